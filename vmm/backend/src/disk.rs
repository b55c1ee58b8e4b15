//! A disk's bytes on the host: a regular file or a block device, as a descriptor. Every call here may wait for the host's storage, so
//! disks are served by threads of their own.
//!
//! Plain preadv(2) and pwritev(2) on a thread a queue, and not io_uring: many hosts switch that off (kernel.io_uring_disabled), and
//! what is asked of a ring passes no seccomp filter, so a VMM that was taken over would have its jail's widest hole there.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use vm_memory::VolatileSlice;

use crate::vectored;

// linux/fs.h
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Smallest unit of a virtio disk in bytes (virtio 1.2, 5.2.4).
const SECTOR: u32 = 512;
/// Largest block that is believed (Linux's own limit is a page until 6.15, larger since).
const MAX_BLOCK: u32 = 64 << 10;

/// An open file or block device.
#[derive(Debug)]
pub struct Disk {
    file: File,
    is_device: bool,
    read_only: bool,
    len: u64,
    logical_block: u32,
    physical_block: u32,
}

/// Why a descriptor can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Neither regular file nor block device.
    #[error("The descriptor is neither a regular file nor a block device")]
    Kind,
    /// Opened for reading, or not even that.
    #[error("The file is open for too little: the disk is to be {0}")]
    Access(&'static str),
    /// Less than a sector.
    #[error("The disk has {0} bytes, which is less than a sector")]
    Small(u64),
    /// A question to the kernel.
    #[error("Could not {doing} of the disk")]
    Ask {
        /// Which.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Disk {
    /// Takes the descriptor, and the length that it has now. A read-only disk is never written, however its file is open.
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, DiskError> {
        let ask = |doing| move |source| DiskError::Ask { doing, source };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|error| ask("learn the access")(error.into()))?;
        let access = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE;
        if read_only && access == OFlag::O_WRONLY || !read_only && access != OFlag::O_RDWR {
            return Err(DiskError::Access(if read_only { "read" } else { "read and written" }));
        }
        let mut file = File::from(fd);
        let kind = file.metadata().map_err(ask("learn the type"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        // For a block device, too; its inode has no length.
        let len = file.seek(SeekFrom::End(0)).map_err(ask("learn the length"))?;
        if len < SECTOR.into() {
            return Err(DiskError::Small(len));
        }
        let mut disk = Self {
            file,
            is_device: kind.is_block_device(),
            read_only,
            len,
            logical_block: SECTOR,
            // A page of the host's cache.
            physical_block: 4096,
        };
        if disk.is_device {
            disk.logical_block = disk.block_size(BLKSSZGET).map_err(ask("learn the logical block size"))?;
            disk.physical_block = disk.block_size(BLKPBSZGET).map_err(ask("learn the physical block size"))?;
        }
        Ok(disk)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a disk has at least a sector.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it must not be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Smallest unit of access in bytes, a power of two.
    pub fn logical_block(&self) -> u32 {
        self.logical_block
    }

    /// Smallest unit that is written without reading it first, in bytes, a power of two.
    pub fn physical_block(&self) -> u32 {
        self.physical_block
    }

    /// Reads into the slices from `offset` on, once: the number of bytes.
    pub fn read_at(&self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        vectored::preadv(self.file.as_fd(), slices, position(offset)?)
    }

    /// Writes the slices from `offset` on, once: the number of bytes.
    pub fn write_at(&self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        vectored::pwritev(self.file.as_fd(), slices, position(offset)?)
    }

    /// Returns when everything written is on the medium.
    pub fn flush(&self) -> io::Result<()> {
        Ok(nix::unistd::fdatasync(&self.file)?)
    }

    /// Gives the range's storage back; what it holds afterwards is undefined. An error of kind `Unsupported` where the host can't.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device { self.range_ioctl(BLKDISCARD, offset, len) } else { self.punch(offset, len) }
    }

    /// Makes the range zeroes; `unmap`: its storage may be given back.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.is_device {
            return self.range_ioctl(BLKZEROOUT, offset, len);
        }
        if !unmap {
            let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match supported(fallocate(&self.file, flags, position(offset)?, position(len)?)) {
                // tmpfs and others know holes only, which read as zeroes as well.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => return other,
            }
        }
        self.punch(offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        supported(fallocate(&self.file, flags, position(offset)?, position(len)?))
    }

    fn block_size(&self, request: libc::c_ulong) -> io::Result<u32> {
        let mut size: libc::c_uint = 0;
        // SAFETY: BLKSSZGET and BLKPBSZGET write one int, which lives until the call returns.
        Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), request, &mut size) })?;
        if !size.is_power_of_two() || !(SECTOR..=MAX_BLOCK).contains(&size) {
            return Err(io::Error::other(format!("a block of {size} bytes")));
        }
        Ok(size)
    }

    fn range_ioctl(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: BLKDISCARD and BLKZEROOUT read two 64-bit numbers, which live until the call returns.
        supported(Errno::result(unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) }).map(drop))
    }
}

/// The kernel's words for "can't do that here" as one kind.
fn supported(outcome: nix::Result<()>) -> io::Result<()> {
    match outcome {
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS) => Err(io::ErrorKind::Unsupported.into()),
        other => Ok(other?),
    }
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn file(len: u64) -> File {
        let file = File::from(nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn reads_writes_and_gives_storage_back() {
        let backing = file(1 << 20);
        let disk = Disk::new(backing.try_clone().unwrap().into(), false).unwrap();
        assert_eq!((disk.len(), disk.logical_block(), disk.is_read_only()), (1 << 20, 512, false));
        let mut data = vec![7u8; 8192];
        let slices = [VolatileSlice::from(&mut data[..])];
        assert_eq!(disk.write_at(&slices, 4096).unwrap(), 8192);
        disk.flush().unwrap();
        let blocks = backing.metadata().unwrap().blocks();
        disk.discard(4096, 4096).unwrap();
        assert!(backing.metadata().unwrap().blocks() < blocks);
        disk.write_zeroes(8192, 512, false).unwrap();
        let mut back = vec![1u8; 1024];
        backing.read_exact_at(&mut back, 8192).unwrap();
        assert!(back[..512].iter().all(|byte| *byte == 0) && back[512..].iter().all(|byte| *byte == 7));
        assert_eq!(disk.read_at(&slices, 1 << 20).unwrap(), 0);
        assert!(disk.read_at(&slices, u64::MAX).is_err());
    }

    #[test]
    fn refuses_what_is_no_disk() {
        let (_read, write) = std::io::pipe().unwrap();
        assert!(matches!(Disk::new(write.into(), true), Err(DiskError::Access(_))));
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        assert!(matches!(Disk::new(null.into(), false), Err(DiskError::Kind)));
        assert!(matches!(Disk::new(file(511).into(), false), Err(DiskError::Small(511))));
        let mut named = tempfile(b"x");
        named.write_all(&[0; 4096]).unwrap();
        let path = format!("/proc/self/fd/{}", named.as_raw_fd());
        let readable = File::open(path).unwrap();
        assert!(matches!(Disk::new(readable.try_clone().unwrap().into(), false), Err(DiskError::Access(_))));
        assert!(Disk::new(readable.into(), true).unwrap().is_read_only());
    }

    fn tempfile(content: &[u8]) -> File {
        let mut file = file(0);
        file.write_all(content).unwrap();
        file
    }
}
