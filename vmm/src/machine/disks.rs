//! Disks that come and go while the machine runs: each a virtio-blk function in a hot-plug slot, and a thread for each of its queues.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use husk_backend::disk::Disk;
use husk_jail::seccomp::{self, ThreadKind};
use husk_virtio::VirtioPciFunction;
use husk_virtio::blk::{Attached, Blk, Worker};
use husk_virtio::device::GuestMemory;
use husk_virtio::served::AttachError;
use husk_virtio::transport::pci;
use tokio::sync::mpsc;

use super::irq::Interrupts;
use crate::hw::hotplug::{HotPlug, HotPlugError};
use crate::lock::lock;

/// Longest wait for the guest to let go of a disk.
const EJECT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the last request to a disk that is gone.
const LAST_REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// Why a disk was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// The slots.
    #[error(transparent)]
    HotPlug(#[from] HotPlugError),
    /// The device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The PCI function.
    #[error("Could not make the PCI function of a disk")]
    Function(#[from] pci::PciError),
    /// A thread.
    #[error("Could not start a thread for a disk")]
    Thread(#[source] std::io::Error),
}

/// How a disk went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Detached {
    /// The guest let go of it; else it was taken away.
    pub(crate) ejected: bool,
    /// Nothing is done with its file any more, which is closed.
    pub(crate) closed: bool,
}

/// The machine's disks.
pub(crate) struct Disks {
    hotplug: Arc<HotPlug>,
    interrupts: Interrupts,
    memory: Arc<GuestMemory>,
    queues: u16,
    /// By device number: ends when all threads have ended.
    busy: Mutex<BTreeMap<u8, mpsc::Receiver<()>>>,
}

impl Disks {
    /// None yet. Each is to have as many queues as there are vCPUs, up to the device's limit.
    pub(crate) fn new(hotplug: Arc<HotPlug>, interrupts: Interrupts, memory: Arc<GuestMemory>, vcpus: u8) -> Self {
        Self { hotplug, interrupts, memory, queues: vcpus.into(), busy: Mutex::default() }
    }

    /// Gives the guest a disk whose serial number is `id`. Its device number on PCI bus 0.
    pub(crate) fn attach(&self, disk: Disk, id: &str) -> Result<u8, DiskError> {
        let Attached { device, workers } = Blk::attach(disk, id, self.queues)?;
        // Where a step fails the device is dropped, and its threads end.
        let (working, ended) = mpsc::channel(1);
        for worker in workers {
            start(worker, working.clone())?;
        }
        let machine = Arc::new(self.interrupts.clone());
        let function = VirtioPciFunction::new(device, machine, 0, self.memory.clone())?;
        let mut busy = lock(&self.busy);
        let device = self.hotplug.insert(Box::new(function))?;
        busy.insert(device, ended);
        tracing::info!(id, device, "A disk is attached");
        Ok(device)
    }

    /// Asks the guest for a disk, and takes it away where the guest keeps it.
    pub(crate) async fn detach(&self, device: u8) -> Result<Detached, DiskError> {
        let mut gone = self.hotplug.ask_back(device)?;
        // The sender lives as long as the device is there.
        let _ = tokio::time::timeout(EJECT_LIMIT, gone.wait_for(|ejected| *ejected)).await;
        let ejected = self.hotplug.finish(device);
        if !ejected {
            tracing::warn!(device, "The guest did not let go of a disk within {EJECT_LIMIT:?}: taken away");
        }
        let ended = lock(&self.busy).remove(&device);
        let closed = match ended {
            Some(mut ended) => tokio::time::timeout(LAST_REQUEST_LIMIT, ended.recv()).await.is_ok(),
            None => true,
        };
        if !closed {
            tracing::warn!(device, "The last request to a disk is not done after {LAST_REQUEST_LIMIT:?}");
        }
        Ok(Detached { ejected, closed })
    }
}

/// Runs a worker on a thread of its own, which holds `working` until its end.
fn start(worker: Worker, working: mpsc::Sender<()>) -> Result<(), DiskError> {
    let span = tracing::Span::current();
    let body = move || {
        let _entered = span.enter();
        let _working = working;
        let served = seccomp::install(ThreadKind::Disk).map_err(std::io::Error::other).and_then(|()| worker.run());
        if let Err(error) = served {
            tracing::error!(%error, "A disk is no longer served");
        }
    };
    thread::Builder::new().name("disk".into()).spawn(body).map(drop).map_err(DiskError::Thread)
}
