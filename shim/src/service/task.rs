//! containerd's Task service, for the pod. Each request runs in a task of its own: containerd may give up waiting, the work is done whole.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::{Service, TtrpcContext};
use tracing::info;

use super::{internal, whole};
use crate::container::process::State;
use crate::container::stats;
use crate::container::stdio::Paths;
use crate::error::Error;
use crate::pod::{Pod, Seen};

/// The service under both its names: containerd 1.x and 2.0 to 2.2 ask for v2 (a bare address is a v2 shim to them), 2.3 for v3. The
/// messages are the same.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = Arc::new(TaskService { pod: Arc::clone(pod) });
    let mut services = HashMap::new();
    for version in ["v2", "v3"] {
        let made = create_task(Arc::clone(&service) as Arc<dyn Task + Send + Sync>);
        services.extend(made.into_values().map(|made| (format!("containerd.task.{version}.Task"), made)));
    }
    services
}

struct TaskService {
    pod: Arc<Pod>,
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        info!("create {}", request.id);
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move { pod.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        info!("start {} {}", request.id, request.exec_id);
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move { pod.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(state_of(&self.pod, request)?)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let Seen { process, .. } = self.pod.find(&request.id, &request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        info!("kill {} {} with signal {}", request.id, request.exec_id, request.signal);
        let pod = Arc::clone(&self.pod);
        let work = async move { pod.kill(&request.id, &request.exec_id, request.signal, request.all).await };
        whole(work).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        info!("delete {} {}", request.id, request.exec_id);
        let pod = Arc::clone(&self.pod);
        let exit = whole(async move { pod.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid: self.pod.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        info!("exec {} {}", request.id, request.exec_id);
        let stdio =
            Paths { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let spec = request.spec.into_option().unwrap_or_default().value;
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.exec(&request.id, &request.exec_id, stdio, spec).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let resized = self.pod.resize(&request.id, &request.exec_id, request.width, request.height).await;
        resized?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.pod.close_stdin(&request.id, &request.exec_id).await?;
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.pod.processes(&request.id).await?;
        let packed = processes.into_iter().map(|(pid, exec_id)| process_info(pid, exec_id)).collect::<Result<_, _>>();
        let processes = packed.map_err(|error| internal("cannot pack a process", &error))?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // As for containerd's own shims: a container that is not there has no process.
        let task_pid = if self.pod.find(&request.id, "").is_ok() { self.pod.pid() } else { 0 };
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.pause(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unsupported("husk cannot checkpoint a container").into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        self.pod.update(&request.id, &resources).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let figures = self.pod.stats(&request.id).await?;
        let packed = stats::pack(&figures).map_err(|error| internal("cannot pack stats", &error))?;
        Ok(StatsResponse { stats: MessageField::some(packed), ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        info!("shutdown {}", request.id);
        let pod = Arc::clone(&self.pod);
        whole(async move {
            pod.shutdown(request.now).await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}

/// What containerd asks of a process all the time and waits 2 s for (`io.containerd.timeout.task.state`): told from what is known here, without a
/// wait for the guest or for anybody who waits for it.
fn state_of(pod: &Pod, request: StateRequest) -> Result<StateResponse, Error> {
    let Seen { container, process } = pod.find(&request.id, &request.exec_id)?;
    let status = match process.state() {
        State::Created | State::Starting(_) => Status::CREATED,
        State::Running if container.is_paused() => Status::PAUSED,
        State::Running => Status::RUNNING,
        State::Exited(_) => Status::STOPPED,
    };
    let exit = process.exit();
    Ok(StateResponse {
        id: request.id,
        exec_id: request.exec_id,
        bundle: container.bundle.clone(),
        pid: pod.pid(),
        status: status.into(),
        stdin: process.stdio.stdin.clone(),
        stdout: process.stdio.stdout.clone(),
        stderr: process.stdio.stderr.clone(),
        terminal: process.stdio.terminal,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| exit.timestamp()).into(),
        ..Default::default()
    })
}

/// A process as Pids tells it: an exec's own with its exec id, as containerd's shims have it.
fn process_info(pid: u32, exec_id: String) -> Result<ProcessInfo, protobuf::Error> {
    let mut info = ProcessInfo { pid, ..Default::default() };
    if !exec_id.is_empty() {
        let value = ProcessDetails { exec_id, ..Default::default() }.write_to_bytes()?;
        let type_url = "containerd.runc.v1.ProcessDetails".to_owned();
        info.info = MessageField::some(Any { type_url, value, ..Default::default() });
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::container::process::{Exit, Process};
    use crate::container::{Container, Kind};
    use crate::id::Id;
    use crate::pod::Surroundings;
    use crate::service::events::Publisher;

    #[tokio::test]
    async fn state_is_told_while_the_guest_keeps_others_waiting() {
        let (publisher, _) = Publisher::start("/no/such/socket", "test");
        let pod = Pod::new(Surroundings {
            id: Id::parse("pod").unwrap(),
            namespace: "test".to_owned(),
            socket: String::new(),
            config: Config::default(),
            publisher,
            birthplace: None,
        });
        let process = |exec_id: &str| Process::new(exec_id, Paths::default(), Vec::new());
        let made = Container::new(Id::parse("c").unwrap(), Kind::Guest, "/bundle".to_owned(), process(""));
        let container = pod.insert(made).unwrap();
        container.init.begin_start("c").unwrap();
        container.init.finish_start(true);
        for number in 0..50 {
            let id = format!("e{number}");
            container.add_exec(Id::parse(&id).unwrap(), process(&id)).unwrap();
        }
        let execs = container.processes();
        let mut held = Vec::new();
        for exec in execs.iter().filter(|exec| !exec.exec_id.is_empty()) {
            exec.begin_start(&exec.exec_id).unwrap();
            held.push(exec.streams.lock().await);
        }
        held.push(container.init.streams.lock().await);
        let told = |exec_id: &str| {
            let request = StateRequest { id: "c".to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
            state_of(&pod, request).unwrap()
        };
        assert_eq!((told("").status(), told("").bundle.as_str()), (Status::RUNNING, "/bundle"));
        assert_eq!(told("e49").status(), Status::CREATED);
        container.set_paused(true);
        assert_eq!(told("").status(), Status::PAUSED);
        container.init.end(Exit { status: 3, at_ns: 1 });
        assert_eq!((told("").status(), told("").exit_status), (Status::STOPPED, 3));
        assert!(state_of(&pod, StateRequest { id: "none".to_owned(), ..Default::default() }).is_err());
    }
}
