//! The FUSE server: takes one request, finds the operation, gives one reply. Nothing that a guest sends makes it panic or exit.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::resource::{Resource, getrlimit};
use zerocopy::{FromZeros, IntoBytes};

use crate::buffers::Buffers;
use crate::handles::Handles;
use crate::inode::Node;
use crate::names::Name;
use crate::sys::node::Statx;
use crate::sys::open::SelfFd;
use crate::sys::{self, Errno};
use crate::tree::{Limits, Tree};
use crate::wire::{Attr, Body, EntryOut, InHeader, OutHeader, WriteIn, encode_device, opcode};
use crate::worker::Worker;

/// Largest READ and WRITE: 256 pages of 4 KiB, which the kernel allows at most.
pub const MOST_DATA: usize = 1 << 20;
/// Largest body of any other request: an extended attribute of 64 KiB and its name, rounded up.
const MOST_BODY: usize = 128 << 10;
/// Descriptors that are kept for ourselves: sockets, guest memory, mounts' anchors, what one request opens.
const RESERVED_DESCRIPTORS: usize = 512;

/// Why a server could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// RLIMIT_NOFILE could not be read.
    #[error("Cannot read the limit of open files")]
    Limit(#[source] Errno),
    /// /proc/self/fd could not become the working directory.
    #[error("Cannot enter /proc/self/fd")]
    Own(#[source] Errno),
    /// The share's root could not be looked at.
    #[error("Cannot look at the share's root")]
    Root(#[source] Errno),
}

/// Serves one share to one guest, from any number of threads.
#[derive(Debug)]
pub struct Server {
    pub(crate) own: Arc<SelfFd>,
    pub(crate) tree: Tree,
    pub(crate) handles: Handles,
    pub(crate) ready: AtomicBool,
    /// Whether SETXATTR's longer form was agreed on.
    pub(crate) long_setxattr: AtomicBool,
}

/// A request of which the header is read.
pub(crate) struct Request<'a> {
    pub(crate) header: InHeader,
    pub(crate) body: Body<'a>,
    /// Bytes that the reply's payload may have.
    pub(crate) room: usize,
}

impl Request<'_> {
    /// The next structure of the body.
    pub(crate) fn take<T: zerocopy::FromBytes>(&mut self) -> sys::Result<T> {
        self.body.take().ok_or(Errno::EINVAL)
    }

    /// Who made it.
    pub(crate) fn caller(&self) -> (u32, u32) {
        (self.header.uid, self.header.gid)
    }
}

/// The next name of a body.
pub(crate) fn take_name<'a>(body: &mut Body<'a>) -> sys::Result<Name<'a>> {
    Name::new(body.take_string().ok_or(Errno::EINVAL)?)
}

impl Server {
    /// A server of what `root` (an O_PATH descriptor of a directory) holds. From here on the process's working directory is `own`.
    pub fn new(root: OwnedFd, own: SelfFd) -> Result<Self, ServerError> {
        own.enter().map_err(ServerError::Own)?;
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(ServerError::Limit)?;
        let free =
            usize::try_from(limit).unwrap_or(usize::MAX).min(1 << 20).saturating_sub(RESERVED_DESCRIPTORS).max(64);
        let limits = Limits { descriptors: free / 2, warm: (free / 8).min(4096) };
        let own = Arc::new(own);
        Ok(Self {
            tree: Tree::new(own.clone(), root, limits).map_err(ServerError::Root)?,
            own,
            handles: Handles::new(free / 4),
            ready: AtomicBool::new(false),
            long_setxattr: AtomicBool::new(false),
        })
    }

    /// Number of inodes that the guest knows.
    pub fn nodes(&self) -> usize {
        self.tree.len()
    }

    /// Serves the request in `input` and writes the reply to `output`; the reply's length, 0 for none.
    pub fn handle(&self, worker: &mut Worker, input: &Buffers<'_>, output: &Buffers<'_>) -> usize {
        let mut header = InHeader::new_zeroed();
        if input.copy_to(0, header.as_mut_bytes()) < size_of::<InHeader>() {
            // It has no number that a reply could name.
            return 0;
        }
        let mut reply = std::mem::take(&mut worker.reply);
        reply.clear();
        let written = match self.serve(worker, header, input, output, &mut reply) {
            Ok(Reply::None) => 0,
            Ok(Reply::Data(length)) => answer(output, header.unique, 0, &[], length),
            Ok(Reply::Payload) if reply.len() + size_of::<OutHeader>() <= output.len() => {
                answer(output, header.unique, 0, &reply, 0)
            }
            Ok(Reply::Payload) => answer(output, header.unique, Errno::EIO as i32, &[], 0),
            Err(errno) => answer(output, header.unique, errno as i32, &[], 0),
        };
        worker.reply = reply;
        written
    }

    fn serve(
        &self,
        worker: &mut Worker,
        header: InHeader,
        input: &Buffers<'_>,
        output: &Buffers<'_>,
        out: &mut Vec<u8>,
    ) -> sys::Result<Reply> {
        let length = (header.len as usize).min(input.len()).saturating_sub(size_of::<InHeader>());
        let is_write = header.opcode == opcode::WRITE;
        let taken = if is_write { length.min(size_of::<WriteIn>()) } else { length };
        if taken > MOST_BODY {
            return Err(Errno::EINVAL);
        }
        let mut bytes = std::mem::take(&mut worker.body);
        bytes.resize(taken, 0);
        input.copy_to(size_of::<InHeader>(), &mut bytes);
        let room = output.len().saturating_sub(size_of::<OutHeader>());
        let mut request = Request { header, body: Body::new(&bytes), room };
        let result = match header.opcode {
            _ if !self.ready.load(Ordering::Acquire) && header.opcode != opcode::INIT => Err(Errno::EIO),
            opcode::READ => self.read(&mut request, output).map(Reply::Data),
            opcode::WRITE => self.write(&mut request, input, length - taken, out).map(|()| Reply::Payload),
            opcode::FORGET | opcode::BATCH_FORGET => {
                self.forget(&mut request);
                Ok(Reply::None)
            }
            // Nothing is ever waited for in here that an interrupt could end.
            opcode::INTERRUPT => Ok(Reply::None),
            _ => self.dispatch(worker, &mut request, out).map(|()| Reply::Payload),
        };
        worker.body = bytes;
        result
    }

    /// Every operation whose reply is built in memory.
    fn dispatch(&self, worker: &mut Worker, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        match request.header.opcode {
            opcode::INIT => self.init(request, out),
            opcode::DESTROY => self.destroy(),
            opcode::STATFS => self.statfs(request, out),
            opcode::SYNCFS => self.tree.sync(),
            opcode::LOOKUP => self.lookup(request, out),
            opcode::GETATTR => self.getattr(request, out),
            opcode::STATX => self.statx(request, out),
            opcode::SETATTR => self.setattr(request, out),
            opcode::READLINK => self.readlink(request, out),
            opcode::SYMLINK => self.symlink(worker, request, out),
            opcode::MKNOD => self.mknod(worker, request, out),
            opcode::MKDIR => self.mkdir(worker, request, out),
            opcode::CREATE => self.create(worker, request, out),
            opcode::TMPFILE => self.tmpfile(worker, request, out),
            opcode::UNLINK => self.unlink(request, 0),
            opcode::RMDIR => self.unlink(request, libc::AT_REMOVEDIR),
            opcode::RENAME => self.rename(request),
            opcode::RENAME2 => self.rename2(request),
            opcode::LINK => self.link(request, out),
            opcode::OPEN => self.open(request, out),
            opcode::FLUSH => self.flush(request),
            opcode::RELEASE => self.release(request),
            opcode::FSYNC => self.fsync(request),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::LSEEK => self.lseek(request, out),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, out),
            opcode::OPENDIR => self.opendir(request, out),
            opcode::READDIR => self.readdir(request, out),
            opcode::READDIRPLUS => self.readdirplus(request, out),
            opcode::RELEASEDIR => self.releasedir(request),
            opcode::FSYNCDIR => self.fsyncdir(request),
            opcode::GETXATTR => self.getxattr(request, out),
            opcode::LISTXATTR => self.listxattr(request, out),
            opcode::SETXATTR => self.setxattr(request),
            opcode::REMOVEXATTR => self.removexattr(request),
            // ACCESS: the guest checks permissions itself. GETLK and its kin: locks live in the guest. POLL, IOCTL, BMAP, DAX: not here.
            // The kernel remembers the answer and does not ask again.
            _ => Err(Errno::ENOSYS),
        }
    }

    /// The node that a request is about.
    pub(crate) fn node(&self, request: &Request<'_>) -> sys::Result<Arc<Node>> {
        self.tree.get(request.header.nodeid)
    }
}

/// What goes back.
enum Reply {
    /// Nothing at all.
    None,
    /// The payload that was built in memory.
    Payload,
    /// So many bytes that are in the reply's place already.
    Data(usize),
}

/// Writes header and payload; `data` bytes behind the header are there already.
fn answer(output: &Buffers<'_>, unique: u64, errno: i32, payload: &[u8], data: usize) -> usize {
    let length = size_of::<OutHeader>() + payload.len() + data;
    if output.len() < length {
        return 0;
    }
    let header = OutHeader { len: length as u32, error: -errno, unique };
    output.copy_from(0, header.as_bytes());
    output.copy_from(size_of::<OutHeader>(), payload);
    length
}

/// The attributes of `node` for the guest.
pub(crate) fn attributes(node: &Node, stat: &Statx) -> Attr {
    Attr {
        ino: node.shown_inode(stat.stx_ino),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec as u64,
        mtime: stat.stx_mtime.tv_sec as u64,
        ctime: stat.stx_ctime.tv_sec as u64,
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// The entry of a directory for the guest.
pub(crate) fn entry(parent: &Node, node: &Node, stat: &Statx) -> EntryOut {
    let (name, attributes_hold) = (parent.policy.entry(node.kind), node.policy.attributes());
    EntryOut {
        nodeid: node.id,
        generation: 0,
        entry_valid: name.as_secs(),
        attr_valid: attributes_hold.as_secs(),
        entry_valid_nsec: name.subsec_nanos(),
        attr_valid_nsec: attributes_hold.subsec_nanos(),
        attr: attributes(node, stat),
    }
}
