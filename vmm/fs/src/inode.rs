//! One inode that the guest knows, and how its file is reached on the host.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, Weak};

use crate::cache::{Policy, Stamp};
use crate::handles::OpenFile;
use crate::mounts::Mount;
use crate::sys::handle::FileHandle;
use crate::sys::node::Statx;
use crate::tree::lock;

/// What makes two descriptors the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) device: (u32, u32),
    inode: u64,
    /// Birth time: tells a new file from a dead one whose inode number it got. Left out where there are no handles: overlayfs shows
    /// another one after it copied a file up.
    birth: (i64, u32),
    readonly: bool,
    /// A directory in which the host's later mounts appear is another one than the same without them.
    live: bool,
}

impl Key {
    /// The key of what has attributes `stat` on `mount`, met where `policy` holds; with its birth time if `born`.
    pub(crate) fn new(stat: &Statx, mount: &Mount, policy: Policy, born: bool) -> Self {
        let birth = if born && stat.stx_mask & libc::STATX_BTIME != 0 {
            (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
        } else {
            (i64::MIN, u32::from(born))
        };
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            birth,
            readonly: mount.readonly,
            live: policy == Policy::Live && u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR,
        }
    }
}

/// How a node's file is reached.
#[derive(Debug)]
pub(crate) enum Place {
    /// By a descriptor that is kept: the root of a mount without handles, or what has no name there.
    Fd(Arc<OwnedFd>),
    /// By its handle.
    Handle(FileHandle),
    /// By its name, on a mount without handles.
    Named(Mutex<Known>),
}

/// What is known of a file on a mount without handles.
#[derive(Clone, Debug)]
pub(crate) enum Known {
    /// The name `.1` in the node numbered `.0` leads to it; kept up to date when the guest renames or removes that.
    At(u64, CString),
    /// That name is gone, so that a descriptor is kept.
    Held(Arc<OwnedFd>),
}

/// One inode that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// The guest's number for it.
    pub id: u64,
    /// S_IFMT of its mode.
    pub kind: u32,
    /// What the guest may remember of it.
    pub policy: Policy,
    /// The mount that it was met on.
    pub mount: Arc<Mount>,
    /// Size and times at the last open.
    pub opened: Mutex<Option<Stamp>>,
    pub(crate) key: Key,
    pub(crate) device_tag: u64,
    pub(crate) place: Place,
    /// An O_PATH descriptor, while the node is in the ring.
    pub(crate) warm: Mutex<Option<Arc<OwnedFd>>>,
    pub(crate) used: AtomicBool,
    open_files: Mutex<Vec<Weak<OpenFile>>>,
}

impl Node {
    /// A node that has no open files yet.
    pub(crate) fn new(
        id: u64,
        key: Key,
        device_tag: u64,
        kind: u32,
        policy: Policy,
        mount: Arc<Mount>,
        place: Place,
    ) -> Self {
        Self {
            id,
            kind,
            policy,
            mount,
            opened: Mutex::default(),
            key,
            device_tag,
            place,
            warm: Mutex::default(),
            used: AtomicBool::new(false),
            open_files: Mutex::default(),
        }
    }

    /// The inode number that the guest shows. Everything is one device there, so a host device's number goes into the high bits.
    pub fn shown_inode(&self, inode: u64) -> u64 {
        inode ^ self.device_tag
    }

    /// Remembers that `file` is open, for when the last name of a file in use goes.
    pub fn add_open(&self, file: &Arc<OpenFile>) {
        let mut files = lock(&self.open_files);
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(file));
    }

    /// A descriptor from one of the open files.
    pub(crate) fn open_file(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.open_files).iter().rev().find_map(Weak::upgrade).map(|file| file.fd.clone())
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    /// Whether it keeps a descriptor for as long as it lives.
    pub(crate) fn holds(&self) -> bool {
        match &self.place {
            Place::Fd(_) => true,
            Place::Handle(_) => false,
            Place::Named(known) => matches!(*lock(known), Known::Held(_)),
        }
    }
}

/// A descriptor of a file that was just met.
#[derive(Debug)]
pub enum Found {
    /// O_PATH.
    Path(OwnedFd),
    /// Open for I/O, and going to be somebody else's.
    Real(Arc<OwnedFd>),
}

impl AsFd for Found {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Path(fd) => fd.as_fd(),
            Self::Real(fd) => fd.as_fd(),
        }
    }
}
