//! The socket device (virtio 1.2, 5.10): stream connections between guest and host, without the kernel's vhost and without a
//! host-wide address space.

mod connection;
mod device;
mod muxer;
pub mod wire;
#[cfg(test)]
mod world;

pub use device::Vsock;
