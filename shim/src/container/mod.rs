//! Containers and their processes as containerd sees them: states, exits, streams.

mod delivery;
pub(crate) mod exec;
mod logger;
pub(crate) mod process;
pub(crate) mod stats;
pub(crate) mod stdio;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::id::Id;
use process::Process;

/// Most exec processes of a container that are not yet deleted.
const MAX_EXECS: usize = 1024;

/// What a container is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The pod itself: no process, only the machine.
    Sandbox,
    /// A container in the guest.
    Guest,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: Id,
    /// What it is in the guest.
    pub(crate) kind: Kind,
    /// containerd's bundle.
    pub(crate) bundle: String,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    execs: Mutex<HashMap<Id, Arc<Process>>>,
    paused: AtomicBool,
    oom_told: AtomicBool,
}

impl Container {
    /// A container whose first process is `init`.
    pub(crate) fn new(id: Id, kind: Kind, bundle: String, init: Process) -> Self {
        Self {
            id,
            kind,
            bundle,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_told: AtomicBool::new(false),
        }
    }

    /// The process with this exec id; the first one for an empty id.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        let found = execs.get(exec_id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "process", id: exec_id.to_owned() })
    }

    /// Adds an exec process.
    pub(crate) fn add_exec(&self, exec_id: Id, process: Process) -> Result<(), Error> {
        let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        if execs.contains_key(&exec_id) {
            return Err(Error::AlreadyExists { what: "process", id: exec_id.to_string() });
        }
        if execs.len() >= MAX_EXECS {
            return Err(Error::State { doing: "add a process to", id: self.id.to_string(), state: "full" });
        }
        execs.insert(exec_id, Arc::new(process));
        Ok(())
    }

    /// Forgets an exec process.
    pub(crate) fn remove_exec(&self, exec_id: &str) {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(exec_id);
    }

    /// Every process, the exec processes first.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        execs.values().chain([&self.init]).cloned().collect()
    }

    /// Whether it is frozen.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Notes whether it is frozen.
    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether this OOM kill is the container's first: later ones, which a guest could send without end, are not passed on.
    pub(crate) fn is_first_oom(&self) -> bool {
        !self.oom_told.swap(true, Ordering::Relaxed)
    }

    /// The name of its part of the share directory.
    pub(crate) fn share(&self) -> PathBuf {
        PathBuf::from(&*self.id)
    }
}
