//! A real tap for tests, and a packet socket on it as the rest of the network.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// A tap that is up, and a raw socket bound to it. None where taps can't be made.
pub(crate) fn tap(name: &str) -> Option<(OwnedFd, OwnedFd)> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request lives until the call returns.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &request) } < 0 {
        return None;
    }
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointer is passed.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into()) };
    if socket < 0 {
        return None;
    }
    // SAFETY: just made.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request lives until the calls return.
    let index = unsafe {
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request), 0);
        assert_eq!(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &mut request), 0);
        request.ifr_ifru.ifru_ifindex
    };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: pointer and length are those of a local variable.
    assert_eq!(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) }, 0);
    Some((tap.into(), socket))
}
