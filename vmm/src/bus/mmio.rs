//! Memory-mapped I/O: all of it is PCI's, either configuration space or a BAR. Elsewhere reads are all ones and writes are lost.

use std::sync::Arc;

use super::pci::PciBus;
use crate::machine::layout::{ECAM, ECAM_LEN, PCI_WINDOW, PCI_WINDOW_LEN};

/// Guest-physical addresses that are not memory.
pub(crate) struct MmioBus {
    pci: Arc<PciBus>,
}

/// What is at an address.
enum Target {
    Config { devfn: u8, register: u16 },
    Bar,
    Nothing,
}

impl MmioBus {
    /// The bus over the PCI bus.
    pub(crate) fn new(pci: Arc<PciBus>) -> Self {
        Self { pci }
    }

    /// The PCI bus.
    pub(crate) fn pci(&self) -> &PciBus {
        &self.pci
    }

    /// The guest reads.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        match target(address) {
            Target::Config { devfn, register } => self.pci.config_read(devfn, register, data),
            Target::Bar => self.pci.bar_read(address, data),
            Target::Nothing => {}
        }
    }

    /// The guest writes.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        match target(address) {
            Target::Config { devfn, register } => self.pci.config_write(devfn, register, data),
            Target::Bar => self.pci.bar_write(address, data),
            Target::Nothing => {}
        }
    }
}

fn target(address: u64) -> Target {
    if within(address, PCI_WINDOW, PCI_WINDOW_LEN).is_some() {
        Target::Bar
    } else if let Some(offset) = within(address, ECAM, ECAM_LEN) {
        Target::Config { devfn: (offset >> 12) as u8, register: (offset & 0xFFF) as u16 }
    } else {
        Target::Nothing
    }
}

fn within(address: u64, start: u64, len: u64) -> Option<u64> {
    address.checked_sub(start).filter(|offset| *offset < len)
}
