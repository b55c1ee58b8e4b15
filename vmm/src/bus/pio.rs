//! I/O ports. A port where nothing is reads as all ones and swallows writes, without a word in the log: the guest may try them all.

use std::ops::Range;
use std::sync::Mutex;

use husk_vmm_api::exit::ExitReason;

use crate::lock::lock;

/// A device behind ports. `offset` counts from its first port and lies within its range; `data` has 1, 2 or 4 bytes, which may
/// reach beyond the range.
pub(crate) trait Ports: Send {
    /// The guest reads; `data` holds all ones.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// The guest writes; a reason ends the VM.
    fn write(&mut self, offset: u16, data: &[u8]) -> Option<ExitReason>;
}

/// All ports of the machine.
#[derive(Default)]
pub(crate) struct PioBus {
    devices: Vec<Device>,
}

struct Device {
    ports: Range<u16>,
    device: Mutex<Box<dyn Ports>>,
}

impl PioBus {
    /// Puts a device on `len` ports from `first` on, which no other device has.
    pub(crate) fn insert(&mut self, first: u16, len: u16, device: impl Ports + 'static) {
        self.devices.push(Device { ports: first..first + len, device: Mutex::new(Box::new(device)) });
    }

    /// The guest reads a port.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(Device { ports, device }) = self.find(port, data.len()) {
            lock(device).read(port - ports.start, data);
        }
    }

    /// The guest writes a port; a reason ends the VM.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        let Device { ports, device } = self.find(port, data.len())?;
        lock(device).write(port - ports.start, data)
    }

    /// A string instruction may move more than 4 bytes in one exit; no device here wants those.
    fn find(&self, port: u16, len: usize) -> Option<&Device> {
        matches!(len, 1 | 2 | 4).then(|| self.devices.iter().find(|device| device.ports.contains(&port)))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl Ports for Echo {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data[0] = self.0 + offset as u8;
        }
        fn write(&mut self, _offset: u16, data: &[u8]) -> Option<ExitReason> {
            self.0 = data[0];
            None
        }
    }

    #[test]
    fn every_port_and_length_is_answered() {
        let mut bus = PioBus::default();
        bus.insert(0x100, 4, Echo(0));
        assert_eq!(bus.write(0x101, &[5]), None);
        let mut data = [0];
        bus.read(0x103, &mut data);
        assert_eq!(data, [8]);
        for port in 0..=u16::MAX {
            for len in [0, 1, 2, 3, 4, 8, 4096] {
                let mut data = vec![0; len];
                bus.read(port, &mut data);
                assert!((0x100..0x104).contains(&port) || data.iter().all(|byte| *byte == 0xFF));
                bus.write(port, &data);
            }
        }
    }
}
