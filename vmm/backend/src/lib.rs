//! What the host gives to a virtio device: a tap, a disk, a console sink, sockets, random bytes, another process by vhost-user. Nothing here
//! sees a guest address: guest memory comes as slices of this process's memory, vhost-user's tables as plain data.

pub mod dial;
pub mod disk;
pub mod entropy;
pub mod event;
pub mod files;
pub mod hole;
pub mod sink;
pub mod stream;
pub mod tap;
pub mod vhost_user;

mod vectored;
