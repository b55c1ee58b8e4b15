//! A helper process of the pod (VMM, fs daemon): started with everything it needs as inherited descriptors, watched without polling,
//! and never outliving the shim.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::Serialize;
use tokio::process::Child;
use tokio::sync::{Notify, watch};
use tracing::warn;

use super::PeerError;
use super::tail::Tail;

/// Number of the first inherited descriptor.
const FIRST_FD: i32 = 3;

/// Descriptors for a helper, each with the number that it will have there.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<FdMapping>);

impl Inherited {
    /// Hands `fd` over; the number is the helper's.
    pub(crate) fn add(&mut self, fd: OwnedFd) -> i32 {
        let child_fd = FIRST_FD + i32::try_from(self.0.len()).unwrap_or(i32::MAX - FIRST_FD);
        self.0.push(FdMapping { parent_fd: fd, child_fd });
        child_fd
    }

    /// Hands a configuration over as JSON in a memory file.
    fn add_config(&mut self, config: &impl Serialize) -> io::Result<i32> {
        let mut file = File::from(memfd_create("config", MFdFlags::MFD_CLOEXEC)?);
        serde_json::to_writer(&mut file, config)?;
        file.flush()?;
        file.rewind()?;
        Ok(self.add(file.into()))
    }
}

/// A running (or ended) helper.
#[derive(Debug)]
pub(crate) struct Helper {
    /// Its process id.
    pub(crate) pid: u32,
    /// What it last logged.
    pub(crate) log: Tail,
    name: &'static str,
    ended: watch::Receiver<Option<ExitStatus>>,
    kill: Arc<Notify>,
}

impl Helper {
    /// Starts `program --config-fd N`. It is killed when the shim's main thread ends, so this must be called on that thread.
    pub(crate) fn start(
        name: &'static str,
        program: &Path,
        config: &impl Serialize,
        mut inherited: Inherited,
    ) -> Result<Self, PeerError> {
        let failed = |doing| move |source| PeerError::Spawn { name, doing, source };
        let config_fd = inherited.add_config(config).map_err(failed("write its configuration"))?;
        let mut command = std::process::Command::new(program);
        command
            .arg("--config-fd")
            .arg(config_fd.to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
            .fd_mappings(inherited.0)
            .map_err(|collision| failed("give it its descriptors")(io::Error::other(collision)))?;
        let death_signal = || prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
        // SAFETY: the closure runs between fork and exec and only makes one system call, which is async-signal-safe.
        unsafe { command.pre_exec(death_signal) };
        let mut child = tokio::process::Command::from(command).spawn().map_err(failed("run its program"))?;
        let pid = child.id().unwrap_or_default();
        // Where the shim's own score comes from containerd's, a pod must not be spared by the OOM killer; later its containers decide.
        if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
            warn!("cannot reset the OOM score of {name}: {error}");
        }
        let stderr = child.stderr.take().ok_or_else(|| failed("read its log")(io::ErrorKind::BrokenPipe.into()))?;
        let stderr = stderr.into_owned_fd().map_err(failed("read its log"))?;
        let log = Tail::read(stderr, name, true).map_err(failed("read its log"))?;
        let (done, ended) = watch::channel(None);
        let kill = Arc::new(Notify::new());
        tokio::spawn(reap(name, child, Arc::clone(&kill), done));
        Ok(Self { pid, log, name, ended, kill })
    }

    /// Kills it; its end is awaited by `ended`.
    pub(crate) fn kill(&self) {
        self.kill.notify_one();
    }

    /// How it ended, if it has.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        *self.ended.borrow()
    }

    /// Waits for its end, however long it lives.
    pub(crate) async fn ended(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.map(|status| *status) {
            Ok(Some(status)) => status,
            // The reaping task is gone only with the runtime.
            _ => std::future::pending().await,
        }
    }

    /// Kills it and waits until it is gone.
    pub(crate) async fn end(&self, limit: Duration) {
        self.kill();
        if tokio::time::timeout(limit, self.ended()).await.is_err() {
            warn!("{} (process {}) is not gone {limit:?} after SIGKILL", self.name, self.pid);
        }
    }
}

/// Owns the child until its end, so that its process id stays its own as long as it may be killed.
async fn reap(name: &'static str, mut child: Child, kill: Arc<Notify>, done: watch::Sender<Option<ExitStatus>>) {
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = kill.notified() => {
                if let Err(error) = child.start_kill() {
                    warn!("cannot kill {name}: {error}");
                }
            }
        }
    };
    match status {
        Ok(status) => {
            done.send_replace(Some(status));
        }
        Err(error) => warn!("cannot wait for {name}: {error}"),
    }
}

/// A connected pair of stream sockets: the shim's end and the helper's.
pub(crate) fn stream_pair() -> Result<(tokio::net::UnixStream, OwnedFd), PeerError> {
    let failed = |source| PeerError::Socket { doing: "make a pair of sockets", source };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    Ok((tokio::net::UnixStream::from_std(ours).map_err(failed)?, theirs.into()))
}

/// Opens a file for a helper.
pub(crate) fn open(path: &Path, writable: bool, doing: &'static str) -> Result<OwnedFd, PeerError> {
    let file = File::options().read(true).write(writable).open(path);
    file.map(OwnedFd::from).map_err(|source| {
        let source = io::Error::new(source.kind(), format!("{}: {source}", path.display()));
        PeerError::Socket { doing, source }
    })
}

/// When the process was started, in clock ticks since boot (proc_pid_stat(5), field 22): with the pid it names one process for good.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptors_are_numbered_from_three() {
        let mut inherited = Inherited::default();
        let null = || open(Path::new("/dev/null"), false, "open").unwrap();
        assert_eq!((inherited.add(null()), inherited.add(null())), (3, 4));
    }

    #[test]
    fn start_time_tells_processes_apart() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }

    #[tokio::test]
    async fn a_helper_is_killed_and_its_end_seen() {
        // `sh --config-fd` fails at once; its complaint is what the tail keeps.
        let helper = Helper::start("sh", Path::new("/bin/sh"), &"x", Inherited::default()).unwrap();
        let status = tokio::time::timeout(Duration::from_secs(5), helper.ended()).await.unwrap();
        assert!(!status.success());
        assert!(!helper.log.last(Duration::from_secs(5)).await.is_empty());
        helper.end(Duration::from_secs(1)).await;
    }
}
