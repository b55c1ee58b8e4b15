//! Raw system calls of the pass-through, one thin function each, errors as [`Errno`]. They exist where no safe wrapper does or where the
//! wrapper would allocate; everything above this module is safe code.
#![allow(unsafe_code)]

pub mod cred;
pub mod handle;
pub mod io;
pub mod node;
pub mod open;
pub mod xattr;

use std::os::fd::{FromRawFd, OwnedFd};

pub use nix::errno::Errno;

/// What every call here gives back.
pub type Result<T> = std::result::Result<T, Errno>;

/// The value of a system call that returns -1 and sets errno when it fails.
fn check(ret: impl Into<i64>) -> Result<i64> {
    match ret.into() {
        -1 => Err(Errno::last()),
        value => Ok(value),
    }
}

/// The new descriptor that a system call returned.
fn new_fd(ret: i64) -> Result<OwnedFd> {
    let fd = check(ret)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
