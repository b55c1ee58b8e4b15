//! The containers of the pod. Each has a lock of its own for its life's steps (create, start, delete); nothing is held over a wait that
//! would keep another container, or a signal to the same one, from its turn.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use husk_agent_api::agent::{CreateContainerRequest, ExecProcessRequest, HugeVolume, SignalProcessRequest, Stdio};
use husk_cell::cgroup::{Cgroup, Stats};
use husk_cell::{CellError, CgroupError, Created, ExecRequest, Namespaces, Starter};
use nix::errno::Errno;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp, Process as OciProcess, Spec};
use thiserror::Error;
use tokio::task::{AbortHandle, spawn_blocking};

use crate::cell::{PATIENCE, build, kill, on_cgroup, remove, set_oom_score};
use crate::dial::Dialler;
use crate::disk::{self, DiskError, Mounted};
use crate::events::Events;
use crate::huge::{HugeError, HugePages};
use crate::oom::Oom;
use crate::process::Process;
use crate::reaper::{Reaper, Spawning};
use crate::session;
use crate::stdio::{self, Connections, Ends, StdioError};

/// Containers in the table, and processes of one container in its own: far above what a pod has.
const MOST: usize = 4096;

/// Why something could not be done with a container.
#[derive(Debug, Error)]
pub(crate) enum ContainerError {
    #[error("There is no {0}")]
    Absent(String),
    #[error("There is already {0}")]
    Exists(String),
    #[error("{0}")]
    Unfit(String),
    #[error("{0}")]
    State(String),
    #[error("Could not read {what} from JSON")]
    Json {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("Could not {what}")]
    Cell {
        what: String,
        #[source]
        source: CellError,
    },
    #[error("Could not {what}")]
    Cgroup {
        what: String,
        #[source]
        source: CgroupError,
    },
    #[error("Could not signal {what}")]
    Signal {
        what: String,
        #[source]
        source: Errno,
    },
    #[error(transparent)]
    Huge(#[from] HugeError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("A thread of the agent ended early")]
    Thread(#[from] tokio::task::JoinError),
}

/// Of work on a container.
pub(crate) type Result<T> = std::result::Result<T, ContainerError>;

/// All containers, and what they are made with.
pub(crate) struct Containers {
    dialler: Dialler,
    reaper: Arc<Reaper>,
    events: Arc<Events>,
    table: Mutex<HashMap<String, Arc<Container>>>,
    pod_pid_namespace: Arc<Mutex<()>>,
    huge: Arc<HugePages>,
}

struct Container {
    id: String,
    /// Taken for each step of its life.
    step: Arc<tokio::sync::Mutex<Step>>,
    /// Disks mounted for it.
    disks: tokio::sync::Mutex<Mounted>,
    /// Set once, when it has been made.
    made: OnceLock<Made>,
}

enum Step {
    Making,
    Created(Starter),
    Started,
    Deleted,
}

struct Made {
    cgroup: Cgroup,
    /// None once it is deleted: they keep its mounts.
    namespaces: Mutex<Option<Namespaces>>,
    seccomp: Option<LinuxSeccomp>,
    init: Arc<Process>,
    running: AtomicBool,
    /// By exec id; none while being made.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    oom: AbortHandle,
}

impl Drop for Made {
    fn drop(&mut self) {
        self.oom.abort();
    }
}

impl Containers {
    /// No containers yet.
    pub(crate) fn new(dialler: Dialler, reaper: Arc<Reaper>, events: Arc<Events>) -> Self {
        Self {
            dialler,
            reaper,
            events,
            table: Mutex::default(),
            pod_pid_namespace: Arc::default(),
            huge: Arc::default(),
        }
    }

    /// Makes a container up to the exec of its first process, whose pid it returns.
    pub(crate) async fn create(&self, request: CreateContainerRequest) -> Result<u32> {
        check_id(&request.id)?;
        let mut spec: Spec = serde_json::from_slice(&request.spec)
            .map_err(|source| ContainerError::Json { what: "the container's spec", source })?;
        let step = Arc::new(tokio::sync::Mutex::new(Step::Making));
        let mut making = step.clone().lock_owned().await;
        let id = request.id.clone();
        let container = Arc::new(Container { id, step, disks: tokio::sync::Mutex::default(), made: OnceLock::new() });
        self.insert(&container)?;
        let making_it = async {
            *container.disks.lock().await = disk::prepare(&request.disks, &mut spec).await?;
            self.make(&container, spec, &request).await
        };
        match making_it.await {
            Ok((starter, pid)) => {
                *making = Step::Created(starter);
                Ok(pid)
            }
            Err(error) => {
                self.huge.release(&request.id);
                *making = Step::Deleted;
                container.disks.lock().await.undo().await;
                lock(&self.table).remove(&request.id);
                Err(error)
            }
        }
    }

    fn insert(&self, container: &Arc<Container>) -> Result<()> {
        let mut table = lock(&self.table);
        if table.contains_key(&container.id) {
            return Err(ContainerError::Exists(format!("a container {}", container.id)));
        }
        if table.len() >= MOST {
            return Err(ContainerError::State(format!("There are {MOST} containers already")));
        }
        table.insert(container.id.clone(), container.clone());
        Ok(())
    }

    async fn make(
        &self,
        container: &Arc<Container>,
        spec: Spec,
        request: &CreateContainerRequest,
    ) -> Result<(Starter, u32)> {
        let (id, stdio): (_, &Stdio) = (&container.id, &request.stdio);
        self.reserve(id, spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()), &request.huge_volumes)
            .await?;
        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
        let (theirs, ends) = stdio::prepare(stdio)?;
        let spawning = self.reaper.spawning();
        let building = spawn_blocking({
            let (id, namespace) = (id.clone(), self.pod_pid_namespace.clone());
            move || build(id, spec, theirs, &namespace)
        });
        // The streams are dialled while the cell is built.
        let (connections, built) = tokio::join!(stdio::dial(&self.dialler, stdio), building);
        let (created, cgroup) = built??;
        for warning in &created.process.warnings {
            tracing::warn!("Container {id}: {warning}");
        }
        let outcome = self.adopt(container, created, cgroup.clone(), seccomp, spawning, connections, ends);
        if outcome.is_err() {
            remove(id, cgroup).await?;
        }
        outcome
    }

    /// Sets huge pages aside for a container and makes its volumes of them.
    async fn reserve(&self, id: &str, resources: Option<&LinuxResources>, volumes: &[HugeVolume]) -> Result<()> {
        let limits = resources.and_then(|resources| resources.hugepage_limits().clone()).unwrap_or_default();
        if limits.iter().all(|limit| limit.limit() == 0) && volumes.is_empty() {
            return Ok(());
        }
        let (id, volumes, huge) = (id.to_owned(), volumes.to_vec(), self.huge.clone());
        Ok(spawn_blocking(move || huge.reserve(&id, &limits, &volumes)).await??)
    }

    /// Puts what was built into the container, and begins to watch it.
    #[allow(clippy::too_many_arguments, reason = "the one caller's results, named")]
    fn adopt(
        &self,
        container: &Arc<Container>,
        created: Created,
        cgroup: Cgroup,
        seccomp: Option<LinuxSeccomp>,
        spawning: Spawning,
        connections: std::result::Result<Connections, StdioError>,
        ends: Ends,
    ) -> Result<(Starter, u32)> {
        let Created { process, namespaces } = created;
        let doing = || format!("watch the memory of container {}", container.id);
        let watch = cgroup.watch_memory().map_err(|source| ContainerError::Cgroup { what: doing(), source })?;
        let oom = Arc::new(Oom::new(watch).map_err(StdioError::Attach)?);
        let stdio::Attached { terminal, outputs } = stdio::attach(ends, connections?, process.terminal)?;
        let pid = to_pid(process.pid);
        let (init, tell) = Process::new(pid, self.reaper.clone(), terminal);
        let claim = spawning.claim(pid);
        let watching = tokio::spawn(oom.clone().run(container.id.clone(), self.events.clone()));
        let made = Made {
            cgroup: cgroup.clone(),
            namespaces: Mutex::new(Some(namespaces)),
            seccomp,
            init: Arc::new(init),
            running: AtomicBool::new(false),
            execs: Mutex::default(),
            oom: watching.abort_handle(),
        };
        // It is the only place where it is set.
        let _ = container.made.set(made);
        let (id, events) = (container.id.clone(), self.events.clone());
        tokio::spawn(async move {
            let Ok(exit) = claim.await else { return };
            // Without a pid namespace of its own the container's other processes would outlive it.
            if let Ok(Err(error)) = spawn_blocking(move || cgroup.kill()).await {
                tracing::debug!("Could not kill what is left of {id}: {error}");
            }
            oom.tell(&id, &events).await;
            // Nobody may wait for it any more.
            let _ = tell.send(Some(exit));
            events.exited(&id, "", exit, outputs.written()).await;
        });
        Ok((process.starter, process.pid))
    }

    /// Lets the first process exec.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        let container = self.find(id)?;
        let mut step = container.step.lock().await;
        match std::mem::replace(&mut *step, Step::Started) {
            Step::Created(starter) => {
                let started = spawn_blocking(move || starter.start()).await?;
                started.map_err(|source| ContainerError::Cell { what: format!("start container {id}"), source })?;
                container.made()?.running.store(true, Ordering::Release);
                Ok(())
            }
            other => {
                *step = other;
                Err(ContainerError::State(format!("Container {id} was started before")))
            }
        }
    }

    /// Kills what is left and forgets the container. One that is not there is deleted already.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        let Ok(container) = self.find(id) else { return Ok(()) };
        // A step that waits for the container's processes ends with them.
        if let Ok(made) = container.made() {
            made.running.store(false, Ordering::Release);
            kill(id, made.cgroup.clone()).await?;
        }
        let mut step = container.step.lock().await;
        if let Step::Deleted = *step {
            return Ok(());
        }
        let made = container.made()?;
        if tokio::time::timeout(PATIENCE, made.init.exited()).await.is_err() {
            return Err(ContainerError::State(format!(
                "Container {id} has not ended {PATIENCE:?} after it was killed"
            )));
        }
        remove(id, made.cgroup.clone()).await?;
        self.huge.release(id);
        drop(lock(&made.namespaces).take());
        container.disks.lock().await.undo().await;
        *step = Step::Deleted;
        lock(&self.table).remove(id);
        Ok(())
    }

    /// Makes and starts a further process; returns its pid.
    pub(crate) async fn exec(&self, request: ExecProcessRequest) -> Result<u32> {
        let ExecProcessRequest { id, exec_id, process, stdio, .. } = request;
        check_id(&exec_id)?;
        let container = self.find(&id)?;
        let made = container.running()?;
        let mut process: OciProcess =
            serde_json::from_slice(&process).map_err(|source| ContainerError::Json { what: "the process", source })?;
        set_oom_score(&mut process);
        {
            let mut execs = lock(&made.execs);
            if execs.contains_key(&exec_id) {
                return Err(ContainerError::Exists(format!("a process {exec_id} in container {id}")));
            }
            if execs.len() >= MOST {
                return Err(ContainerError::State(format!("Container {id} has {MOST} processes already")));
            }
            execs.insert(exec_id.clone(), None);
        }
        let outcome = self.spawn(&container, made, &exec_id, process, &stdio).await;
        let mut execs = lock(&made.execs);
        match outcome {
            Ok(process) => {
                let pid = process.pid();
                execs.insert(exec_id, Some(process));
                Ok(pid)
            }
            Err(error) => {
                execs.remove(&exec_id);
                // What the container's end broke off is the caller's to know as that.
                if made.init.has_exited() { Err(container.not_running()) } else { Err(error) }
            }
        }
    }

    async fn spawn(
        &self,
        container: &Container,
        made: &Made,
        exec_id: &str,
        process: OciProcess,
        stdio: &Stdio,
    ) -> Result<Arc<Process>> {
        let id = &container.id;
        let failed = |source| ContainerError::Cell { what: format!("run a process in container {id}"), source };
        let (theirs, ends) = stdio::prepare(stdio)?;
        let namespaces = lock(&made.namespaces).clone().ok_or_else(|| container.not_running())?;
        let request = ExecRequest {
            namespaces,
            process,
            seccomp: made.seccomp.clone(),
            stdio: theirs,
            cgroup: made.cgroup.clone(),
        };
        let spawning = self.reaper.spawning();
        let (connections, spawned) =
            tokio::join!(stdio::dial(&self.dialler, stdio), spawn_blocking(move || husk_cell::exec(request)));
        let spawned = spawned?.map_err(failed)?;
        for warning in &spawned.warnings {
            tracing::warn!("Process {exec_id} in container {id}: {warning}");
        }
        let pid = to_pid(spawned.pid);
        let claim = spawning.claim(pid);
        drop(spawning);
        let stdio::Attached { terminal, outputs } = stdio::attach(ends, connections?, spawned.terminal)?;
        let starter = spawned.starter;
        spawn_blocking(move || starter.start()).await?.map_err(failed)?;
        let (process, tell) = Process::new(pid, self.reaper.clone(), terminal);
        let (events, id, exec_id) = (self.events.clone(), id.clone(), exec_id.to_owned());
        tokio::spawn(async move {
            let Ok(exit) = claim.await else { return };
            // Nobody may wait for it any more.
            let _ = tell.send(Some(exit));
            events.exited(&id, &exec_id, exit, outputs.written()).await;
        });
        Ok(Arc::new(process))
    }

    /// Forgets a process of an exec that has ended. One that is not there is deleted already.
    pub(crate) fn delete_process(&self, id: &str, exec_id: &str) -> Result<()> {
        let container = self.find(id)?;
        let mut execs = lock(&container.made()?.execs);
        match execs.get(exec_id) {
            None => Ok(()),
            Some(Some(process)) if process.has_exited() => {
                execs.remove(exec_id);
                Ok(())
            }
            Some(_) => Err(ContainerError::State(format!("Process {exec_id} in container {id} is running"))),
        }
    }

    /// Sends a signal to one process, or to all of the container.
    pub(crate) async fn signal(&self, request: &SignalProcessRequest) -> Result<()> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=nix::libc::SIGRTMAX()).contains(signal))
            .ok_or_else(|| ContainerError::Unfit(format!("{} is no signal", request.signal)))?;
        let container = self.find(&request.id)?;
        let made = container.made()?;
        if !request.all || !request.exec_id.is_empty() {
            let process = container.process(&request.exec_id)?;
            let what = || describe(&request.id, &request.exec_id);
            process.signal(signal).map_err(|source| match source {
                Errno::ESRCH => ContainerError::Absent(format!("{} any more: it has ended", what())),
                source => ContainerError::Signal { what: what(), source },
            })?;
            if signal == nix::libc::SIGKILL && !request.exec_id.is_empty() {
                // What a probe that took too long has started goes with it.
                let (cgroup, session) = (made.cgroup.clone(), process.pid());
                return on_cgroup(format!("kill the session of {}", what()), move || session::kill(&cgroup, session))
                    .await;
            }
            return Ok(());
        }
        if signal == nix::libc::SIGKILL {
            return kill(&request.id, made.cgroup.clone()).await;
        }
        let cgroup = made.cgroup.clone();
        let listing = on_cgroup(format!("list the processes of container {}", request.id), move || cgroup.processes());
        for pid in listing.await? {
            match crate::reaper::send(to_pid(pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(source) => return Err(ContainerError::Signal { what: describe(&request.id, ""), source }),
            }
        }
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let process = self.find(id)?.process(exec_id)?;
        match &process.terminal {
            Some(terminal) => Ok(terminal.resize(width, height)?),
            None => Err(ContainerError::State(format!("{} has no terminal", describe(id, exec_id)))),
        }
    }

    /// Freezes a running container.
    pub(crate) async fn pause(&self, id: &str) -> Result<()> {
        let cgroup = self.find(id)?.running()?.cgroup.clone();
        on_cgroup(format!("freeze container {id}"), move || cgroup.freeze(PATIENCE)).await
    }

    /// Thaws it.
    pub(crate) async fn resume(&self, id: &str) -> Result<()> {
        let cgroup = self.find(id)?.running()?.cgroup.clone();
        on_cgroup(format!("thaw container {id}"), move || cgroup.thaw(PATIENCE)).await
    }

    /// Sets new limits.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|source| ContainerError::Json { what: "the container's resources", source })?;
        let cgroup = self.find(id)?.made()?.cgroup.clone();
        if resources.hugepage_limits().is_some() {
            self.reserve(id, Some(&resources), &[]).await?;
        }
        on_cgroup(format!("set the limits of container {id}"), move || cgroup.set(&resources)).await
    }

    /// The container's figures.
    pub(crate) async fn stats(&self, id: &str) -> Result<Stats> {
        let cgroup = self.find(id)?.made()?.cgroup.clone();
        on_cgroup(format!("read the figures of container {id}"), move || cgroup.stats()).await
    }

    /// The container's processes, each with its exec id if it is an exec's own.
    pub(crate) async fn processes(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let container = self.find(id)?;
        let made = container.made()?;
        let cgroup = made.cgroup.clone();
        let pids = on_cgroup(format!("list the processes of container {id}"), move || cgroup.processes()).await?;
        let execs = lock(&made.execs);
        let running = |(exec_id, process): (&String, &Option<Arc<Process>>)| {
            let process = process.as_ref().filter(|process| !process.has_exited())?;
            Some((process.pid(), exec_id.clone()))
        };
        let mut exec_ids: HashMap<u32, String> = execs.iter().filter_map(running).collect();
        Ok(pids.into_iter().map(|pid| (pid, exec_ids.remove(&pid).unwrap_or_default())).collect())
    }

    /// Kills every container, without waiting for their ends.
    pub(crate) async fn kill_all(&self) {
        let containers: Vec<_> = lock(&self.table).values().cloned().collect();
        for container in containers {
            if let Ok(made) = container.made()
                && let Err(error) = kill(&container.id, made.cgroup.clone()).await
            {
                tracing::warn!("{}", crate::display(error));
            }
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.table).get(id).cloned().ok_or_else(|| ContainerError::Absent(format!("container {id}")))
    }
}

impl Container {
    fn made(&self) -> Result<&Made> {
        self.made.get().ok_or_else(|| ContainerError::State(format!("Container {} is still being made", self.id)))
    }

    fn running(&self) -> Result<&Made> {
        let made = self.made()?;
        if made.running.load(Ordering::Acquire) && !made.init.has_exited() { Ok(made) } else { Err(self.not_running()) }
    }

    fn not_running(&self) -> ContainerError {
        ContainerError::State(format!("Container {} is not running", self.id))
    }

    /// The first process, or that of an exec.
    fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        let made = self.made()?;
        if exec_id.is_empty() {
            return Ok(made.init.clone());
        }
        match lock(&made.execs).get(exec_id) {
            Some(Some(process)) => Ok(process.clone()),
            Some(None) => Err(ContainerError::State(format!("{} is still being made", describe(&self.id, exec_id)))),
            None => Err(ContainerError::Absent(describe(&self.id, exec_id))),
        }
    }
}

/// Ids appear in messages and as a directory's name.
fn check_id(id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if id.is_empty() || id.len() > 255 || matches!(id, "." | "..") || !id.bytes().all(plain) {
        return Err(ContainerError::Unfit(format!("{id:?} is no id: 1 to 255 letters, digits, '_', '-', '.'")));
    }
    Ok(())
}

fn describe(id: &str, exec_id: &str) -> String {
    if exec_id.is_empty() { format!("container {id}") } else { format!("process {exec_id} in container {id}") }
}

fn to_pid(pid: u32) -> Pid {
    // The kernel's pids fit: PID_MAX_LIMIT is 2^22.
    Pid::from_raw(pid as i32)
}

/// A poisoned lock's data is whole: nothing panics between its changes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain() {
        for id in ["a", "0f-_.x", "..."] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a\n", "é", &"a".repeat(256)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
