//! The channel by which VMM and shim hand each other vsock connections: a SOCK_SEQPACKET socket, one message and one descriptor each
//! (`husk_vmm_api::dial`). Never waited for.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use husk_vmm_api::dial::{LEN, Message};
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockType, getsockopt, recvmsg, sendmsg, sockopt,
};

use crate::sink::set_nonblocking;
use crate::stream::Stream;

/// Our end of the channel.
#[derive(Debug)]
pub struct DialChannel {
    socket: OwnedFd,
}

/// What came over the channel.
#[derive(Debug)]
pub enum Received {
    /// The shim wants this socket connected with this port of the guest.
    Dial {
        /// The guest's port.
        port: u32,
        /// The VMM's end of the connection.
        stream: Stream,
    },
    /// Something that is no request; it was dropped, with its descriptors.
    Malformed,
    /// Nothing more now.
    Empty,
    /// The shim closed the channel.
    Closed,
}

impl DialChannel {
    /// Takes the socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        if getsockopt(&socket, sockopt::SockType)? != SockType::SeqPacket {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the dial channel is no seqpacket socket"));
        }
        set_nonblocking(&socket)?;
        Ok(Self { socket })
    }

    /// Tells the shim that the guest dialled this port, with the shim's end of the connection. An error if the shim can't take it now.
    pub fn guest_dialled(&self, port: u32, end: OwnedFd) -> io::Result<()> {
        let bytes = Message::GuestDialled { port }.encode();
        let fds = [end.as_raw_fd()];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&fds)],
            flags,
            None,
        )?;
        Ok(())
    }

    /// The next message.
    pub fn receive(&self) -> Received {
        let mut bytes = [0; LEN + 1];
        // Room for more than the one descriptor that a message carries, so that others are received and closed.
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let (len, mut fds) = match recvmsg::<()>(self.socket.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
            Ok(message) => {
                let mut fds = Vec::new();
                for control in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel just made these descriptors for us and nothing else knows them.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                (message.bytes, fds)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return Received::Empty,
            Err(_) => return Received::Closed,
        };
        if len == 0 {
            return Received::Closed;
        }
        let (Some(Message::DialGuest { port }), 1, Some(fd)) = (Message::decode(&bytes[..len]), fds.len(), fds.pop())
        else {
            return Received::Malformed;
        };
        match Stream::from_fd(fd) {
            Ok(stream) => Received::Dial { port, stream },
            Err(_) => Received::Malformed,
        }
    }
}

impl AsRawFd for DialChannel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "dial_tests.rs"]
mod tests;
