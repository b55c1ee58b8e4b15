//! The pod's cgroup on the host, v1, v2 or hybrid (cgroups(7)): made directly as directories, joined by the shim so that all of
//! the pod's host processes are born in it. No limits are set: the cluster's are on the parent, the pod's own cgroup.

mod stats;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// Most bytes of a cgroup path.
const MAX_PATH: usize = 4096;

/// v2 controllers whose figures are wanted of a pod. Each one more costs time at the pod's start.
const DELEGATED: [&str; 4] = ["cpu", "memory", "io", "pids"];

/// The directories of a pod's cgroup, one a hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodCgroup {
    directories: Vec<Directory>,
}

/// The cgroup in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Directory {
    /// Where the hierarchy is mounted.
    root: PathBuf,
    /// The cgroup below it.
    path: PathBuf,
    kind: Kind,
}

/// What a hierarchy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// cgroup2, alone or beside v1's.
    V2,
    /// A v1 hierarchy.
    V1 {
        /// Its cpuset controller takes no process before its CPUs and memory nodes are set.
        cpuset: bool,
    },
}

/// Why the pod's cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// Not a path that stays below the hierarchy's root.
    #[error("the cgroup path {path:?} is no absolute path or slice:prefix:name without '..'")]
    Path {
        /// The OCI cgroupsPath.
        path: String,
    },
    /// /proc/self/mountinfo shows none.
    #[error("no cgroup hierarchy is mounted on this host")]
    NoHierarchy,
    /// A file or directory of the cgroup.
    #[error("cannot {what} {path}", path = path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        cause: std::io::Error,
    },
    /// Processes that do not end.
    #[error("waited {limit:?} for the processes of {path} to end", path = path.display())]
    Deadline {
        /// The cgroup.
        path: PathBuf,
        /// How long.
        limit: Duration,
    },
}

impl PodCgroup {
    /// Finds the directories for an OCI `cgroupsPath` (a path, or systemd's "slice:prefix:name"). Makes nothing.
    pub(crate) fn find(cgroups_path: &str) -> Result<Self, CgroupError> {
        let mountinfo = Path::new("/proc/self/mountinfo");
        let mounts = fs::read_to_string(mountinfo).map_err(failed("read", mountinfo))?;
        Self::in_mounts(cgroups_path, &mounts)
    }

    fn in_mounts(cgroups_path: &str, mountinfo: &str) -> Result<Self, CgroupError> {
        let relative = relative(cgroups_path)?;
        let mut directories: Vec<Directory> = mountinfo.lines().filter_map(|line| hierarchy(line, &relative)).collect();
        // The same hierarchy may be mounted more than once.
        let mut seen = BTreeSet::new();
        directories.retain(|directory| seen.insert(directory.root.clone()));
        if directories.is_empty() { Err(CgroupError::NoHierarchy) } else { Ok(Self { directories }) }
    }

    /// Makes the cgroup and moves the calling process (all its threads) into it.
    pub(crate) fn join(&self) -> Result<(), CgroupError> {
        for directory in &self.directories {
            directory.make()?;
        }
        for directory in &self.directories {
            enter(&directory.path)?;
        }
        Ok(())
    }

    /// Lets the pod's processes run on these of the host's CPUs and memory nodes only; empty: on all that the parent has now.
    pub(crate) fn confine(&self, cpus: &str, mems: &str) -> Result<(), CgroupError> {
        let has_v1 = self.directories.iter().any(|directory| directory.kind == Kind::V1 { cpuset: true });
        // A controller is in one hierarchy only: v2 beside v1 has it where v1 has not.
        let concerned = self.directories.iter().filter(|directory| !(has_v1 && directory.kind == Kind::V2));
        concerned.into_iter().try_for_each(|directory| directory.confine(cpus, mems))
    }

    /// Moves the calling process out, to the root of each hierarchy.
    pub(crate) fn leave(&self) -> Result<(), CgroupError> {
        self.directories.iter().try_for_each(|directory| enter(&directory.root))
    }

    /// Kills what is left in it (but not the caller, who must have left), waits for the end, and removes it.
    /// Absent is success. Blocks, at most for `limit`.
    pub(crate) fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        let deadline = Deadline { at: Instant::now() + limit, limit };
        self.directories.iter().try_for_each(|directory| directory.remove(&deadline))
    }
}

impl Directory {
    /// Makes the directory and its missing ancestors.
    fn make(&self) -> Result<(), CgroupError> {
        let below = self.path.strip_prefix(&self.root).unwrap_or(Path::new(""));
        let mut parent = self.root.clone();
        for component in below.components() {
            let child = parent.join(component);
            if self.kind == Kind::V2 {
                delegate(&parent);
            }
            match fs::create_dir(&child) {
                Err(cause) if cause.kind() != ErrorKind::AlreadyExists => return Err(failed("make", &child)(cause)),
                _ => {}
            }
            if self.kind == (Kind::V1 { cpuset: true }) {
                inherit_cpuset(&parent, &child)?;
            }
            parent = child;
        }
        Ok(())
    }

    /// See [`PodCgroup::confine`].
    fn confine(&self, cpus: &str, mems: &str) -> Result<(), CgroupError> {
        match self.kind {
            Kind::V1 { cpuset: false } => return Ok(()),
            Kind::V1 { cpuset: true } => {}
            // Only the pods that need it have the controller.
            Kind::V2 => {
                for parent in self.path.ancestors().skip(1).take_while(|parent| parent.starts_with(&self.root)) {
                    if parent.join("cpuset.cpus").exists() || parent == self.root {
                        self.give_cpuset_below(parent)?;
                        break;
                    }
                }
            }
        }
        for (name, value) in [("cpus", cpus), ("mems", mems)] {
            let file = cpuset_file(&self.path, name);
            let mut value = value.to_owned();
            if value.is_empty() {
                // A set of a cgroup with processes can't be emptied again (ENOSPC).
                let parent = self.path.parent().unwrap_or(&self.root);
                let parent = match self.kind {
                    Kind::V1 { .. } => cpuset_file(parent, name),
                    Kind::V2 => parent.join(format!("cpuset.{name}.effective")),
                };
                value = fs::read_to_string(&parent).map_err(failed("read", &parent))?;
            }
            fs::write(&file, value.trim()).map_err(failed("write", &file))?;
        }
        Ok(())
    }

    /// Gives the v2 cgroups from `top`, which has the controller, down to this one the controller too.
    fn give_cpuset_below(&self, top: &Path) -> Result<(), CgroupError> {
        let mut between: Vec<&Path> =
            self.path.ancestors().skip(1).take_while(|parent| parent.starts_with(top)).collect();
        between.reverse();
        between.into_iter().try_for_each(|parent| {
            let control = parent.join("cgroup.subtree_control");
            fs::write(&control, "+cpuset").map_err(failed("write", &control))
        })
    }

    fn remove(&self, deadline: &Deadline) -> Result<(), CgroupError> {
        if !self.path.exists() || self.path == self.root {
            return Ok(());
        }
        match self.kind {
            Kind::V2 => empty_v2(&self.path, deadline)?,
            Kind::V1 { .. } => empty_v1(&self.path, deadline)?,
        }
        match fs::remove_dir(&self.path) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => Err(failed("remove", &self.path)(cause)),
            _ => Ok(()),
        }
    }
}

/// When to give up.
struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// Waits for an event on the descriptor.
    fn wait(&self, path: &Path, descriptor: &impl AsFd, event: PollFlags) -> Result<(), CgroupError> {
        let left = self.at.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(descriptor.as_fd(), event)], timeout) {
            Ok(0) => Err(CgroupError::Deadline { path: path.to_owned(), limit: self.limit }),
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(errno) => Err(failed("wait for", path)(errno.into())),
        }
    }
}

/// The path below a hierarchy's root.
fn relative(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let bad = || CgroupError::Path { path: cgroups_path.chars().take(256).collect() };
    let expanded = expand(cgroups_path);
    let path = Path::new(expanded.as_deref().unwrap_or(cgroups_path));
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => relative.push(name),
            Component::ParentDir | Component::Prefix(_) => return Err(bad()),
        }
    }
    let sound = cgroups_path.len() <= MAX_PATH && !cgroups_path.contains('\0') && !relative.as_os_str().is_empty();
    if sound { Ok(relative) } else { Err(bad()) }
}

/// systemd's form: "a-b.slice:prefix:name" is a.slice/a-b.slice/prefix-name.scope (systemd.slice(5)). Nothing if it is not that form,
/// and then the text is a path like any other.
fn expand(text: &str) -> Option<String> {
    let mut parts = text.split(':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || name.is_empty() || text.contains('/') {
        return None;
    }
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    let mut path = String::new();
    // "-.slice" is the root.
    if stem != "-" {
        let mut so_far = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return None;
            }
            if !so_far.is_empty() {
                so_far.push('-');
            }
            so_far.push_str(part);
            path.push_str(&format!("/{so_far}.slice"));
        }
    }
    let unit = if name.ends_with(".slice") { name.to_owned() } else { scope(prefix, name) };
    Some(format!("{path}/{unit}"))
}

fn scope(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") }
}

/// The cgroup's directory in the hierarchy that a line of mountinfo (proc_pid_mountinfo(5)) shows; nothing for other mounts.
fn hierarchy(line: &str, relative: &Path) -> Option<Directory> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (below, mount_point) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, _source, options) = (right.next()?, right.next()?, right.next()?);
    let kind = match kind {
        "cgroup2" => Kind::V2,
        "cgroup" => Kind::V1 { cpuset: options.split(',').any(|option| option == "cpuset") },
        _ => return None,
    };
    let root = PathBuf::from(unescape(mount_point));
    // In a container the mount may show a part of the hierarchy only; a path that leads there is told from its root.
    let inside = relative.strip_prefix(below.trim_start_matches('/')).unwrap_or(relative);
    Some(Directory { path: root.join(inside), root, kind })
}

/// Where the cgroups are that a process's /proc/<pid>/cgroup (cgroups(7)) names.
pub(crate) fn directories(cgroups: &str) -> Result<Vec<PathBuf>, CgroupError> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    let mounts = fs::read_to_string(mountinfo).map_err(failed("read", mountinfo))?;
    let of_entry = |entry: &str| {
        let mut parts = entry.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        mounts.lines().find_map(|line| {
            let directory = hierarchy(line, Path::new(path))?;
            let has = |name| line.rsplit(' ').next().is_some_and(|options| options.split(',').any(|one| one == name));
            let is_it = match directory.kind {
                Kind::V2 => controllers.is_empty(),
                Kind::V1 { .. } => !controllers.is_empty() && controllers.split(',').all(has),
            };
            is_it.then_some(directory.path)
        })
    };
    Ok(cgroups.lines().filter_map(of_entry).collect())
}

/// Moves the calling process into the cgroups at these directories.
pub(crate) fn enter_all(directories: &[PathBuf]) -> Result<(), CgroupError> {
    directories.iter().try_for_each(|directory| enter(directory))
}

/// Undoes mountinfo's octal escapes of blanks and backslashes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Lets the children of a v2 cgroup have the controllers whose figures are wanted. What is refused (by a cgroup with processes of its
/// own, or a threaded one) stays as it is: nothing depends on it.
fn delegate(parent: &Path) {
    let read = |name| fs::read_to_string(parent.join(name)).unwrap_or_default();
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let has = |list: &str, name: &str| list.split_whitespace().any(|one| one == name);
    let lacking = DELEGATED.into_iter().filter(|name| has(&available, name) && !has(&enabled, name));
    let words: Vec<String> = lacking.map(|name| format!("+{name}")).collect();
    let control = parent.join("cgroup.subtree_control");
    if !words.is_empty() && fs::write(&control, words.join(" ")).is_err() {
        // A single refusal refused them all.
        for word in words {
            let _ = fs::write(&control, word);
        }
    }
}

/// Gives a new v1 cpuset its parent's CPUs and memory nodes (Documentation/admin-guide/cgroup-v1/cpusets.rst).
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<(), CgroupError> {
    for name in ["cpus", "mems"] {
        let (from, to) = (cpuset_file(parent, name), cpuset_file(child, name));
        let own = fs::read_to_string(&to).map_err(failed("read", &to))?;
        if own.trim().is_empty() {
            let value = fs::read_to_string(&from).map_err(failed("read", &from))?;
            fs::write(&to, value.trim()).map_err(failed("write", &to))?;
        }
    }
    Ok(())
}

/// With v1's mount option noprefix the files have short names.
fn cpuset_file(directory: &Path, name: &str) -> PathBuf {
    let long = directory.join(format!("cpuset.{name}"));
    if long.exists() || !directory.join(name).exists() { long } else { directory.join(name) }
}

/// Moves the calling process into the cgroup at `directory`.
fn enter(directory: &Path) -> Result<(), CgroupError> {
    let file = directory.join("cgroup.procs");
    // "0" is the writer itself.
    fs::write(&file, "0").map_err(failed("move this process into", &file))
}

/// Kills everything in a v2 cgroup and waits until it is empty.
fn empty_v2(path: &Path, deadline: &Deadline) -> Result<(), CgroupError> {
    let events = path.join("cgroup.events");
    let mut file = File::open(&events).map_err(failed("open", &events))?;
    if !populated(&mut file, &events)? {
        return Ok(());
    }
    // Since Linux 5.14; before, one by one.
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        for pid in pids(path)? {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    while populated(&mut file, &events)? {
        deadline.wait(path, &file, PollFlags::POLLPRI)?;
    }
    Ok(())
}

/// Whether the cgroup or one below it has a process.
fn populated(events: &mut File, path: &Path) -> Result<bool, CgroupError> {
    let mut text = String::new();
    events.rewind().and_then(|()| events.read_to_string(&mut text)).map_err(failed("read", path))?;
    Ok(text.lines().any(|line| line == "populated 1"))
}

/// Kills everything in a v1 cgroup and waits for the end of each process (v1 tells of no emptiness).
fn empty_v1(path: &Path, deadline: &Deadline) -> Result<(), CgroupError> {
    loop {
        let left = pids(path)?;
        if left.is_empty() {
            return Ok(());
        }
        // Opened first, then killed: what is waited for is what was killed.
        let processes: Vec<OwnedFd> =
            left.into_iter().filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect();
        for process in &processes {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        for process in &processes {
            deadline.wait(path, process, PollFlags::POLLIN)?;
        }
        if Instant::now() >= deadline.at {
            return Err(CgroupError::Deadline { path: path.to_owned(), limit: deadline.limit });
        }
    }
}

/// The cgroup's own processes, without the caller.
fn pids(path: &Path) -> Result<Vec<Pid>, CgroupError> {
    let file = path.join("cgroup.procs");
    let text = fs::read_to_string(&file).map_err(failed("read", &file))?;
    let own = rustix::process::getpid();
    Ok(text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).filter(|pid| *pid != own).collect())
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> CgroupError + 'a {
    move |cause| CgroupError::Io { what, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests;
