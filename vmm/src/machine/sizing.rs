//! The size of guest memory: what the machine booted with, and what is plugged in and out while it runs. The guest is shown the region
//! for that from its start, as far as it was ever asked to plug memory: whatever its driver does, beyond that it finds nothing.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_virtio::Attached;
use husk_virtio::device::GuestMemory;
use husk_virtio::mem::{BLOCK, Mem, Resizer};
use husk_virtio::served::AttachError;
use kvm_ioctls::VmFd;
use tokio::sync::watch;

use super::layout::{self, MIB};
use super::memory::{self, MemoryError};
use crate::lock::lock;

/// Longest wait for the guest to plug or unplug what it is asked for.
const LIMIT: Duration = Duration::from_secs(5);

/// Why the memory was not resized.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResizeError {
    /// Too much.
    #[error("{wanted} MiB can't be plugged in: this machine has room for {room} MiB")]
    Room {
        /// MiB that were asked for.
        wanted: u64,
        /// MiB that are possible.
        room: u64,
    },
    /// No whole blocks.
    #[error("{0} MiB can't be plugged in: memory comes by {block} MiB", block = BLOCK / MIB)]
    Granularity(u64),
    /// KVM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A machine's memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figures {
    /// What it booted with.
    pub(crate) boot: u64,
    /// Most that can be plugged.
    pub(crate) hotplug: u64,
    /// What the guest is asked to have plugged.
    pub(crate) requested: u64,
    /// What it has plugged.
    pub(crate) plugged: u64,
}

/// A machine's memory as the control API sees it.
pub(crate) struct Sizing {
    boot: u64,
    hotplug: Option<Hotplug>,
}

/// The region where memory is plugged, as the host sees it.
pub(crate) struct Hotplug {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    region: Range<u64>,
    /// The guest's kernel plugs memory by blocks of so many bytes.
    block: u64,
    resizer: Resizer,
    plugged: watch::Receiver<u64>,
    asked: Mutex<Asked>,
}

/// What the guest was asked for.
struct Asked {
    requested: u64,
    /// How many bytes of the region it is shown.
    shown: u64,
    /// KVM's next free slot.
    slot: u32,
}

impl Sizing {
    /// Of a machine that booted with so many MiB.
    pub(crate) fn new(boot: u64, hotplug: Option<Hotplug>) -> Self {
        Self { boot, hotplug }
    }

    /// Asks the guest to have `wanted` MiB plugged, and waits for it, 5 s at most. MiB that are plugged then.
    pub(crate) async fn resize(&self, wanted: u64) -> Result<u64, ResizeError> {
        let room = self.figures().hotplug;
        if wanted > room {
            return Err(ResizeError::Room { wanted, room });
        }
        if !(wanted * MIB).is_multiple_of(BLOCK) {
            return Err(ResizeError::Granularity(wanted));
        }
        match &self.hotplug {
            Some(hotplug) => hotplug.resize(wanted * MIB).await,
            None => Ok(0),
        }
    }

    /// How large it is.
    pub(crate) fn figures(&self) -> Figures {
        let (hotplug, requested, plugged) = self.hotplug.as_ref().map_or((0, 0, 0), |hotplug| {
            (hotplug.len() / MIB, lock(&hotplug.asked).requested / MIB, *hotplug.plugged.borrow() / MIB)
        });
        Figures { boot: self.boot, hotplug, requested, plugged }
    }
}

impl Hotplug {
    /// The device over `region`, a region of `memory` of which the guest is shown nothing yet; KVM's slots are free from `slot` on. The
    /// machine boots with `ram` bytes.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemory>,
        region: Range<u64>,
        ram: u64,
        slot: u32,
    ) -> Result<(Attached, Self), AttachError> {
        let (tell, plugged) = watch::channel(0);
        let tell = move |bytes| {
            tell.send_replace(bytes);
        };
        let (attached, resizer) = Mem::attach(region.clone(), tell)?;
        let asked = Mutex::new(Asked { requested: 0, shown: 0, slot });
        Ok((attached, Self { vm, memory, region, block: layout::memory_block(ram), resizer, plugged, asked }))
    }

    fn len(&self) -> u64 {
        self.region.end - self.region.start
    }

    async fn resize(&self, wanted: u64) -> Result<u64, ResizeError> {
        self.ask(wanted)?;
        let mut plugged = self.plugged.clone();
        // The time being over is told by what is plugged; the sender lives as long as the device.
        let _ = tokio::time::timeout(LIMIT, plugged.wait_for(|plugged| *plugged == wanted)).await;
        let (wanted, has) = (wanted / MIB, *plugged.borrow() / MIB);
        tracing::info!(wanted, has, "Memory is resized");
        Ok(has)
    }

    fn ask(&self, requested: u64) -> Result<(), MemoryError> {
        let mut asked = lock(&self.asked);
        let usable = requested.next_multiple_of(self.block).min(self.len());
        if usable > asked.shown {
            let part = self.region.start + asked.shown..self.region.start + usable;
            memory::show(&self.vm, asked.slot, &self.memory, part)?;
            asked.shown = usable;
            asked.slot += 1;
        }
        asked.requested = requested;
        self.resizer.ask(requested, asked.shown);
        Ok(())
    }
}
