//! The host's mounts that the share directory shows. Each is met when a name first leads into it, also when it appeared later, and is
//! forgotten with its last node.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::sys::handle::FileHandle;
use crate::sys::node::{self, Statx};
use crate::sys::open::{self, SelfFd};
use crate::sys::{self, Errno};

/// File systems that may tell an error of a write only at close(2) (magic numbers of linux/magic.h: NFS, SMB2, CIFS, Ceph, FUSE).
const LATE_ERRORS: [i64; 5] = [0x6969, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400, 0x6573_5546];

/// One mount.
#[derive(Debug)]
pub struct Mount {
    /// A real descriptor on it, where its root is a directory or a regular file: file handles are opened and syncfs(2) is called with it.
    anchor: Option<OwnedFd>,
    /// Whether files are named by handle here.
    handles: bool,
    /// Held to change names where files are reached by them, shared by who goes by names.
    names: RwLock<()>,
    /// Whether it is read-only. A file seen both ways is two nodes, so that no right leaks from one way to the other.
    pub readonly: bool,
    /// Whether FLUSH has to reach the host.
    pub flush: bool,
}

impl Mount {
    /// Looks at the mount that `fd` (with attributes `stat`) lies on.
    fn new(own: &SelfFd, fd: BorrowedFd<'_>, stat: &Statx) -> sys::Result<Self> {
        let figures = node::statfs(fd)?;
        let anchor = match u32::from(stat.stx_mode) & libc::S_IFMT {
            libc::S_IFDIR => Some(open::directory(fd)?),
            libc::S_IFREG => own.reopen(fd, libc::O_RDONLY | libc::O_NONBLOCK).ok(),
            _ => None,
        };
        // Without a birth time a handle's node could not be told from a later file with its inode number.
        let known = libc::STATX_MNT_ID | libc::STATX_BTIME;
        let handles = stat.stx_mask & known == known
            && anchor.as_ref().is_some_and(|anchor| {
                FileHandle::of(fd).is_ok_and(|handle| handle.open(anchor.as_fd(), libc::O_PATH).is_ok())
            });
        Ok(Self {
            anchor,
            handles,
            names: RwLock::default(),
            readonly: figures.f_flags as u64 & libc::ST_RDONLY != 0,
            flush: LATE_ERRORS.contains(&(figures.f_type as i64)),
        })
    }

    /// Whether files are named by handle here.
    pub fn has_handles(&self) -> bool {
        self.handles
    }

    /// While it lives no name changes (by the guest). Not to be asked for twice by one thread.
    pub(crate) fn names_hold(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// While it lives nobody goes by names.
    pub(crate) fn names_change(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle of `fd`, which lies on this mount; `None` where descriptors must do.
    pub fn handle(&self, fd: BorrowedFd<'_>) -> Option<FileHandle> {
        if !self.handles {
            return None;
        }
        FileHandle::of(fd).ok()
    }

    /// Opens what `handle` names.
    pub fn open(&self, handle: &FileHandle, flags: i32) -> sys::Result<OwnedFd> {
        handle.open(self.anchor.as_ref().ok_or(Errno::ESTALE)?.as_fd(), flags)
    }
}

/// All mounts that live nodes are on, by mount id. (An id is not used again while a node's descriptor or the anchor holds the mount.)
#[derive(Debug, Default)]
pub struct Mounts(Mutex<HashMap<u64, Weak<Mount>>>);

impl Mounts {
    /// The mount that `fd` (with attributes `stat`) lies on.
    pub fn of(&self, own: &SelfFd, fd: BorrowedFd<'_>, stat: &Statx) -> sys::Result<Arc<Mount>> {
        let id = stat.stx_mnt_id;
        if let Some(mount) = self.lock().get(&id).and_then(Weak::upgrade) {
            return Ok(mount);
        }
        let new = Arc::new(Mount::new(own, fd, stat)?);
        let mut mounts = self.lock();
        if let Some(mount) = mounts.get(&id).and_then(Weak::upgrade) {
            return Ok(mount);
        }
        mounts.retain(|_, mount| mount.strong_count() > 0);
        mounts.insert(id, Arc::downgrade(&new));
        Ok(new)
    }

    /// syncfs(2) on every mount; the first error, after all were tried.
    pub fn sync(&self) -> sys::Result<()> {
        let all: Vec<_> = self.lock().values().filter_map(Weak::upgrade).collect();
        all.iter()
            .filter(|mount| !mount.readonly)
            .filter_map(|mount| mount.anchor.as_ref())
            .map(|anchor| sys::io::sync_filesystem(anchor.as_fd()))
            .reduce(|first, next| first.and(next))
            .unwrap_or(Ok(()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Weak<Mount>>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
