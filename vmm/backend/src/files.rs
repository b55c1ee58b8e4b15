//! The channel on which the shim hands over disks' files: a SOCK_SEQPACKET socket, one message and one descriptor each
//! (`husk_vmm_api::disk`). Never waited for: a file is sent before it is asked for.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use husk_vmm_api::disk::{LEN, decode};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockType, getsockopt, recvmsg, sockopt};

use crate::sink::set_nonblocking;

/// Most files kept that nobody has asked for; then the oldest is closed.
const MAX_WAITING: usize = 32;

/// Our end of the channel.
#[derive(Debug)]
pub struct FileChannel {
    socket: OwnedFd,
    waiting: VecDeque<(u64, OwnedFd)>,
}

impl FileChannel {
    /// Takes the socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        if getsockopt(&socket, sockopt::SockType)? != SockType::SeqPacket {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the channel for disks is no seqpacket socket"));
        }
        set_nonblocking(&socket)?;
        Ok(Self { socket, waiting: VecDeque::new() })
    }

    /// The file of this number, if it has come.
    pub fn take(&mut self, number: u64) -> Option<OwnedFd> {
        while let Some(message) = self.receive() {
            let Some(file) = message else { continue };
            if self.waiting.len() == MAX_WAITING {
                self.waiting.pop_front();
            }
            self.waiting.push_back(file);
        }
        let at = self.waiting.iter().position(|(known, _)| *known == number)?;
        self.waiting.remove(at).map(|(_, file)| file)
    }

    /// The next message: a file, or something that is none and was dropped. None if there is no more now.
    fn receive(&self) -> Option<Option<(u64, OwnedFd)>> {
        let mut bytes = [0; LEN + 1];
        // Room for more than the one descriptor that a message carries, so that others are received and closed.
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let (len, mut fds) = loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
                Ok(message) => {
                    let mut fds = Vec::new();
                    for control in message.cmsgs().into_iter().flatten() {
                        if let ControlMessageOwned::ScmRights(raw) = control {
                            // SAFETY: the kernel just made these descriptors for us and nothing else knows them.
                            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    break (message.bytes, fds);
                }
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        };
        if len == 0 && fds.is_empty() {
            return None;
        }
        match (decode(&bytes[..len]), fds.len(), fds.pop()) {
            (Some(number), 1, Some(file)) => Some(Some((number, file))),
            _ => Some(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use husk_vmm_api::disk::encode;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, sendmsg, socketpair};

    use super::*;

    fn pair() -> (FileChannel, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        (FileChannel::new(ours).unwrap(), theirs)
    }

    fn send(socket: &OwnedFd, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn files_are_found_by_number_once() {
        let (mut channel, shim) = pair();
        assert!(channel.take(1).is_none());
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = null.as_fd().as_raw_fd();
        send(&shim, &encode(1), &[fd]);
        send(&shim, &encode(2), &[fd]);
        assert!(channel.take(2).is_some() && channel.take(2).is_none() && channel.take(1).is_some());
        drop(shim);
        assert!(channel.take(3).is_none());
    }

    #[test]
    fn nonsense_is_dropped_and_what_waits_is_bounded() {
        let (mut channel, shim) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = null.as_fd().as_raw_fd();
        send(&shim, &encode(1), &[]);
        send(&shim, &encode(1), &[fd, fd]);
        send(&shim, &[1; 7], &[fd]);
        send(&shim, &[1; 100], &[fd]);
        assert!(channel.take(1).is_none());
        for number in 0..=MAX_WAITING as u64 {
            send(&shim, &encode(number), &[fd]);
            assert!(channel.take(u64::MAX).is_none());
        }
        assert!(channel.take(0).is_none() && channel.take(1).is_some());
        assert_eq!(channel.waiting.len(), MAX_WAITING - 1);
        let (read, _write) = std::io::pipe().unwrap();
        assert!(FileChannel::new(read.into()).is_err());
    }
}
