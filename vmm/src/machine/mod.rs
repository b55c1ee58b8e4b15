//! The machine: memory, vCPUs and buses under KVM. Its states are types: what may not be called in a state does not exist there.

mod acpi;
mod boot;
mod builder;
mod cpuid;
mod devices;
mod ending;
mod gate;
mod inherited;
mod irq;
mod kick;
pub(crate) mod layout;
mod memory;
mod msr;
mod vcpu;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use husk_jail::seccomp::{self, SeccompError, ThreadKind};
use husk_virtio::device::GuestMemory;
use husk_vmm_api::exit::ExitReason;

pub(crate) use builder::{build, check};
pub(crate) use devices::EventLoop;
pub(crate) use ending::{Ending, EndingSubscriber};
pub(crate) use inherited::Taker;

use crate::phases::Phases;
use gate::Gate;
use kick::{Kicker, RunPage};
use vcpu::{Buses, Vcpu};

/// Longest wait for the vCPUs to pause; leaving KVM_RUN takes microseconds.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// A machine that has not run yet.
pub(crate) struct Built {
    vcpus: Vec<(Vcpu, RunPage)>,
    shared: Arc<Shared>,
}

/// A machine whose vCPUs run.
pub(crate) struct Running {
    vcpus: Vec<Kicker>,
    shared: Arc<Shared>,
}

/// A machine whose vCPUs stand still.
pub(crate) struct Paused(Running);

/// What the vCPUs' threads share.
struct Shared {
    buses: Buses,
    gate: Arc<Gate>,
    ending: Arc<Ending>,
    phases: Phases,
    /// KVM knows it by address: it must live as long as any vCPU.
    _memory: Arc<GuestMemory>,
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
        Ok(Running { vcpus, shared: self.shared })
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
    /// Lets the vCPUs run on.
    pub(crate) fn resume(self) -> Running {
        self.0.shared.gate.open();
        self.0
    }
}
