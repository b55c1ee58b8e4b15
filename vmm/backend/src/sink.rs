//! Where a console's output goes: a pipe that is never waited for. What does not fit is dropped and counted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::VolatileSlice;

use crate::vectored;

/// The write end of a pipe, or anything else that takes bytes.
#[derive(Debug)]
pub struct Sink {
    fd: OwnedFd,
    dropped: u64,
}

impl Sink {
    /// Takes the descriptor and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self { fd, dropped: 0 })
    }

    /// Writes what fits now.
    pub fn write(&mut self, slices: &[VolatileSlice<'_>]) {
        let wanted: usize = slices.iter().map(VolatileSlice::len).sum();
        // A reader that is slow or gone costs output, never the guest's progress.
        let written = vectored::writev(self.fd.as_fd(), slices).unwrap_or(0);
        self.dropped += (wanted - written.min(wanted)) as u64;
    }

    /// Bytes dropped until now.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// Sets O_NONBLOCK.
pub(crate) fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn drops_and_counts_what_does_not_fit() {
        let (mut read, write) = std::io::pipe().unwrap();
        let mut sink = Sink::new(write.into()).unwrap();
        let mut data = vec![7u8; 100 << 10];
        let slice = VolatileSlice::from(data.as_mut_slice());
        sink.write(&[slice]);
        assert_eq!(sink.dropped(), 36 << 10);
        let mut got = vec![0; 64 << 10];
        read.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 7));
        drop(read);
        sink.write(&[slice]);
        assert_eq!(sink.dropped(), 136 << 10);
    }
}
