//! File contents and directory entries of open descriptors.

use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::{Result, check};

/// The pieces as iovecs, as they are: the kernel copies between the page cache and the guest's memory, we touch neither.
fn iovecs(pieces: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    pieces
        .iter()
        .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() })
        .collect()
}

/// preadv(2) at `offset` into `pieces`; bytes read.
pub fn read(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], offset: i64) -> Result<usize> {
    let vectors = iovecs(pieces);
    // SAFETY: each iovec is memory that the slices borrow for longer than the call, and no Rust reference to it exists.
    let count = unsafe { libc::preadv64(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset) };
    Ok(check(count as i64)? as usize)
}

/// pwritev2(2) at `offset`, or at the end with RWF_APPEND in `flags`; bytes written.
pub fn write(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], offset: i64, flags: i32) -> Result<usize> {
    let vectors = iovecs(pieces);
    if flags == 0 {
        // SAFETY: as in `read`; the kernel only reads.
        let count = unsafe { libc::pwritev64(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, offset) };
        return Ok(check(count as i64)? as usize);
    }
    // SAFETY: as in `read`; the kernel only reads. On 64-bit machines the low word holds all of the offset.
    let count = unsafe {
        libc::syscall(
            libc::SYS_pwritev2,
            fd.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len(),
            offset,
            0 as libc::c_long,
            flags as libc::c_long,
        )
    };
    Ok(check(count)? as usize)
}

/// getdents64(2) into `buffer`; bytes of entries, 0 at the end.
pub fn entries(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: the buffer's length is passed with it.
    let count = unsafe {
        libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), buffer.as_mut_ptr(), buffer.len() as libc::c_long)
    };
    Ok(check(count)? as usize)
}

/// lseek(2).
pub fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> Result<u64> {
    // SAFETY: takes no memory.
    Ok(check(unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) })? as u64)
}

/// fallocate(2).
pub fn allocate(fd: BorrowedFd<'_>, mode: i32, offset: i64, length: i64) -> Result<()> {
    // SAFETY: takes no memory.
    check(unsafe { libc::fallocate64(fd.as_raw_fd(), mode, offset, length) }).map(drop)
}

/// ftruncate(2).
pub fn truncate(fd: BorrowedFd<'_>, size: i64) -> Result<()> {
    // SAFETY: takes no memory.
    check(unsafe { libc::ftruncate64(fd.as_raw_fd(), size) }).map(drop)
}

/// fsync(2), or fdatasync(2) with `data_only`.
pub fn sync(fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
    // SAFETY: both take no memory.
    check(unsafe { if data_only { libc::fdatasync(fd.as_raw_fd()) } else { libc::fsync(fd.as_raw_fd()) } }).map(drop)
}

/// syncfs(2).
pub fn sync_filesystem(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: takes no memory.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) }).map(drop)
}

/// copy_file_range(2); bytes copied.
pub fn copy(from: BorrowedFd<'_>, from_at: i64, to: BorrowedFd<'_>, to_at: i64, length: usize) -> Result<usize> {
    let (mut from_at, mut to_at) = (from_at, to_at);
    // SAFETY: both offsets are ours and live through the call. (By number: musl has no wrapper.)
    let count = unsafe {
        libc::syscall(
            libc::SYS_copy_file_range,
            from.as_raw_fd(),
            &raw mut from_at,
            to.as_raw_fd(),
            &raw mut to_at,
            length,
            0 as libc::c_long,
        )
    };
    Ok(check(count)? as usize)
}

/// close(2) of a copy, which is what hands over an error that a network file system kept back.
pub fn flush(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: takes no memory; the copy is closed at once.
    let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: `copy` was made in the line above and is ours alone.
    check(unsafe { libc::close(copy as i32) }).map(drop)
}
