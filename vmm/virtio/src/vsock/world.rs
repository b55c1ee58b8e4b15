//! The muxer between a model of the guest's driver and a model of the shim, for tests.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use husk_backend::dial::DialChannel;
use vm_memory::VolatileSlice;

use super::connection::HOST_CID;
use super::muxer::{EVENTS, MAX_CONNECTIONS, Muxer};
use super::wire::{Header, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::testing::seqpacket;

pub(super) const GUEST: u64 = 3;

/// Muxer, shim's end of the dial channel, and the guest's side of each connection.
pub(super) struct World {
    pub(super) muxer: Muxer,
    pub(super) shim: OwnedFd,
}

/// The guest's side of a connection, as Linux keeps it.
#[derive(Default)]
pub(super) struct Guest {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) sent: u32,
    pub(super) peer_alloc: u32,
    pub(super) peer_forwarded: u32,
    pub(super) buffer: VecDeque<u8>,
    pub(super) alloc: u32,
    pub(super) forwarded: u32,
    pub(super) established: bool,
    pub(super) shutdown: u32,
    pub(super) reset: bool,
}

impl World {
    pub(super) fn new() -> Self {
        let (ours, shim) = seqpacket();
        Self { muxer: Muxer::new(DialChannel::new(ours).unwrap(), GUEST).unwrap(), shim }
    }

    /// The shim's end of a connection that the guest dialled.
    pub(super) fn dialled(&self) -> (u32, UnixStream) {
        let mut bytes = [0; 16];
        let mut control = nix::cmsg_space!([i32; 4]);
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let message =
            nix::sys::socket::recvmsg::<()>(self.shim.as_raw_fd(), &mut pieces, Some(&mut control), flags).unwrap();
        let fd = match message.cmsgs().unwrap().next() {
            Some(nix::sys::socket::ControlMessageOwned::ScmRights(fds)) => fds[0],
            other => panic!("{other:?}"),
        };
        let stream = crate::testing::stream(fd);
        stream.set_nonblocking(true).unwrap();
        (u32::from_le_bytes(bytes[4..8].try_into().unwrap()), stream)
    }

    /// The shim dials the guest.
    pub(super) fn dial(&mut self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut bytes = 2u32.to_le_bytes().to_vec();
        bytes.extend(port.to_le_bytes());
        let fds = [theirs.as_raw_fd()];
        nix::sys::socket::sendmsg::<()>(
            self.shim.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[nix::sys::socket::ControlMessage::ScmRights(&fds)],
            nix::sys::socket::MsgFlags::empty(),
            None,
        )
        .unwrap();
        // Events of all connections come before, 64 at a time.
        (0..MAX_CONNECTIONS / EVENTS + 2).for_each(|_| self.muxer.poll());
        ours.set_nonblocking(true).unwrap();
        ours
    }

    /// The next packet for the guest.
    pub(super) fn packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut payload = vec![0; room];
        let header = self.muxer.next_packet(&[VolatileSlice::from(payload.as_mut_slice())])?;
        payload.truncate(header.len as usize);
        assert_eq!((header.src_cid, header.dst_cid, header.socket_type), (2, GUEST, TYPE_STREAM));
        Some((header, payload))
    }

    pub(super) fn send(&mut self, header: &Header, data: &[u8]) {
        let mut data = data.to_vec();
        let slices = if data.is_empty() { vec![] } else { vec![VolatileSlice::from(data.as_mut_slice())] };
        self.muxer.receive(header, &slices);
    }

    /// Connects guest port to host port.
    pub(super) fn connect(&mut self, guest_port: u32, host_port: u32) -> (Guest, UnixStream) {
        let mut guest = Guest::new(guest_port, host_port);
        self.send(&guest.header(op::REQUEST, 0, 0), &[]);
        let (port, stream) = self.dialled();
        assert_eq!(port, host_port);
        let (header, _) = self.packet(1).unwrap();
        guest.take(&header, &[]);
        assert!(guest.established);
        (guest, stream)
    }
}

impl Guest {
    pub(super) fn new(guest_port: u32, host_port: u32) -> Self {
        Self { guest_port, host_port, alloc: 64 << 10, ..Self::default() }
    }

    pub(super) fn header(&self, op: u16, len: u32, flags: u32) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        }
    }

    /// Bytes that the muxer's credit allows.
    pub(super) fn credit(&self) -> u32 {
        self.peer_alloc - self.sent.wrapping_sub(self.peer_forwarded)
    }

    /// Takes a packet; the answer, if there is one.
    pub(super) fn take(&mut self, header: &Header, data: &[u8]) -> Option<Header> {
        assert_eq!((header.src_port, header.dst_port), (self.host_port, self.guest_port));
        (self.peer_alloc, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match header.op {
            op::RESPONSE => self.established = true,
            op::REQUEST => {
                self.established = true;
                return Some(self.header(op::RESPONSE, 0, 0));
            }
            op::RW => {
                assert!(!data.is_empty());
                assert!(self.shutdown & SHUTDOWN_SEND == 0, "data after the end");
                self.buffer.extend(data);
                assert!(self.buffer.len() <= self.alloc as usize, "more than the guest's credit");
            }
            op::SHUTDOWN => {
                self.shutdown |= header.flags;
            }
            op::RST => self.reset = true,
            op::CREDIT_REQUEST => return Some(self.header(op::CREDIT_UPDATE, 0, 0)),
            op::CREDIT_UPDATE => {}
            other => panic!("operation {other}"),
        }
        None
    }
}
