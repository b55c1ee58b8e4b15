//! Extended attributes of what a descriptor (O_PATH too) refers to. The calls take the descriptor's name in /proc/self/fd, which
//! [`super::open::SelfFd::enter`] made the working directory: the f…xattr calls refuse O_PATH descriptors.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::open::number;
use super::{Result, check};

/// getxattr(2) into `out` (empty asks for the size); the value's length.
pub fn get(fd: BorrowedFd<'_>, name: &CStr, out: &mut [u8]) -> Result<usize> {
    let path = number(fd.as_raw_fd());
    // SAFETY: both strings are C strings; the buffer's length is passed with it.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), out.as_mut_ptr().cast(), out.len()) };
    Ok(check(length as i64)? as usize)
}

/// listxattr(2) into `out` (empty asks for the size); the list's length.
pub fn list(fd: BorrowedFd<'_>, out: &mut [u8]) -> Result<usize> {
    let path = number(fd.as_raw_fd());
    // SAFETY: the path is a C string; the buffer's length is passed with it.
    let length = unsafe { libc::listxattr(path.as_ptr(), out.as_mut_ptr().cast(), out.len()) };
    Ok(check(length as i64)? as usize)
}

/// setxattr(2); `flags` is XATTR_CREATE, XATTR_REPLACE or 0.
pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: i32) -> Result<()> {
    let path = number(fd.as_raw_fd());
    // SAFETY: both strings are C strings; the value's length is passed with it.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) }).map(drop)
}

/// removexattr(2).
pub fn remove(fd: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let path = number(fd.as_raw_fd());
    // SAFETY: both strings are C strings.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// truncate(2).
pub fn truncate(fd: BorrowedFd<'_>, size: i64) -> Result<()> {
    let path = number(fd.as_raw_fd());
    // SAFETY: the path is a C string.
    check(unsafe { libc::truncate64(path.as_ptr(), size) }).map(drop)
}
