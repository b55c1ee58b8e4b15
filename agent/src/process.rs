//! One process that the shim knows: the first of a container, or one of an exec.

use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::reaper::{Exit, Reaper};
use crate::stdio::Terminal;

/// A process from its making until the shim deletes it.
pub(crate) struct Process {
    pid: Pid,
    reaper: Arc<Reaper>,
    exit: watch::Receiver<Option<Exit>>,
    /// Its terminal, if it has one.
    pub terminal: Option<Terminal>,
}

impl Process {
    /// A process, and where its end is to be told.
    pub(crate) fn new(
        pid: Pid,
        reaper: Arc<Reaper>,
        terminal: Option<Terminal>,
    ) -> (Self, watch::Sender<Option<Exit>>) {
        let (sender, exit) = watch::channel(None);
        (Self { pid, reaper, exit, terminal }, sender)
    }

    /// Its number in the guest's first pid namespace.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Sends it a signal; `ESRCH` when it is gone.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), Errno> {
        self.reaper.kill(self.pid, signal)
    }

    /// Whether its end has been told.
    pub(crate) fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Until its end has been told.
    pub(crate) async fn exited(&self) {
        // An error means that nobody is left to tell it: as good as over.
        let _ = self.exit.clone().wait_for(Option::is_some).await;
    }
}
