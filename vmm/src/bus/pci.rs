//! PCI bus 0: a host bridge at device 0, single-function devices from device 1 on, and slots for devices that come and go while the
//! machine runs. Configuration space is reached through ECAM and through mechanism 1; BARs lie where firmware (this VMM) or the guest
//! placed them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use husk_virtio::interrupt::PciFunction;
use husk_virtio::transport::pci::FunctionState;
use husk_virtio::transport::saved::SavedError;
use husk_vmm_api::exit::ExitReason;

use super::pio::Ports;
use crate::lock::lock;
use crate::machine::layout::{BAR_SLOT, PCI_WINDOW};

/// Device numbers of a bus.
const DEVICES: usize = 32;
/// First device number of those that come and go.
pub(crate) const FIRST_SLOT: u8 = 16;
/// How many there are: the rest of the bus.
pub(crate) const SLOTS: u8 = DEVICES as u8 - FIRST_SLOT;
/// Length of a function's configuration space in bytes.
const CONFIG_LEN: usize = 4096;

/// Why a function isn't on the bus.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PciError {
    /// No device number left.
    #[error("Could not put one more device on the PCI bus: it is full")]
    Full,
    /// There is a function already.
    #[error("There is a function at device {0} of the PCI bus")]
    Occupied(u8),
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

impl RestoreError {
    /// Whether the state is another machine's.
    pub(crate) fn is_of_other_machine(&self) -> bool {
        matches!(self, Self::Count { .. } | Self::Function(SavedError::Other { .. } | SavedError::Vectors(_)))
    }
}

/// The bus. Device 0 of it, the host bridge, has no place here.
pub(crate) struct PciBus {
    places: [Place; DEVICES],
}

/// What may be at a device number.
#[derive(Default)]
struct Place {
    function: Mutex<Option<Box<dyn PciFunction>>>,
    /// Where its BAR is; empty while it answers nowhere. Apart, so that an access to one device never waits for another.
    bar: RwLock<Range<u64>>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self { places: std::array::from_fn(|_| Place::default()) }
    }
}

impl PciBus {
    /// A free device number for a device that is there from the start, and where its BAR 0 is to be.
    pub(crate) fn next(&self) -> Result<(u8, u64), PciError> {
        let free = (1..FIRST_SLOT).find(|device| lock(&self.places[usize::from(*device)].function).is_none());
        free.map(|device| (device, PCI_WINDOW + u64::from(device - 1) * BAR_SLOT)).ok_or(PciError::Full)
    }

    /// Puts a function at a device number.
    pub(crate) fn insert(&self, device: u8, function: Box<dyn PciFunction>) -> Result<(), PciError> {
        if function.bar_len() > BAR_SLOT {
            return Err(PciError::BarTooLarge(function.bar_len()));
        }
        let place = self.places.get(usize::from(device)).filter(|_| device != 0).ok_or(PciError::Full)?;
        let mut at = lock(&place.function);
        if at.is_some() {
            return Err(PciError::Occupied(device));
        }
        place.follow(Some(&*function));
        *at = Some(function);
        Ok(())
    }

    /// Takes the function at a device number away: from now on nothing answers there.
    pub(crate) fn remove(&self, device: u8) -> Option<Box<dyn PciFunction>> {
        let place = self.places.get(usize::from(device))?;
        let mut at = lock(&place.function);
        place.follow(None);
        at.take()
    }

    /// The states of all functions that are there from the start, in their order, while the vCPUs stand still. What was plugged in
    /// belongs to a pod, which no snapshot holds.
    pub(crate) fn save(&self) -> Result<Vec<FunctionState>, SavedError> {
        if self.places[usize::from(FIRST_SLOT)..].iter().any(|place| lock(&place.function).is_some()) {
            return Err(SavedError::Busy("plugged in"));
        }
        self.places.iter().filter_map(|place| lock(&place.function).as_ref().map(|function| function.save())).collect()
    }

    /// Brings functions that no guest has touched into these states.
    pub(crate) fn restore(&self, states: &[FunctionState]) -> Result<(), RestoreError> {
        let (has, wants) = (states.len(), self.places.iter().filter(|place| lock(&place.function).is_some()).count());
        if has != wants {
            return Err(RestoreError::Count { has, wants });
        }
        let there = || self.places.iter().filter(|place| lock(&place.function).is_some());
        for (place, state) in there().zip(states) {
            if let Some(function) = &*lock(&place.function) {
                function.announce(state);
            }
        }
        for (place, state) in there().zip(states) {
            if let Some(function) = &mut *lock(&place.function) {
                function.restore(state)?;
                place.follow(Some(&**function));
            }
        }
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
                if let Some(function) = &mut *lock(&self.places[usize::from(device)].function) {
                    function.config_read(register, data);
                }
            }
            _ => {}
        }
    }

    /// Writes configuration space.
    pub(crate) fn config_write(&self, devfn: u8, register: u16, data: &[u8]) {
        if devfn & 7 != 0 || !valid(register, data.len()) {
            return;
        }
        let place = &self.places[usize::from(devfn >> 3)];
        if let Some(function) = &mut *lock(&place.function) {
            function.config_write(register, data);
            place.follow(Some(&**function));
        }
    }

    /// Reads from the BAR at an address; `data` holds all ones.
    pub(crate) fn bar_read(&self, address: u64, data: &mut [u8]) {
        self.in_bar(address, data.len(), |function, offset| function.bar_read(offset, data));
    }

    /// Writes to the BAR at an address.
    pub(crate) fn bar_write(&self, address: u64, data: &[u8]) {
        self.in_bar(address, data.len(), |function, offset| function.bar_write(offset, data));
    }

    fn in_bar(&self, address: u64, len: usize, access: impl FnOnce(&mut dyn PciFunction, u64)) {
        let Some((place, bar)) =
            self.places.iter().map(|place| (place, place.bar())).find(|(_, bar)| bar.contains(&address))
        else {
            return;
        };
        if let Some(function) = &mut *lock(&place.function)
            // It may have been moved or taken away meanwhile.
            && place.bar() == bar
            && bar.end - address >= len as u64
        {
            access(&mut **function, address - bar.start);
        }
    }
}

impl Place {
    fn bar(&self) -> Range<u64> {
        self.bar.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes where the function's BAR is now.
    fn follow(&self, function: Option<&dyn PciFunction>) {
        let place = |function: &dyn PciFunction| {
            let start = function.bar()?;
            Some(start..start.checked_add(function.bar_len())?)
        };
        let bar = function.and_then(place).unwrap_or_default();
        if self.bar() != bar {
            *self.bar.write().unwrap_or_else(PoisonError::into_inner) = bar;
        }
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
        fn bar(&self) -> Option<u64> {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.0[16..20]);
            Some(u32::from_le_bytes(bytes).into()).filter(|address| *address != 0)
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

    fn memory() -> Box<Memory> {
        let mut config = vec![0; CONFIG_LEN];
        config[16..20].copy_from_slice(&(PCI_WINDOW as u32).to_le_bytes());
        Box::new(Memory(config))
    }

    fn bus() -> Arc<PciBus> {
        let bus = PciBus::default();
        assert_eq!(bus.next().unwrap(), (1, PCI_WINDOW));
        bus.insert(1, memory()).unwrap();
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
    fn a_bar_is_where_the_guest_placed_it() {
        let pci = bus();
        let mmio = MmioBus::new(pci.clone());
        let at = |address| {
            let mut data = [0];
            mmio.read(address, &mut data);
            data[0]
        };
        assert_eq!((at(PCI_WINDOW), at(PCI_WINDOW + 0xFFF), at(PCI_WINDOW + 0x1000)), (7, 7, 0xFF));
        mmio.write(ECAM + (1 << 15) + 16, &(PCI_WINDOW as u32 + 0x8000).to_le_bytes());
        assert_eq!((at(PCI_WINDOW), at(PCI_WINDOW + 0x8000)), (0xFF, 7));
        // Over configuration space, the end of memory: nothing answers.
        for address in [ECAM as u32, u32::MAX, 0] {
            mmio.write(ECAM + (1 << 15) + 16, &address.to_le_bytes());
            assert_eq!(at(PCI_WINDOW + 0x8000), 0xFF);
        }
        mmio.write(ECAM + (1 << 15) + 16, &(PCI_WINDOW as u32).to_le_bytes());
        assert_eq!(at(PCI_WINDOW), 7);
        assert!(pci.remove(1).is_some());
        assert!(pci.remove(1).is_none());
        assert_eq!((at(PCI_WINDOW), at(ECAM + (1 << 15))), (0xFF, 0xFF));
        pci.insert(1, memory()).unwrap();
        assert_eq!(at(PCI_WINDOW), 7);
    }

    #[test]
    fn the_bus_has_its_places() {
        let bus = PciBus::default();
        for _ in 1..FIRST_SLOT {
            bus.insert(bus.next().unwrap().0, memory()).unwrap();
        }
        assert!(matches!(bus.next(), Err(PciError::Full)));
        for device in FIRST_SLOT..FIRST_SLOT + SLOTS {
            bus.insert(device, memory()).unwrap();
            assert!(matches!(bus.insert(device, memory()), Err(PciError::Occupied(_))));
        }
        for device in [0, 32, 255] {
            assert!(bus.insert(device, memory()).is_err());
        }
    }
}
