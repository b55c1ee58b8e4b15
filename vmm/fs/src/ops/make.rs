//! SYMLINK, MKNOD, MKDIR, CREATE, TMPFILE: new inodes, made as the guest's caller so that they belong to it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::put;
use crate::cache::Policy;
use crate::handles::OpenFile;
use crate::inode::{Found, Node};
use crate::names::Name;
use crate::server::{Request, Server, entry, take_name};
use crate::sys::{self, Errno, node, open};
use crate::wire::{CreateIn, MkdirIn, MknodIn, OPEN_KILL_SUIDGID, decode_device};
use crate::worker::Worker;

/// Permission bits with set-user-id, set-group-id and sticky.
const PERMISSIONS: u32 = 0o7777;

impl Server {
    pub(crate) fn symlink(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let name = take_name(&mut request.body)?;
        // Any text will do: only the guest ever follows it.
        let target = request.body.take_string().ok_or(Errno::EINVAL)?;
        let fd = self.tree.fd(&parent)?;
        worker.create_as(request.caller(), 0, 0, |_| node::symlink(target, fd.as_fd(), name.as_cstr()))?;
        self.made(&parent, name, out)
    }

    /// Regular files, FIFOs, sockets (whose listeners live in the guest) and overlayfs' whiteouts, which are character devices 0:0.
    /// Other devices are made only in a container's own root, which no other user of the host can reach: on a volume somebody there
    /// could open one. EPERM.
    pub(crate) fn mknod(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let MknodIn { mode, rdev, umask, .. } = request.take()?;
        let name = take_name(&mut request.body)?;
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {}
            libc::S_IFCHR if rdev == 0 => {}
            libc::S_IFCHR | libc::S_IFBLK if parent.policy == Policy::Rootfs => {}
            libc::S_IFCHR | libc::S_IFBLK => return Err(Errno::EPERM),
            _ => return Err(Errno::EINVAL),
        }
        let mode = mode & (libc::S_IFMT | PERMISSIONS);
        let (major, minor) = decode_device(rdev);
        let device = libc::makedev(major, minor);
        let fd = self.tree.fd(&parent)?;
        worker
            .create_as(request.caller(), mode, umask, |mode| node::mknod(fd.as_fd(), name.as_cstr(), mode, device))?;
        self.made(&parent, name, out)
    }

    pub(crate) fn mkdir(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let MkdirIn { mode, umask } = request.take()?;
        let name = take_name(&mut request.body)?;
        let fd = self.tree.fd(&parent)?;
        worker.create_as(request.caller(), mode & PERMISSIONS, umask, |mode| {
            node::mkdir(fd.as_fd(), name.as_cstr(), mode)
        })?;
        self.made(&parent, name, out)
    }

    pub(crate) fn create(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let CreateIn { flags, mode, umask, open_flags } = request.take()?;
        let name = take_name(&mut request.body)?;
        let host = super::file::host_flags(flags)?;
        let fd = self.tree.fd(&parent)?;
        let new = worker.create_as(request.caller(), mode & PERMISSIONS, umask, |mode| {
            open::create_at(fd.as_fd(), name.as_cstr(), host, mode)
        });
        match new {
            Ok(new) => self.created(&parent, Some(name), new, flags, out),
            // Somebody on the host was faster. It is opened like any other file, and only if it is a regular one.
            Err(Errno::EEXIST) if flags as i32 & libc::O_EXCL == 0 => {
                let (node, stat) = self.tree.lookup(&parent, name)?;
                let kill = open_flags & OPEN_KILL_SUIDGID != 0;
                let opened = self.open_node(&node, flags, kill).inspect_err(|_| self.tree.forget(node.id, 1))?;
                put(out, &entry(&parent, &node, &stat));
                put(out, &opened);
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    /// A file without a name (O_TMPFILE); the name in the body is the kernel's filler.
    pub(crate) fn tmpfile(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let parent = self.node(request)?;
        let CreateIn { flags, mode, umask, .. } = request.take()?;
        // With O_EXCL the file may never get a name.
        let host = super::file::host_flags(flags)? | (flags as i32 & libc::O_EXCL);
        let fd = self.tree.fd(&parent)?;
        let new = worker
            .create_as(request.caller(), mode & PERMISSIONS, umask, |mode| open::tmpfile_at(fd.as_fd(), host, mode))?;
        self.created(&parent, None, new, flags, out)
    }

    fn created(
        &self,
        parent: &Arc<Node>,
        name: Option<Name<'_>>,
        fd: OwnedFd,
        flags: u32,
        out: &mut Vec<u8>,
    ) -> sys::Result<()> {
        let fd = Arc::new(fd);
        let (node, stat) = self.tree.enter(Found::Real(fd.clone()), parent, name)?;
        let file = OpenFile::new(node.clone(), fd, flags);
        let opened = self.opened(file, &stat).inspect_err(|_| self.tree.forget(node.id, 1))?;
        put(out, &entry(parent, &node, &stat));
        put(out, &opened);
        Ok(())
    }
}
