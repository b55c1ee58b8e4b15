//! PCI bus 0: a host bridge at device 0, then one single-function device after the other. Configuration space is reached through
//! ECAM and through mechanism 1; BAR 0 of each function lies at a fixed place, as if firmware had assigned it.

use std::sync::{Arc, Mutex};

use husk_virtio::interrupt::PciFunction;
use husk_virtio::transport::pci::FunctionState;
use husk_virtio::transport::saved::SavedError;
use husk_vmm_api::exit::ExitReason;

use super::pio::Ports;
use crate::lock::lock;
use crate::machine::layout::{BAR_SLOT, PCI_WINDOW};

/// Devices of a bus less the host bridge.
const MAX_FUNCTIONS: usize = 31;
/// Length of a function's configuration space in bytes.
const CONFIG_LEN: usize = 4096;

/// Why a function isn't on the bus.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PciError {
    /// No device number left.
    #[error("Could not put one more device on the PCI bus: it is full")]
    Full,
    /// The BAR does not fit.
    #[error("A BAR of {0:#x} bytes is more than a function may have")]
    BarTooLarge(u64),
}

/// Why the functions are not what they were when saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// Another machine.
    #[error("The snapshot has {has} PCI functions, the machine {wants}")]
    Count {
        /// Functions in the snapshot.
        has: usize,
        /// Functions of the machine.
        wants: usize,
    },
    /// A function.
    #[error(transparent)]
    Function(#[from] SavedError),
}

/// The bus.
#[derive(Default)]
pub(crate) struct PciBus {
    functions: Vec<Function>,
}

struct Function {
    bar_len: u64,
    function: Mutex<Box<dyn PciFunction>>,
}

impl PciBus {
    /// Where the next function's BAR 0 will be.
    pub(crate) fn next_bar(&self) -> u64 {
        PCI_WINDOW + self.functions.len() as u64 * BAR_SLOT
    }

    /// Adds a function whose BAR 0 is at [`Self::next_bar`].
    pub(crate) fn push(&mut self, function: Box<dyn PciFunction>) -> Result<(), PciError> {
        let bar_len = function.bar_len();
        if self.functions.len() == MAX_FUNCTIONS {
            return Err(PciError::Full);
        }
        if bar_len > BAR_SLOT {
            return Err(PciError::BarTooLarge(bar_len));
        }
        self.functions.push(Function { bar_len, function: Mutex::new(function) });
        Ok(())
    }

    /// Reads configuration space; `data` holds all ones. `devfn` is device and function as in a PCI address.
    pub(crate) fn config_read(&self, devfn: u8, register: u16, data: &mut [u8]) {
        if !valid(register, data.len()) {
            return;
        }
        match (devfn >> 3, devfn & 7) {
            (0, 0) => host_bridge(register, data),
            (device, 0) => {
                if let Some(function) = self.functions.get(usize::from(device) - 1) {
                    lock(&function.function).config_read(register, data);
                }
            }
            _ => {}
        }
    }

    /// Writes configuration space.
    pub(crate) fn config_write(&self, devfn: u8, register: u16, data: &[u8]) {
        let function = match (devfn >> 3, devfn & 7) {
            (0, _) | (_, 1..) => None,
            (device, 0) => self.functions.get(usize::from(device) - 1),
        };
        if let Some(function) = function.filter(|_| valid(register, data.len())) {
            lock(&function.function).config_write(register, data);
        }
    }

    /// Reads from the BAR in the given slot of the window; `data` holds all ones.
    pub(crate) fn bar_read(&self, slot: usize, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.bar(slot, offset, data.len()) {
            lock(&function.function).bar_read(offset, data);
        }
    }

    /// Writes to the BAR in the given slot of the window.
    pub(crate) fn bar_write(&self, slot: usize, offset: u64, data: &[u8]) {
        if let Some(function) = self.bar(slot, offset, data.len()) {
            lock(&function.function).bar_write(offset, data);
        }
    }

    /// The states of all functions, in their order, while the vCPUs stand still.
    pub(crate) fn save(&self) -> Result<Vec<FunctionState>, SavedError> {
        self.functions.iter().map(|function| lock(&function.function).save()).collect()
    }

    /// Brings functions that no guest has touched into these states.
    pub(crate) fn restore(&self, states: &[FunctionState]) -> Result<(), RestoreError> {
        let (has, wants) = (states.len(), self.functions.len());
        if has != wants {
            return Err(RestoreError::Count { has, wants });
        }
        let restored = |(function, state): (&Function, _)| lock(&function.function).restore(state);
        Ok(self.functions.iter().zip(states).try_for_each(restored)?)
    }

    fn bar(&self, slot: usize, offset: u64, len: usize) -> Option<&Function> {
        self.functions.get(slot).filter(|function| offset + len as u64 <= function.bar_len)
    }
}

/// 1, 2 or 4 bytes within one 32-bit register, as PCI has it.
fn valid(register: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(register) % 4 + len <= 4 && usize::from(register) + len <= CONFIG_LEN
}

/// Vendor and device of QEMU's PCIe host bridge (1b36:0008), class 06.00; everything else is zero, and nothing can be written.
fn host_bridge(register: u16, data: &mut [u8]) {
    const HEADER: [u8; 12] = [0x36, 0x1B, 0x08, 0x00, 0, 0, 0, 0, 0, 0x00, 0x00, 0x06];
    for (byte, at) in data.iter_mut().zip(usize::from(register)..) {
        *byte = HEADER.get(at).copied().unwrap_or(0);
    }
}

/// Configuration mechanism 1: an address port and a data port (PCI 3.0, section 3.2.2.3.2).
pub(crate) struct ConfigPorts {
    address: u32,
    pci: Arc<PciBus>,
}

impl ConfigPorts {
    /// The ports over the bus.
    pub(crate) fn new(pci: Arc<PciBus>) -> Self {
        Self { address: 0, pci }
    }

    /// The device and register that the data port means, if it is enabled and on bus 0.
    fn target(&self, offset: u16) -> Option<(u8, u16)> {
        let [register, devfn, bus, enable] = self.address.to_le_bytes();
        let byte = offset.checked_sub(4)?;
        (enable & 0x80 != 0 && bus == 0).then_some((devfn, u16::from(register & 0xFC) + byte))
    }
}

impl Ports for ConfigPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some((devfn, register)) = self.target(offset) {
            self.pci.config_read(devfn, register, data);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<ExitReason> {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address = u32::from_le_bytes(address);
        } else if let Some((devfn, register)) = self.target(offset) {
            self.pci.config_write(devfn, register, data);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::mmio::MmioBus;
    use crate::machine::layout::ECAM;

    /// Remembers its registers; panics if anything invalid reaches it.
    struct Memory(Vec<u8>);

    impl PciFunction for Memory {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            let at = usize::from(offset);
            data.copy_from_slice(&self.0[at..at + data.len()]);
        }
        fn config_write(&mut self, offset: u16, data: &[u8]) {
            let at = usize::from(offset);
            self.0[at..at + data.len()].copy_from_slice(data);
        }
        fn bar_len(&self) -> u64 {
            0x1000
        }
        fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
            assert!(offset + data.len() as u64 <= 0x1000);
            data.fill(7);
        }
        fn bar_write(&mut self, offset: u64, data: &[u8]) {
            assert!(offset + data.len() as u64 <= 0x1000);
        }
        fn save(&self) -> Result<FunctionState, SavedError> {
            Err(SavedError::Busy("memory"))
        }
        fn restore(&mut self, _state: &FunctionState) -> Result<(), SavedError> {
            Err(SavedError::Busy("memory"))
        }
    }

    fn bus() -> Arc<PciBus> {
        let mut bus = PciBus::default();
        bus.push(Box::new(Memory(vec![0; CONFIG_LEN]))).unwrap();
        Arc::new(bus)
    }

    #[test]
    fn both_mechanisms_reach_the_same_register() {
        let pci = bus();
        let mut ports = ConfigPorts::new(pci.clone());
        let mmio = MmioBus::new(pci);
        ports.write(0, &(0x8000_0000u32 | 1 << 11 | 0x40).to_le_bytes());
        ports.write(6, &[0xAB, 0xCD]);
        let mut data = [0; 4];
        mmio.read(ECAM + (1 << 15) + 0x40, &mut data);
        assert_eq!(data, [0, 0, 0xAB, 0xCD]);
        ports.read(4, &mut data);
        assert_eq!(data, [0, 0, 0xAB, 0xCD]);
    }

    #[test]
    fn the_host_bridge_is_read_only_and_absent_devices_are_ones() {
        let mmio = MmioBus::new(bus());
        mmio.write(ECAM, &[0; 4]);
        let mut data = [0; 4];
        mmio.read(ECAM, &mut data);
        assert_eq!(data, [0x36, 0x1B, 0x08, 0x00]);
        mmio.read(ECAM + (2 << 15), &mut data);
        assert_eq!(data, [0xFF; 4]);
        mmio.read(ECAM + (1 << 15) + (1 << 12), &mut data);
        assert_eq!(data, [0xFF; 4]);
    }

    #[test]
    fn nothing_invalid_reaches_a_function() {
        let pci = bus();
        let mut ports = ConfigPorts::new(pci.clone());
        let mmio = MmioBus::new(pci);
        ports.write(0, &0x8000_08FCu32.to_le_bytes());
        for len in [1, 2, 3, 4, 8] {
            let mut data = vec![0; len];
            for offset in 0..8 {
                ports.read(offset, &mut data);
            }
            for offset in (0..0x2000).chain(0xF_FFF0..0x10_0000) {
                for base in [ECAM, ECAM + (1 << 15), PCI_WINDOW] {
                    mmio.read(base + offset, &mut data);
                    mmio.write(base + offset, &data);
                }
            }
        }
    }

    #[test]
    fn the_bus_has_31_places() {
        let mut bus = PciBus::default();
        for _ in 0..MAX_FUNCTIONS {
            bus.push(Box::new(Memory(Vec::new()))).unwrap();
        }
        assert!(matches!(bus.push(Box::new(Memory(Vec::new()))), Err(PciError::Full)));
    }
}
