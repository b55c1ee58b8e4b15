//! Mappings of user and group ids for mounts: a user namespace that holds the mapping, and the mount attribute that takes it
//! (mount_setattr(2), "ID-mapped mounts"; Linux 5.12 and later, overlayfs over such layers 5.19).

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxIdMapping;

use super::{StorageError, step};

/// Most lines of a map (kernel: UID_GID_MAP_MAX_EXTENTS).
const MAX_LINES: usize = 340;

/// One line of a map: ids from `inside` on are those from `outside` on, `size` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    /// First id in the container, and on the disk.
    pub(crate) inside: u32,
    /// First id outside of it.
    pub(crate) outside: u32,
    /// How many.
    pub(crate) size: u32,
}

/// The ids of users and groups.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IdMap {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl IdMap {
    /// A map; nothing if it has no line, too many, or a line that is empty or goes beyond 32 bits.
    pub(crate) fn new(uids: Vec<Range>, gids: Vec<Range>) -> Option<Self> {
        let fits = |range: &Range| {
            range.size > 0
                && range.inside.checked_add(range.size - 1).is_some()
                && range.outside.checked_add(range.size - 1).is_some()
        };
        let good = |ranges: &[Range]| (1..=MAX_LINES).contains(&ranges.len()) && ranges.iter().all(fits);
        (good(&uids) && good(&gids)).then_some(Self { uids, gids })
    }

    /// A map of an OCI spec.
    pub(crate) fn of_spec(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Option<Self> {
        let ranges = |lines: &[LinuxIdMapping]| {
            let range = |line: &LinuxIdMapping| Range {
                inside: line.container_id(),
                outside: line.host_id(),
                size: line.size(),
            };
            lines.iter().map(range).collect()
        };
        Self::new(ranges(uids), ranges(gids))
    }

    /// A map as in containerd's mount options `uidmap=` and `gidmap=`: `inside:outside:size`, more after commas.
    pub(crate) fn of_options(uids: &str, gids: &str) -> Option<Self> {
        Self::new(parse(uids)?, parse(gids)?)
    }

    /// The lines about users.
    pub(crate) fn uids(&self) -> &[Range] {
        &self.uids
    }

    /// The lines about groups.
    pub(crate) fn gids(&self) -> &[Range] {
        &self.gids
    }

    /// Whether id 0 is somebody, as a user and as a group.
    pub(crate) fn has_root(&self) -> bool {
        let has = |ranges: &[Range]| ranges.iter().any(|range| range.inside == 0);
        has(&self.uids) && has(&self.gids)
    }

    /// Makes a user namespace with this map. No process is left in it.
    pub(crate) fn namespace(&self) -> Result<OwnedFd, Error> {
        let (pid, pidfd) = clone_into_user_namespace()?;
        // The child waits to be killed, so the pid is its.
        let made = fs::write(format!("/proc/{pid}/uid_map"), text(&self.uids))
            .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), text(&self.gids)))
            .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        // It has no exit signal, so nobody else reaps it.
        waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::__WALL)?;
        Ok(made?.into())
    }
}

fn parse(list: &str) -> Option<Vec<Range>> {
    list.split(',')
        .take(MAX_LINES + 1)
        .map(|line| {
            let mut numbers = line.split(':').map(str::parse);
            let (inside, outside, size) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
            numbers.next().is_none().then_some(Range { inside, outside, size })
        })
        .collect()
}

/// As in /proc/PID/uid_map (user_namespaces(7)).
fn text(ranges: &[Range]) -> String {
    ranges.iter().fold(String::new(), |mut text, Range { inside, outside, size }| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{inside} {outside} {size}");
        text
    })
}

/// A child in a new user namespace that does nothing until it is killed, or our thread ends; its pid and a descriptor of it.
fn clone_into_user_namespace() -> Result<(i32, OwnedFd), Error> {
    let mut pidfd: RawFd = -1;
    let flags = libc::CLONE_NEWUSER | libc::CLONE_PIDFD;
    // SAFETY: clone(2) without CLONE_VM and with a null stack is a fork. The child consists of a copy of this thread and calls nothing
    // but prctl(2) and pause(2), which need no lock that another thread may have held.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0);
        if pid == 0 {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            loop {
                libc::syscall(libc::SYS_pause);
            }
        }
        pid
    };
    match i32::try_from(pid) {
        // SAFETY: clone succeeded with CLONE_PIDFD, so it stored a descriptor that is ours.
        Ok(pid) if pid > 0 => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(Error::last_os_error()),
    }
}

/// How the ids of a mount are mapped.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// The user namespace that holds the map.
    pub(crate) namespace: Arc<OwnedFd>,
    /// Also of the mounts below it.
    pub(crate) recursive: bool,
}

/// User namespaces of maps, each made once: making one takes a process.
#[derive(Debug, Default)]
pub(crate) struct Namespaces<'a>(HashMap<&'a IdMap, Arc<OwnedFd>>);

impl<'a> Namespaces<'a> {
    /// How `map` is applied to the mount of `source`.
    pub(crate) fn map(&mut self, map: &'a IdMap, recursive: bool, source: &Path) -> Result<Mapped, StorageError> {
        let namespace = match self.0.get(map) {
            Some(namespace) => Arc::clone(namespace),
            None => {
                let name = source.display().to_string();
                let made = map.namespace().map_err(step(&name, source, "make a user namespace of its mappings"))?;
                Arc::clone(self.0.entry(map).or_insert(Arc::new(made)))
            }
        };
        Ok(Mapped { namespace, recursive })
    }
}

/// Maps the ids of a detached mount.
pub(super) fn apply(tree: &impl AsFd, Mapped { namespace, recursive }: &Mapped) -> Result<(), Error> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        // Descriptors are never negative.
        userns_fd: namespace.as_raw_fd() as u64,
    };
    super::volume::set_attr(tree, &attributes, *recursive).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => {
            Error::new(ErrorKind::Unsupported, "this host's kernel cannot map the user ids of that file system's files")
        }
        _ => error,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn reads_containerds_options() {
        let map = IdMap::of_options("0:1000:65536", "0:2000:10,10:9000:5").unwrap();
        assert_eq!(map.uids, [Range { inside: 0, outside: 1000, size: 65536 }]);
        assert_eq!(map.gids[1], Range { inside: 10, outside: 9000, size: 5 });
        assert_eq!(text(&map.gids), "0 2000 10\n10 9000 5\n");
        let many = vec!["0:0:1"; MAX_LINES + 1].join(",");
        for bad in ["", "0:1000", "0:1000:1:1", "0:1000:0", "0:-1:5", "1:4294967295:2", "0:1:a", many.as_str()] {
            assert_eq!(IdMap::of_options(bad, "0:0:1"), None, "{bad}");
            assert_eq!(IdMap::of_options("0:0:1", bad), None, "{bad}");
        }
    }

    #[test]
    fn makes_namespaces_and_leaves_no_process() {
        let map = IdMap::of_options("0:1000:10", "0:1000:10").unwrap();
        let namespaces: Vec<_> = (0..5).map(|_| map.namespace().unwrap()).collect();
        let inode = |fd: &OwnedFd| fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino();
        assert_ne!(inode(&namespaces[0]), fs::metadata("/proc/self/ns/user").unwrap().ino());
        let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        assert_eq!(children, "", "processes are left");
    }

    #[test]
    fn a_map_has_one_namespace() {
        let (one, other) = (IdMap::of_options("0:1:1", "0:1:1").unwrap(), IdMap::of_options("0:2:1", "0:1:1").unwrap());
        let mut namespaces = Namespaces::default();
        let mut map = |map| namespaces.map(map, false, Path::new("/")).unwrap().namespace;
        let (first, second, third) = (map(&one), map(&other), map(&one));
        assert!(Arc::ptr_eq(&first, &third) && !Arc::ptr_eq(&first, &second));
    }

    #[test]
    fn a_map_that_the_kernel_refuses_leaves_no_process() {
        // Two lines about the same ids.
        let map = IdMap::of_options("0:1000:10,5:2000:10", "0:1000:10").unwrap();
        assert!(map.namespace().is_err());
    }
}
