//! Virtio as the guest sees it (virtio 1.2, the memory device and the balloon 1.3): the devices, and the PCI transport that they sit on. Nothing here opens a file.
//!
//! How a machine gets a device, here the network:
//!
//! ```ignore
//! let mut events = EventManager::<husk_virtio::Subscriber>::new()?;
//! let attached = husk_virtio::net::Net::attach(husk_backend::tap::Tap::new(tap_fd)?, mac, mtu)?;
//! let function = VirtioPciFunction::new(attached.device, machine, bar_address, memory.clone())?;
//! events.add_subscriber(attached.subscriber);
//! bus.add(function, bar_address);
//! loop { events.run()?; }
//! ```
//!
//! `attach` joins a device with its back end; each device has one: `rng::Rng::attach(Entropy)`, `console::Console::attach(Sink)`,
//! `vsock::Vsock::attach(DialChannel, guest_cid)`, `fs::Fs::attach(UnixStream, tag, request_queues)`, `net::Net::attach(Tap, mac, mtu)`;
//! the balloon and the memory device (`mem::Mem::attach(region, tell)`) need none but guest memory itself.
//! The function is driven by vCPU threads, the subscriber by the one thread that runs the event loop; they share the device under a
//! lock. A driver's DRIVER_OK only hands the queues over: the device starts on the loop's thread. Disks (`blk::Blk::attach(Disk, id, queues)`)
//! have threads of their own in place of the loop, since they wait for the host's storage.
#![cfg_attr(not(test), forbid(unsafe_code))]

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod device;
mod discard;
pub mod fs;
pub mod interrupt;
pub mod mem;
pub mod net;
pub mod queue;
pub mod rng;
pub mod served;
pub mod transport;
pub mod vsock;

#[cfg(test)]
mod testing;

pub use served::{Attached, Subscriber};
pub use transport::pci::VirtioPciFunction;
