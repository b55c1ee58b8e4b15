//! OPEN, READ, WRITE, FLUSH, RELEASE, FSYNC, FALLOCATE, LSEEK, COPY_FILE_RANGE: regular files.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::put;
use crate::buffers::Buffers;
use crate::cache::{Policy, Stamp};
use crate::handles::OpenFile;
use crate::inode::Node;
use crate::server::{MOST_DATA, Request, Server};
use crate::sys::node::Statx;
use crate::sys::{self, Errno, io, node};
use crate::tree::lock;
use crate::wire::{
    CopyFileRangeIn, FSYNC_FDATASYNC, FallocateIn, FlushIn, FsyncIn, InHeader, LseekIn, LseekOut, OPEN_KILL_SUIDGID,
    OpenIn, OpenOut, OutHeader, ReadIn, ReleaseIn, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteIn, WriteOut, fopen,
};

/// The guest's open(2) flags that the host's descriptor gets too. O_APPEND is not among them: fcntl(2) sets and clears it on an open
/// file, so that each WRITE tells it anew, and the write-back of mapped pages must not go to the end.
const KEPT_FLAGS: i32 = libc::O_SYNC | libc::O_DSYNC | libc::O_DIRECT | libc::O_NOATIME;
/// Most bytes that one COPY_FILE_RANGE copies, so that it does not hold up its queue; the guest asks again for the rest.
const MOST_COPIED: u64 = 64 << 20;

/// The access mode and the flags that the host's descriptor is opened with.
pub(super) fn host_flags(flags: u32) -> sys::Result<i32> {
    let flags = flags as i32;
    match flags & libc::O_ACCMODE {
        mode @ (libc::O_RDONLY | libc::O_WRONLY | libc::O_RDWR) => Ok(mode | flags & KEPT_FLAGS),
        _ => Err(Errno::EINVAL),
    }
}

/// An offset or length of the guest's as the host's type.
fn signed(value: u64) -> sys::Result<i64> {
    i64::try_from(value).map_err(|_| Errno::EINVAL)
}

/// What the guest's flags of one write mean for it (pwritev2(2)): to the end as the host knows it, which others may have moved, and
/// synchronous, which RWF_DSYNC and RWF_SYNC in the guest ask of single writes.
fn per_write(flags: u32) -> i32 {
    let flags = flags as i32;
    let sync = match flags & libc::O_SYNC {
        libc::O_SYNC => libc::RWF_SYNC,
        libc::O_DSYNC => libc::RWF_DSYNC,
        _ => 0,
    };
    sync | if flags & libc::O_APPEND != 0 { libc::RWF_APPEND } else { 0 }
}

impl OpenFile {
    /// `fd` was opened with the guest's `flags`.
    pub(super) fn new(node: Arc<Node>, fd: Arc<std::os::fd::OwnedFd>, flags: u32) -> Self {
        Self { node, fd, direct: flags as i32 & libc::O_DIRECT != 0 }
    }
}

impl Server {
    pub(crate) fn open(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let OpenIn { flags, open_flags } = request.take()?;
        put(out, &self.open_node(&node, flags, open_flags & OPEN_KILL_SUIDGID != 0)?);
        Ok(())
    }

    /// Opens a regular file, and nothing else: FIFOs, sockets and devices are opened within the guest and never reach the host's.
    pub(super) fn open_node(&self, node: &Arc<Node>, flags: u32, kill: bool) -> sys::Result<OpenOut> {
        match node.kind {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::EISDIR),
            libc::S_IFLNK => return Err(Errno::ELOOP),
            _ => return Err(Errno::ENXIO),
        }
        let truncate = flags as i32 & libc::O_TRUNC;
        let fd = Arc::new(self.tree.open(node, host_flags(flags)? | truncate)?);
        if kill && truncate != 0 {
            self.kill_suid(fd.as_fd())?;
        }
        let stat = node::stat(fd.as_fd())?;
        self.opened(OpenFile::new(node.clone(), fd, flags), &stat)
    }

    /// Gives an open file its handle and says whether the guest may keep what it has cached of it.
    pub(super) fn opened(&self, file: OpenFile, stat: &Statx) -> sys::Result<OpenOut> {
        let node = file.node.clone();
        let stamp = Stamp::of(stat);
        let unchanged = lock(&node.opened).replace(stamp) == Some(stamp);
        let mut open_flags = 0;
        if node.policy == Policy::Rootfs || unchanged {
            open_flags |= fopen::KEEP_CACHE;
        }
        if !node.mount.flush {
            open_flags |= fopen::NOFLUSH;
        }
        let file = Arc::new(file);
        node.add_open(&file);
        Ok(OpenOut { fh: self.handles.add_file(file)?, open_flags, backing_id: 0 })
    }

    /// Reads straight into the reply's memory; the number of bytes that are there.
    pub(crate) fn read(&self, request: &mut Request<'_>, output: &Buffers<'_>) -> sys::Result<usize> {
        let ReadIn { fh, offset, size, .. } = request.take()?;
        let file = self.handles.file(fh)?;
        let size = (size as usize).min(request.room).min(MOST_DATA);
        let pieces = output.range(size_of::<OutHeader>(), size);
        if pieces.is_empty() {
            return Ok(0);
        }
        io::read(file.fd.as_fd(), &pieces, signed(offset)?)
    }

    /// Writes straight from the request's memory, of which `given` bytes follow the header.
    pub(crate) fn write(
        &self,
        request: &mut Request<'_>,
        input: &Buffers<'_>,
        given: usize,
        out: &mut Vec<u8>,
    ) -> sys::Result<()> {
        let WriteIn { fh, offset, size, write_flags, flags, .. } = request.take()?;
        let file = self.handles.file(fh)?;
        let size = size as usize;
        if size > MOST_DATA || size > given {
            return Err(Errno::EINVAL);
        }
        let pieces = input.range(size_of::<InHeader>() + size_of::<WriteIn>(), size);
        if write_flags & WRITE_KILL_SUIDGID != 0 {
            self.kill_suid(file.fd.as_fd())?;
        }
        let (offset, mapped) = (signed(offset)?, write_flags & WRITE_CACHE != 0);
        let count = if pieces.is_empty() {
            0
        } else if mapped && file.direct {
            // The kernel writes mapped pages back by any descriptor of the file; the tail of one need not be as O_DIRECT wants it.
            io::write(self.tree.open(&file.node, libc::O_WRONLY)?.as_fd(), &pieces, offset, 0)?
        } else {
            io::write(file.fd.as_fd(), &pieces, offset, if mapped { 0 } else { per_write(flags) })?
        };
        put(out, &WriteOut { size: count as u32, padding: 0 });
        Ok(())
    }

    /// HANDLE_KILLPRIV_V2: a change by somebody without CAP_FSETID takes set-user-id and set-group-id away. (The host's kernel does not
    /// do it for us, who have that capability; it does drop security.capability itself.)
    pub(super) fn kill_suid(&self, fd: BorrowedFd<'_>) -> sys::Result<()> {
        let mode = u32::from(node::stat(fd)?.stx_mode);
        // Set-group-id without group execution meant mandatory locking and is let be, as in the kernel's setattr_should_drop_suidgid.
        let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
        let kept = mode & !(libc::S_ISUID | group);
        if kept == mode { Ok(()) } else { node::chmod(&self.own, fd, kept & 0o7777) }
    }

    /// Reached only on file systems that keep errors back until close(2); elsewhere the guest was told not to ask (FOPEN_NOFLUSH).
    pub(crate) fn flush(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let FlushIn { fh, .. } = request.take()?;
        let file = self.handles.file(fh)?;
        if file.node.mount.flush { io::flush(file.fd.as_fd()) } else { Ok(()) }
    }

    pub(crate) fn release(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let ReleaseIn { fh, .. } = request.take()?;
        self.handles.close_file(fh)
    }

    pub(crate) fn fsync(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let FsyncIn { fh, fsync_flags, .. } = request.take()?;
        io::sync(self.handles.file(fh)?.fd.as_fd(), fsync_flags & FSYNC_FDATASYNC != 0)
    }

    pub(crate) fn fallocate(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let FallocateIn { fh, offset, length, mode, .. } = request.take()?;
        let file = self.handles.file(fh)?;
        if request.header.uid != 0 {
            self.kill_suid(file.fd.as_fd())?;
        }
        io::allocate(file.fd.as_fd(), mode as i32, signed(offset)?, signed(length)?)
    }

    /// SEEK_DATA and SEEK_HOLE; the other ways need no server.
    pub(crate) fn lseek(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let LseekIn { fh, offset, whence, .. } = request.take()?;
        let whence = whence as i32;
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(Errno::EINVAL);
        }
        let offset = io::seek(self.handles.file(fh)?.fd.as_fd(), signed(offset)?, whence)?;
        put(out, &LseekOut { offset });
        Ok(())
    }

    pub(crate) fn copy_file_range(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let copy: CopyFileRangeIn = request.take()?;
        if copy.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let (from, to) = (self.handles.file(copy.fh_in)?, self.handles.file(copy.fh_out)?);
        if request.header.uid != 0 {
            self.kill_suid(to.fd.as_fd())?;
        }
        let length = copy.len.min(MOST_COPIED) as usize;
        let count = io::copy(from.fd.as_fd(), signed(copy.off_in)?, to.fd.as_fd(), signed(copy.off_out)?, length)?;
        put(out, &WriteOut { size: count as u32, padding: 0 });
        Ok(())
    }
}
