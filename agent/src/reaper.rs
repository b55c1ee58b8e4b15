//! Waits for every child of process 1: those that became the first process of a container or of an exec are told to whoever
//! claimed them, all others (orphans, makers of containers) are just reaped.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Children reaped before others get their turn.
const BATCH: usize = 256;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When it was reaped: nanoseconds since the epoch.
    pub time_ns: u64,
}

/// The source of SIGCHLD. Made before the first child is.
pub(crate) struct Children(Signal);

impl Children {
    /// Installs the handler.
    pub(crate) fn new() -> io::Result<Self> {
        signal(SignalKind::child()).map(Self)
    }
}

/// All children.
#[derive(Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Processes whose end somebody waits for; in the table until reaped, so that a process id in it is never another's.
    claimed: HashMap<Pid, oneshot::Sender<Exit>>,
    /// Spawns under way: any child may turn out to be theirs.
    spawning: usize,
    /// Ends of children that nobody claimed yet, kept while spawns are under way. Bounded by the kernel's pid_max.
    unclaimed: HashMap<Pid, Exit>,
}

impl Reaper {
    /// Reaps for ever.
    pub(crate) async fn run(self: Arc<Self>, mut children: Children) {
        loop {
            let mut count = 0;
            while self.reap_one() {
                count += 1;
                if count % BATCH == 0 {
                    tokio::task::yield_now().await;
                }
            }
            if children.0.recv().await.is_none() {
                return;
            }
        }
    }

    /// Whether there was a child to reap. The lock is held from reaping to the table's change, so that `kill` can't hit a new
    /// process with the old one's id.
    fn reap_one(&self) -> bool {
        let mut table = self.lock();
        let (pid, status) = match wait_any() {
            Ok(Some(ended)) => ended,
            Ok(None) | Err(Errno::ECHILD) => return false,
            Err(Errno::EINTR) => return true,
            Err(error) => {
                tracing::error!("Could not wait for children: {error}");
                return false;
            }
        };
        let exit = Exit { status, time_ns: now() };
        if let Some(claim) = table.claimed.remove(&pid) {
            // Whoever claimed it may be gone.
            let _ = claim.send(exit);
        } else if table.spawning > 0 {
            table.unclaimed.insert(pid, exit);
        }
        true
    }

    /// Begins a spawn: until the returned value is dropped no child's end is forgotten.
    pub(crate) fn spawning(self: &Arc<Self>) -> Spawning {
        self.lock().spawning += 1;
        Spawning { reaper: self.clone() }
    }

    /// Sends a signal to a claimed process. `ESRCH` when it has been reaped; signal 0 only asks.
    pub(crate) fn kill(&self, pid: Pid, signal: i32) -> Result<(), Errno> {
        let table = self.lock();
        if !table.claimed.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        send(pid, signal)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A spawn under way.
pub(crate) struct Spawning {
    reaper: Arc<Reaper>,
}

impl Spawning {
    /// Claims the process that was spawned. Its end arrives once, also when it is over already.
    pub(crate) fn claim(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.lock();
        let over = table.unclaimed.remove(&pid);
        // A child that is still there is the one meant, and an earlier end was that of an older process with this id.
        let alive = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT).is_ok();
        match over {
            Some(exit) if !alive => {
                // The receiver is in our hand.
                let _ = sender.send(exit);
            }
            _ => {
                table.claimed.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.spawning -= 1;
        if table.spawning == 0 {
            table.unclaimed = HashMap::new();
        }
    }
}

/// Reaps a child that has ended, if there is one: its exit code, or 128 + signal. nix's waitpid forgets whom a real-time signal has ended.
fn wait_any() -> Result<Option<(Pid, u32)>, Errno> {
    let mut status = 0;
    // SAFETY: waitpid(2) writes one int and keeps no pointer.
    let pid = unsafe { nix::libc::waitpid(-1, &raw mut status, nix::libc::WNOHANG | nix::libc::__WALL) };
    let pid = Pid::from_raw(Errno::result(pid)?);
    // Without WUNTRACED and WCONTINUED only ends are told.
    let code =
        if nix::libc::WIFSIGNALED(status) { 128 + nix::libc::WTERMSIG(status) } else { nix::libc::WEXITSTATUS(status) };
    Ok((pid.as_raw() != 0).then_some((pid, code.unsigned_abs())))
}

/// Sends a signal to a process by number, real-time signals included, for which nix has no names.
pub(crate) fn send(pid: Pid, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill(2) takes two integers and touches no memory.
    Errno::result(unsafe { nix::libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// Nanoseconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    // One test: each waits for any child of this process.
    #[tokio::test]
    #[allow(clippy::zombie_processes, reason = "the reaper waits for them")]
    async fn tells_ends_before_and_after_the_claim() {
        let reaper = Arc::new(Reaper::default());
        tokio::spawn(reaper.clone().run(Children::new().unwrap()));
        let spawn = |script: &str| {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            Pid::from_raw(child.id() as i32)
        };

        let spawning = reaper.spawning();
        let early = spawn("exit 3");
        while !reaper.lock().unclaimed.contains_key(&early) {
            tokio::task::yield_now().await;
        }
        assert_eq!(spawning.claim(early).await.unwrap().status, 3);
        assert_eq!(reaper.kill(early, 0), Err(Errno::ESRCH));

        let late = spawn("kill -STOP $$; exit 0");
        let end = spawning.claim(late);
        drop(spawning);
        assert_eq!(reaper.kill(late, 0), Ok(()));
        assert_eq!(reaper.kill(late, nix::libc::SIGKILL), Ok(()));
        assert_eq!(end.await.unwrap().status, 128 + 9);

        // A stale end under the number of a living child is not its own.
        let spawning = reaper.spawning();
        let reused = spawn("read line < /dev/zero; exit 5");
        reaper.lock().unclaimed.insert(reused, Exit { status: 1, time_ns: 0 });
        let end = spawning.claim(reused);
        assert_eq!(reaper.kill(reused, nix::libc::SIGTERM), Ok(()));
        assert_eq!(end.await.unwrap().status, 128 + 15);

        // A real-time signal, which has no name.
        let spawning = reaper.spawning();
        let real_time = spawn("kill -40 $$");
        assert_eq!(spawning.claim(real_time).await.unwrap().status, 128 + 40);

        spawn("exit 0");
        drop(spawning);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
