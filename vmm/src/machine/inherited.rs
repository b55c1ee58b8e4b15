//! The descriptors that the shim handed over, by the numbers in the configuration: each is taken once, checked, and from then on
//! owned.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use husk_vmm_api::config::{self, Fd, VmConfig};
use kvm_ioctls::Kvm;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

/// Why a descriptor of the configuration can't be used.
#[derive(Debug, thiserror::Error)]
#[error("Descriptor {fd} for the {what} can't be used: {reason}")]
pub(crate) struct InheritedError {
    what: &'static str,
    fd: Fd,
    reason: String,
}

/// All of them.
pub(crate) struct Inherited {
    pub(crate) start: Start,
    pub(crate) save: Option<Snapshot>,
    pub(crate) kvm: Kvm,
    pub(crate) dial: OwnedFd,
    pub(crate) console: OwnedFd,
    /// Taps, in the order of the configuration.
    pub(crate) taps: Vec<Option<OwnedFd>>,
    pub(crate) fs: Option<UnixStream>,
}

/// What the machine begins from.
pub(crate) enum Start {
    Boot { kernel: File, initramfs: File },
    Restore(Snapshot, Option<Code>),
}

/// The guest kernel's code, see [`config::Code`].
pub(crate) struct Code {
    pub(crate) file: File,
    pub(crate) address: u64,
}

/// A snapshot's files.
pub(crate) struct Snapshot {
    pub(crate) state: File,
    pub(crate) memory: File,
}

/// Takes descriptors, each number once.
#[derive(Default)]
pub(crate) struct Taker(BTreeSet<Fd>);

impl Taker {
    /// Takes descriptor `fd`, which serves as `what`, and closes it on exec.
    pub(crate) fn take(&mut self, what: &'static str, fd: Fd) -> Result<OwnedFd, InheritedError> {
        let failed = |reason: String| InheritedError { what, fd, reason };
        if fd <= 2 {
            return Err(failed("it is a standard stream".into()));
        }
        if !self.0.insert(fd) {
            return Err(failed("it is named twice".into()));
        }
        // SAFETY: only a number so far: nothing but this function takes descriptors from numbers, and each only once.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Err(error) = fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            // It isn't open, so there is nothing to close.
            let _ = owned.into_raw_fd();
            return Err(failed(error.desc().into()));
        }
        Ok(owned)
    }

    /// Takes every descriptor of which the machine is made.
    pub(crate) fn take_all(&mut self, config: &VmConfig) -> Result<Inherited, InheritedError> {
        let kvm = self.take("KVM device", config.kvm)?;
        let console = self.take("console", config.console)?;
        non_blocking(&console).map_err(|e| InheritedError {
            what: "console",
            fd: config.console,
            reason: e.to_string(),
        })?;
        let start = match &config.start {
            config::Start::Boot { kernel, initramfs, .. } => Start::Boot {
                kernel: self.take("kernel", *kernel)?.into(),
                initramfs: self.take("initramfs", *initramfs)?.into(),
            },
            config::Start::Restore { state, memory, code } => {
                let snapshot = self.take_snapshot(&config::Snapshot { state: *state, memory: *memory })?;
                let take = |code: &config::Code| {
                    let file = self.take("kernel's code", code.file)?.into();
                    Ok(Code { file, address: code.address })
                };
                Start::Restore(snapshot, code.as_ref().map(take).transpose()?)
            }
        };
        let taps = config.nets.iter().map(|net| net.tap.map(|tap| self.take("tap", tap)).transpose());
        let taps = taps.collect::<Result<_, _>>()?;
        let socket = config.fs.as_ref().and_then(|fs| fs.socket);
        Ok(Inherited {
            start,
            save: config.save.as_ref().map(|snapshot| self.take_snapshot(snapshot)).transpose()?,
            // SAFETY: the descriptor is open and owned, and its ownership goes to the new object.
            kvm: unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) },
            dial: self.take("dial socket", config.dial)?,
            console,
            taps,
            fs: socket.map(|fd| self.take("file system socket", fd)).transpose()?.map(UnixStream::from),
        })
    }

    fn take_snapshot(&mut self, files: &config::Snapshot) -> Result<Snapshot, InheritedError> {
        Ok(Snapshot {
            state: self.take("snapshot's state", files.state)?.into(),
            memory: self.take("snapshot's memory", files.memory)?.into(),
        })
    }
}

/// A slow reader of the console must not stop the VM.
fn non_blocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_open() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let number = read.into_raw_fd();
        let mut taker = Taker::default();
        let taken = taker.take("pipe", number).unwrap();
        assert!(taker.take("pipe", number).is_err());
        drop(taken);
        assert!(Taker::default().take("stdin", 0).is_err());
        assert!(Taker::default().take("nothing", 100_000).is_err());
        assert!(Taker::default().take("nothing", -1).is_err());
    }
}
