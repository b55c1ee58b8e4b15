//! The pod under containerd's Sandbox API (core/sandbox): there is no pause container, the pod is described by the CRI's configuration alone.
//! Inside it is a sandbox like any other, without the Task API's events.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::Spec;
use tracing::warn;

use super::machine::Machine;
use super::{Pod, Seen};
use crate::container::process::{Exit, Process, State};
use crate::container::stdio::Paths;
use crate::container::{Container, Kind};
use crate::error::{Error, chain};
use crate::id::Id;
use crate::spec::load::{self, Role};
use crate::spec::sandbox::{self, Files, PodSandboxConfig};
use crate::spec::size::{self, Host};

/// Longest wait for a sandbox's end where containerd names none: its machine is killed well before.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// SIGTERM, by which a sandbox is stopped.
const SIGTERM: u32 = 15;

/// What CreateSandbox has said.
#[derive(Debug)]
pub(super) struct Described {
    spec: Spec,
    config: PodSandboxConfig,
}

/// A sandbox as containerd asks for it.
pub(crate) struct Status {
    /// The VMM's process id; 0 before there is one.
    pub(crate) pid: u32,
    /// Whether containers can be made in it.
    pub(crate) is_ready: bool,
    /// When its machine was started.
    pub(crate) started_at: Option<SystemTime>,
    /// How it ended.
    pub(crate) exit: Option<Exit>,
    /// The machine.
    pub(crate) machine: Option<Arc<Machine>>,
}

impl Pod {
    /// Takes note of the pod and refuses what can't be. Nothing is started yet.
    pub(crate) fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<(), Error> {
        let id = Id::parse(&request.sandbox_id)?;
        if *id != *self.around.id {
            return Err(Error::NotFound { what: "sandbox", id: request.sandbox_id });
        }
        let config = sandbox::config(&request.options)?;
        let spec = sandbox::spec(&config, &id, &self.around.namespace, &request.netns_path)?;
        load::pod(&spec)?;
        size::of(&spec, &Role::Sandbox, &self.around.config, Host::here())?;
        let process = Process::new("", Paths::default(), Vec::new());
        self.insert(Container::new(id, Kind::Sandbox, request.bundle_path, process))?;
        let mut described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        *described = Some(Described { spec, config });
        Ok(())
    }

    /// Starts its machine.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<Status, Error> {
        // A shutdown that comes meanwhile waits for the outcome.
        let _booting = self.booting.lock().await;
        let Seen { process, .. } = self.find(id, "")?;
        let described = self.described.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Described { spec, config }) = described else {
            return Err(Error::State { doing: "start", id: id.to_owned(), state: process.state().name() });
        };
        process.begin_start(id)?;
        let started = self.boot_sandbox(&spec, &config).await;
        if let Err(error) = &started {
            warn!("sandbox {id} is not started: {}", chain(error));
        }
        process.finish_start(started.is_ok());
        started?;
        self.sandbox_status(id)
    }

    async fn boot_sandbox(self: &Arc<Self>, spec: &Spec, config: &PodSandboxConfig) -> Result<(), Error> {
        let machine = self.start_machine(spec, &Role::Sandbox).await?;
        let files = Files::write(machine.directory(), config)?;
        let sandbox = super::Sandbox { files, started_at: SystemTime::now() };
        // It is the only place where it is set, and the machine starts once.
        let _ = self.sandbox.set(sandbox);
        Ok(())
    }

    /// What there is to say of it.
    pub(crate) fn sandbox_status(&self, id: &str) -> Result<Status, Error> {
        let Seen { process, .. } = self.find(id, "")?;
        let machine = self.current();
        let is_up = machine.as_ref().is_some_and(|machine| machine.cause().is_none());
        Ok(Status {
            pid: self.pid(),
            is_ready: is_up && process.state() == State::Running,
            started_at: self.sandbox.get().map(|sandbox| sandbox.started_at),
            exit: process.exit(),
            machine,
        })
    }

    /// Fails where the sandbox is not there or its machine does not run.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), Error> {
        self.find(id, "")?;
        self.running("reach the sandbox").map(drop)
    }

    /// Ends its machine, and with it all containers, and waits for that. One that has ended is stopped.
    pub(crate) async fn stop_sandbox(self: &Arc<Self>, id: &str, limit: Option<Duration>) -> Result<(), Error> {
        let Seen { process, .. } = self.find(id, "")?;
        self.kill_sandbox(&process, SIGTERM);
        let limit = limit.unwrap_or(STOP_LIMIT);
        match tokio::time::timeout(limit, process.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Late { what: "the sandbox's end", limit }),
        }
    }

    /// Takes back all that the pod has; then the shim has nothing left to do. One that is not there is gone already.
    pub(crate) async fn shutdown_sandbox(&self) {
        let _booting = self.booting.lock().await;
        self.shutdown(true).await;
    }
}
