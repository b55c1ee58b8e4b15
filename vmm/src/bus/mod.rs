//! How an access by the guest finds its device.

pub(crate) mod mmio;
pub(crate) mod pci;
pub(crate) mod pio;
