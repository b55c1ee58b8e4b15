//! Descriptors that are not sockets, in the runtime's event loop: pipes, terminals, and files of cgroups.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

mod ioctls {
    nix::ioctl_read_bad!(bytes_to_read, nix::libc::FIONREAD, nix::libc::c_int);
}

/// Registers something with the event loop that owns a descriptor and keeps it for its whole life.
pub(crate) fn watch<T: AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: the owners here (OwnedFd, EventsWatch) neither close nor exchange their descriptor before they are dropped.
    Ok(unsafe { AsyncFd::register_with_interest(owner, interest) }?)
}

/// A pipe's end or a terminal's master, not blocking.
pub(crate) struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Makes it not blocking; its other end is another open file and stays as it is.
    pub(crate) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let interest = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => Interest::READABLE,
            OFlag::O_WRONLY => Interest::WRITABLE.add(Interest::ERROR),
            _ => Interest::READABLE.add(Interest::WRITABLE),
        };
        watch(descriptor, interest).map(Self)
    }

    /// Until there may be something to read, or the end.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there, or `WouldBlock`. 0 at the end, which a terminal tells by EIO when the last process has closed it.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_io(Interest::READABLE, |descriptor| match nix::unistd::read(descriptor, buffer) {
            Err(Errno::EIO) => Ok(0),
            result => Ok(result?),
        })
    }

    /// Bytes that wait to be read (FIONREAD, ioctl_fionread(2)).
    pub(crate) fn waiting(&self) -> io::Result<u64> {
        let mut bytes: nix::libc::c_int = 0;
        // SAFETY: the kernel writes one int and keeps no pointer.
        unsafe { ioctls::bytes_to_read(self.as_raw_fd(), &mut bytes) }?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    /// Writes everything, waiting where there is no room.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |descriptor: &OwnedFd| Ok(nix::unistd::write(descriptor, bytes)?);
            match self.0.async_io(Interest::WRITABLE, write).await {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Until nobody has the pipe's other end open (poll(2), POLLERR).
    pub(crate) async fn readers_gone(&self) {
        // An error here means that the runtime ends.
        let _ = self.0.ready(Interest::ERROR).await.map(|mut guard| guard.retain_ready());
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
