//! Hot-plug of PCI devices by ACPI (ACPI 6.5, sections 5.6.9, 6.3): which slots got a device or are to lose theirs. An interrupt of the
//! generic event device tells the guest to look; the methods that read these registers are in `machine::acpi`.
//!
//! | offset | access | what |
//! |---|---|---|
//! | 0 | read | slots with a new device, a bit each; reading clears them |
//! | 4 | read | slots whose device the host wants back; reading clears them |
//! | 8 | write | _EJ0: the guest has let go of these devices |

use std::sync::{Arc, Mutex};

use husk_virtio::interrupt::PciFunction;
use husk_vmm_api::exit::ExitReason;
use tokio::sync::watch;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::pci::{FIRST_SLOT, PciBus, PciError, SLOTS};
use crate::bus::pio::Ports;
use crate::lock::lock;

/// Number of ports.
pub(crate) const PORTS: u16 = 12;
/// Offset of the slots with a new device.
pub(crate) const INSERTED: u8 = 0;
/// Offset of the slots to be freed.
pub(crate) const REMOVING: u8 = 4;
/// Offset of the eject register.
pub(crate) const EJECT: u8 = 8;

/// Why a device was not plugged in or asked back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HotPlugError {
    /// All slots have one.
    #[error("All {SLOTS} slots for devices that come and go are taken")]
    Full,
    /// There is nothing to take.
    #[error("There is no device to be removed at device {0} of the PCI bus")]
    Absent(u8),
    /// The bus.
    #[error(transparent)]
    Bus(#[from] PciError),
}

/// What is in a slot.
#[derive(Debug, Default)]
enum Slot {
    #[default]
    Free,
    /// A device; told when the guest ejects it.
    Present(watch::Sender<bool>),
    /// The guest ejected it; whoever plugged it in has not asked for it yet.
    Ejected,
    /// The host took it away while the guest still held on to it. Another device here would be mistaken for it, so the slot stays
    /// out of use until the guest has let go.
    Taken,
}

/// The slots.
pub(crate) struct HotPlug {
    pci: Arc<PciBus>,
    interrupt: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: [Slot; SLOTS as usize],
    inserted: u32,
    removing: u32,
}

impl HotPlug {
    /// Slots of the bus, all empty. `interrupt` is the generic event device's.
    pub(crate) fn new(pci: Arc<PciBus>, interrupt: EventFd) -> Self {
        Self { pci, interrupt, state: Mutex::default() }
    }

    /// Plugs a function into a free slot and tells the guest. The device number.
    pub(crate) fn insert(&self, function: Box<dyn PciFunction>) -> Result<u8, HotPlugError> {
        let mut state = lock(&self.state);
        let free = (0..SLOTS).find(|slot| matches!(state.slots[usize::from(*slot)], Slot::Free));
        let slot = free.ok_or(HotPlugError::Full)?;
        self.pci.insert(FIRST_SLOT + slot, function)?;
        state.slots[usize::from(slot)] = Slot::Present(watch::Sender::new(false));
        state.inserted |= 1 << slot;
        self.tell();
        Ok(FIRST_SLOT + slot)
    }

    /// Asks the guest for a device. The receiver becomes true when it was ejected.
    pub(crate) fn ask_back(&self, device: u8) -> Result<watch::Receiver<bool>, HotPlugError> {
        let mut state = lock(&self.state);
        let slot = device.checked_sub(FIRST_SLOT).ok_or(HotPlugError::Absent(device))?;
        match state.slots.get(usize::from(slot)) {
            Some(Slot::Present(ejected)) => {
                let ejected = ejected.subscribe();
                state.removing |= 1 << slot;
                self.tell();
                Ok(ejected)
            }
            Some(Slot::Ejected) => Ok(watch::channel(true).1),
            _ => Err(HotPlugError::Absent(device)),
        }
    }

    /// Frees a slot that was asked back: a device that is still there is taken away, and the guest finds nothing in its place. True if
    /// the guest had ejected it.
    pub(crate) fn finish(&self, device: u8) -> bool {
        let mut state = lock(&self.state);
        let Some(slot) = device.checked_sub(FIRST_SLOT) else { return false };
        let Some(place) = state.slots.get_mut(usize::from(slot)) else { return false };
        match place {
            Slot::Present(_) => {
                *place = Slot::Taken;
                state.inserted &= !(1 << slot);
                state.removing &= !(1 << slot);
                // Without the lock: its end may take a moment.
                drop(state);
                drop(self.pci.remove(device));
                false
            }
            Slot::Ejected => {
                *place = Slot::Free;
                true
            }
            Slot::Free | Slot::Taken => false,
        }
    }

    /// The guest lets go of devices.
    fn eject(&self, slots: u32) {
        for slot in (0..SLOTS).filter(|slot| slots & 1 << slot != 0) {
            let mut state = lock(&self.state);
            let place = &mut state.slots[usize::from(slot)];
            match std::mem::take(place) {
                Slot::Present(ejected) => {
                    *place = Slot::Ejected;
                    state.removing &= !(1 << slot);
                    drop(state);
                    drop(self.pci.remove(FIRST_SLOT + slot));
                    ejected.send_replace(true);
                }
                Slot::Taken | Slot::Free => {}
                Slot::Ejected => *place = Slot::Ejected,
            }
        }
    }

    fn tell(&self) {
        // Fails only if the interrupt is pending already.
        let _ = self.interrupt.write(1);
    }
}

/// The registers as the guest reaches them.
pub(crate) struct HotPlugPorts(pub(crate) Arc<HotPlug>);

impl Ports for HotPlugPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let mut state = lock(&self.0.state);
        let slots = match u8::try_from(offset) {
            Ok(INSERTED) => std::mem::take(&mut state.inserted),
            Ok(REMOVING) => std::mem::take(&mut state.removing),
            _ => 0,
        };
        *data = slots.to_le_bytes();
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<ExitReason> {
        if let (EJECT, Ok(slots)) = (u8::try_from(offset).ok()?, <[u8; 4]>::try_from(data)) {
            self.0.eject(u32::from_le_bytes(slots));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use husk_virtio::transport::pci::FunctionState;
    use husk_virtio::transport::saved::SavedError;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    struct Nothing;

    impl PciFunction for Nothing {
        fn config_read(&mut self, _offset: u16, data: &mut [u8]) {
            data.fill(0);
        }
        fn config_write(&mut self, _offset: u16, _data: &[u8]) {}
        fn bar_len(&self) -> u64 {
            0x1000
        }
        fn bar(&self) -> Option<u64> {
            None
        }
        fn bar_read(&mut self, _offset: u64, _data: &mut [u8]) {}
        fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}
        fn save(&self) -> Result<FunctionState, SavedError> {
            Err(SavedError::Busy("nothing"))
        }
        fn restore(&mut self, _state: &FunctionState) -> Result<(), SavedError> {
            Ok(())
        }
    }

    fn setup() -> (Arc<HotPlug>, HotPlugPorts, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let told = husk_backend::event::duplicate(&interrupt).unwrap();
        let hotplug = Arc::new(HotPlug::new(Arc::default(), interrupt));
        (hotplug.clone(), HotPlugPorts(hotplug), told)
    }

    fn read(ports: &mut HotPlugPorts, offset: u8) -> u32 {
        let mut data = [0xFF; 4];
        ports.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn there(hotplug: &HotPlug, device: u8) -> bool {
        let mut data = [0xFF; 2];
        hotplug.pci.config_read(device << 3, 0, &mut data);
        data != [0xFF; 2]
    }

    #[test]
    fn a_device_comes_is_asked_back_and_ejected() {
        let (hotplug, mut ports, told) = setup();
        let device = hotplug.insert(Box::new(Nothing)).unwrap();
        assert_eq!((device, told.read().unwrap(), there(&hotplug, device)), (FIRST_SLOT, 1, true));
        assert_eq!((read(&mut ports, INSERTED), read(&mut ports, INSERTED), read(&mut ports, REMOVING)), (1, 0, 0));
        let ejected = hotplug.ask_back(device).unwrap();
        assert_eq!((told.read().unwrap(), read(&mut ports, REMOVING), *ejected.borrow()), (1, 1, false));
        ports.write(EJECT.into(), &1u32.to_le_bytes());
        assert!(*ejected.borrow() && !there(&hotplug, device));
        assert!(hotplug.finish(device) && !hotplug.finish(device));
        assert!(matches!(hotplug.ask_back(device), Err(HotPlugError::Absent(_))));
        assert_eq!(hotplug.insert(Box::new(Nothing)).unwrap(), device);
    }

    #[test]
    fn a_guest_that_holds_on_loses_the_device_and_the_slot() {
        let (hotplug, mut ports, _told) = setup();
        let device = hotplug.insert(Box::new(Nothing)).unwrap();
        let ejected = hotplug.ask_back(device).unwrap();
        assert!(!hotplug.finish(device));
        assert!(!*ejected.borrow() && !there(&hotplug, device));
        assert_eq!((read(&mut ports, INSERTED), read(&mut ports, REMOVING)), (0, 0));
        assert_eq!(hotplug.insert(Box::new(Nothing)).unwrap(), device + 1);
        ports.write(EJECT.into(), &1u32.to_le_bytes());
        assert!(there(&hotplug, device + 1));
        assert_eq!(hotplug.insert(Box::new(Nothing)).unwrap(), device);
    }

    #[test]
    fn a_guest_may_eject_what_it_was_not_asked_for() {
        let (hotplug, mut ports, _told) = setup();
        ports.write(EJECT.into(), &u32::MAX.to_le_bytes());
        let device = hotplug.insert(Box::new(Nothing)).unwrap();
        for _ in 0..2 {
            ports.write(EJECT.into(), &u32::MAX.to_le_bytes());
        }
        assert!(!there(&hotplug, device));
        // The slot is not given away before its owner knows.
        assert_eq!(hotplug.insert(Box::new(Nothing)).unwrap(), device + 1);
        assert!(*hotplug.ask_back(device).unwrap().borrow() && hotplug.finish(device));
        for device in [0, 1, FIRST_SLOT - 1, FIRST_SLOT + SLOTS, 255] {
            assert!(hotplug.ask_back(device).is_err() && !hotplug.finish(device));
        }
    }

    #[test]
    fn slots_run_out_in_words() {
        let (hotplug, mut ports, _told) = setup();
        for _ in 0..SLOTS {
            hotplug.insert(Box::new(Nothing)).unwrap();
        }
        assert!(hotplug.insert(Box::new(Nothing)).unwrap_err().to_string().contains("All 16 slots"));
        assert_eq!(read(&mut ports, INSERTED), 0xFFFF);
        for (offset, len) in [(0, 1), (1, 4), (EJECT.into(), 4), (EJECT.into(), 2), (11, 4)] {
            let mut data = vec![0; len];
            ports.read(offset, &mut data);
            assert_eq!((data.iter().all(|byte| *byte == 0), ports.write(offset, &data)), (true, None));
        }
    }
}
