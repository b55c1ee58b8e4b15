//! LOOKUP, READLINK, UNLINK, RMDIR, RENAME, RENAME2, LINK: names and what they lead to.

use std::os::fd::AsFd;

use super::put;
use crate::inode::Node;
use crate::server::{Request, Server, entry, take_name};
use crate::sys::{self, Errno, node};
use crate::wire::{EntryOut, LinkIn, Rename2In, RenameIn};

/// The flags of renameat2(2) that are let through.
const RENAME_FLAGS: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;

impl Server {
    pub(crate) fn lookup(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let name = take_name(&mut request.body)?;
        match self.tree.lookup(&parent, name) {
            Ok((node, stat)) => put(out, &entry(&parent, &node, &stat)),
            // Node 0 lets the guest remember that the name is missing.
            Err(Errno::ENOENT) if !parent.policy.missing().is_zero() => {
                put(out, &EntryOut { entry_valid: parent.policy.missing().as_secs(), ..EntryOut::default() });
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    pub(crate) fn readlink(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        if node.kind != libc::S_IFLNK {
            return Err(Errno::EINVAL);
        }
        node::readlink(self.tree.fd(&node)?.as_fd(), out)
    }

    /// UNLINK, and RMDIR with AT_REMOVEDIR in `flags`.
    pub(crate) fn unlink(&self, request: &mut Request<'_>, flags: i32) -> sys::Result<()> {
        let parent = self.node(request)?;
        let name = take_name(&mut request.body)?;
        self.tree.unlink(&parent, name, flags)
    }

    pub(crate) fn rename(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let RenameIn { newdir } = request.take()?;
        self.rename_to(request, newdir, 0)
    }

    pub(crate) fn rename2(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let Rename2In { newdir, flags, .. } = request.take()?;
        if flags & !RENAME_FLAGS != 0 {
            return Err(Errno::EINVAL);
        }
        self.rename_to(request, newdir, flags)
    }

    fn rename_to(&self, request: &mut Request<'_>, newdir: u64, flags: u32) -> sys::Result<()> {
        let (from, to) = (self.node(request)?, self.tree.get(newdir)?);
        let (old, new) = (take_name(&mut request.body)?, take_name(&mut request.body)?);
        self.tree.rename((&from, old), (&to, new), flags)
    }

    pub(crate) fn link(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let LinkIn { oldnodeid } = request.take()?;
        let (node, parent) = (self.tree.get(oldnodeid)?, self.node(request)?);
        let name = take_name(&mut request.body)?;
        if node.is_directory() {
            return Err(Errno::EPERM);
        }
        let fd = self.tree.fd(&node)?;
        node::link(&self.own, fd.as_fd(), self.tree.fd(&parent)?.as_fd(), name.as_cstr())?;
        let stat = node::stat(fd.as_fd())?;
        // The same node by intent: a name looked up anew could be another one after overlayfs copied the file up.
        self.tree.retain(node.id)?;
        put(out, &entry(&parent, &node, &stat));
        Ok(())
    }

    /// The entry that was just made, looked up for the reply.
    pub(crate) fn made(
        &self,
        parent: &std::sync::Arc<Node>,
        name: crate::names::Name<'_>,
        out: &mut Vec<u8>,
    ) -> sys::Result<()> {
        let (node, stat) = self.tree.lookup(parent, name)?;
        put(out, &entry(parent, &node, &stat));
        Ok(())
    }
}
