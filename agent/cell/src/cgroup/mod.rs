//! One container's cgroup (v2 only, Documentation/admin-guide/cgroup-v2.rst).

mod devices;
mod files;
mod limits;
mod stats;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use crate::CgroupError;
pub use stats::{HugetlbStat, IoStat, Stats};

/// Where the guest's cgroup2 hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// A container may nest cgroups in its own; deeper or more is refused when they are walked.
const MAX_DEPTH: usize = 32;
const MAX_CGROUPS: usize = 65536;
const MAX_PIDS: usize = 1 << 22;

/// A cgroup by its directory.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup (a plain name below `root`) whose children get every controller. One that is there already is fine.
    pub fn parent(root: &Path, name: &str) -> Result<Self, CgroupError> {
        let path = root.join(name);
        enable_controllers(root)?;
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(files::error("create", &path)(error));
            }
            _ => {}
        }
        enable_controllers(&path)?;
        Ok(Self { path })
    }

    /// Makes `path` (the spec's cgroupsPath: absolute, below `root`, no dots) and switches the controllers on for it. One that is there
    /// already is replaced if it has no process, else it is an error.
    pub fn create(root: &Path, path: &str) -> Result<Self, CgroupError> {
        let names = names(path)?;
        let mut directory = root.to_owned();
        for (index, name) in names.iter().enumerate() {
            enable_controllers(&directory)?;
            directory.push(name);
            match fs::create_dir(&directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if index + 1 == names.len() {
                        let old = Self { path: directory.clone() };
                        if old.event("populated")? {
                            return Err(CgroupError::Invalid(format!("{} has processes already", directory.display())));
                        }
                        old.remove_tree()?;
                        fs::create_dir(&directory).map_err(files::error("create", &directory))?;
                    }
                }
                other => other.map_err(files::error("create", &directory))?,
            }
        }
        Ok(Self { path: directory })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets the limits that are given; the others stay. Also for UpdateContainer. Devices are not touched.
    pub fn set(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        limits::apply(&self.path, resources)
    }

    /// Denies all devices but those of `rules` (the last match wins) and what every container needs: to make nodes, the memory
    /// devices, terminals. Once, at creation.
    pub fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<(), CgroupError> {
        devices::restrict(&self.path, rules)
    }

    /// SIGKILL to every process, those of cgroups below included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        files::write(&self.path, "cgroup.kill", "1")
    }

    /// Freezes and waits until all is frozen (blocks, at most `limit`); thaws again if that takes too long.
    pub fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        files::write(&self.path, "cgroup.freeze", "1")?;
        let frozen = self.wait_for("frozen", true, "frozen", limit);
        if frozen.is_err() {
            files::write(&self.path, "cgroup.freeze", "0")?;
        }
        frozen
    }

    /// Thaws and waits for it (blocks, at most `limit`).
    pub fn thaw(&self, limit: Duration) -> Result<(), CgroupError> {
        files::write(&self.path, "cgroup.freeze", "0")?;
        self.wait_for("frozen", false, "thawed", limit)
    }

    /// All pids, of the cgroups below too, as the agent sees them.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for cgroup in self.tree()? {
            match files::read(&cgroup, "cgroup.procs") {
                Ok(text) => {
                    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|&pid| pid != 0))
                }
                // Removed meanwhile, or a threaded one, whose processes are listed above it.
                Err(error) if files::is_any(&error, &[Errno::ENOENT, Errno::ENODEV, Errno::EOPNOTSUPP]) => {}
                Err(error) => return Err(error),
            }
            if pids.len() > MAX_PIDS {
                return Err(CgroupError::Invalid(format!("{} has too many processes", self.path.display())));
            }
        }
        Ok(pids)
    }

    /// The figures for StatsContainer.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        stats::read(&self.path)
    }

    /// `memory.events` opened for poll (POLLPRI wakes at each change: `AsyncFd` with `Interest::PRIORITY`): `oom_kill` counts the processes
    /// of the cgroup and of those below that the OOM killer took.
    pub fn watch_memory(&self) -> Result<EventsWatch, CgroupError> {
        EventsWatch::open(self.path.join("memory.events"))
    }

    /// `memory.events.local` likewise, which counts what this cgroup's own limits did: `high` each time that its memory.high was passed.
    pub fn watch_own_memory(&self) -> Result<EventsWatch, CgroupError> {
        EventsWatch::open(self.path.join("memory.events.local"))
    }

    /// Bytes charged to it and those below that reclaim can't get: all but file pages and reclaimable slab (cgroup-v2.rst, memory.stat).
    pub fn memory_held(&self) -> Result<u64, CgroupError> {
        stats::held(&self.path)
    }

    /// Sets memory.high, bytes; none: no such mark. Where more is in use, this blocks while the kernel takes it back.
    pub fn set_memory_high(&self, mark: Option<u64>) -> Result<(), CgroupError> {
        files::write(&self.path, "memory.high", &mark.map_or_else(|| "max".to_owned(), |mark| mark.to_string()))
    }

    /// Waits until no process is left (blocks, at most `limit`) and removes it with all below. Absent is success.
    pub fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.wait_for("populated", false, "empty", limit)?;
        self.remove_tree()
    }

    fn remove_tree(&self) -> Result<(), CgroupError> {
        // Outer ones come first in the tree, so the other way round.
        for cgroup in self.tree()?.iter().rev() {
            match fs::remove_dir(cgroup) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(files::error("remove", cgroup)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// This cgroup and all below, outer ones first.
    fn tree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut found = vec![(self.path.clone(), 0)];
        let mut next = 0;
        while let Some((path, depth)) = found.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&path) {
                Err(error) if next > 1 && error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(files::error("list", &path))?,
            };
            for entry in entries {
                let entry = entry.map_err(files::error("list", &path))?;
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    found.push((entry.path(), depth + 1));
                }
            }
            if depth >= MAX_DEPTH || found.len() > MAX_CGROUPS {
                return Err(CgroupError::Invalid(format!("{} has too many cgroups below", self.path.display())));
            }
        }
        Ok(found.into_iter().map(|(path, _)| path).collect())
    }

    fn event(&self, key: &str) -> Result<bool, CgroupError> {
        let text = files::read(&self.path, "cgroup.events")?;
        Ok(stats::lookup(&text, key) == Some(1))
    }

    /// Waits until a line of cgroup.events is so; the file wakes its pollers at each change.
    fn wait_for(&self, key: &str, wanted: bool, awaited: &'static str, limit: Duration) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let file = File::open(&path).map_err(files::error("open", &path))?;
        let deadline = Instant::now() + limit;
        loop {
            let text = files::read_open(&file).map_err(files::error("read", &path))?;
            if (stats::lookup(&text, key) == Some(1)) == wanted {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::Deadline { path: self.path.clone(), awaited, limit });
            }
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(files::error("wait for", &path)(errno.into())),
            }
        }
    }
}

/// A file of counted events.
#[derive(Debug)]
pub struct EventsWatch {
    file: File,
    path: PathBuf,
}

impl EventsWatch {
    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let file = File::open(&path).map_err(files::error("open", &path))?;
        Ok(Self { file, path })
    }

    /// How often the event has happened. Reading re-arms the poll.
    pub fn count(&self, event: &str) -> Result<u64, CgroupError> {
        let text = files::read_open(&self.file).map_err(files::error("read", &self.path))?;
        Ok(stats::lookup(&text, event).unwrap_or(0))
    }
}

impl AsRawFd for EventsWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for EventsWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The names of a cgroupsPath.
fn names(path: &str) -> Result<Vec<&str>, CgroupError> {
    let invalid =
        || CgroupError::Invalid(format!("path \"{}\" is not an absolute one below the root", path.escape_debug()));
    if !path.starts_with('/') {
        return Err(invalid());
    }
    let mut names = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => names.push(name.to_str().ok_or_else(invalid)?),
            _ => return Err(invalid()),
        }
    }
    // A name with a dot after a controller's or "cgroup" would be one of the kernel's files.
    let file = |name: &&str| name.starts_with("cgroup.") || name.contains('\0');
    if names.is_empty() || names.len() > MAX_DEPTH || names.iter().any(file) {
        return Err(invalid());
    }
    Ok(names)
}

/// Gives the cgroups below `directory` all controllers that it has.
fn enable_controllers(directory: &Path) -> Result<(), CgroupError> {
    let available = files::read(directory, "cgroup.controllers")?;
    let enabled = files::read(directory, "cgroup.subtree_control")?;
    let missing = available.split_whitespace().filter(|name| !enabled.split_whitespace().any(|e| e == *name));
    let words: Vec<_> = missing.map(|name| format!("+{name}")).collect();
    if words.is_empty() { Ok(()) } else { files::write(directory, "cgroup.subtree_control", &words.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(names("/kubepods/pod1/c1").unwrap(), ["kubepods", "pod1", "c1"]);
        assert_eq!(names("//a/./b/").unwrap(), ["a", "b"]);
        for path in ["", "/", "a", "/a/../b", "/..", "/cgroup.procs", "system.slice:cri:abc"] {
            assert!(names(path).is_err(), "{path}");
        }
    }
}
