//! Opening: one checked name below a directory, or again what a descriptor already holds. No path of several components is ever resolved.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{Result, new_fd};

/// openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_MAGICLINKS; the last component is never followed.
fn openat2(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> Result<OwnedFd> {
    // SAFETY: all of `open_how` is plain integers, for which zero is a value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC | libc::O_NOFOLLOW) as u32 as u64;
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `name` ends with NUL and `how` is as long as we say; both live through the call.
    new_fd(unsafe {
        libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), name.as_ptr(), &raw const how, size_of::<libc::open_how>())
    })
}

/// A descriptor that only names the entry (O_PATH); a symlink is taken as itself.
pub fn path_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    openat2(dir, name, libc::O_PATH, 0)
}

/// Makes a new regular file and opens it; EEXIST when the name is taken.
pub fn create_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> Result<OwnedFd> {
    openat2(dir, name, flags | libc::O_CREAT | libc::O_EXCL, mode)
}

/// Makes a regular file without a name in `dir` (O_TMPFILE).
pub fn tmpfile_at(dir: BorrowedFd<'_>, flags: i32, mode: u32) -> Result<OwnedFd> {
    openat2(dir, c".", flags | libc::O_TMPFILE, mode)
}

/// The directory `dir` itself, opened for reading its entries.
pub fn directory(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    openat2(dir, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)
}

/// A directory of the daemon's own choice, as O_PATH.
pub fn directory_path(path: &CStr) -> Result<OwnedFd> {
    // SAFETY: the path is a C string that lives through the call.
    new_fd(unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) }.into())
}

/// /proc/self/fd, through which an O_PATH descriptor is opened again, and its extended attributes and mode are reached.
/// The copy is a mount of its own (open_tree(2)), so that `..` cannot lead from it into the rest of /proc.
#[derive(Debug)]
pub struct SelfFd(OwnedFd);

impl SelfFd {
    /// Opens it; to be called while /proc can still be seen. EPERM without CAP_SYS_ADMIN.
    pub fn open() -> Result<Self> {
        // SAFETY: the path is a C string literal; the call takes no other memory.
        let fd = new_fd(unsafe {
            libc::syscall(
                libc::SYS_open_tree,
                libc::AT_FDCWD,
                c"/proc/self/fd".as_ptr(),
                (libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC) as libc::c_long,
            )
        })?;
        Ok(Self(fd))
    }

    /// Makes it the process's working directory, where the calls in [`super::xattr`] look descriptors' numbers up.
    pub fn enter(&self) -> Result<()> {
        nix::unistd::fchdir(&self.0)
    }

    /// Opens again what `fd` refers to.
    pub fn reopen(&self, fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
        let name = number(fd.as_raw_fd());
        // SAFETY: the name is a C string that lives through the call.
        new_fd(unsafe { libc::openat(self.0.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC) }.into())
    }

    /// A number to keep open, or for calls that take a directory and a name.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A descriptor's name in /proc/self/fd.
pub(super) fn number(fd: RawFd) -> CString {
    CString::new(fd.to_string()).unwrap_or_default()
}
