//! The walls around husk's helper processes: namespaces, an empty root, no capabilities, rlimits, Landlock, seccomp.
//! `enter_vmm` or `enter_fs` comes first thing in `main`, before any thread exists; then `seccomp::install` in each thread.
//!
//! There is no new pid namespace: a process enters one only by a fork, and the second process would cost a pod more than the wall
//! is worth here, where neither /proc nor any right to signal others is left.

mod descriptors;
mod landlock;
mod limits;
mod privileges;
mod root;
pub mod seccomp;
#[cfg(test)]
mod tests;

pub use limits::bound_arenas;

use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;

/// Walls of husk-vmm.
#[derive(Clone, Copy, Debug)]
pub struct VmmJail<'a> {
    /// User id to run as; not 0.
    pub uid: u32,
    /// Group id to run as; not 0.
    pub gid: u32,
    /// The pod's network namespace; without one, an empty one is made.
    pub netns: Option<RawFd>,
    /// Descriptors to keep beside 0, 1 and 2; all others are closed (the netns too, unless listed).
    pub keep: &'a [RawFd],
}

/// Walls of husk-fs.
#[derive(Clone, Copy, Debug)]
pub struct FsJail<'a> {
    /// The share directory, a mount point; afterwards it is `/`, itself read-only. What is mounted below it, now or later, is as
    /// writable as its own mount says.
    pub root: &'a Path,
    /// Descriptors to keep beside 0, 1 and 2; all others are closed.
    pub keep: &'a [RawFd],
}

/// Why a wall could not be put up. The process is then half inside: it must end.
#[derive(Debug, thiserror::Error)]
#[error("cannot enter the jail: {step}")]
pub struct JailError {
    /// What was being done.
    pub step: &'static str,
    /// Why it failed.
    #[source]
    pub cause: std::io::Error,
}

/// Puts the calling, single-threaded process, which must be root, into the VMM's jail: the pod's network namespace, own mount, ipc
/// and uts namespaces, an empty read-only root, its own user, no capabilities, no way to new ones, no file system, few rlimits.
/// The signal that it gets when its parent dies stays as it was.
pub fn enter_vmm(jail: &VmmJail<'_>) -> Result<(), JailError> {
    if jail.uid == 0 || jail.gid == 0 {
        return Err(refusal("check the user and group: 0 is no jail"));
    }
    let parent = Parent::find()?;
    match jail.netns {
        Some(netns) => {
            if netns < 0 {
                return Err(refusal("check the network namespace's descriptor"));
            }
            // SAFETY: the number is not -1; a closed one makes setns fail, and it is not used afterwards.
            let netns = unsafe { BorrowedFd::borrow_raw(netns) };
            setns(netns, CloneFlags::CLONE_NEWNET).map_err(failed("join the pod's network namespace"))?;
        }
        None => unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace"))?,
    }
    unshare_rest()?;
    root::empty()?;
    limits::vmm()?;
    descriptors::close_others(jail.keep)?;
    privileges::drop_all(jail.uid, jail.gid)?;
    privileges::seal()?;
    landlock::deny_all()?;
    parent.restore()
}

/// Puts the calling, single-threaded process, which must be root, into the fs daemon's jail: an empty network namespace, own mount,
/// ipc and uts namespaces, the share directory as root, the few capabilities that serving files needs, no way to new ones.
/// The signal that it gets when its parent dies stays as it was.
///
/// Mounts that the shim makes later below the share directory appear. /proc is gone: what is needed of it must be open before, and
/// be in `keep`.
pub fn enter_fs(jail: &FsJail<'_>) -> Result<(), JailError> {
    let parent = Parent::find()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace"))?;
    unshare_rest()?;
    root::share(jail.root)?;
    limits::fs()?;
    descriptors::close_others(jail.keep)?;
    privileges::keep_for_files()?;
    privileges::seal()?;
    parent.restore()
}

/// New mount, ipc and uts namespaces, for a process with one thread.
fn unshare_rest() -> Result<(), JailError> {
    // Others would stay outside.
    let threads = std::fs::read_dir("/proc/self/task").map_err(failed("count this process's threads"))?.count();
    if threads != 1 {
        return Err(refusal("check that this process has one thread"));
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(failed("make mount, ipc and uts namespaces"))
}

/// The parent and what its death does; a change of user makes the kernel forget the latter (PR_SET_PDEATHSIG(2const)).
struct Parent {
    pid: nix::unistd::Pid,
    signal: Option<nix::sys::signal::Signal>,
}

impl Parent {
    fn find() -> Result<Self, JailError> {
        let signal = prctl::get_pdeathsig().map_err(failed("ask for the parent's death signal"))?;
        Ok(Self { pid: nix::unistd::getppid(), signal })
    }

    fn restore(&self) -> Result<(), JailError> {
        let Some(signal) = self.signal else { return Ok(()) };
        prctl::set_pdeathsig(signal).map_err(failed("set the parent's death signal"))?;
        // It may have died in between.
        if nix::unistd::getppid() == self.pid { Ok(()) } else { Err(refusal("check that the parent lives")) }
    }
}

fn failed<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |cause| JailError { step, cause: cause.into() }
}

fn refusal(step: &'static str) -> JailError {
    JailError { step, cause: std::io::ErrorKind::InvalidInput.into() }
}
