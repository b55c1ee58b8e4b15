//! A tap interface (kernel document networking/tuntap): frames, each behind a virtio-net header of 12 bytes, with offloads.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use vm_memory::VolatileSlice;

use crate::sink::set_nonblocking;
use crate::stream::Transfer;
use crate::vectored;

/// Length of the header before each frame: struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;

/// linux/if_tun.h
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;

const TUNSETOFFLOAD: libc::c_ulong = nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>());
const TUNSETVNETHDRSZ: libc::c_ulong = nix::request_code_write!(b'T', 216, size_of::<libc::c_int>());

/// What the reader of the tap can take: frames without checksum, and larger than the MTU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is still to be made.
    pub checksum: bool,
    /// TCP over IPv4, unsegmented. Needs `checksum`.
    pub tso4: bool,
    /// TCP over IPv6, unsegmented. Needs `checksum`.
    pub tso6: bool,
}

/// An attached tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Takes the descriptor, sets the header's length and switches offloads off.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives until the call returns.
        nix::errno::Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &len) })?;
        let tap = Self { fd };
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Says what the reader can take.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        if offloads.checksum {
            flags |= TUN_F_CSUM;
            flags |= if offloads.tso4 { TUN_F_TSO4 } else { 0 };
            flags |= if offloads.tso6 { TUN_F_TSO6 } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        nix::errno::Errno::result(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, flags) })?;
        Ok(())
    }

    /// Reads one frame with its header.
    pub fn read(&self, buffer: &mut [u8]) -> Transfer {
        loop {
            match nix::unistd::read(&self.fd, buffer) {
                Ok(0) => return Transfer::Closed,
                Ok(len) => return Transfer::Bytes(len),
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Transfer::Blocked,
                Err(_) => return Transfer::Closed,
            }
        }
    }

    /// Writes one frame with its header; an error if the kernel refused it (it is then dropped).
    pub fn write(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        vectored::writev(self.fd.as_fd(), slices)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
