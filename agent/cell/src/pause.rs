//! The pod's shared pid namespace and its init, which does nothing but reap.

use std::path::Path;

use caps::CapSet;
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    sched::CloneFlags,
    sys::{
        signal::{SigSet, Signal},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

use crate::{
    CellError, PodNamespaces,
    fault::{Doing, Fault, Step},
    namespaces::{bind_namespace, wait_exited},
    spawn,
};
use std::os::fd::AsFd;

/// The ids of a process that owns nothing (the kernel's overflow id).
const NOBODY: u32 = 65534;

/// Makes the pod's shared pid namespace at `path` (`/run/husk/ns/pid`) if it is not there yet: a pause process as its init, held by
/// a bind mount of its namespace file. Returns the pause process's pid if it was made now (the agent's child; never exits by itself;
/// SIGKILL ends it and all of the namespace). Blocks (at most [`DEADLINE`](crate::DEADLINE)). Calls must not overlap: the agent makes it
/// at StartPod or guards it by a mutex.
pub fn ensure_pod_pid_namespace(path: &Path) -> Result<Option<u32>, CellError> {
    if path.exists() {
        return Ok(None);
    }
    start(None, &[(CloneFlags::CLONE_NEWPID, path)]).map(Some)
}

/// Makes the namespaces of a pod with a user namespace, as files in `directory`: `user`, `net`, `ipc`, `uts`, and `pid`, which is that of
/// [`ensure_pod_pid_namespace`]. Returns the pid of the pause process in them. Once, before any container.
pub fn make_pod_namespaces(directory: &Path, pod: PodNamespaces) -> Result<u32, CellError> {
    let files = [
        (CloneFlags::CLONE_NEWUSER, directory.join("user")),
        (CloneFlags::CLONE_NEWNET, directory.join("net")),
        (CloneFlags::CLONE_NEWIPC, directory.join("ipc")),
        (CloneFlags::CLONE_NEWUTS, directory.join("uts")),
        (CloneFlags::CLONE_NEWPID, directory.join("pid")),
    ];
    start(Some(pod), &files.each_ref().map(|(kind, path)| (*kind, path.as_path())))
}

/// Starts the pause process and binds its namespaces to files.
fn start(pod: Option<PodNamespaces>, files: &[(CloneFlags, &Path)]) -> Result<u32, CellError> {
    let (pid, pidfd) = spawn::pause(pod)?;
    if let Err(error) = files.iter().try_for_each(|(kind, path)| bind_namespace(pid, *kind, path)) {
        if crate::sys::pidfd_kill(&pidfd).is_ok() && wait_exited(pidfd.as_fd(), crate::DEADLINE) {
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        }
        for (_, path) in files {
            let _ = umount2(*path, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_file(path);
        }
        return Err(error);
    }
    Ok(pid)
}

/// Drops everything that a process of the namespace could be after: the pause process is already in a mount namespace of its own.
pub(crate) fn give_up_privileges() -> Step<()> {
    nix::unistd::setsid().doing(|| "leave the session")?;
    setgroups(&[]).doing(|| "drop groups")?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    match setresgid(gid, gid, gid).and_then(|()| setresuid(uid, uid, uid)) {
        // A user namespace whose maps leave nobody out: its root without any capability will do.
        Err(Errno::EINVAL) => {}
        other => other.doing(|| "become nobody")?,
    }
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).map_err(|e| Fault::new(format!("drop the capabilities: {e}")))?;
    }
    nix::sys::prctl::set_no_new_privs().doing(|| "set no_new_privs")?;
    nix::sys::prctl::set_dumpable(false).doing(|| "become undumpable")?;
    nix::sys::prctl::set_name(c"pause").doing(|| "take a name")
}

/// Reaps for ever.
pub(crate) fn reap_for_ever() -> ! {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    // Blocked, so that each one stays pending until it is taken.
    let _ = signals.thread_block();
    loop {
        while let Ok(status) = waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        if !matches!(signals.wait(), Ok(_) | Err(Errno::EINTR)) {
            // Can't fail for a valid set; ending would end the pod.
            nix::unistd::pause();
        }
    }
}
