//! The file system device (virtio 1.2, 5.11). Its queues are served by another process, which gets guest memory and queues over
//! vhost-user; here remain its configuration, its start and stop, and noticing that the process is gone.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use husk_backend::vhost_user::{Region, VhostUser, VhostUserError, Vring, Watchdog};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ActivateError, Activation, GuestMemory, Position, VirtioDevice};
use crate::interrupt::Interrupt;
use crate::served::{Attached, read_config};

const NAME: &str = "fs";
const QUEUE_SIZE: u16 = 1024;
/// Length of the tag in bytes (virtio 1.2, 5.11.4).
const TAG_LEN: usize = 36;
/// What the device offers if the back end does.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why the device could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag.
    #[error("The file system's tag must have 1 to {TAG_LEN} bytes, it has {0}")]
    Tag(usize),
    /// The queues.
    #[error("The file system device needs 1 to 254 request queues, not {0}")]
    Queues(u16),
    /// The back end.
    #[error("Could not attach the fs device to its back end")]
    BackEnd(#[from] VhostUserError),
}

/// The file system device.
pub struct Fs {
    /// None in a machine that becomes a template: its driver can start the device, and no request is answered.
    back_end: Option<VhostUser>,
    request_queues: u16,
    /// tag, num_request_queues (virtio 1.2, 5.11.4).
    config: [u8; TAG_LEN + 4],
    /// Queues that the back end serves.
    running: Vec<usize>,
    /// Called on when the back end goes away.
    interrupt: SharedInterrupt,
}

type SharedInterrupt = Arc<Mutex<Option<Arc<dyn Interrupt>>>>;

/// The device's part on the event loop: sees the back end's end, and its silence.
struct Watch {
    watchdog: Option<Watchdog>,
    interrupt: SharedInterrupt,
}

impl Fs {
    /// Joins the device with the back end behind a connected socket. Negotiates, so it waits for the back end, 2 s at most. Without one
    /// the device offers what husk-fs does.
    pub fn attach(socket: Option<UnixStream>, tag: &str, request_queues: u16) -> Result<Attached, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN {
            return Err(FsError::Tag(tag.len()));
        }
        if !(1..=254).contains(&request_queues) {
            return Err(FsError::Queues(request_queues));
        }
        let back_end = socket.map(|socket| VhostUser::connect(socket, request_queues + 1)).transpose()?;
        let mut config = [0; TAG_LEN + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_LEN..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        let interrupt = SharedInterrupt::default();
        let watch = Watch { watchdog: back_end.as_ref().map(VhostUser::watchdog), interrupt: interrupt.clone() };
        let device = Self { back_end, request_queues, config, running: Vec::new(), interrupt };
        Ok(Attached { device: Arc::new(Mutex::new(device)), subscriber: Arc::new(Mutex::new(watch)) })
    }

    fn start(&mut self, activation: &Activation) -> Result<(), String> {
        let Some(back_end) = &mut self.back_end else { return Ok(()) };
        let regions = regions(&activation.memory)?;
        // A queue that the driver gave no vector still needs an event to signal.
        let calls = (0..)
            .zip(&activation.queues)
            .map(|(index, _)| activation.interrupt.queue_event(index).map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())?;
        let mut vrings = Vec::new();
        for (index, (queue, call)) in activation.queues.iter().zip(&calls).enumerate() {
            if let Some((queue, kick)) = queue {
                vrings.push(vring(&activation.memory, index, queue, kick, call)?);
            }
        }
        self.running = vrings.iter().map(|vring| vring.index).collect();
        back_end.start(activation.features, &regions, &vrings).map_err(|error| with_sources(&error))
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        // hiprio, then the request queues
        vec![QUEUE_SIZE; usize::from(self.request_queues) + 1]
    }

    fn features(&self) -> u64 {
        let back_end = self.back_end.as_ref().map_or(FEATURES, VhostUser::features);
        FEATURES & back_end | 1 << VIRTIO_F_VERSION_1
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(&activation).map_err(|reason| ActivateError { device: NAME, reason })?;
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(activation.interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let running = std::mem::take(&mut self.running);
        if let Some(back_end) = &mut self.back_end
            && let Err(error) = back_end.stop(&running)
        {
            tracing::warn!(error = with_sources(&error), "could not stop the file system's queues");
        }
    }

    fn positions(&self) -> Option<Vec<Position>> {
        // What a back end has done with the queues is its own.
        self.back_end.is_none().then(|| vec![Position::default(); usize::from(self.request_queues) + 1])
    }
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Some(watchdog) = &self.watchdog else { return };
        if events.fd() == watchdog.timer() {
            watchdog.expired();
            return;
        }
        tracing::error!("the file system's back end closed its connection");
        if let Err(error) = ops.remove(Events::empty_raw(watchdog.connection())) {
            tracing::error!(?error, "could not stop watching the file system's back end");
        }
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.needs_reset();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let Some(watchdog) = &self.watchdog else { return };
        let watched: [(RawFd, EventSet); 2] = [
            (watchdog.timer(), EventSet::IN | EventSet::EDGE_TRIGGERED),
            (watchdog.connection(), EventSet::READ_HANG_UP),
        ];
        for (fd, set) in watched {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                tracing::error!(?error, "could not watch the file system's back end");
            }
        }
    }
}

/// The regions of guest memory, each with the file behind it.
fn regions(memory: &GuestMemory) -> Result<Vec<Region>, String> {
    memory
        .iter()
        .map(|region| {
            let file = region.file_offset().ok_or("guest memory is not backed by a file")?;
            Ok(Region {
                guest_address: region.start_addr().raw_value(),
                len: region.len(),
                our_address: our_address(memory, region.start_addr().raw_value())?,
                fd: file.file().as_raw_fd(),
                offset: file.start(),
            })
        })
        .collect()
}

fn vring<'a>(
    memory: &GuestMemory,
    index: usize,
    queue: &Queue,
    kick: &'a EventFd,
    call: &'a EventFd,
) -> Result<Vring<'a>, String> {
    Ok(Vring {
        index,
        size: queue.size(),
        descriptors: our_address(memory, queue.desc_table())?,
        available: our_address(memory, queue.avail_ring())?,
        used: our_address(memory, queue.used_ring())?,
        next_available: queue.next_avail(),
        kick,
        call,
    })
}

/// Where this process has a guest address.
fn our_address(memory: &GuestMemory, address: u64) -> Result<u64, String> {
    memory.get_host_address(GuestAddress(address)).map(|pointer| pointer as u64).map_err(|error| error.to_string())
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
#[path = "fs_tests.rs"]
mod tests;
