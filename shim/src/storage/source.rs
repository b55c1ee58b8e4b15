//! What the source of a bind mount is on the host: most are files and directories, which virtio-fs shows to the guest; what only means
//! something in the host's kernel is told apart here.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::libc::{major, minor};
use nix::sys::statfs::{HUGETLBFS_MAGIC, Statfs, statfs};

/// A bind mount's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A file, or what can't be looked at: the mount itself will say why.
    File,
    /// A directory.
    Directory,
    /// A unix socket: its other end is a process of the host.
    Socket,
    /// A FIFO: so is its.
    Fifo,
    /// A character device.
    Character {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block,
    /// A directory of hugetlbfs, whose pages are the host's.
    HugePages(HugePages),
}

/// A hugetlbfs of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HugePages {
    /// Tells one file system from another while the pod lives.
    pub(crate) device: u64,
    /// Bytes of a page.
    pub(crate) page_size: u64,
    /// Most bytes in it; 0: no limit.
    pub(crate) size: u64,
    /// Permissions, owner and group of the source.
    pub(crate) mode: u32,
    /// See `mode`.
    pub(crate) uid: u32,
    /// See `mode`.
    pub(crate) gid: u32,
}

impl Source {
    /// Looks at `path`, through links.
    pub(crate) fn of(path: &Path) -> Self {
        let Ok(found) = fs::metadata(path) else { return Self::File };
        let kind = found.file_type();
        if kind.is_dir() {
            return match statfs(path) {
                Ok(figures) if figures.filesystem_type() == HUGETLBFS_MAGIC => {
                    Self::HugePages(huge_pages(&figures, &found))
                }
                _ => Self::Directory,
            };
        }
        if kind.is_socket() {
            Self::Socket
        } else if kind.is_fifo() {
            Self::Fifo
        } else if kind.is_char_device() {
            Self::Character { major: major(found.rdev()), minor: minor(found.rdev()) }
        } else if kind.is_block_device() {
            Self::Block
        } else {
            Self::File
        }
    }
}

/// hugetlbfs tells its page size as the block size, and its size only if it has one (fs/hugetlbfs/inode.c, hugetlbfs_statfs).
fn huge_pages(figures: &Statfs, found: &Metadata) -> HugePages {
    let page_size = u64::try_from(figures.block_size()).unwrap_or(0);
    HugePages {
        device: found.dev(),
        page_size,
        size: figures.blocks().saturating_mul(page_size),
        mode: found.mode(),
        uid: found.uid(),
        gid: found.gid(),
    }
}

/// The mount points of the shim's namespace, for questions about what lies below a source (proc_pid_mountinfo(5)).
#[derive(Debug, Default)]
pub(crate) struct MountPoints(Option<Vec<PathBuf>>);

impl MountPoints {
    /// Whether something is mounted below `directory`. The table is read with the first question.
    pub(crate) fn below(&mut self, directory: &Path) -> bool {
        let points = self.0.get_or_insert_with(|| {
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect()
        });
        // The table has no links in it.
        let Ok(directory) = fs::canonicalize(directory) else { return false };
        points.iter().any(|point| point.starts_with(&directory) && *point != directory)
    }
}

/// Undoes mountinfo's octal escapes.
fn unescape(text: &str) -> PathBuf {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\").into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn tells_kinds_apart() {
        let directory = std::env::temp_dir().join(format!("husk-source-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        nix::unistd::mkfifo(&directory.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("socket", directory.join("link")).unwrap();
        assert_eq!(Source::of(&directory), Source::Directory);
        assert_eq!(Source::of(&socket), Source::Socket);
        assert_eq!(Source::of(&directory.join("link")), Source::Socket);
        assert_eq!(Source::of(&directory.join("fifo")), Source::Fifo);
        assert_eq!(Source::of(&directory.join("absent")), Source::File);
        assert_eq!(Source::of(Path::new("/dev/null")), Source::Character { major: 1, minor: 3 });
        assert_eq!(Source::of(Path::new("/etc/passwd")), Source::File);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn knows_what_is_mounted_below() {
        let mut points = MountPoints::default();
        assert!(points.below(Path::new("/")));
        assert!(!points.below(Path::new("/proc/self/fdinfo")));
        assert!(!points.below(Path::new("/no/such/directory")));
    }
}
