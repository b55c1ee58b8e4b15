//! The service `husk.vmm.v1.Vmm` (vmm/api/proto/vmm.proto).

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_backend::disk::Disk;
use husk_backend::files::FileChannel;
use husk_vmm_api::vmm::{
    AttachDiskRequest, AttachDiskResponse, DetachDiskRequest, DetachDiskResponse, Empty, Memory, Phase,
    ResizeMemoryRequest, ResizeMemoryResponse, SaveResponse, StatusResponse,
};
use husk_vmm_api::vmm_ttrpc::{Vmm, create_vmm};
use ttrpc::r#async::TtrpcContext;
use ttrpc::r#async::transport::Listener;
use ttrpc::{Code, Error, get_status};

use super::socket::{ControlSocket, Stop};
use crate::hw::hotplug::HotPlugError;
use crate::lock::lock;
use crate::machine::{DiskError, Disks, Paused, ResizeError, Running, Sizing};
use crate::phases::Phases;

/// The machine as the API sees it.
enum State {
    Running(Running),
    Paused(Paused),
    /// For the moment of a change, under the lock.
    Changing,
}

/// The API over a machine.
pub(super) struct Control {
    machine: Mutex<State>,
    disks: Arc<Disks>,
    sizing: Arc<Sizing>,
    files: Mutex<Option<FileChannel>>,
    phases: Phases,
    stop: Stop,
}

impl Control {
    /// Of a running machine.
    pub(super) fn new(machine: Running, files: Option<FileChannel>, phases: Phases, stop: Stop) -> Self {
        let (disks, sizing) = (machine.disks(), machine.sizing());
        Self { machine: Mutex::new(State::Running(machine)), disks, sizing, files: Mutex::new(files), phases, stop }
    }
}

/// Serves the one connection that there is, forever.
pub(super) async fn serve(socket: ControlSocket, control: Control) -> ttrpc::Result<()> {
    let connections = futures::StreamExt::chain(
        futures::stream::iter([Ok(socket)]),
        // A listener that ends would end the server.
        futures::stream::pending(),
    );
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_vmm(Arc::new(control)));
    server.start().await?;
    std::future::pending().await
}

fn refused(message: &str) -> Error {
    Error::RpcStatus(get_status(Code::FAILED_PRECONDITION, message))
}

fn disk_status(error: DiskError) -> Error {
    let code = match &error {
        DiskError::HotPlug(HotPlugError::Full) => Code::RESOURCE_EXHAUSTED,
        DiskError::HotPlug(HotPlugError::Absent(_)) => Code::NOT_FOUND,
        _ => Code::INTERNAL,
    };
    Error::RpcStatus(get_status(code, crate::chain(&error)))
}

fn resize_status(error: ResizeError) -> Error {
    let code = match &error {
        ResizeError::Room { .. } | ResizeError::Granularity(_) => Code::INVALID_ARGUMENT,
        ResizeError::Memory(_) => Code::INTERNAL,
    };
    Error::RpcStatus(get_status(code, crate::chain(&error)))
}

/// Printable, so that it can stand in logs and in the guest's sysfs.
fn is_serial(serial: &str) -> bool {
    (1..=20).contains(&serial.len()) && serial.bytes().all(|byte| byte.is_ascii_graphic())
}

#[async_trait]
impl Vmm for Control {
    async fn status(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<StatusResponse> {
        let state = match *lock(&self.machine) {
            State::Paused(_) => "paused",
            State::Running(_) | State::Changing => "running",
        };
        let phase = |(name, micros): (&str, u64)| Phase { name: name.into(), micros, ..Default::default() };
        let phases = self.phases.list().into_iter().map(phase).collect();
        let figures = self.sizing.figures();
        let memory = Memory {
            boot_mib: figures.boot,
            hotplug_mib: figures.hotplug,
            requested_mib: figures.requested,
            plugged_mib: figures.plugged,
            ..Default::default()
        };
        Ok(StatusResponse { state: state.into(), phases, memory: Some(memory).into(), ..Default::default() })
    }

    async fn stop(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        tracing::info!("Stopped by the shim");
        self.stop.after_answer();
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let mut state = lock(&self.machine);
        let (next, result) = match std::mem::replace(&mut *state, State::Changing) {
            State::Running(machine) => match machine.pause() {
                Ok(paused) => (State::Paused(paused), Ok(Empty::default())),
                Err((machine, error)) => (State::Running(machine), Err(Error::Others(crate::chain(&error)))),
            },
            other => (other, Err(refused("The machine is paused already"))),
        };
        *state = next;
        result
    }

    async fn resume(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let mut state = lock(&self.machine);
        let (next, result) = match std::mem::replace(&mut *state, State::Changing) {
            State::Paused(machine) => (State::Running(machine.resume()), Ok(Empty::default())),
            other => (other, Err(refused("The machine is not paused"))),
        };
        *state = next;
        result
    }

    async fn save(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<SaveResponse> {
        match &mut *lock(&self.machine) {
            State::Paused(machine) => {
                let memory = machine.save().map_err(|error| refused(&crate::chain(&error)))?;
                tracing::info!("Saved, {} KiB of memory", memory >> 10);
                Ok(SaveResponse { memory, ..Default::default() })
            }
            State::Running(_) | State::Changing => Err(refused("Only a paused machine can be saved")),
        }
    }

    async fn resize_memory(
        &self,
        _: &TtrpcContext,
        request: ResizeMemoryRequest,
    ) -> ttrpc::Result<ResizeMemoryResponse> {
        if matches!(*lock(&self.machine), State::Paused(_)) {
            return Err(refused("The memory of a paused machine can't be resized"));
        }
        let plugged_mib = self.sizing.resize(request.plugged_mib).await.map_err(resize_status)?;
        Ok(ResizeMemoryResponse { plugged_mib, ..Default::default() })
    }

    async fn attach_disk(&self, _: &TtrpcContext, request: AttachDiskRequest) -> ttrpc::Result<AttachDiskResponse> {
        if !is_serial(&request.serial) {
            let message = format!("{:?} is no serial number: 1 to 20 printable characters", request.serial);
            return Err(Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, message)));
        }
        let file = lock(&self.files).as_mut().and_then(|files| files.take(request.number));
        let file = file.ok_or_else(|| refused("The disk's file has not come"))?;
        let disk = Disk::new(file, request.read_only)
            .map_err(|error| Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, crate::chain(&error))))?;
        let device = self.disks.attach(disk, &request.serial).map_err(disk_status)?.into();
        Ok(AttachDiskResponse { device, ..Default::default() })
    }

    async fn detach_disk(&self, _: &TtrpcContext, request: DetachDiskRequest) -> ttrpc::Result<DetachDiskResponse> {
        // 255 is none.
        let device = u8::try_from(request.device).unwrap_or(u8::MAX);
        // On a task of its own: a caller that gives up must not leave it half done.
        let disks = self.disks.clone();
        let detached = tokio::spawn(async move { disks.detach(device).await }).await;
        let detached = detached.map_err(|error| Error::Others(error.to_string()))?.map_err(disk_status)?;
        Ok(DetachDiskResponse { ejected: detached.ejected, closed: detached.closed, ..Default::default() })
    }
}
