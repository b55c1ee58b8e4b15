//! A container's namespaces: which are new, which are joined, and their pins for later processes.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, openat},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use crate::{
    CellError,
    fault::{Doing, Fault, Step},
};

/// A container's namespaces and its first process, pinned by descriptors before any code of the container ran. They are never
/// looked up again by pid: a container's process may have gone elsewhere by then.
#[derive(Clone)]
pub struct Namespaces {
    pins: Arc<[(CloneFlags, OwnedFd)]>,
    init: Arc<OwnedFd>,
    /// Who the user namespace's root is outside of it, if there is one.
    root: Option<(u32, u32)>,
}

impl Namespaces {
    /// Pins those of the process `pid` that differ from the agent's: `kinds`. The process waits for its start, so it is ours still.
    pub(crate) fn pin(
        pid: u32,
        init: OwnedFd,
        kinds: &[CloneFlags],
        root: Option<(u32, u32)>,
    ) -> Result<Self, CellError> {
        let pins = kinds
            .iter()
            .map(|&kind| {
                let path = format!("/proc/{pid}/ns/{}", file_name(kind));
                let file = File::open(&path).map_err(CellError::io(format!("open {path}")))?;
                Ok((kind, file.into()))
            })
            .collect::<Result<Arc<[_]>, CellError>>()?;
        Ok(Self { pins, init: Arc::new(init), root })
    }

    /// Whether the container's first process has not exited.
    pub fn alive(&self) -> bool {
        let mut fds = [PollFd::new(self.init.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    pub(crate) fn root(&self) -> Option<(u32, u32)> {
        self.root
    }

    pub(crate) fn pins(&self) -> impl Iterator<Item = (CloneFlags, BorrowedFd<'_>)> {
        self.pins.iter().map(|(kind, fd)| (*kind, fd.as_fd()))
    }
}

/// CLONE_NEWTIME of linux/sched.h, which nix does not name.
pub(crate) const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// Who root of the spec's user namespace is outside of it, if there is one.
pub(crate) fn root_of(linux: Option<&Linux>) -> Option<(u32, u32)> {
    let linux = linux?;
    linux.namespaces().iter().flatten().find(|namespace| namespace.typ() == LinuxNamespaceType::User)?;
    let root = |maps: &Option<Vec<LinuxIdMapping>>| {
        maps.iter().flatten().find(|line| line.container_id() == 0 && line.size() > 0).map(LinuxIdMapping::host_id)
    };
    Some((root(linux.uid_mappings())?, root(linux.gid_mappings())?))
}

/// What the spec wants with namespaces.
pub(crate) struct Plan {
    /// New ones.
    pub(crate) new: CloneFlags,
    /// Those to join.
    pub(crate) joined: Vec<(CloneFlags, OwnedFd)>,
}

/// Every namespace of the spec that is not the agent's own; the mount namespace is always there.
pub(crate) fn kinds(linux: Option<&Linux>) -> Vec<CloneFlags> {
    let mut kinds = vec![CloneFlags::CLONE_NEWNS];
    for namespace in linux.and_then(|l| l.namespaces().as_ref()).into_iter().flatten() {
        let kind = flag(namespace.typ());
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

impl Plan {
    /// Reads the spec and opens the namespaces to join.
    pub(crate) fn of(linux: Option<&Linux>) -> Step<Self> {
        let mut plan = Self { new: CloneFlags::CLONE_NEWNS, joined: Vec::new() };
        for namespace in linux.and_then(|l| l.namespaces().as_ref()).into_iter().flatten() {
            let kind = flag(namespace.typ());
            match namespace.path() {
                None => plan.new |= kind,
                Some(_) if kind == CloneFlags::CLONE_NEWNS => {
                    return Err(Fault::new("a container can't join a mount namespace"));
                }
                Some(path) => {
                    let file = File::open(path).doing(|| format!("open namespace {}", path.display()))?;
                    plan.joined.push((kind, file.into()));
                }
            }
        }
        Ok(plan)
    }

    /// Whether a user namespace is joined.
    pub(crate) fn joins_user(&self) -> bool {
        self.joined.iter().any(|(kind, _)| *kind == CloneFlags::CLONE_NEWUSER)
    }
}

/// Joins them, the user namespace last, since that is what allows the others. A joined pid namespace is for children only.
pub(crate) fn join(namespaces: &[(CloneFlags, OwnedFd)]) -> Step<()> {
    let user = |kind: &CloneFlags| *kind == CloneFlags::CLONE_NEWUSER;
    let (last, first): (Vec<_>, Vec<_>) = namespaces.iter().partition(|(kind, _)| user(kind));
    for (kind, fd) in first.into_iter().chain(last) {
        setns(fd, *kind).doing(|| format!("join the {} namespace", file_name(*kind)))?;
    }
    Ok(())
}

/// Makes a new time namespace for our children with the spec's offsets, which nobody can change once one is in it
/// (time_namespaces(7)).
pub(crate) fn make_time(linux: Option<&Linux>, proc: &OwnedFd) -> Step<()> {
    unshare(NEWTIME).doing(|| "make a time namespace")?;
    for (clock, offset) in linux.iter().flat_map(|linux| linux.time_offsets().iter().flatten()) {
        let doing = || format!("set the time offset of clock {clock}");
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Fault::new(format!("time offset of clock {clock}: there are monotonic and boottime")));
        }
        let line = format!("{clock} {} {}", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = openat(proc, "self/timens_offsets", flags, Mode::empty()).doing(doing)?;
        nix::unistd::write(&file, line.as_bytes()).doing(doing)?;
    }
    Ok(())
}

/// Writes a new user namespace's maps (user_namespaces(7)), from outside of it.
pub(crate) fn write_id_maps(pid: i32, uids: &str, gids: &str) -> Step<()> {
    for (name, map) in [("uid_map", uids), ("gid_map", gids)] {
        if map.is_empty() {
            return Err(Fault::new("a new user namespace needs uidMappings and gidMappings"));
        }
        let path = format!("/proc/{pid}/{name}");
        std::fs::write(&path, map).doing(|| format!("write {path}"))?;
    }
    Ok(())
}

/// A map as the kernel takes it.
pub(crate) fn map_text(maps: Option<&Vec<LinuxIdMapping>>) -> String {
    maps.into_iter().flatten().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => NEWTIME,
    }
}

fn file_name(kind: CloneFlags) -> &'static str {
    match kind {
        CloneFlags::CLONE_NEWNS => "mnt",
        CloneFlags::CLONE_NEWCGROUP => "cgroup",
        CloneFlags::CLONE_NEWUTS => "uts",
        CloneFlags::CLONE_NEWIPC => "ipc",
        CloneFlags::CLONE_NEWUSER => "user",
        CloneFlags::CLONE_NEWPID => "pid",
        NEWTIME => "time",
        _ => "net",
    }
}

/// Waits until the process behind a pidfd has exited.
pub(crate) fn wait_exited(pidfd: BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout), Ok(n) if n > 0)
}

/// Binds a process's namespace of a kind to a file, which then holds it.
pub(crate) fn bind_namespace(pid: u32, kind: CloneFlags, path: &Path) -> Result<(), CellError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(CellError::io(format!("create {}", directory.display())))?;
    }
    let file = File::create(path).map_err(CellError::io(format!("create {}", path.display())))?;
    let name = file_name(kind);
    let source =
        std::ffi::CString::new(format!("/proc/{pid}/ns/{name}")).map_err(|e| CellError::Invalid(e.to_string()))?;
    let doing = || format!("bind the pod's {name} namespace to {}", path.display());
    let tree = crate::sys::clone_tree(None, &source, false).map_err(CellError::system(doing()))?;
    crate::sys::attach(tree, file).map_err(CellError::system(doing()))
}
