//! Open files and directories: what the guest's FUSE handles stand for.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use crate::inode::Node;
use crate::sys::{self, Errno};
use crate::tree::lock;
use crate::wire::HostDirent;

/// Bytes of host entries read at once.
const DIRECTORY_BUFFER: usize = 32 << 10;

/// An open regular file.
#[derive(Debug)]
pub struct OpenFile {
    /// Whose file it is.
    pub node: Arc<Node>,
    /// Opened for I/O, without O_APPEND.
    pub fd: Arc<OwnedFd>,
    /// The guest's O_DIRECT.
    pub direct: bool,
}

/// An open directory.
#[derive(Debug)]
pub struct OpenDirectory {
    /// Whose it is.
    pub node: Arc<Node>,
    fd: OwnedFd,
    state: Mutex<Entries>,
}

/// Entries that were read from the host and not given yet.
#[derive(Debug)]
struct Entries {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The guest's offset of the entry at `start`.
    position: i64,
}

impl OpenDirectory {
    /// `fd` is open for reading.
    pub fn new(node: Arc<Node>, fd: OwnedFd) -> Self {
        Self { node, fd, state: Mutex::new(Entries { buffer: Box::default(), start: 0, end: 0, position: 0 }) }
    }

    /// Gives the entries from `offset` on (0, or a `next` of an entry) to `give`, until it says that it took one no more.
    pub fn entries(&self, offset: i64, mut give: impl FnMut(&HostDirent<'_>) -> bool) -> sys::Result<()> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        if state.buffer.is_empty() {
            state.buffer = vec![0; DIRECTORY_BUFFER].into();
        }
        if offset != state.position || offset == 0 {
            sys::io::seek(self.fd.as_fd(), offset, libc::SEEK_SET)?;
            (state.start, state.end, state.position) = (0, 0, offset);
        }
        loop {
            if state.start == state.end {
                state.end = sys::io::entries(self.fd.as_fd(), &mut state.buffer)?;
                state.start = 0;
                if state.end == 0 {
                    return Ok(());
                }
            }
            let entry = HostDirent::parse(&state.buffer[state.start..state.end]).ok_or(Errno::EIO)?;
            if !give(&entry) {
                return Ok(());
            }
            state.position = entry.next;
            state.start += entry.length;
        }
    }
}

impl AsFd for OpenDirectory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All open handles; a number means one thing only, also after it is closed.
#[derive(Debug)]
pub struct Handles {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    files: HashMap<u64, Arc<OpenFile>>,
    directories: HashMap<u64, Arc<OpenDirectory>>,
    last: u64,
}

impl Handles {
    /// At most `limit` at once.
    pub fn new(limit: usize) -> Self {
        Self { limit, inner: Mutex::default() }
    }

    /// Adds an open file; ENFILE when there are too many.
    pub fn add_file(&self, file: Arc<OpenFile>) -> sys::Result<u64> {
        let mut inner = lock(&self.inner);
        let id = inner.next(self.limit)?;
        inner.files.insert(id, file);
        Ok(id)
    }

    /// Adds an open directory; ENFILE when there are too many.
    pub fn add_directory(&self, directory: OpenDirectory) -> sys::Result<u64> {
        let mut inner = lock(&self.inner);
        let id = inner.next(self.limit)?;
        inner.directories.insert(id, Arc::new(directory));
        Ok(id)
    }

    /// An open file; EBADF when there is none with that number.
    pub fn file(&self, id: u64) -> sys::Result<Arc<OpenFile>> {
        lock(&self.inner).files.get(&id).cloned().ok_or(Errno::EBADF)
    }

    /// An open directory; EBADF when there is none with that number.
    pub fn directory(&self, id: u64) -> sys::Result<Arc<OpenDirectory>> {
        lock(&self.inner).directories.get(&id).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a file.
    pub fn close_file(&self, id: u64) -> sys::Result<()> {
        let file = lock(&self.inner).files.remove(&id);
        file.map(drop).ok_or(Errno::EBADF)
    }

    /// Closes a directory.
    pub fn close_directory(&self, id: u64) -> sys::Result<()> {
        let directory = lock(&self.inner).directories.remove(&id);
        directory.map(drop).ok_or(Errno::EBADF)
    }

    /// Closes all.
    pub fn reset(&self) {
        let (files, directories) = {
            let mut inner = lock(&self.inner);
            (std::mem::take(&mut inner.files), std::mem::take(&mut inner.directories))
        };
        drop((files, directories));
    }
}

impl Inner {
    fn next(&mut self, limit: usize) -> sys::Result<u64> {
        if self.files.len() + self.directories.len() >= limit {
            return Err(Errno::ENFILE);
        }
        self.last += 1;
        Ok(self.last)
    }
}
