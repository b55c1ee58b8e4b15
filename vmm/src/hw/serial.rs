//! ttyS0: a 16550 that only sends, to find out why a guest does not start before its virtio console works.

use std::fs::File;
use std::io;

use husk_vmm_api::exit::ExitReason;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::pio::Ports;

/// The port's interrupt.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
pub(crate) struct Serial(vm_superio::Serial<Line, vm_superio::serial::NoEvents, File>);

impl Serial {
    /// A port that writes to `output` (non-blocking; what doesn't fit is lost) and raises `interrupt`.
    pub(crate) fn new(interrupt: EventFd, output: File) -> Self {
        Self(vm_superio::Serial::new(Line(interrupt), output))
    }
}

impl Ports for Serial {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.0.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<ExitReason> {
        if let [byte] = data {
            // A full pipe loses output, as a console without a reader does.
            let _ = self.0.write(offset as u8, *byte);
        }
        None
    }
}
