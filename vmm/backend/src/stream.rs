//! The host end of a vsock connection inside the VMM: one end of a stream socketpair, non-blocking.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use vm_memory::VolatileSlice;

use crate::vectored;

/// Most rounds of throwing away what a peer wrote before its end is closed; a socket buffer is far smaller.
const DISCARD_ROUNDS: usize = 64;

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
}

/// What a non-blocking transfer did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now: an event tells when.
    Blocked,
    /// The peer reads no more, or wrote its last byte.
    Closed,
}

impl Stream {
    /// A new pair: ours, and the one to hand over (blocking, close-on-exec).
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { socket: ours }, theirs.into()))
    }

    /// Takes a descriptor that came from outside; it must be a stream socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if getsockopt(&fd, sockopt::SockType)? != SockType::Stream {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no stream socket"));
        }
        let socket = UnixStream::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Reads into the slices, which must not be empty.
    pub fn read(&self, slices: &[VolatileSlice<'_>]) -> Transfer {
        transfer(vectored::readv(self.socket.as_fd(), slices))
    }

    /// Writes from the slices, which must not be empty.
    pub fn write(&self, slices: &[VolatileSlice<'_>]) -> Transfer {
        transfer(vectored::sendv(self.socket.as_fd(), slices))
    }

    /// Writes bytes of our own.
    pub fn write_bytes(&self, bytes: &[u8]) -> Transfer {
        use std::io::IoSlice;
        use std::os::fd::BorrowedFd;

        use nix::sys::socket::{MsgFlags, sendmsg};
        let fd: BorrowedFd<'_> = self.socket.as_fd();
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return transfer(result.map_err(io::Error::from)),
            }
        }
    }

    /// The peer will read end-of-file after what was written.
    pub fn finish_writing(&self) {
        // Fails only if the peer is gone.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// The peer can write no more.
    pub fn stop_reading(&self) {
        let _ = self.socket.shutdown(Shutdown::Read);
        self.discard();
    }

    /// Closes so that the peer reads all that was written and then end-of-file, and not a reset on account of bytes that nobody read.
    pub fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        self.discard();
    }

    fn discard(&self) {
        use std::io::Read;
        let mut waste = vec![0; 16 << 10];
        for _ in 0..DISCARD_ROUNDS {
            match (&self.socket).read(&mut waste) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn transfer(result: io::Result<usize>) -> Transfer {
    match result {
        Ok(0) => Transfer::Closed,
        Ok(len) => Transfer::Bytes(len),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Transfer::Blocked,
        // ECONNRESET, EPIPE: the peer is gone. Nothing else can be done about any other error either.
        Err(_) => Transfer::Closed,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_peer_reads_everything_and_then_end_of_file_though_it_wrote_unread_bytes() {
        let (ours, theirs) = Stream::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs.write_all(b"never read").unwrap();
        assert_eq!(ours.write_bytes(b"last words"), Transfer::Bytes(10));
        ours.close();
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
    }

    #[test]
    fn tells_blocked_from_closed() {
        let (ours, theirs) = Stream::pair().unwrap();
        let mut memory = [0u8; 16];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        assert_eq!(ours.read(&[slice]), Transfer::Blocked);
        let theirs = UnixStream::from(theirs);
        (&theirs).write_all(b"abc").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ours.read(&[slice]), Transfer::Bytes(3));
        assert_eq!(ours.read(&[slice]), Transfer::Closed);
        assert_eq!(ours.write(&[slice]), Transfer::Bytes(16));
        drop(theirs);
        assert_eq!(ours.write(&[slice]), Transfer::Closed);
    }

    #[test]
    fn refuses_what_is_no_stream_socket() {
        let (read, _write) = std::io::pipe().unwrap();
        assert!(Stream::from_fd(read.into()).is_err());
    }
}
