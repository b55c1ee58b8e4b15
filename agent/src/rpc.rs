//! The agent's API (agent.proto) over one connection: requests to their modules, errors to status codes; no logic of its own.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures::stream;
use husk_agent_api::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, Event, ExecProcessRequest,
    ExecProcessResponse, ListProcessesResponse, ListedProcess, LoadProfileRequest, MemoryChangedRequest,
    ProcessRequest, ResizeTerminalRequest, SignalProcessRequest, StartPodRequest, StartPodResponse, StatsPodResponse,
    StatsResponse, UpdateContainerRequest,
};
use husk_agent_api::agent_ttrpc::{Agent, create_agent};
use husk_cell::{CellError, CgroupError};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::{Code, get_status};

use crate::apparmor;
use crate::boot;
use crate::container::{ContainerError, Containers};
use crate::dial::{Connection, Dialler};
use crate::events::Events;
use crate::huge::HugeError;
use crate::memory::{Memory, MemoryError};
use crate::pod::{self, PodError};
use crate::reaper::{Children, Reaper};
use crate::shutdown::Machine;
use crate::{display, stats};

/// Why serving ended early.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    #[error("Could not make the cgroup of the pod")]
    Cgroup(#[source] CgroupError),
    #[error("Could not start the RPC server")]
    Start(#[source] ttrpc::Error),
}

/// Serves the connection until it ends; then every container is killed.
pub(crate) async fn serve(
    connection: Connection,
    dialler: Dialler,
    children: Children,
    machine: Machine,
) -> Result<(), ServeError> {
    let reaper = Arc::new(Reaper::default());
    tokio::spawn(reaper.clone().run(children));
    let events = Arc::new(Events::new());
    let memory = Arc::new(Memory::new(boot::pod_cgroup().map_err(ServeError::Cgroup)?, events.clone()));
    let containers = Arc::new(Containers::new(dialler, reaper, events.clone()));
    let service = Service { containers: containers.clone(), events, memory, started: AtomicBool::new(false), machine };
    let (announce, ended) = oneshot::channel();
    let connection = Announced { connection, announce: Some(announce) };
    let listener = Listener::new(stream::once(async { Ok::<_, io::Error>(connection) }));
    let mut server = Server::new().add_listener(listener).register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(ServeError::Start)?;
    // Dropped without a word it has ended too.
    let _ = ended.await;
    tracing::info!("The connection with the shim has ended");
    containers.kill_all().await;
    Ok(())
}

struct Service {
    containers: Arc<Containers>,
    events: Arc<Events>,
    memory: Arc<Memory>,
    started: AtomicBool,
    machine: Machine,
}

#[async_trait]
impl Agent for Service {
    async fn start_pod(&self, _: &TtrpcContext, request: StartPodRequest) -> ttrpc::Result<StartPodResponse> {
        if self.started.swap(true, Ordering::AcqRel) {
            return Err(status(Code::FAILED_PRECONDITION, "The pod was started before".into()));
        }
        self.memory.changed(request.growth_mib, 0).await.map_err(memory_status)?;
        to_the_end(async move { pod::start(&request).await.map_err(pod_status) }).await?;
        Ok(StartPodResponse {
            kernel: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn load_profile(&self, _: &TtrpcContext, request: LoadProfileRequest) -> ttrpc::Result<Empty> {
        let loading = tokio::task::spawn_blocking(move || apparmor::load(&request.name, &request.policy));
        let loaded = loading.await.map_err(|error| status(Code::INTERNAL, display(error)))?;
        loaded.map_err(|error| status(Code::INVALID_ARGUMENT, display(error)))?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let containers = self.containers.clone();
        let pid = to_the_end(async move { containers.create(request).await.map_err(container_status) }).await?;
        Ok(CreateContainerResponse { pid, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        to_the_end(async move { containers.start(&request.id).await.map_err(container_status) }).await?;
        Ok(Empty::new())
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        to_the_end(async move { containers.delete(&request.id).await.map_err(container_status) }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<ExecProcessResponse> {
        let containers = self.containers.clone();
        let pid = to_the_end(async move { containers.exec(request).await.map_err(container_status) }).await?;
        Ok(ExecProcessResponse { pid, ..Default::default() })
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.delete_process(&request.id, &request.exec_id).map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.signal(&request).await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> ttrpc::Result<Empty> {
        let ResizeTerminalRequest { id, exec_id, width, height, .. } = request;
        self.containers.resize(&id, &exec_id, width, height).map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.pause(&request.id).await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.resume(&request.id).await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.update(&request.id, &request.resources).await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn memory_changed(&self, _: &TtrpcContext, request: MemoryChangedRequest) -> ttrpc::Result<Empty> {
        let memory = self.memory.clone();
        to_the_end(async move { memory.changed(request.growth_mib, request.plugged_mib).await.map_err(memory_status) })
            .await?;
        Ok(Empty::new())
    }

    async fn stats_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.containers.stats(&request.id).await.map(stats::response).map_err(container_status)
    }

    async fn stats_pod(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<StatsPodResponse> {
        let failed = |error| status(Code::INTERNAL, crate::context("Could not read the interfaces' counters", error));
        let network = stats::network().map_err(failed)?;
        Ok(StatsPodResponse { network, ..Default::default() })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = self.containers.processes(&request.id).await.map_err(container_status)?;
        let listed = |(pid, exec_id)| ListedProcess { pid, exec_id, ..Default::default() };
        Ok(ListProcessesResponse { processes: processes.into_iter().map(listed).collect(), ..Default::default() })
    }

    async fn events(&self, _: &TtrpcContext, _: Empty, sender: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let Some(mut queue) = self.events.listen() else {
            return Err(status(Code::FAILED_PRECONDITION, "The events are being told to another call".into()));
        };
        while let Some(event) = queue.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.containers.kill_all().await;
        self.machine.off()
    }
}

/// Runs work that must not be broken off half done where its caller gives up (ttrpc drops a request's future at its deadline).
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(status(Code::INTERNAL, display(error))),
    }
}

fn pod_status(error: PodError) -> ttrpc::Error {
    let code = match error {
        PodError::EntropyLength { .. } => Code::INVALID_ARGUMENT,
        _ => Code::INTERNAL,
    };
    status(code, display(error))
}

fn memory_status(error: MemoryError) -> ttrpc::Error {
    status(Code::INTERNAL, display(error))
}

fn container_status(error: ContainerError) -> ttrpc::Error {
    let code = match &error {
        ContainerError::Absent(_) => Code::NOT_FOUND,
        ContainerError::Exists(_) => Code::ALREADY_EXISTS,
        ContainerError::Unfit(_)
        | ContainerError::Json { .. }
        | ContainerError::Huge(HugeError::Unfit(_))
        | ContainerError::Cell { source: CellError::Invalid(_), .. }
        | ContainerError::Cgroup { source: CgroupError::Invalid(_), .. } => Code::INVALID_ARGUMENT,
        ContainerError::State(_) | ContainerError::Cell { source: CellError::NotRunning, .. } => {
            Code::FAILED_PRECONDITION
        }
        _ => Code::INTERNAL,
    };
    status(code, display(error))
}

fn status(code: Code, message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

/// The connection, telling of its end at once: ttrpc itself first waits for requests under way.
struct Announced {
    connection: Connection,
    announce: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Announced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.remaining();
        let result = Pin::new(&mut self.connection).poll_read(context, buffer);
        let over = match &result {
            Poll::Ready(Ok(())) => before > 0 && buffer.remaining() == before,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if over && let Some(announce) = self.announce.take() {
            // The receiver may be gone when the machine is ending anyway.
            let _ = announce.send(());
        }
        result
    }
}

impl AsyncWrite for Announced {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }
}
