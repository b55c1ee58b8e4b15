//! pvpanic: the guest's kernel tells that it panics (QEMU, docs/specs/pvpanic.rst).

use husk_vmm_api::exit::ExitReason;

use crate::bus::pio::Ports;

/// PVPANIC_PANICKED, the only event supported here.
const PANICKED: u8 = 1;

/// The event port. The kernel has printed its reason when it writes here, so the VM ends at once instead of trusting the guest to
/// reset itself.
pub(crate) struct PvPanic;

impl Ports for PvPanic {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED;
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<ExitReason> {
        (data.first()? & PANICKED != 0).then_some(ExitReason::Panic)
    }
}
