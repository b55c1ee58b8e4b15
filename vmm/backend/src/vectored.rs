//! Vectored transfers between a descriptor and memory that the guest may change meanwhile.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most pieces of one transfer (IOV_MAX of Linux, see readv(2)).
pub(crate) const MAX_PIECES: usize = 1024;

/// Reads once into the slices: the number of bytes.
pub(crate) fn readv(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let pieces: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    // SAFETY: each piece is valid, mapped memory for as long as its guard and slice live; the kernel copies into it, no reference exists.
    retry(|| unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) })
}

/// Writes once from the slices: the number of bytes.
pub(crate) fn writev(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    with_pieces(slices, |pieces| {
        // SAFETY: each piece is valid, mapped memory while `with_pieces` holds its guard; the kernel only reads it.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) })
    })
}

/// Reads once from `offset` of a file on into the slices: the number of bytes.
pub(crate) fn preadv(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>], offset: i64) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let pieces: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    // SAFETY: as in `readv`: valid, mapped memory for as long as guards and slices live, and no reference into it.
    retry(|| unsafe { libc::preadv(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset) })
}

/// Writes once from the slices to a file from `offset` on: the number of bytes.
pub(crate) fn pwritev(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>], offset: i64) -> io::Result<usize> {
    with_pieces(slices, |pieces| {
        // SAFETY: each piece is valid, mapped memory while `with_pieces` holds its guard; the kernel only reads it.
        retry(|| unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, offset) })
    })
}

/// Sends once from the slices on a socket: the number of bytes. A closed peer is an error, not a signal.
pub(crate) fn sendv(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    with_pieces(slices, |pieces| {
        // SAFETY: an all-zero msghdr is a valid one: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: `message` points at pieces that are valid, mapped memory while `with_pieces` holds their guards.
        retry(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags) })
    })
}

fn with_pieces<T>(slices: &[VolatileSlice<'_>], transfer: impl FnOnce(&mut [libc::iovec]) -> T) -> T {
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let mut pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    transfer(&mut pieces)
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(len) => return Ok(len),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
