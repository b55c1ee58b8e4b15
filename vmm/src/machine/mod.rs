//! The machine: memory, vCPUs and buses under KVM. Its states are types: what may not be called in a state does not exist there.

mod acpi;
mod barrier;
mod boot;
mod builder;
mod cpuid;
mod devices;
mod disks;
mod ending;
mod gate;
mod generation;
mod inherited;
mod irq;
mod kick;
pub(crate) mod layout;
mod memory;
mod msr;
mod saved;
mod sizing;
mod vcpu;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use husk_jail::seccomp::{self, SeccompError, ThreadKind};
use husk_snapshot::{MemoryError, StateError};
use husk_virtio::device::GuestMemory;
use husk_virtio::transport::saved::SavedError;
use husk_vmm_api::exit::ExitReason;
use kvm_ioctls::VmFd;

pub(crate) use builder::{BuildError, build, check};
pub(crate) use devices::EventLoop;
pub(crate) use disks::{DiskError, Disks};
pub(crate) use ending::{Ending, EndingSubscriber};
pub(crate) use inherited::Taker;
pub(crate) use sizing::{ResizeError, Sizing};

use crate::lock::lock;
use crate::phases::Phases;
use barrier::Barrier;
use gate::Gate;
use inherited::Snapshot;
use kick::{Kicker, RunPage};
use saved::{Controllers, MachineState, Slot, VcpuStateError};
use vcpu::{Buses, Vcpu};

/// Longest wait for the vCPUs to pause; leaving KVM_RUN takes microseconds.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for the event loop to do what there is to do.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// A machine that has not run yet.
pub(crate) struct Built {
    vcpus: Vec<(Vcpu, RunPage)>,
    shared: Arc<Shared>,
    saving: Option<Saving>,
}

/// A machine whose vCPUs run.
pub(crate) struct Running {
    vcpus: Vec<Kicker>,
    shared: Arc<Shared>,
    saving: Option<Saving>,
}

/// A machine whose vCPUs stand still.
pub(crate) struct Paused(Running);

/// What the vCPUs' threads share.
struct Shared {
    buses: Buses,
    gate: Arc<Gate>,
    disks: Arc<Disks>,
    ending: Arc<Ending>,
    phases: Phases,
    sizing: Arc<Sizing>,
    /// KVM knows it by address: it must live as long as any vCPU.
    _memory: Arc<GuestMemory>,
}

/// What a VM needs that is to be saved.
struct Saving {
    vm: Arc<VmFd>,
    /// Without what was plugged in: such a machine is not saved.
    memory: Arc<GuestMemory>,
    barrier: Arc<Barrier>,
    /// Where each vCPU leaves its state.
    slots: Vec<Slot>,
    files: Snapshot,
}

/// Why a VM was not saved; it is as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveError {
    /// The configuration names no files.
    #[error("This VM was not started to be saved")]
    NoFiles,
    /// The devices' thread is stuck.
    #[error("Waited {} s for the devices to come to rest", SETTLE_LIMIT.as_secs())]
    Timeout,
    /// A vCPU paused before it could be told to leave its state.
    #[error("vCPU {0} left no state")]
    NoState(usize),
    /// A vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// Interrupt controllers or clock.
    #[error("Could not read the interrupt controllers and the clock")]
    Controllers(#[source] io::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] SavedError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why the vCPUs do not run.
#[derive(Debug, thiserror::Error)]
#[error("Could not start the thread of vCPU {id}")]
pub(crate) struct StartError {
    id: usize,
    #[source]
    source: io::Error,
}

/// Why the machine did not pause; it still runs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PauseError {
    /// A vCPU's thread can't be interrupted.
    #[error("Could not interrupt a vCPU")]
    Kick(#[source] io::Error),
    /// A vCPU did not stop.
    #[error("Waited {} s for the vCPUs to stop", PAUSE_LIMIT.as_secs())]
    Timeout,
}

impl Built {
    /// Starts a thread for each vCPU.
    pub(crate) fn start(self) -> Result<Running, StartError> {
        let mut vcpus = Vec::new();
        for (id, (vcpu, page)) in self.vcpus.into_iter().enumerate() {
            let shared = self.shared.clone();
            let span = tracing::Span::current();
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    let _entered = span.enter();
                    let reason = run(vcpu, id, &shared).unwrap_or_else(|error| {
                        tracing::error!(error = crate::chain(&error), "vCPU {id} can't run");
                        ExitReason::Failed
                    });
                    shared.ending.end(reason);
                })
                .map_err(|source| StartError { id, source })?;
            vcpus.push(Kicker::new(page, thread));
        }
        Ok(Running { vcpus, shared: self.shared, saving: self.saving })
    }
}

fn run(vcpu: Vcpu, id: usize, shared: &Shared) -> Result<ExitReason, SeccompError> {
    seccomp::install(ThreadKind::Vcpu)?;
    if id == 0 {
        shared.phases.end("first vcpu run");
    }
    Ok(vcpu.run(&shared.buses, &shared.gate))
}

impl Running {
    /// Disks that come and go, whatever the vCPUs do.
    pub(crate) fn disks(&self) -> Arc<Disks> {
        self.shared.disks.clone()
    }

    /// The size of its memory, whatever the vCPUs do.
    pub(crate) fn sizing(&self) -> Arc<Sizing> {
        self.shared.sizing.clone()
    }

    /// Stops all vCPUs. If that fails the machine runs on.
    pub(crate) fn pause(self) -> Result<Paused, (Self, PauseError)> {
        self.shared.gate.close();
        let kicked = self.vcpus.iter().try_for_each(Kicker::kick).map_err(PauseError::Kick);
        let stopped = kicked.and_then(|()| match self.shared.gate.wait_for(self.vcpus.len(), PAUSE_LIMIT) {
            true => Ok(()),
            false => Err(PauseError::Timeout),
        });
        match stopped {
            Ok(()) => Ok(Paused(self)),
            Err(error) => {
                self.shared.gate.open();
                Err((self, error))
            }
        }
    }
}

impl Paused {
    /// Writes the machine into the files of its configuration; returns the bytes of memory that were not zero.
    pub(crate) fn save(&mut self) -> Result<u64, SaveError> {
        let Running { shared, saving, .. } = &mut self.0;
        let saving = saving.as_mut().ok_or(SaveError::NoFiles)?;
        if !saving.barrier.pass(SETTLE_LIMIT) {
            return Err(SaveError::Timeout);
        }
        let states = saving.slots.iter().enumerate();
        let states = states.map(|(id, slot)| Ok(lock(slot).take().ok_or(SaveError::NoState(id))??));
        let state = MachineState {
            vcpus: states.collect::<Result<_, SaveError>>()?,
            controllers: Controllers::save(&saving.vm).map_err(SaveError::Controllers)?,
            functions: shared.buses.mmio.pci().save()?,
            hotplug_mib: shared.sizing.figures().hotplug,
        };
        let sum = husk_snapshot::memory::save(&saving.memory, &saving.files.memory)?;
        husk_snapshot::write_state(&mut saving.files.state, &state, sum)?;
        Ok(sum.len)
    }

    /// Lets the vCPUs run on.
    pub(crate) fn resume(self) -> Running {
        self.0.shared.gate.open();
        self.0
    }
}
