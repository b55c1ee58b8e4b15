//! Taps: made by /dev/net/tun in the namespace of the calling thread (Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::NetworkError;

nix::ioctl_write_int!(tunsetiff, b'T', 202);

/// Flags of every tap: Ethernet frames, no packet information header, a virtio-net header before each frame.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes the tap `name` in the calling thread's network namespace, down and without IPv6 of its own.
/// It lives as long as its descriptor.
pub(super) fn create(name: &str) -> Result<OwnedFd, NetworkError> {
    let failed = |step, cause| NetworkError::Tap { name: name.to_owned(), step, cause };
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|cause| failed("open /dev/net/tun", cause))?;
    let request = request(name).ok_or_else(|| failed("name", ErrorKind::InvalidInput.into()))?;
    // SAFETY: TUNSETIFF takes the address of an ifreq, which `request` is, alive until the call is over.
    unsafe { tunsetiff(device.as_raw_fd(), std::ptr::from_ref(&request) as libc::c_ulong) }
        .map_err(|errno| failed("TUNSETIFF", errno.into()))?;
    // Else the namespace's kernel speaks on the guest's wire (router solicitations, multicast reports).
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(failed("disable IPv6", cause)),
        _ => {}
    }
    Ok(device.into())
}

/// The ifreq that asks for the tap; nothing if the name does not fit one.
fn request(name: &str) -> Option<libc::ifreq> {
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ && name.bytes().all(|b| b.is_ascii_alphanumeric());
    if !fits {
        return None;
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = i8::from_ne_bytes([from]);
    }
    let ifru_flags = libc::c_short::try_from(FLAGS).ok()?;
    Some(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_do_not_fit() {
        assert!(request("husk2").is_some());
        for name in ["", "a-name-of-sixteen", "sixteencharacter", "a/b", ".."] {
            assert!(request(name).is_none(), "{name}");
        }
    }
}
