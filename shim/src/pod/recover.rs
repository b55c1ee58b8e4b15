//! The `delete` action: cleans up after a shim that is gone, by its state file. Processes are killed only if they are still the ones
//! that the shim started.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{info, warn};

use super::machine::unmount_below;
use super::state::{Directory, Identity, Record};
use crate::cgroup::PodCgroup;
use crate::error::chain;
use crate::id::Id;
use crate::{network, storage};

/// Longest wait for a killed process to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for the pod's cgroup to be empty.
const CGROUP_LIMIT: Duration = Duration::from_secs(5);

/// Takes back what pod `id` of containerd's `namespace` has on this host. Nothing there is success: containers of a pod have nothing of
/// their own, and a pod of the same id that was refused has nothing either.
pub(crate) async fn delete(id: &Id, namespace: &str) {
    let directory = Directory::of(id);
    match directory.read() {
        Ok(Some(record)) if record.namespace != namespace => {
            warn!("the pod {id} here is of the namespace {}, not of {namespace}: it is left alone", record.namespace);
        }
        Ok(Some(record)) => clean(&directory, &record).await,
        Ok(None) => {}
        Err(error) => warn!("{}", chain(&error)),
    }
}

/// Takes back what the record names. Each step is tried, whatever the others do.
pub(crate) async fn clean(directory: &Directory, record: &Record) {
    info!("cleaning up after a shim that is gone: {}", directory.path().display());
    for (name, process) in [("shim", record.shim), ("VMM", record.vmm), ("fs daemon", record.fs)] {
        let Some(process) = process.filter(|process| process.pid != std::process::id()) else { continue };
        if let Err(error) = kill(process) {
            warn!("cannot kill the {name} (process {}): {error}", process.pid);
        }
    }
    if let Some(netns) = &record.netns
        && let Err(error) = network::teardown(netns).await
    {
        warn!("cannot take the pod's network back: {}", chain(&error));
    }
    // The mounts were in the shim's own namespace and went with it; these are only there if it had none.
    unmount_below(&directory.shared());
    if let Err(error) = storage::unmount(&directory.shared()) {
        warn!("{}", chain(&error));
    }
    if !record.cgroups_path.is_empty() {
        let removed = PodCgroup::find(&record.cgroups_path).and_then(|cgroup| cgroup.remove(CGROUP_LIMIT));
        if let Err(error) = removed {
            warn!("cannot remove the pod's cgroup: {}", chain(&error));
        }
    }
    // Only what is surely a socket of a shim's: the record could name anything.
    if is_socket(&record.socket) {
        let _ = std::fs::remove_file(&record.socket);
    }
    if let Err(error) = directory.remove() {
        warn!("{}", chain(&error));
    }
}

fn is_socket(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Kills the process, if it is still the one, and waits until it is gone.
fn kill(process: Identity) -> io::Result<()> {
    let pidfd = match pidfd_open(process.pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other?,
    };
    // The descriptor now holds the process: its number can't be given to another between this look and the signal.
    if !process.is_there() {
        return Ok(());
    }
    pidfd_kill(&pidfd)?;
    let limit = PollTimeout::try_from(KILL_LIMIT).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], limit)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// pidfd_open(2).
fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let number = i32::try_from(number).ok().filter(|number| *number >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends SIGKILL by pidfd_send_signal(2).
fn pidfd_kill(pidfd: &OwnedFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the call takes numbers and a null pointer, which it allows, and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_only_the_very_process() {
        let mut child = std::process::Command::new("/bin/cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        kill(Identity { start_time: identity.start_time + 1, ..identity }).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        kill(identity).unwrap();
        assert!(!child.wait().unwrap().success());
        kill(identity).unwrap();
    }
}
