//! The pod: its containers and its machine, and what containerd may ask of them. `create` starts the machine, `stop` sees its end,
//! `recover` cleans up after a dead shim.

pub(crate) mod command_line;
mod cpusets;
pub(crate) mod create;
pub(crate) mod disks;
pub(crate) mod guest;
pub(crate) mod machine;
pub(crate) mod memory;
mod power;
pub(crate) mod recover;
pub(crate) mod sandbox;
pub(crate) mod state;
mod stop;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use oci_spec::runtime::LinuxResources;
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::apparmor;
use crate::config::Config;
use crate::container::process::{Exit, Process, State};
use crate::container::stats::Figures;
use crate::container::stdio::Paths;
use crate::container::{Container, Kind, exec};
use crate::error::{Error, chain};
use crate::id::Id;
use crate::service::events::Publisher;
use crate::spec::load::{self, Role};
use crate::spec::resources;
use crate::spec::sandbox::Files;
use crate::spec::size::{self, Host};
use crate::template::background::Birthplace;
use cpusets::CpuSet;
use machine::Machine;

/// Most containers of a pod.
const MAX_CONTAINERS: usize = 512;

/// What the shim was started with.
pub(crate) struct Surroundings {
    /// The pod's id.
    pub(crate) id: Id,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The shim's socket for containerd.
    pub(crate) socket: String,
    /// The shim's configuration.
    pub(crate) config: Config,
    /// Events for containerd.
    pub(crate) publisher: Publisher,
    /// Where the shim was born; none where nothing is built there.
    pub(crate) birthplace: Option<Arc<Birthplace>>,
}

/// One pod.
pub(crate) struct Pod {
    around: Surroundings,
    containers: Mutex<HashMap<Id, Arc<Container>>>,
    machine: Mutex<Slot>,
    /// Exit status of the sandbox, where a signal has already decided it.
    sandbox_status: Mutex<Option<u32>>,
    finished: watch::Sender<bool>,
    /// What the Sandbox API has said of the pod, until it is started.
    described: Mutex<Option<sandbox::Described>>,
    /// Held while the Sandbox API's pod is being started.
    booting: tokio::sync::Mutex<()>,
    /// What a pod of the Sandbox API has.
    sandbox: OnceLock<Sandbox>,
}

/// What only a pod of the Sandbox API has.
struct Sandbox {
    files: Files,
    started_at: SystemTime,
}

/// The place of the pod's machine.
enum Slot {
    None,
    Starting,
    Some(Arc<Machine>),
}

/// A process as containerd's State asks for it.
pub(crate) struct Seen {
    /// Its container.
    pub(crate) container: Arc<Container>,
    /// The process.
    pub(crate) process: Arc<Process>,
}

impl Pod {
    /// A pod without containers and machine.
    pub(crate) fn new(around: Surroundings) -> Arc<Self> {
        Arc::new(Self {
            around,
            containers: Mutex::default(),
            machine: Mutex::new(Slot::None),
            sandbox_status: Mutex::new(None),
            finished: watch::Sender::new(false),
            described: Mutex::default(),
            booting: tokio::sync::Mutex::default(),
            sandbox: OnceLock::new(),
        })
    }

    /// Waits until the shim has nothing left to do.
    pub(crate) async fn finished(&self) {
        // The sender is the pod itself: the wait can't fail.
        let _ = self.finished.subscribe().wait_for(|finished| *finished).await;
    }

    /// The VMM's process id; 0 before there is one.
    pub(crate) fn pid(&self) -> u32 {
        self.current().map_or(0, |machine| machine.pid)
    }

    /// Makes a container, and the machine for the pod's first.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let id = Id::parse(&request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("husk cannot restore a container from a checkpoint"));
        }
        let mut spec = load::load(Path::new(&request.bundle))?;
        let role = load::role(&spec)?;
        if let (Role::Member(_), Some(sandbox)) = (&role, self.sandbox.get()) {
            sandbox.files.add_to(&mut spec);
        }
        let stdio = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let kind = if role == Role::Sandbox { Kind::Sandbox } else { Kind::Guest };
        let container = Container::new(id.clone(), kind, request.bundle.clone(), Process::new("", stdio, Vec::new()));
        let container = self.insert(container)?;
        let outcome = match role {
            Role::Sandbox => self.start_machine(&spec, &role).await.map(drop),
            Role::Single => match self.start_machine(&spec, &role).await {
                Ok(machine) => self.create_guest(&machine, &container, spec, &role, &request.rootfs).await,
                Err(error) => Err(error),
            },
            Role::Member(ref sandbox) if **sandbox != *self.around.id => {
                Err(Error::NotFound { what: "sandbox", id: sandbox.clone() })
            }
            Role::Member(_) => match self.running("create a container") {
                Ok(machine) => self.create_guest(&machine, &container, spec, &role, &request.rootfs).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = outcome {
            self.remove(&id);
            warn!("container {id} is not created: {}", chain(&error));
            return Err(error);
        }
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(io),
            pid: self.pid(),
            ..Default::default()
        };
        self.around.publisher.publish(event).await;
        Ok(self.pid())
    }

    /// Starts the pod's machine, which can happen once.
    async fn start_machine(
        self: &Arc<Self>,
        spec: &oci_spec::runtime::Spec,
        role: &Role,
    ) -> Result<Arc<Machine>, Error> {
        let pod = load::pod(spec)?;
        let size = size::of(spec, role, &self.around.config, Host::here())?;
        {
            let mut slot = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            if !matches!(*slot, Slot::None) {
                return Err(Error::AlreadyExists { what: "machine of pod", id: self.around.id.to_string() });
            }
            *slot = Slot::Starting;
        }
        let request = create::Request {
            id: &self.around.id,
            namespace: &self.around.namespace,
            socket: &self.around.socket,
            config: &self.around.config,
            pod,
            size,
            birthplace: self.around.birthplace.as_ref(),
        };
        let booted = create::boot(request).await;
        let mut slot = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        match booted {
            Ok((machine, events)) => {
                let machine = Arc::new(machine);
                *slot = Slot::Some(Arc::clone(&machine));
                tokio::spawn(Arc::clone(self).watch(Arc::clone(&machine), events));
                if tracing::enabled!(tracing::Level::DEBUG) {
                    tokio::spawn(log_phases(Arc::clone(&machine)));
                }
                Ok(machine)
            }
            Err(error) => {
                *slot = Slot::None;
                Err(error.into())
            }
        }
    }

    /// Lets a created process go.
    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let Seen { container, process } = self.find(id, exec_id)?;
        let machine = self.running("start a process")?;
        process.begin_start(if exec_id.is_empty() { id } else { exec_id })?;
        let started = match (container.kind, exec_id) {
            (Kind::Sandbox, "") => Ok(()),
            (Kind::Sandbox, _) => Err(Error::Unsupported("a sandbox has no processes")),
            (Kind::Guest, "") => machine.agent.start_container(id).await.map_err(Error::from),
            (Kind::Guest, _) => exec::start(&machine, &self.around.namespace, &container, &process).await,
        };
        if started.is_ok() {
            let (container_id, pid) = (id.to_owned(), machine.pid);
            if exec_id.is_empty() {
                self.around.publisher.publish(TaskStart { container_id, pid, ..Default::default() }).await;
            } else {
                let exec_id = exec_id.to_owned();
                let event = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
                self.around.publisher.publish(event).await;
            }
        }
        if let Some(exit) = process.finish_start(started.is_ok()) {
            self.tell_exit(&container, &process, exit).await;
        }
        started.map(|()| machine.pid)
    }

    /// Adds an exec process to a container.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, stdio: Paths, spec: Vec<u8>) -> Result<(), Error> {
        let exec_id = Id::parse(exec_id)?;
        let Seen { container, process: init } = self.find(id, "")?;
        if container.kind == Kind::Sandbox {
            return Err(Error::Unsupported("a sandbox has no processes"));
        }
        if init.state() != State::Running {
            return Err(Error::State { doing: "add a process to", id: id.to_owned(), state: init.state().name() });
        }
        let message = |source| Error::Message { what: "process to be added", source };
        let oci = crate::spec::guest::guest_process(serde_json::from_slice(&spec).map_err(message)?)?;
        if let Some(profile) = apparmor::wanted(Some(&oci)) {
            let machine = self.running("add a process")?;
            machine.profiles.give_once(&machine.agent, profile).await?;
        }
        let process = Process::new(&exec_id, stdio, serde_json::to_vec(&oci).map_err(message)?);
        container.add_exec(exec_id.clone(), process)?;
        let (container_id, exec_id) = (id.to_owned(), exec_id.to_string());
        self.around.publisher.publish(TaskExecAdded { container_id, exec_id, ..Default::default() }).await;
        Ok(())
    }

    /// A process, for State.
    pub(crate) fn find(&self, id: &str, exec_id: &str) -> Result<Seen, Error> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        let container = containers.get(id).cloned();
        let container = container.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })?;
        let process = container.process(exec_id)?;
        Ok(Seen { container, process })
    }

    /// Sends a signal.
    pub(crate) async fn kill(self: &Arc<Self>, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let Seen { container, process } = self.find(id, exec_id)?;
        if process.exit().is_some() && !all {
            let id = if exec_id.is_empty() { id } else { exec_id };
            return Err(Error::Finished { id: id.to_owned() });
        }
        match container.kind {
            Kind::Sandbox => {
                self.kill_sandbox(&process, signal);
                Ok(())
            }
            Kind::Guest if !exec_id.is_empty() && process.state() == State::Created => {
                Err(Error::State { doing: "send a signal to", id: exec_id.to_owned(), state: "created" })
            }
            Kind::Guest => {
                let machine = self.running("send a signal")?;
                Ok(machine.agent.signal(id, exec_id, signal, all).await?)
            }
        }
    }

    /// Removes an exited (or never started) process; for a container's first process the container too.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let Seen { container, process } = self.find(id, exec_id)?;
        let exit = match process.state() {
            State::Exited(exit) => exit,
            State::Created => {
                let exit = Exit::killed();
                if process.end(exit) && exec_id.is_empty() && container.kind == Kind::Guest {
                    self.tell_exit(&container, &process, exit).await;
                }
                exit
            }
            state => {
                let id = if exec_id.is_empty() { id } else { exec_id };
                return Err(Error::State { doing: "delete", id: id.to_owned(), state: state.name() });
            }
        };
        if exec_id.is_empty() {
            if container.kind == Kind::Guest {
                self.delete_guest(&container).await?;
            }
            self.remove(&container.id);
            let event = TaskDelete {
                container_id: id.to_owned(),
                pid: self.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.timestamp()),
                ..Default::default()
            };
            self.around.publisher.publish(event).await;
        } else {
            self.delete_exec(&container, &process).await;
        }
        Ok(exit)
    }

    /// Freezes a container.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), Error> {
        let (container, machine) = self.guest(id, "pause")?;
        machine.agent.pause(id).await?;
        container.set_paused(true);
        self.around.publisher.publish(TaskPaused { container_id: id.to_owned(), ..Default::default() }).await;
        Ok(())
    }

    /// Thaws a container.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), Error> {
        let (container, machine) = self.guest(id, "resume")?;
        if !container.is_paused() {
            return Err(Error::State { doing: "resume", id: id.to_owned(), state: "running" });
        }
        machine.agent.resume(id).await?;
        container.set_paused(false);
        self.around.publisher.publish(TaskResumed { container_id: id.to_owned(), ..Default::default() }).await;
        Ok(())
    }

    /// Sets the size of a terminal, also of one that is not there yet.
    pub(crate) async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let Seen { container, process } = self.find(id, exec_id)?;
        process.set_size(width, height);
        if container.kind == Kind::Sandbox || !matches!(process.state(), State::Running) {
            return Ok(());
        }
        let machine = self.running("resize a terminal")?;
        Ok(machine.agent.resize(id, exec_id, width, height).await?)
    }

    /// Ends a process's input, once it is drained.
    pub(crate) async fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let Seen { process, .. } = self.find(id, exec_id)?;
        if let Some(streams) = process.streams.lock().await.as_mut() {
            streams.close_stdin();
        }
        Ok(())
    }

    /// Sets a container's limits; `resources` is OCI LinuxResources as JSON. A sandbox has none of its own.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), Error> {
        let Seen { container, .. } = self.find(id, "")?;
        if container.kind == Kind::Sandbox {
            return Ok(());
        }
        let message = |source| Error::Message { what: "resources of the update", source };
        let resources: LinuxResources = serde_json::from_slice(resources).map_err(message)?;
        let machine = self.running("update a container")?;
        let (limit, host) = (resources::memory_limit(Some(&resources)), Host::here());
        resources::fit(&resources, machine.size, host.cpus)?;
        if let Some(set) = CpuSet::of(Some(&resources)) {
            machine.cpusets.put(id, set, machine.cgroup.as_ref())?;
        }
        let resources = resources::guest_resources(resources)?;
        let resources = serde_json::to_vec(&resources).map_err(message)?;
        let set = machine.agent.update(id, resources);
        if limit == 0 { Ok(set.await?) } else { machine.with_limit(id, limit, host, set).await }
    }

    /// A container's figures; those of one that has ended are zero. A sandbox's are what its pod costs on the host.
    pub(crate) async fn stats(&self, id: &str) -> Result<Figures, Error> {
        let Seen { container, process } = self.find(id, "")?;
        if process.exit().is_some() {
            return Ok(Figures::default());
        }
        let machine = self.running("measure a container")?;
        match container.kind {
            Kind::Sandbox => {
                let (cgroup, pod) = tokio::join!(machine.cgroup_stats(), machine.agent.stats_pod());
                Ok(Figures { cgroup: cgroup?, pod: pod? })
            }
            Kind::Guest if *container.id == *self.around.id => {
                let (cgroup, pod) = tokio::join!(machine.agent.stats(id), machine.agent.stats_pod());
                Ok(Figures { cgroup: cgroup?, pod: pod? })
            }
            Kind::Guest => Ok(Figures { cgroup: machine.agent.stats(id).await?, ..Figures::default() }),
        }
    }

    /// A container's processes by their numbers in the guest, each with its exec id if it is an exec's own. A sandbox's only one is the VMM,
    /// on the host.
    pub(crate) async fn processes(&self, id: &str) -> Result<Vec<(u32, String)>, Error> {
        let Seen { container, process } = self.find(id, "")?;
        if process.exit().is_some() {
            return Ok(Vec::new());
        }
        let machine = self.running("list processes")?;
        if container.kind == Kind::Sandbox {
            return Ok(vec![(machine.pid, String::new())]);
        }
        let listed = machine.agent.processes(id).await?;
        Ok(listed.into_iter().map(|process| (process.pid, process.exec_id)).collect())
    }

    /// A container of the guest with the machine, for a request that needs both.
    fn guest(&self, id: &str, doing: &'static str) -> Result<(Arc<Container>, Arc<Machine>), Error> {
        let Seen { container, process } = self.find(id, "")?;
        if container.kind == Kind::Sandbox {
            return Err(Error::State { doing, id: id.to_owned(), state: "a sandbox, which has no process" });
        }
        if process.state() != State::Running {
            return Err(Error::State { doing, id: id.to_owned(), state: process.state().name() });
        }
        Ok((container, self.running(doing)?))
    }

    /// The machine, running or not.
    fn current(&self) -> Option<Arc<Machine>> {
        match &*self.machine.lock().unwrap_or_else(PoisonError::into_inner) {
            Slot::Some(machine) => Some(Arc::clone(machine)),
            Slot::None | Slot::Starting => None,
        }
    }

    /// The machine, if it runs.
    fn running(&self, doing: &'static str) -> Result<Arc<Machine>, Error> {
        let machine = self.current().ok_or(Error::Down { doing, cause: String::new() })?;
        match machine.cause() {
            None => Ok(machine),
            Some(cause) => Err(Error::Down { doing, cause: format!(": {cause}") }),
        }
    }

    /// Adds a container.
    pub(crate) fn insert(&self, container: Container) -> Result<Arc<Container>, Error> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if containers.contains_key(&container.id) {
            return Err(Error::AlreadyExists { what: "container", id: container.id.to_string() });
        }
        if containers.len() >= MAX_CONTAINERS {
            return Err(Error::State {
                doing: "add a container to",
                id: self.around.id.to_string(),
                state: "a pod that is full",
            });
        }
        let container = Arc::new(container);
        containers.insert(container.id.clone(), Arc::clone(&container));
        Ok(container)
    }

    fn remove(&self, id: &Id) {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// Every container.
    fn all(&self) -> Vec<Arc<Container>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Tells containerd of a process's end. That of a sandbox of the Sandbox API is what WaitSandbox waits for.
    async fn tell_exit(&self, container: &Container, process: &Process, exit: Exit) {
        if container.kind == Kind::Sandbox && self.sandbox.get().is_some() {
            return;
        }
        let id = if process.exec_id.is_empty() { container.id.to_string() } else { process.exec_id.clone() };
        let event = TaskExit {
            container_id: container.id.to_string(),
            id,
            pid: self.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        };
        self.around.publisher.publish(event).await;
    }
}

/// Logs the VMM's own view of its start.
async fn log_phases(machine: Arc<Machine>) {
    let held = machine.held.read().await;
    let Some(vmm) = &held.vmm else { return };
    match vmm.phases().await {
        Ok(phases) => debug!("VMM started {phases}"),
        Err(error) => debug!("{}", chain(&error)),
    }
}
