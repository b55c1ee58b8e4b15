//! One process of a container: created, starting, running, exited. An exit that comes while the start is still being told to
//! containerd is held back until it is, since containerd expects TaskStart before TaskExit.

use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Mutex, watch};

use super::stdio::{Paths, Streams, Written};
use crate::error::Error;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub(crate) status: u32,
    /// When, since the epoch.
    pub(crate) at_ns: u64,
}

impl Exit {
    /// An exit of this moment.
    pub(crate) fn now(status: u32) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { status, at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) }
    }

    /// The end of a process whose machine is gone: as if killed by SIGKILL.
    pub(crate) fn killed() -> Self {
        Self::now(128 + 9)
    }

    /// Its time, for containerd.
    pub(crate) fn timestamp(&self) -> Timestamp {
        const NANOS: u64 = 1_000_000_000;
        Timestamp {
            seconds: i64::try_from(self.at_ns / NANOS).unwrap_or(i64::MAX),
            nanos: i32::try_from(self.at_ns % NANOS).unwrap_or(0),
            ..Default::default()
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Made, not yet let go.
    Created,
    /// Being started; it may have ended already.
    Starting(Option<Exit>),
    /// Running.
    Running,
    /// Ended.
    Exited(Exit),
}

impl State {
    /// Its name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting(_) => "being started",
            Self::Running => "running",
            Self::Exited(_) => "stopped",
        }
    }
}

/// Longest wait for a process's start to be told before its end is.
const START_LIMIT: Duration = Duration::from_secs(2);

/// Longest time in which containerd takes nothing of a process's output before its end is told nevertheless.
const OUTPUT_STALL: Duration = Duration::from_secs(2);

/// Longest wait for a process's output before its end is told, however slowly it is taken.
const OUTPUT_LIMIT: Duration = Duration::from_secs(60);

/// What the guest has said of a process's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    /// How.
    pub(crate) exit: Exit,
    /// Its output until then.
    pub(crate) written: Written,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for a container's first process.
    pub(crate) exec_id: String,
    /// Where containerd wants its streams.
    pub(crate) stdio: Paths,
    /// An exec's OCI process as JSON; empty for a container's first process.
    pub(crate) spec: Vec<u8>,
    /// Its streams, once they are connected.
    pub(crate) streams: Mutex<Option<Streams>>,
    size: std::sync::Mutex<Option<(u32, u32)>>,
    ending: std::sync::Mutex<Option<Ending>>,
    state: watch::Sender<State>,
}

impl Process {
    /// A created process.
    pub(crate) fn new(exec_id: &str, stdio: Paths, spec: Vec<u8>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            streams: Mutex::new(None),
            size: std::sync::Mutex::new(None),
            ending: std::sync::Mutex::new(None),
            state: watch::Sender::new(State::Created),
        }
    }

    /// Keeps the size of a terminal that is not there yet: width and height in characters.
    pub(crate) fn set_size(&self, width: u32, height: u32) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some((width, height));
    }

    /// The size that its terminal is to have from the start.
    pub(crate) fn size(&self) -> Option<(u32, u32)> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state.
    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Its end, if it came.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self.state() {
            State::Exited(exit) => Some(exit),
            _ => None,
        }
    }

    /// Begins the start: from here on an exit is held back until `finish_start`.
    pub(crate) fn begin_start(&self, id: &str) -> Result<(), Error> {
        let mut found = State::Created;
        self.state.send_if_modified(|state| {
            found = *state;
            if *state == State::Created {
                *state = State::Starting(None);
            }
            found == State::Created
        });
        match found {
            State::Created => Ok(()),
            other => Err(Error::State { doing: "start", id: id.to_owned(), state: other.name() }),
        }
    }

    /// Ends the start, after containerd was told of it. What comes back is an exit that came meanwhile: it is now to be told.
    pub(crate) fn finish_start(&self, succeeded: bool) -> Option<Exit> {
        let mut held = None;
        self.state.send_modify(|state| {
            if let State::Starting(exit) = *state {
                held = exit;
                *state = match exit {
                    Some(exit) => State::Exited(exit),
                    None if succeeded => State::Running,
                    None => State::Created,
                };
            }
        });
        held
    }

    /// Notes the end. True if it is to be told now: it is the first, and not held back by a start.
    pub(crate) fn end(&self, exit: Exit) -> bool {
        let mut is_told_now = false;
        self.state.send_if_modified(|state| match *state {
            State::Created | State::Running => {
                *state = State::Exited(exit);
                is_told_now = true;
                true
            }
            State::Starting(None) => {
                *state = State::Starting(Some(exit));
                true
            }
            State::Starting(Some(_)) | State::Exited(_) => false,
        });
        is_told_now
    }

    /// Keeps what the guest says of its end, which is told to containerd later; false if it has said it before.
    pub(crate) fn set_ending(&self, ending: Ending) -> bool {
        let mut kept = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = kept.is_none();
        kept.get_or_insert(ending);
        is_first
    }

    /// What the guest has said of its end.
    pub(crate) fn ending(&self) -> Option<Ending> {
        *self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its output that is to be with containerd before its end is told. A terminal ends with its process, whoever else has it.
    pub(crate) fn written(&self) -> Written {
        self.ending().filter(|_| !self.stdio.terminal).map_or(Written::ALL, |ending| ending.written)
    }

    /// Waits, after the process has ended, until its start is told and its output is with containerd. What it has left running may hold its
    /// output open, and containerd may have stopped reading: neither is waited for.
    pub(crate) async fn settle(&self) {
        let mut state = self.state.subscribe();
        let started = state.wait_for(|state| !matches!(state, State::Starting(_)));
        let _ = tokio::time::timeout(START_LIMIT, started).await;
        let deliveries = self.streams.lock().await.as_ref().map(Streams::deliveries);
        if let Some(deliveries) = deliveries {
            let _ = tokio::time::timeout(OUTPUT_LIMIT, deliveries.wait(self.written(), OUTPUT_STALL)).await;
        }
    }

    /// Waits for the end; any number may wait.
    pub(crate) async fn wait(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Exited(exit) = *state.borrow_and_update() {
                return exit;
            }
            // The sender is this very process: it can't be gone.
            let _ = state.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn process() -> Process {
        Process::new("", Paths::default(), Vec::new())
    }

    #[test]
    fn runs_and_ends_once() {
        let process = process();
        process.begin_start("c").unwrap();
        assert!(process.begin_start("c").is_err());
        assert_eq!(process.finish_start(true), None);
        assert_eq!(process.state(), State::Running);
        let exit = Exit::now(3);
        assert!(process.end(exit));
        assert!(!process.end(Exit::killed()));
        assert_eq!(process.exit(), Some(exit));
        assert!(process.begin_start("c").is_err());
    }

    #[test]
    fn an_exit_during_the_start_is_held_back() {
        let process = process();
        process.begin_start("c").unwrap();
        let exit = Exit::now(1);
        assert!(!process.end(exit));
        assert!(!process.end(Exit::killed()));
        assert_eq!(process.exit(), None);
        assert_eq!(process.finish_start(true), Some(exit));
        assert_eq!(process.exit(), Some(exit));
    }

    #[test]
    fn a_failed_start_leaves_it_created_unless_it_ended() {
        let process = process();
        process.begin_start("c").unwrap();
        assert_eq!(process.finish_start(false), None);
        assert_eq!(process.state(), State::Created);
        assert!(process.end(Exit::killed()));
        assert_eq!(process.exit().unwrap().status, 137);
    }

    #[tokio::test]
    async fn many_wait_and_all_are_told() {
        let process = Arc::new(process());
        let waiting: Vec<_> = (0..32)
            .map(|_| {
                let process = Arc::clone(&process);
                tokio::spawn(async move { process.wait().await })
            })
            .collect();
        tokio::task::yield_now().await;
        process.end(Exit::now(7));
        for wait in waiting {
            assert_eq!(wait.await.unwrap().status, 7);
        }
        assert_eq!(process.wait().await.status, 7);
    }

    #[test]
    fn timestamps_split_nanoseconds() {
        let stamp = Exit { status: 0, at_ns: 5_000_000_007 }.timestamp();
        assert_eq!((stamp.seconds, stamp.nanos), (5, 7));
    }
}
