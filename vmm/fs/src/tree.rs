//! The inodes that the guest knows. A node is one file of the host, found by device, inode number and birth, whatever names lead to it:
//! containers of a pod that share a volume thus share its locks, sockets and cached pages. It lives until the guest forgets it.
//!
//! Where the file system has file handles a node costs no descriptor; a ring of recently used ones keeps O_PATH descriptors open so that
//! most requests need not open any. Elsewhere (overlayfs) each node holds one, and their number is bounded.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::cache::{Policy, Stamp};
use crate::handles::OpenFile;
use crate::mounts::{Mount, Mounts};
use crate::names::Name;
use crate::sys::handle::FileHandle;
use crate::sys::node::{self, Statx};
use crate::sys::open::{self, SelfFd};
use crate::sys::{self, Errno};
use crate::wire::ROOT_ID;

/// Most nodes at once, so that a guest cannot make us hold without end (about 300 bytes each).
const MOST_NODES: usize = 1 << 22;

/// Locks `mutex`; what it guards is sound after any panic, since each change of it is one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What makes two descriptors the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    inode: u64,
    /// Birth time: tells a new file from a dead one whose inode number it got. Not asked for where a descriptor keeps the number taken.
    birth: (i64, u32),
    readonly: bool,
    /// A directory in which the host's later mounts appear is another one than the same without them.
    live: bool,
}

/// How a node's file is reached.
#[derive(Debug)]
enum Place {
    Fd(Arc<OwnedFd>),
    Handle(FileHandle),
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
    key: Key,
    device_tag: u64,
    place: Place,
    /// An O_PATH descriptor, while the node is in the ring.
    warm: Mutex<Option<Arc<OwnedFd>>>,
    used: AtomicBool,
    open_files: Mutex<Vec<Weak<OpenFile>>>,
}

impl Node {
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

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == libc::S_IFDIR
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

#[derive(Debug)]
struct Slot {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: HashMap<u64, Slot>,
    by_key: HashMap<Key, u64>,
    devices: HashMap<(u32, u32), u64>,
    next_id: u64,
    /// Nodes that hold a descriptor.
    descriptors: usize,
}

/// Bounds of what a tree holds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nodes that hold a descriptor for as long as they live.
    pub descriptors: usize,
    /// Descriptors kept open for recently used nodes.
    pub warm: usize,
}

/// All nodes.
#[derive(Debug)]
pub struct Tree {
    own: Arc<SelfFd>,
    root: OwnedFd,
    limits: Limits,
    mounts: Mounts,
    inner: Mutex<Inner>,
    ring: Mutex<VecDeque<Weak<Node>>>,
}

impl Tree {
    /// A tree that knows only `root`, a directory's O_PATH descriptor.
    pub fn new(own: Arc<SelfFd>, root: OwnedFd, limits: Limits) -> sys::Result<Self> {
        let tree =
            Self { own, root, limits, mounts: Mounts::default(), inner: Mutex::default(), ring: Mutex::default() };
        tree.reset()?;
        Ok(tree)
    }

    /// Forgets everything but the root.
    pub fn reset(&self) -> sys::Result<()> {
        let root = self.root.try_clone().map_err(|_| Errno::EMFILE)?;
        let stat = node::stat(root.as_fd())?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(Errno::ENOTDIR);
        }
        let mount = self.mounts.of(&self.own, root.as_fd(), &stat)?;
        let old = {
            let mut inner = lock(&self.inner);
            std::mem::replace(&mut *inner, Inner { next_id: ROOT_ID, ..Inner::default() })
        };
        // Its descriptors are closed without the lock.
        drop(old);
        lock(&self.ring).clear();
        let key = Key::new(&stat, &mount, Policy::Share, false);
        let mut inner = lock(&self.inner);
        inner.add(key, &stat, Policy::Share, mount, Place::Fd(Arc::new(root)));
        Ok(())
    }

    /// The node with this number.
    pub fn get(&self, id: u64) -> sys::Result<Arc<Node>> {
        lock(&self.inner).by_id.get(&id).map(|slot| slot.node.clone()).ok_or(Errno::ESTALE)
    }

    /// Finds `name` in `parent` and counts one lookup of what it is.
    pub fn lookup(&self, parent: &Arc<Node>, name: Name<'_>) -> sys::Result<(Arc<Node>, Statx)> {
        let fd = open::path_at(self.fd(parent)?.as_fd(), name.as_cstr())?;
        self.enter(Found::Path(fd), parent.policy.below(name.as_cstr().to_bytes()))
    }

    /// The node of `fd`, a new one if need be, with one more lookup.
    pub fn enter(&self, fd: Found, policy: Policy) -> sys::Result<(Arc<Node>, Statx)> {
        let stat = node::stat(fd.as_fd())?;
        let mount = self.mounts.of(&self.own, fd.as_fd(), &stat)?;
        let (pinned, born) = (Key::new(&stat, &mount, policy, false), Key::new(&stat, &mount, policy, true));
        // Both ways to be known, before the price of a handle is paid.
        if let Some(node) = lock(&self.inner).again(&[born, pinned]) {
            if let (Place::Handle(_), Found::Path(fd)) = (&node.place, fd) {
                self.keep_warm(&node, Arc::new(fd));
            }
            return Ok((node, stat));
        }
        let handle = mount.handle(fd.as_fd());
        let (key, place, path) = match (handle, fd) {
            (Some(handle), Found::Path(fd)) => (born, Place::Handle(handle), Some(fd)),
            (Some(handle), Found::Real(_)) => (born, Place::Handle(handle), None),
            (None, Found::Path(fd)) => (pinned, Place::Fd(Arc::new(fd)), None),
            (None, Found::Real(fd)) => (pinned, Place::Fd(Arc::new(self.own.reopen(fd.as_fd(), libc::O_PATH)?)), None),
        };
        let node = {
            let mut inner = lock(&self.inner);
            // Another thread may have met it meanwhile.
            if let Some(node) = inner.again(&[key]) {
                node
            } else {
                let full = matches!(place, Place::Fd(_)) && inner.descriptors >= self.limits.descriptors;
                if full || inner.by_id.len() >= MOST_NODES {
                    return Err(Errno::ENFILE);
                }
                inner.add(key, &stat, policy, mount, place)
            }
        };
        if let Some(fd) = path {
            self.keep_warm(&node, Arc::new(fd));
        }
        Ok((node, stat))
    }

    /// Counts one more lookup of a node that the guest knows already.
    pub fn retain(&self, id: u64) -> sys::Result<()> {
        let mut inner = lock(&self.inner);
        let slot = inner.by_id.get_mut(&id).ok_or(Errno::ESTALE)?;
        slot.lookups = slot.lookups.saturating_add(1);
        Ok(())
    }

    /// Takes `count` lookups back; more than there were are as many as there were. An unknown number is nothing.
    pub fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let gone = {
            let mut inner = lock(&self.inner);
            let Some(slot) = inner.by_id.get_mut(&id) else { return };
            slot.lookups = slot.lookups.saturating_sub(count);
            if slot.lookups > 0 { None } else { inner.remove(id) }
        };
        // The descriptor is closed without the lock.
        drop(gone);
    }

    /// A descriptor of the node's file that names it (O_PATH, mostly).
    pub fn fd(&self, node: &Arc<Node>) -> sys::Result<Arc<OwnedFd>> {
        let handle = match &node.place {
            Place::Fd(fd) => return Ok(fd.clone()),
            Place::Handle(handle) => handle,
        };
        if let Some(fd) = lock(&node.warm).as_ref() {
            node.used.store(true, Ordering::Relaxed);
            return Ok(fd.clone());
        }
        match node.mount.open(handle, libc::O_PATH) {
            Ok(fd) => {
                let fd = Arc::new(fd);
                self.keep_warm(node, fd.clone());
                Ok(fd)
            }
            // Its last name is gone (some file systems then no longer find it by handle), but it may still be open.
            Err(Errno::ESTALE) => Self::open_file(node).ok_or(Errno::ESTALE),
            Err(errno) => Err(errno),
        }
    }

    /// A descriptor from one of the node's open files.
    fn open_file(node: &Node) -> Option<Arc<OwnedFd>> {
        lock(&node.open_files).iter().rev().find_map(Weak::upgrade).map(|file| file.fd.clone())
    }

    /// Puts `fd` into the ring of recently used nodes, unless the node has one there; the oldest that was not used since goes.
    fn keep_warm(&self, node: &Arc<Node>, fd: Arc<OwnedFd>) {
        {
            let mut warm = lock(&node.warm);
            if warm.is_some() {
                return;
            }
            *warm = Some(fd);
        }
        let mut dropped = Vec::new();
        {
            let mut ring = lock(&self.ring);
            ring.push_back(Arc::downgrade(node));
            // Each node gets at most one second chance a call.
            let mut chances = ring.len();
            while ring.len() > self.limits.warm {
                let Some(oldest) = ring.pop_front().and_then(|oldest| oldest.upgrade()) else { continue };
                if chances > 0 && oldest.used.swap(false, Ordering::Relaxed) {
                    chances -= 1;
                    ring.push_back(Arc::downgrade(&oldest));
                } else {
                    dropped.push(lock(&oldest.warm).take());
                }
            }
        }
        // Closed without the lock.
        drop(dropped);
    }

    /// Opens the node's file.
    pub fn open(&self, node: &Node, flags: i32) -> sys::Result<OwnedFd> {
        match &node.place {
            Place::Fd(fd) => self.own.reopen(fd.as_fd(), flags),
            Place::Handle(handle) => match node.mount.open(handle, flags) {
                Err(Errno::ESTALE) => {
                    let fd = Self::open_file(node).ok_or(Errno::ESTALE)?;
                    self.own.reopen(fd.as_fd(), flags)
                }
                other => other,
            },
        }
    }

    /// syncfs(2) on all mounts.
    pub fn sync(&self) -> sys::Result<()> {
        self.mounts.sync()
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        lock(&self.inner).by_id.len()
    }

    /// Never: the root is always there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Key {
    /// The key of what has attributes `stat` on `mount`, met where `policy` holds; with its birth time if `born`.
    fn new(stat: &Statx, mount: &Mount, policy: Policy, born: bool) -> Self {
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

impl Inner {
    /// The node known by one of `keys`, with one more lookup.
    fn again(&mut self, keys: &[Key]) -> Option<Arc<Node>> {
        let id = keys.iter().find_map(|key| self.by_key.get(key))?;
        let slot = self.by_id.get_mut(id)?;
        slot.lookups = slot.lookups.saturating_add(1);
        Some(slot.node.clone())
    }

    /// Adds a node with one lookup.
    fn add(&mut self, key: Key, stat: &Statx, policy: Policy, mount: Arc<Mount>, place: Place) -> Arc<Node> {
        let id = self.next_id;
        self.next_id += 1;
        let seen = self.devices.len() as u64;
        // 48 bits are enough for the numbers of all usual file systems; what has more only loses the promise of being unique.
        let device_tag = (*self.devices.entry(key.device).or_insert(seen) & 0xffff) << 48;
        self.descriptors += usize::from(matches!(place, Place::Fd(_)));
        let node = Arc::new(Node {
            id,
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
            policy,
            mount,
            opened: Mutex::default(),
            key,
            device_tag,
            place,
            warm: Mutex::default(),
            used: AtomicBool::new(false),
            open_files: Mutex::default(),
        });
        self.by_key.insert(key, id);
        self.by_id.insert(id, Slot { node: node.clone(), lookups: 1 });
        node
    }

    /// Takes a node out.
    fn remove(&mut self, id: u64) -> Option<Arc<Node>> {
        let node = self.by_id.remove(&id)?.node;
        if self.by_key.get(&node.key) == Some(&id) {
            self.by_key.remove(&node.key);
        }
        self.descriptors -= usize::from(matches!(node.place, Place::Fd(_)));
        Some(node)
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
