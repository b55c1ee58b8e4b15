//! Builds a template beside the pods: in a process of its own that belongs to no pod, with the lowest priority.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::build::log_file;
use super::command::Request;
use super::files::StoreError;
use super::key::Inputs;
use super::store::{Lock, Store};
use crate::cgroup::{self, CgroupError};
use crate::error::chain;
use crate::spec::size::Size;

/// The builder's descriptors: the lock, and the mount namespace in which the shim was born.
const LOCK_FD: i32 = 3;
const MOUNTS_FD: i32 = 4;

/// Least priority (setpriority(2)).
const NICE: i32 = 19;

/// Name of the file with what the last build in the background said.
const LOG: &str = "build.log";

/// Where the shim was born, before it had a mount namespace of its own and moved into its pod's cgroup: where what is not the pod's
/// belongs.
#[derive(Debug)]
pub(crate) struct Birthplace {
    mounts: File,
    cgroups: String,
}

impl Birthplace {
    /// That of this process, which must not have left it yet.
    pub(crate) fn note() -> io::Result<Self> {
        Ok(Self { mounts: File::open("/proc/self/ns/mnt")?, cgroups: fs::read_to_string("/proc/self/cgroup")? })
    }
}

/// What a builder is told beside the shape.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Background {
    /// Directories of the cgroups that it moves to.
    cgroups: Vec<PathBuf>,
}

/// Why no build was started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot find a cgroup for the build")]
    Cgroup(#[from] CgroupError),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io { doing, source }
}

/// Starts a build of the template that `inputs` ask for, unless there is one under way or one has failed lately. It goes on when this
/// process ends. Must be called within the runtime, on the main thread.
pub(crate) fn start(store: &Store, inputs: &Inputs, birthplace: &Birthplace) {
    let name = inputs.name();
    if let Some(why) = store.notes.failed_lately(&name) {
        warn!(
            "the template {name} is not built now, since a build has failed a short time ago (`husk template build` tries again at once): {why}"
        );
        return;
    }
    match spawn(store, inputs.size(), birthplace) {
        Ok(true) => {
            info!("the template {name} is being built; what the build says: {}", store.notes.path(LOG).display())
        }
        Ok(false) => {}
        Err(error) => warn!("the template {name} is not built: {}", chain(&error)),
    }
}

/// False if another build is under way.
fn spawn(store: &Store, size: Size, birthplace: &Birthplace) -> Result<bool, StartError> {
    // Taken here, so that a thousand pods that start at once start one builder, and a bad directory is told in the pod's own log.
    let Some(lock) = store.try_lock()? else { return Ok(false) };
    let cgroups = cgroup::directories(&birthplace.cgroups)?;
    let request = Request::Build {
        vcpus: Some(size.vcpus),
        memory_mib: Some(size.memory_mib),
        background: Some(Background { cgroups }),
    };
    let request = serde_json::to_string(&request).map_err(|error| failed("describe the build")(error.into()))?;
    store.notes.make().map_err(failed("make the directory for the build's log"))?;
    let log = log_file(&store.notes.path(LOG)).map_err(failed("make the build's log"))?;
    let mut command = Command::new(std::env::current_exe().map_err(failed("find the shim's program"))?);
    command.arg(super::command::ACTION).arg(request).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let clone = |file: &File| file.try_clone().map(Into::into).map_err(failed("share a descriptor"));
    let mappings = vec![
        FdMapping { parent_fd: clone(lock.file())?, child_fd: LOCK_FD },
        FdMapping { parent_fd: clone(&birthplace.mounts)?, child_fd: MOUNTS_FD },
    ];
    command.fd_mappings(mappings).map_err(|error| failed("give it its descriptors")(io::Error::other(error)))?;
    // The runtime reaps it, should this process live so long.
    tokio::process::Command::from(command).spawn().map(drop).map_err(failed("start the build"))?;
    Ok(true)
}

/// In the builder: leaves all that is the pod's, and gives the lock.
pub(super) fn settle(background: &Background) -> io::Result<Lock> {
    use std::os::fd::FromRawFd;
    nix::unistd::setsid()?;
    cgroup::enter_all(&background.cgroups).map_err(io::Error::other)?;
    // SAFETY: whoever started this process with a `Background` has put these descriptors there, and nothing has taken or closed them.
    let (lock, mounts) = unsafe { (File::from_raw_fd(LOCK_FD), File::from_raw_fd(MOUNTS_FD)) };
    setns(mounts, CloneFlags::CLONE_NEWNS)?;
    std::env::set_current_dir("/")?;
    rustix::process::setpriority_process(None, NICE)?;
    fs::write("/proc/self/oom_score_adj", "0")?;
    Ok(Lock::of(lock))
}
