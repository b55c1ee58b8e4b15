//! Virtio as the guest sees it: the devices, and the PCI transport that they sit on. Nothing here opens a file.

pub mod device;
pub mod interrupt;
