//! How a driver finds and configures a device: one state machine (`state`), shown to the guest as a PCI function (`pci`).

pub mod pci;
pub mod saved;
pub mod state;
