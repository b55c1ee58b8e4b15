//! ACPI's sleep and reset registers of a hardware-reduced machine (ACPI 6.5, sections 4.8.3.7 and 4.8.3.6).

use husk_vmm_api::exit::ExitReason;

use crate::bus::pio::Ports;
use crate::machine::layout::POWER_PORT;

/// Port of the sleep control register.
pub(crate) const SLEEP_CONTROL: u16 = POWER_PORT;
/// Port of the sleep status register.
pub(crate) const SLEEP_STATUS: u16 = POWER_PORT + 1;
/// Port of the reset register.
pub(crate) const RESET: u16 = POWER_PORT + 2;
/// Number of ports.
pub(crate) const PORTS: u16 = 3;
/// What resets the machine.
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of soft off.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// Sleep control: SLP_EN; SLP_TYP is bits 4:2.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The three registers.
pub(crate) struct Power;

impl Ports for Power {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<ExitReason> {
        let value = *data.first()?;
        match POWER_PORT + offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => Some(ExitReason::PowerOff),
            RESET if value == RESET_VALUE => Some(ExitReason::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_specified_writes_end_the_machine() {
        let mut power = Power;
        assert_eq!(power.write(0, &[SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE]), Some(ExitReason::PowerOff));
        assert_eq!(power.write(0, &[SLEEP_TYPE_S5 << 2]), None);
        assert_eq!(power.write(0, &[SLEEP_ENABLE]), None);
        assert_eq!(power.write(1, &[0x80]), None);
        assert_eq!(power.write(2, &[RESET_VALUE]), Some(ExitReason::Reset));
        assert_eq!(power.write(2, &[0]), None);
        assert_eq!(power.write(0, &[]), None);
    }
}
