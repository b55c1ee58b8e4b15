//! GETATTR, STATX, SETATTR.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::put;
use crate::inode::Node;
use crate::server::{Request, Server, attributes};
use crate::sys::node::Statx;
use crate::sys::{self, Errno, io, node, xattr};
use crate::wire::{self, AttrOut, GETATTR_FH, GetattrIn, SetattrIn, StatxIn, StatxOut, SxTime, fattr};

impl Server {
    pub(crate) fn getattr(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let GetattrIn { getattr_flags, fh, .. } = request.take()?;
        let stat = self.stat(&node, (getattr_flags & GETATTR_FH != 0).then_some(fh))?;
        put(out, &attr_out(&node, &stat));
        Ok(())
    }

    pub(crate) fn statx(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let StatxIn { getattr_flags, fh, .. } = request.take()?;
        let stat = self.stat(&node, (getattr_flags & GETATTR_FH != 0).then_some(fh))?;
        let valid = node.policy.attributes();
        let time = |time: libc::statx_timestamp| SxTime { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec, reserved: 0 };
        put(
            out,
            &StatxOut {
                attr_valid: valid.as_secs(),
                attr_valid_nsec: valid.subsec_nanos(),
                stat: wire::Statx {
                    mask: stat.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
                    blksize: stat.stx_blksize,
                    nlink: stat.stx_nlink,
                    uid: stat.stx_uid,
                    gid: stat.stx_gid,
                    mode: stat.stx_mode,
                    ino: node.shown_inode(stat.stx_ino),
                    size: stat.stx_size,
                    blocks: stat.stx_blocks,
                    atime: time(stat.stx_atime),
                    btime: time(stat.stx_btime),
                    ctime: time(stat.stx_ctime),
                    mtime: time(stat.stx_mtime),
                    rdev_major: stat.stx_rdev_major,
                    rdev_minor: stat.stx_rdev_minor,
                    ..wire::Statx::default()
                },
                ..StatxOut::default()
            },
        );
        Ok(())
    }

    /// By the open file if there is one with that handle (its last name may be gone), else by the node.
    fn stat(&self, node: &Arc<Node>, fh: Option<u64>) -> sys::Result<Statx> {
        match fh.map(|fh| self.handles.file(fh)) {
            Some(Ok(file)) if file.node.id == node.id => node::stat(file.fd.as_fd()),
            _ => node::stat(self.tree.fd(node)?.as_fd()),
        }
    }

    pub(crate) fn setattr(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let set: SetattrIn = request.take()?;
        let has = |flag| set.valid & flag != 0;
        let file =
            if has(fattr::FH) { Some(self.handles.file(set.fh)?).filter(|file| file.node.id == node.id) } else { None };
        let fd = match &file {
            Some(file) => file.fd.clone(),
            None => self.tree.fd(&node)?,
        };
        // The owner first: the change takes set-user-id away, which an explicit mode then decides.
        if has(fattr::UID | fattr::GID) {
            let id = |flag, id| if has(flag) { id } else { u32::MAX };
            node::chown(fd.as_fd(), id(fattr::UID, set.uid), id(fattr::GID, set.gid))?;
        }
        if has(fattr::MODE) {
            if node.kind == libc::S_IFLNK {
                return Err(Errno::EOPNOTSUPP);
            }
            node::chmod(&self.own, fd.as_fd(), set.mode & 0o7777)?;
        }
        if has(fattr::SIZE) {
            // Never by path on what is no regular file: opening a FIFO or device has effects.
            if node.kind != libc::S_IFREG {
                return Err(Errno::EINVAL);
            }
            let size = i64::try_from(set.size).map_err(|_| Errno::EFBIG)?;
            match &file {
                Some(file) => io::truncate(file.fd.as_fd(), size)?,
                None => xattr::truncate(fd.as_fd(), size)?,
            }
            if has(fattr::KILL_SUIDGID) {
                self.kill_suid(fd.as_fd())?;
            }
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let time = |set_flag, now_flag, seconds: u64, nanoseconds: u32| {
                let tv_nsec = match (has(set_flag), has(now_flag)) {
                    (false, _) => libc::UTIME_OMIT,
                    (true, true) => libc::UTIME_NOW,
                    (true, false) => i64::from(nanoseconds.min(999_999_999)),
                };
                libc::timespec { tv_sec: seconds as i64, tv_nsec }
            };
            let times = [
                time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
                time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
            ];
            node::set_times(fd.as_fd(), &times)?;
        }
        put(out, &attr_out(&node, &node::stat(fd.as_fd())?));
        Ok(())
    }
}

fn attr_out(node: &Node, stat: &Statx) -> AttrOut {
    let valid = node.policy.attributes();
    AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr: attributes(node, stat),
    }
}
