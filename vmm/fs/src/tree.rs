//! The inodes that the guest knows. A node is one file of the host, found by device, inode number and birth, whatever names lead to it:
//! containers of a pod that share a volume thus share its locks, sockets and cached pages. It lives until the guest forgets it.
//!
//! A node costs no descriptor: its file is opened again when needed, by handle where the file system has them, else (overlayfs) by
//! name. A ring of recently used ones keeps O_PATH descriptors open so that most requests need not open any.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::cache::Policy;
use crate::inode::{Found, Key, Known, Node, Place};
use crate::mounts::{Mount, Mounts};
use crate::names::Name;
use crate::sys::node::{self, Statx};
use crate::sys::open::{self, SelfFd};
use crate::sys::{self, Errno};
use crate::wire::ROOT_ID;

/// Most nodes at once, so that a guest cannot make us hold without end (about 500 bytes each).
const MOST_NODES: usize = 1 << 22;

/// Locks `mutex`; what it guards is sound after any panic, since each change of it is one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Nodes that keep a descriptor.
    descriptors: usize,
}

/// Bounds of what a tree holds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nodes that keep a descriptor for as long as they live: roots of mounts without handles, and files there whose name went.
    pub descriptors: usize,
    /// Descriptors kept open for recently used nodes.
    pub warm: usize,
}

/// All nodes.
#[derive(Debug)]
pub struct Tree {
    pub(crate) own: Arc<SelfFd>,
    root: OwnedFd,
    pub(crate) limits: Limits,
    pub(crate) mounts: Mounts,
    inner: Mutex<Inner>,
    pub(crate) ring: Mutex<VecDeque<Weak<Node>>>,
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
        let directory = self.fd(parent)?;
        // No rename between the look and what is remembered of it.
        let _unchanged = (!parent.mount.has_handles()).then(|| parent.mount.names_hold());
        let fd = open::path_at(directory.as_fd(), name.as_cstr())?;
        self.enter(Found::Path(fd), parent, Some(name))
    }

    /// The node of `fd`, a new one if need be, with one more lookup. It was found by `name` in `parent`, or has no name.
    pub fn enter(&self, fd: Found, parent: &Node, name: Option<Name<'_>>) -> sys::Result<(Arc<Node>, Statx)> {
        let stat = node::stat(fd.as_fd())?;
        let mount = self.mounts.of(&self.own, fd.as_fd(), &stat)?;
        let policy = parent.policy.below(name.map_or(b"".as_slice(), |name| name.as_cstr().to_bytes()));
        let (pinned, born) = (Key::new(&stat, &mount, policy, false), Key::new(&stat, &mount, policy, true));
        // Both ways to be known, before the price of a handle is paid.
        if let Some(node) = lock(&self.inner).again(&[born, pinned]) {
            if let Some(name) = name {
                self.learn_name(&node, parent, name);
            }
            if let (Place::Handle(_) | Place::Named(_), Found::Path(fd)) = (&node.place, fd) {
                self.keep_warm(&node, Arc::new(fd));
            }
            return Ok((node, stat));
        }
        let (key, place, path) = match (mount.handle(fd.as_fd()), name, fd) {
            (Some(handle), _, Found::Path(fd)) => (born, Place::Handle(handle), Some(fd)),
            (Some(handle), _, Found::Real(_)) => (born, Place::Handle(handle), None),
            // A mount's root keeps its descriptor: the name that it was found by is not of this mount.
            (None, Some(name), fd) if Arc::ptr_eq(&mount, &parent.mount) => {
                let known = Known::At(parent.id, name.as_cstr().to_owned());
                let path = if let Found::Path(fd) = fd { Some(fd) } else { None };
                (pinned, Place::Named(Mutex::new(known)), path)
            }
            (None, _, Found::Path(fd)) => (pinned, Place::Fd(Arc::new(fd)), None),
            (None, _, Found::Real(fd)) => {
                (pinned, Place::Fd(Arc::new(self.own.reopen(fd.as_fd(), libc::O_PATH)?)), None)
            }
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

    /// The node with this key, without counting a lookup.
    pub(crate) fn known(&self, key: &Key) -> Option<Arc<Node>> {
        let inner = lock(&self.inner);
        inner.by_key.get(key).and_then(|id| inner.by_id.get(id)).map(|slot| slot.node.clone())
    }

    /// Whether one more node may keep a descriptor.
    pub(crate) fn may_hold(&self) -> bool {
        lock(&self.inner).descriptors < self.limits.descriptors
    }

    /// `change` more nodes keep a descriptor.
    pub(crate) fn count_held(&self, change: isize) {
        let mut inner = lock(&self.inner);
        inner.descriptors = inner.descriptors.saturating_add_signed(change);
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
        let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
        let node = Arc::new(Node::new(id, key, device_tag, kind, policy, mount, place));
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
        self.descriptors = self.descriptors.saturating_sub(usize::from(node.holds()));
        Some(node)
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
pub(crate) mod tests;
