//! A virtio device as a PCI function (virtio 1.2, 4.1): modern only, one 64-bit memory BAR, MSI-X only (no INTx pin).

mod config;
mod function;
mod layout;
mod msix;
mod saved;

pub use function::{PciError, VirtioPciFunction};
pub use saved::FunctionState;
