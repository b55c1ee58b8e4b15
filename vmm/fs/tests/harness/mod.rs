//! A guest for the server's tests: sends FUSE requests from plain memory and reads the replies, with no virtio between.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)] // Each test binary uses a part of it.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use husk_fs::buffers::Buffers;
use husk_fs::server::Server;
use husk_fs::sys::open::{SelfFd, directory_path};
use husk_fs::wire::{
    AttrOut, CreateIn, EntryOut, GetattrIn, InHeader, InitIn, InitOut, MkdirIn, OpenIn, OpenOut, OutHeader, ReadIn,
    ReleaseIn, WriteIn, WriteOut, opcode,
};
use husk_fs::worker::Worker;
use tempfile::TempDir;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The reply to a request: the payload, or the errno.
pub type Reply = Result<Vec<u8>, i32>;

pub struct Guest {
    pub server: Server,
    pub worker: Worker,
    pub caller: (u32, u32),
    /// Where the share is on the host.
    pub share: PathBuf,
    unique: u64,
    _directory: TempDir,
}

/// Bytes of a structure.
pub fn bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// A name with its NUL.
pub fn name(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

/// The structure at the front of a reply.
pub fn parse<T: FromBytes>(reply: &[u8]) -> T {
    T::read_from_prefix(reply).unwrap().0
}

impl Guest {
    /// A guest of an empty directory, after INIT.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let share = directory.path().to_owned();
        Self::at(directory, share)
    }

    pub fn at(directory: TempDir, share: PathBuf) -> Self {
        let mut guest = Self::before_init(directory, share);
        guest.init();
        guest
    }

    pub fn before_init(directory: TempDir, share: PathBuf) -> Self {
        let root: OwnedFd = directory_path(&CString::new(share.to_str().unwrap()).unwrap()).unwrap();
        let server = Server::new(root, SelfFd::open().unwrap()).unwrap();
        let worker = Worker::new().unwrap();
        Self { server, worker, caller: (0, 0), share, unique: 0, _directory: directory }
    }

    pub fn init(&mut self) -> InitOut {
        let mut body = bytes(&InitIn { major: 7, minor: 41, max_readahead: 1 << 20, flags: !(1 << 31) });
        body.extend_from_slice(&[0xff; 4]);
        body.extend_from_slice(&[0; 44]);
        parse(&self.call(opcode::INIT, 0, &body).unwrap())
    }

    /// Sends raw bytes in pieces of `piece` bytes, with `room` bytes for the reply; what came back.
    pub fn raw(&mut self, request: &[u8], room: usize, piece: usize) -> Vec<u8> {
        let mut request = request.to_vec();
        let mut reply = vec![0xaa; room];
        let mut input = Buffers::new();
        for part in request.chunks_mut(piece) {
            input.push(VolatileSlice::from(part));
        }
        let mut output = Buffers::new();
        for part in reply.chunks_mut(piece) {
            output.push(VolatileSlice::from(part));
        }
        let written = self.server.handle(&mut self.worker, &input, &output);
        assert!(written <= room);
        reply.truncate(written);
        reply
    }

    pub fn header(&mut self, opcode: u32, nodeid: u64, body: usize) -> InHeader {
        self.unique += 2;
        InHeader {
            len: (size_of::<InHeader>() + body) as u32,
            opcode,
            unique: self.unique,
            nodeid,
            uid: self.caller.0,
            gid: self.caller.1,
            pid: 1,
            ..InHeader::default()
        }
    }

    pub fn call_with_room(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Reply {
        let header = self.header(opcode, nodeid, body.len());
        let mut request = bytes(&header);
        request.extend_from_slice(body);
        let reply = self.raw(&request, 16 + room, 4096);
        if reply.is_empty() {
            return Err(0);
        }
        let out: OutHeader = parse(&reply);
        assert_eq!(out.unique, header.unique);
        assert_eq!(out.len as usize, reply.len());
        assert!(out.error <= 0);
        if out.error != 0 {
            assert_eq!(reply.len(), 16);
            return Err(-out.error);
        }
        Ok(reply[16..].to_vec())
    }

    pub fn call(&mut self, opcode: u32, nodeid: u64, body: &[u8]) -> Reply {
        self.call_with_room(opcode, nodeid, body, 128 << 10)
    }

    /// A structure, then names.
    pub fn with<T: IntoBytes + Immutable>(&mut self, opcode: u32, nodeid: u64, head: &T, names: &[&str]) -> Reply {
        let mut body = bytes(head);
        for each in names {
            body.extend(name(each));
        }
        self.call(opcode, nodeid, &body)
    }

    pub fn lookup(&mut self, parent: u64, child: &str) -> Result<EntryOut, i32> {
        self.call(opcode::LOOKUP, parent, &name(child)).map(|reply| parse(&reply))
    }

    /// Looks a path up from the root, name by name.
    pub fn walk(&mut self, path: &str) -> Result<EntryOut, i32> {
        let mut entry = EntryOut { nodeid: 1, ..EntryOut::default() };
        for part in path.split('/') {
            entry = self.lookup(entry.nodeid, part)?;
        }
        Ok(entry)
    }

    pub fn getattr(&mut self, node: u64) -> Result<AttrOut, i32> {
        self.with(opcode::GETATTR, node, &GetattrIn::default(), &[]).map(|reply| parse(&reply))
    }

    pub fn mkdir(&mut self, parent: u64, child: &str, mode: u32) -> Result<EntryOut, i32> {
        self.with(opcode::MKDIR, parent, &MkdirIn { mode, umask: 0o022 }, &[child]).map(|reply| parse(&reply))
    }

    pub fn create(&mut self, parent: u64, child: &str, flags: i32, mode: u32) -> Result<(EntryOut, OpenOut), i32> {
        let head = CreateIn { flags: flags as u32, mode, umask: 0o022, open_flags: 0 };
        self.with(opcode::CREATE, parent, &head, &[child]).map(|reply| (parse(&reply), parse(&reply[128..])))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<OpenOut, i32> {
        self.with(opcode::OPEN, node, &OpenIn { flags: flags as u32, open_flags: 0 }, &[]).map(|reply| parse(&reply))
    }

    pub fn opendir(&mut self, node: u64) -> Result<OpenOut, i32> {
        self.with(opcode::OPENDIR, node, &OpenIn::default(), &[]).map(|reply| parse(&reply))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply {
        let head = ReadIn { fh, offset, size, ..ReadIn::default() };
        self.call_with_room(opcode::READ, node, &bytes(&head), size as usize)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8], write_flags: u32) -> Result<u32, i32> {
        self.write_with(node, WriteIn { fh, offset, write_flags, ..WriteIn::default() }, data)
    }

    pub fn write_with(&mut self, node: u64, head: WriteIn, data: &[u8]) -> Result<u32, i32> {
        let mut body = bytes(&WriteIn { size: data.len() as u32, ..head });
        body.extend_from_slice(data);
        self.call(opcode::WRITE, node, &body).map(|reply| parse::<WriteOut>(&reply).size)
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Reply {
        self.with(opcode::RELEASE, node, &ReleaseIn { fh, ..ReleaseIn::default() }, &[])
    }

    /// Number of nodes that the server knows.
    pub fn server_nodes(&self) -> usize {
        self.server.nodes()
    }

    /// A path on the host.
    pub fn host(&self, path: &str) -> PathBuf {
        self.share.join(path)
    }
}

/// Gives the calling thread a mount namespace of its own.
pub fn own_mounts() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

pub fn bind(from: &Path, to: &Path, readonly: bool) {
    use nix::mount::{MsFlags, mount};
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    if readonly {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, to, None::<&str>, flags, None::<&str>).unwrap();
    }
}

/// Mounts an overlay of fresh directories in `base` at `to`; the lower directory.
pub fn overlay(base: &Path, to: &Path) -> PathBuf {
    use nix::mount::{MsFlags, mount};
    for part in ["lower", "upper", "work"] {
        std::fs::create_dir(base.join(part)).unwrap();
    }
    std::fs::create_dir_all(to).unwrap();
    let at = base.display();
    let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
    mount(Some("overlay"), to, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    base.join("lower")
}
