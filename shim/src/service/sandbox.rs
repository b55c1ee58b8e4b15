//! containerd's Sandbox service (runtime/sandbox/v1), for the same pod as the Task service. UpdateSandbox of containerd 2.4, which a shim may
//! leave out, is left out: the machine follows its containers' limits.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::{Service, TtrpcContext};
use serde_json::json;
use tracing::info;

use super::{internal, whole};
use crate::RUNTIME;
use crate::container::stats;
use crate::pod::Pod;
use crate::pod::sandbox::Status;

/// The service by its name.
pub(super) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { pod: Arc::clone(pod) }))
}

struct SandboxService {
    pod: Arc<Pod>,
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        info!("create sandbox {}", request.sandbox_id);
        self.pod.create_sandbox(request)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        info!("start sandbox {}", request.sandbox_id);
        let pod = Arc::clone(&self.pod);
        let status = whole(async move { pod.start_sandbox(&request.sandbox_id).await }).await?;
        let created_at = status.started_at.map(timestamp).into();
        Ok(StartSandboxResponse { pid: status.pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.mut_platform();
        platform.os = "linux".to_owned();
        // The guest's CPU is the host's, by the name of Go's GOARCH.
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        info!("stop sandbox {}", request.sandbox_id);
        let pod = Arc::clone(&self.pod);
        let limit = (request.timeout_secs > 0).then(|| Duration::from_secs(request.timeout_secs.into()));
        whole(async move { pod.stop_sandbox(&request.sandbox_id, limit).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.pod.find(&request.sandbox_id, "")?.process.wait().await;
        let exited_at = MessageField::some(exit.timestamp());
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let status = self.pod.sandbox_status(&request.sandbox_id)?;
        Ok(SandboxStatusResponse {
            pid: status.pid,
            // Names of the CRI's PodSandboxState.
            state: if status.is_ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.to_owned(),
            info: if request.verbose { info_of(&status) } else { HashMap::new() },
            created_at: status.started_at.map(timestamp).into(),
            exited_at: status.exit.map(|exit| exit.timestamp()).into(),
            sandbox_id: request.sandbox_id,
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.pod.ping_sandbox(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        info!("shutdown sandbox {}", request.sandbox_id);
        let pod = Arc::clone(&self.pod);
        whole(async move {
            pod.shutdown_sandbox().await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let figures = self.pod.stats(&request.sandbox_id).await?;
        let packed = stats::pack(&figures).map_err(|error| internal("cannot pack the metrics", &error))?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.mut_metrics();
        metrics.id = request.sandbox_id;
        metrics.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metrics.data = MessageField::some(packed);
        Ok(response)
    }
}

/// What `crictl inspectp` shows: the names of containerd's own SandboxInfo, and husk's.
fn info_of(status: &Status) -> HashMap<String, String> {
    let machine = status.machine.as_ref();
    let info = json!({
        "pid": status.pid,
        "processStatus": if status.is_ready { "running" } else { "stopped" },
        "runtimeType": RUNTIME,
    });
    let own = json!({
        "vcpus": machine.map(|machine| machine.size.vcpus),
        "memoryMib": machine.map(|machine| machine.size.memory_mib),
        "ended": machine.and_then(|machine| machine.cause()),
    });
    HashMap::from([("info".to_owned(), info.to_string()), ("husk".to_owned(), own.to_string())])
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}
