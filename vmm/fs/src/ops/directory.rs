//! OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR.

use std::os::fd::AsFd;

use zerocopy::IntoBytes;

use super::put;
use crate::cache::Policy;
use crate::handles::OpenDirectory;
use crate::names::Name;
use crate::server::{MOST_DATA, Request, Server, entry};
use crate::sys::{self, Errno, io, open};
use crate::wire::{
    Dirent, EntryOut, FSYNC_FDATASYNC, FsyncIn, HostDirent, OpenOut, ReadIn, ReleaseIn, dirent_size, fopen,
};

impl Server {
    pub(crate) fn opendir(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        if !node.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        let fd = open::directory(self.tree.fd(&node)?.as_fd())?;
        let open_flags = if node.policy == Policy::Rootfs { fopen::CACHE_DIR | fopen::KEEP_CACHE } else { 0 };
        let fh = self.handles.add_directory(OpenDirectory::new(node, fd))?;
        put(out, &OpenOut { fh, open_flags, backing_id: 0 });
        Ok(())
    }

    pub(crate) fn readdir(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        self.list(request, out, false)
    }

    pub(crate) fn readdirplus(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        self.list(request, out, true)
    }

    /// As many entries as there is room for; with `plus` each is looked up too.
    fn list(&self, request: &mut Request<'_>, out: &mut Vec<u8>, plus: bool) -> sys::Result<()> {
        let ReadIn { fh, offset, size, .. } = request.take()?;
        let directory = self.handles.directory(fh)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let room = (size as usize).min(request.room).min(MOST_DATA);
        let head = if plus { size_of::<EntryOut>() } else { 0 };
        let mut short = false;
        let result = directory.entries(offset, |host| {
            if out.len() + head + dirent_size(host.name.count_bytes()) > room {
                short = true;
                return false;
            }
            if plus {
                put(out, &self.looked_up(&directory, host));
            }
            put_dirent(out, directory.node.shown_inode(host.ino), host);
            true
        });
        match result {
            // What has been looked up must reach the guest, or it could never forget it; the error comes again with the next call.
            _ if !out.is_empty() => Ok(()),
            // Not even one entry fits: as getdents(2) says it. An empty reply would be the end.
            Ok(()) if short => Err(Errno::EINVAL),
            other => other,
        }
    }

    /// The entry's node with one more lookup, or nothing (node 0: the guest then takes only the name).
    fn looked_up(&self, directory: &OpenDirectory, host: &HostDirent<'_>) -> EntryOut {
        let Ok(name) = Name::new(host.name) else { return EntryOut::default() };
        match self.tree.lookup(&directory.node, name) {
            Ok((node, stat)) => entry(&directory.node, &node, &stat),
            Err(_) => EntryOut::default(),
        }
    }

    pub(crate) fn releasedir(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let ReleaseIn { fh, .. } = request.take()?;
        self.handles.close_directory(fh)
    }

    pub(crate) fn fsyncdir(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let FsyncIn { fh, fsync_flags, .. } = request.take()?;
        io::sync(self.handles.directory(fh)?.as_fd(), fsync_flags & FSYNC_FDATASYNC != 0)
    }
}

/// Appends an entry, padded to 8 bytes.
fn put_dirent(out: &mut Vec<u8>, ino: u64, host: &HostDirent<'_>) {
    let name = host.name.to_bytes();
    let end = out.len() + dirent_size(name.len());
    let dirent = Dirent { ino, off: host.next as u64, namelen: name.len() as u32, kind: u32::from(host.kind) };
    out.extend_from_slice(dirent.as_bytes());
    out.extend_from_slice(name);
    out.resize(end, 0);
}
