//! Descriptors of nodes' files: at hand in the ring of recently used ones, else opened again by handle, or by name where there are no
//! handles (overlayfs). A name is trusted only as far as it leads to the same inode; renames and removals keep it true.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::inode::{Key, Known, Node, Place};
use crate::names::Name;
use crate::sys::{self, Errno, node, open};
use crate::tree::{Tree, lock};

/// Most directories that are opened again to reach one file: names that lead in a circle, which only a hostile guest or a busy host
/// makes, end there.
const MOST_STEPS: usize = 1 << 14;

impl Tree {
    /// A descriptor of the node's file that names it (O_PATH, mostly).
    pub fn fd(&self, node: &Arc<Node>) -> sys::Result<Arc<OwnedFd>> {
        if let Some(fd) = at_hand(node) {
            return Ok(fd);
        }
        let found = match &node.place {
            Place::Handle(handle) => node.mount.open(handle, libc::O_PATH).map(|fd| {
                let fd = Arc::new(fd);
                self.keep_warm(node, fd.clone());
                fd
            }),
            Place::Fd(_) | Place::Named(_) => self.find_by_name(node),
        };
        match found {
            // Its last name is gone (some file systems then no longer find it by handle), but it may still be open.
            Err(Errno::ESTALE) => node.open_file().ok_or(Errno::ESTALE),
            other => other,
        }
    }

    /// Opens the node's file.
    pub fn open(&self, node: &Arc<Node>, flags: i32) -> sys::Result<OwnedFd> {
        match &node.place {
            Place::Handle(handle) => match node.mount.open(handle, flags) {
                Err(Errno::ESTALE) => self.own.reopen(node.open_file().ok_or(Errno::ESTALE)?.as_fd(), flags),
                other => other,
            },
            Place::Fd(_) | Place::Named(_) => self.own.reopen(self.fd(node)?.as_fd(), flags),
        }
    }

    /// Goes by names from the nearest directory that is at hand. ESTALE when they lead elsewhere: the guest then looks them up anew.
    fn find_by_name(&self, node: &Arc<Node>) -> sys::Result<Arc<OwnedFd>> {
        let _unchanged = node.mount.names_hold();
        let mut missing: Vec<(Arc<Node>, CString)> = Vec::new();
        let mut next = node.clone();
        let mut at = loop {
            if let Some(fd) = at_hand(&next) {
                break fd;
            }
            let Place::Named(known) = &next.place else { break self.fd_by_handle(&next)? };
            let Known::At(parent, name) = lock(known).clone() else { continue };
            if missing.len() == MOST_STEPS {
                return Err(Errno::ESTALE);
            }
            missing.push((next.clone(), name));
            next = self.get(parent)?;
        };
        while let Some((node, name)) = missing.pop() {
            let fd = open::path_at(at.as_fd(), &name).map_err(|errno| match errno {
                Errno::ENOENT | Errno::ENOTDIR => Errno::ESTALE,
                other => other,
            })?;
            if Key::new(&node::stat(fd.as_fd())?, &node.mount, node.policy, false) != node.key {
                return Err(Errno::ESTALE);
            }
            at = Arc::new(fd);
            self.keep_warm(&node, at.clone());
        }
        Ok(at)
    }

    /// Names lead up to the root of a mount, which keeps its descriptor; a handle on the way is a stale name's.
    fn fd_by_handle(&self, node: &Node) -> sys::Result<Arc<OwnedFd>> {
        match &node.place {
            Place::Handle(handle) => node.mount.open(handle, libc::O_PATH).map(Arc::new),
            Place::Fd(fd) => Ok(fd.clone()),
            Place::Named(_) => Err(Errno::ESTALE),
        }
    }

    /// Puts `fd` into the ring of recently used nodes, unless the node has one there; the oldest that was not used since goes.
    pub(crate) fn keep_warm(&self, node: &Arc<Node>, fd: Arc<OwnedFd>) {
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

    /// UNLINK and RMDIR (AT_REMOVEDIR in `flags`).
    pub fn unlink(&self, parent: &Arc<Node>, name: Name<'_>, flags: i32) -> sys::Result<()> {
        let directory = self.fd(parent)?;
        let unlink = || node::unlink(directory.as_fd(), name.as_cstr(), flags);
        if parent.mount.has_handles() {
            return unlink();
        }
        let _changing = parent.mount.names_change();
        let held = self.hold(parent, name, &directory);
        unlink().inspect_err(|_| self.let_go(held))
    }

    /// RENAME with the `flags` of renameat2(2).
    pub fn rename(
        &self,
        (from, old): (&Arc<Node>, Name<'_>),
        (to, new): (&Arc<Node>, Name<'_>),
        flags: u32,
    ) -> sys::Result<()> {
        let (old_directory, new_directory) = (self.fd(from)?, self.fd(to)?);
        let rename = || node::rename(old_directory.as_fd(), old.as_cstr(), new_directory.as_fd(), new.as_cstr(), flags);
        if from.mount.has_handles() {
            return rename();
        }
        let _changing = from.mount.names_change();
        let moved = self.known_at(from, old, &old_directory).map(|(node, _)| node);
        let exchanged = flags & libc::RENAME_EXCHANGE != 0;
        let (held, other) = if exchanged {
            (None, self.known_at(to, new, &new_directory).map(|(node, _)| node))
        } else {
            (self.hold(to, new, &new_directory), None)
        };
        rename().inspect_err(|_| self.let_go(held))?;
        if let Some(node) = moved {
            self.learn_name(&node, to, new);
        }
        if let Some(node) = other {
            self.learn_name(&node, from, old);
        }
        Ok(())
    }

    /// Remembers that `name` in `parent` leads to `node`.
    pub(crate) fn learn_name(&self, node: &Node, parent: &Node, name: Name<'_>) {
        let Place::Named(known) = &node.place else { return };
        if !Arc::ptr_eq(&node.mount, &parent.mount) {
            return;
        }
        let mut known = lock(known);
        match &*known {
            Known::At(id, old) if *id == parent.id && old.as_c_str() == name.as_cstr() => {}
            Known::At(..) => *known = Known::At(parent.id, name.as_cstr().to_owned()),
            Known::Held(_) => {
                *known = Known::At(parent.id, name.as_cstr().to_owned());
                drop(known);
                self.count_held(-1);
            }
        }
    }

    /// The node that `name` leads to, if the guest knows it, with a descriptor.
    fn known_at(&self, parent: &Node, name: Name<'_>, directory: &OwnedFd) -> Option<(Arc<Node>, OwnedFd)> {
        let fd = open::path_at(directory.as_fd(), name.as_cstr()).ok()?;
        let stat = node::stat(fd.as_fd()).ok()?;
        let mount = self.mounts.of(&self.own, fd.as_fd(), &stat).ok()?;
        let policy = parent.policy.below(name.as_cstr().to_bytes());
        Some((self.known(&Key::new(&stat, &mount, policy, false))?, fd))
    }

    /// Keeps a descriptor of what `name` leads to, which is about to lose that name, if it is the name that the node is known by and the
    /// guest may still use it. (Beyond the bound of such descriptors the file can be used as long as it is open.)
    fn hold(&self, parent: &Node, name: Name<'_>, directory: &OwnedFd) -> Option<Held> {
        let (node, fd) = self.known_at(parent, name, directory)?;
        {
            let Place::Named(known) = &node.place else { return None };
            let mut known = lock(known);
            match &*known {
                Known::At(id, old) if *id == parent.id && old.as_c_str() == name.as_cstr() => {}
                _ => return None,
            }
            if !self.may_hold() {
                return None;
            }
            let before = std::mem::replace(&mut *known, Known::Held(Arc::new(fd)));
            drop(known);
            self.count_held(1);
            Some(Held { node: node.clone(), before })
        }
    }

    /// Undoes `hold` after the name did not go.
    fn let_go(&self, held: Option<Held>) {
        let Some(Held { node, before }) = held else { return };
        if let Place::Named(known) = &node.place {
            *lock(known) = before;
            self.count_held(-1);
        }
    }
}

/// A node that was made to keep a descriptor, and what was known of it before.
struct Held {
    node: Arc<Node>,
    before: Known,
}

/// A descriptor that need not be opened.
fn at_hand(node: &Node) -> Option<Arc<OwnedFd>> {
    match &node.place {
        Place::Fd(fd) => return Some(fd.clone()),
        Place::Named(known) => {
            if let Known::Held(fd) = &*lock(known) {
                return Some(fd.clone());
            }
        }
        Place::Handle(_) => {}
    }
    let fd = lock(&node.warm).clone()?;
    node.used.store(true, Ordering::Relaxed);
    Some(fd)
}

#[cfg(test)]
#[path = "reach_tests.rs"]
mod tests;
