//! The guest's agent: its hello, then its ttrpc service. It is hostile as the guest is: every call has a deadline, every answer is bounded by ttrpc.

use std::future::Future;
use std::time::Duration;

use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::{Client, ClientStreamReceiver};
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::context::{self, Context};
use husk_agent_api::agent::{
    ContainerRequest, CreateContainerRequest, Empty, Event, ExecProcessRequest, ListedProcess, LoadProfileRequest,
    MemoryChangedRequest, ProcessRequest, ResizeTerminalRequest, SignalProcessRequest, StartPodRequest,
    StartPodResponse, StatsPodResponse, StatsResponse, UpdateContainerRequest,
};
use husk_agent_api::agent_ttrpc::AgentClient;
use husk_agent_api::hello::{self, Hello};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::PeerError;

/// Longest wait for an ordinary call.
const LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for a call that makes or ends processes.
const LONG_LIMIT: Duration = Duration::from_secs(60);

/// A connected agent.
#[derive(Clone)]
pub(crate) struct Agent(AgentClient);

impl Agent {
    /// Reads and checks the hello on a new connection; the caller bounds the wait.
    pub(crate) async fn greet(mut stream: UnixStream, nonce: &[u8; 16]) -> Result<Self, PeerError> {
        let mut bytes = [0; hello::LEN];
        stream
            .read_exact(&mut bytes)
            .await
            .map_err(|source| PeerError::Socket { doing: "read the agent's hello", source })?;
        Hello::verify(&bytes, nonce)?;
        Ok(Self(AgentClient::new(Client::new(Socket::new(stream)))))
    }

    /// Once, before any container.
    pub(crate) async fn start_pod(&self, request: &StartPodRequest) -> Result<StartPodResponse, PeerError> {
        call("start the pod", LONG_LIMIT, |context| self.0.start_pod(context, request)).await
    }

    /// Loads an AppArmor profile into the guest's kernel; `policy` is in the kernel's binary form.
    pub(crate) async fn load_profile(&self, name: &str, policy: Vec<u8>) -> Result<(), PeerError> {
        let request = LoadProfileRequest { name: name.to_owned(), policy, ..Default::default() };
        call("load the AppArmor profile", LIMIT, |context| self.0.load_profile(context, &request)).await.map(drop)
    }

    /// Builds a container.
    pub(crate) async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), PeerError> {
        call("create the container", LONG_LIMIT, |context| self.0.create_container(context, request)).await.map(drop)
    }

    /// Lets a built container run.
    pub(crate) async fn start_container(&self, id: &str) -> Result<(), PeerError> {
        let request = container(id);
        call("start the container", LONG_LIMIT, |context| self.0.start_container(context, &request)).await.map(drop)
    }

    /// Removes a container.
    pub(crate) async fn delete_container(&self, id: &str) -> Result<(), PeerError> {
        let request = container(id);
        call("delete the container", LONG_LIMIT, |context| self.0.delete_container(context, &request)).await.map(drop)
    }

    /// Starts a further process in a container.
    pub(crate) async fn exec_process(&self, request: &ExecProcessRequest) -> Result<(), PeerError> {
        call("start the process", LONG_LIMIT, |context| self.0.exec_process(context, request)).await.map(drop)
    }

    /// Forgets an exited process.
    pub(crate) async fn delete_process(&self, id: &str, exec_id: &str) -> Result<(), PeerError> {
        let request = ProcessRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        call("forget the process", LIMIT, |context| self.0.delete_process(context, &request)).await.map(drop)
    }

    /// Sends a signal to a process or to a whole container.
    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), PeerError> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let request = SignalProcessRequest { id, exec_id, signal, all, ..Default::default() };
        call("send the signal", LIMIT, |context| self.0.signal_process(context, &request)).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    pub(crate) async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<(), PeerError> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let request = ResizeTerminalRequest { id, exec_id, width, height, ..Default::default() };
        call("resize the terminal", LIMIT, |context| self.0.resize_terminal(context, &request)).await.map(drop)
    }

    /// Freezes a container.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), PeerError> {
        let request = container(id);
        call("pause the container", LIMIT, |context| self.0.pause_container(context, &request)).await.map(drop)
    }

    /// Thaws a container.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), PeerError> {
        let request = container(id);
        call("resume the container", LIMIT, |context| self.0.resume_container(context, &request)).await.map(drop)
    }

    /// Sets limits; `resources` is OCI LinuxResources as JSON.
    pub(crate) async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), PeerError> {
        let request = UpdateContainerRequest { id: id.to_owned(), resources, ..Default::default() };
        call("update the container", LIMIT, |context| self.0.update_container(context, &request)).await.map(drop)
    }

    /// A container's figures.
    pub(crate) async fn stats(&self, id: &str) -> Result<StatsResponse, PeerError> {
        let request = container(id);
        call("measure the container", LIMIT, |context| self.0.stats_container(context, &request)).await
    }

    /// The figures of the pod as a whole.
    pub(crate) async fn stats_pod(&self) -> Result<StatsPodResponse, PeerError> {
        let empty = Empty::new();
        call("measure the pod", LIMIT, |context| self.0.stats_pod(context, &empty)).await
    }

    /// A container's processes.
    pub(crate) async fn processes(&self, id: &str) -> Result<Vec<ListedProcess>, PeerError> {
        let request = container(id);
        let listed = call("list the processes", LIMIT, |context| self.0.list_processes(context, &request)).await?;
        Ok(listed.processes)
    }

    /// Tells by how many MiB the machine can still grow, and by how many it has grown.
    pub(crate) async fn memory_changed(&self, growth_mib: u64, plugged_mib: u64) -> Result<(), PeerError> {
        let request = MemoryChangedRequest { growth_mib, plugged_mib, ..Default::default() };
        call("watch its memory", LIMIT, |context| self.0.memory_changed(context, &request)).await.map(drop)
    }

    /// Exits, OOM kills and wishes for memory, until the connection ends.
    pub(crate) async fn events(&self) -> Result<Events, PeerError> {
        // A stream lives as long as the connection: only its opening has a deadline.
        let empty = Empty::new();
        let opening = self.0.events(Context::default(), &empty);
        let stream = tokio::time::timeout(LIMIT, opening)
            .await
            .map_err(|_| PeerError::Deadline { what: "the agent's events", limit: LIMIT })?
            .map_err(|error| PeerError::of_call("the agent", "tell events", LIMIT, error))?;
        Ok(Events(stream))
    }

    /// Asks for the machine's end. The connection may end before the answer: that is success.
    pub(crate) async fn shutdown(&self, limit: Duration) -> Result<(), PeerError> {
        let empty = Empty::new();
        match call("shut down", limit, |context| self.0.shutdown(context, &empty)).await {
            Err(PeerError::Connection { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The agent's events.
pub(crate) struct Events(ClientStreamReceiver<Event>);

impl Events {
    /// The next event; nothing once the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.0.recv().await.ok().flatten()
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { id: id.to_owned(), ..Default::default() }
}

/// Makes a call with its deadline.
async fn call<T, F>(what: &'static str, limit: Duration, start: impl FnOnce(Context) -> F) -> Result<T, PeerError>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    start(context::with_duration(limit)).await.map_err(|error| PeerError::of_call("the agent", what, limit, error))
}
