//! Calls on entries of a directory and on the inode behind a descriptor.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::open::{SelfFd, number};
use super::{Result, check};

/// statx(2)'s answer.
pub type Statx = libc::statx;

/// Attributes of what `fd` refers to, with the mount's id and the birth time where the kernel has them.
pub fn stat(fd: BorrowedFd<'_>) -> Result<Statx> {
    let mut out = MaybeUninit::<Statx>::uninit();
    // SAFETY: `out` has room for one statx; the path is empty and ends with NUL.
    check(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
            libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID,
            out.as_mut_ptr(),
        )
    })?;
    // SAFETY: the call succeeded and filled it.
    Ok(unsafe { out.assume_init() })
}

/// mkdirat(2).
pub fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<()> {
    // SAFETY: the name is a C string that lives through the call.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// mknodat(2).
pub fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: libc::dev_t) -> Result<()> {
    // SAFETY: the name is a C string that lives through the call.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }).map(drop)
}

/// symlinkat(2).
pub fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // SAFETY: both strings are C strings that live through the call.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// unlinkat(2); `flags` is 0 or AT_REMOVEDIR.
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> Result<()> {
    // SAFETY: the name is a C string that lives through the call.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// renameat2(2).
pub fn rename(from: BorrowedFd<'_>, name: &CStr, to: BorrowedFd<'_>, new: &CStr, flags: u32) -> Result<()> {
    // SAFETY: both names are C strings that live through the call. (By number: older C libraries have no wrapper.)
    check(unsafe {
        libc::syscall(libc::SYS_renameat2, from.as_raw_fd(), name.as_ptr(), to.as_raw_fd(), new.as_ptr(), flags)
    })
    .map(drop)
}

/// A further name for what `fd` refers to, whatever its type.
pub fn link(own: &SelfFd, fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let old = number(fd.as_raw_fd());
    // SAFETY: both names are C strings that live through the call.
    check(unsafe { libc::linkat(own.raw(), old.as_ptr(), dir.as_raw_fd(), name.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
        .map(drop)
}

/// The target of the symlink that `fd` (O_PATH) is, appended to `out`.
pub fn readlink(fd: BorrowedFd<'_>, out: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer's length is passed with it; the path is an empty C string.
    let length =
        check(
            unsafe { libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64
        )?;
    out.extend_from_slice(&buffer[..length as usize]);
    Ok(())
}

/// chmod(2) of what `fd` (O_PATH too) refers to.
pub fn chmod(own: &SelfFd, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    let name = number(fd.as_raw_fd());
    // SAFETY: the name is a C string that lives through the call.
    check(unsafe { libc::fchmodat(own.raw(), name.as_ptr(), mode, 0) }).map(drop)
}

/// chown(2); `u32::MAX` leaves that id.
pub fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the path is an empty C string.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(drop)
}

/// utimensat(2): access and modification time.
pub fn set_times(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Result<()> {
    // SAFETY: the path is an empty C string and `times` are the two that the call reads.
    check(unsafe { libc::utimensat(fd.as_raw_fd(), c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) }).map(drop)
}

/// Figures of the file system that `fd` lies on.
pub fn statfs(fd: BorrowedFd<'_>) -> Result<libc::statfs64> {
    let mut out = MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: `out` has room for one statfs64.
    check(unsafe { libc::fstatfs64(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the call succeeded and filled it.
    Ok(unsafe { out.assume_init() })
}
