//! The vhost-user back end: takes descriptor chains from the queues, one thread each, and has the server answer them.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use husk_jail::seccomp::{self, ThreadKind};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::buffers::Buffers;
use crate::server::Server;
use crate::tree::lock;
use crate::worker::Worker;

/// Largest queue: 256 pages of data and their headers fit in one chain even without indirect descriptors.
const QUEUE_SIZE: usize = 1024;
/// Answers after which the guest is told, even if there are more requests.
const BATCH: usize = 32;

/// Broken queues that are told: a guest must not fill the log.
const MOST_COMPLAINTS: u8 = 10;

/// The guest's memory.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The back end of one device.
pub struct Backend {
    server: Server,
    memory: Memory,
    /// One a queue, made by the queue's thread; locked while that serves requests.
    workers: Vec<Mutex<Option<Worker>>>,
    /// Broken queues that may still be told in the log.
    complaints: AtomicU8,
}

impl Backend {
    /// A device with `request_queues` queues beside the one for FORGETs; `memory` is filled when the front end connects.
    pub fn new(server: Server, memory: Memory, request_queues: u16) -> Self {
        let workers = (0..=request_queues).map(|_| Mutex::new(None)).collect();
        Self { server, memory, workers, complaints: AtomicU8::new(MOST_COMPLAINTS) }
    }

    /// Serves all that is in the queue.
    fn serve(&self, vring: &VringMutex<Memory>, worker: &mut Worker) -> Result<(), virtio_queue::Error> {
        let memory = self.memory.memory();
        let mut empty_passes = 0;
        // The second pass in vain means a ring whose index is nonsense: it waits for its next kick.
        while empty_passes < 2 {
            vring.disable_notification()?;
            let mut served = 0;
            while let Some(chain) = next(vring, &memory) {
                let head = chain.head_index();
                let length = self.answer(chain, &memory, worker);
                vring.add_used(head, length as u32)?;
                served += 1;
                if served % BATCH == 0 {
                    notify(vring)?;
                }
            }
            if served > 0 {
                notify(vring)?;
            }
            empty_passes = if served == 0 { empty_passes + 1 } else { 0 };
            if !vring.enable_notification()? {
                break;
            }
        }
        Ok(())
    }

    /// Serves one chain; the bytes written to it. A chain that is none gets no answer.
    fn answer(&self, chain: Chain, memory: &GuestMemoryMmap, worker: &mut Worker) -> usize {
        let (mut input, mut output) = (Buffers::new(), Buffers::new());
        for descriptor in chain {
            let sound = if descriptor.is_write_only() {
                output.push_descriptor(memory, descriptor)
            } else {
                output.is_empty() && input.push_descriptor(memory, descriptor)
            };
            if !sound {
                return 0;
            }
        }
        self.server.handle(worker, &input, &output)
    }
}

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// The next chain, if the queue is running and has one.
fn next(vring: &VringMutex<Memory>, memory: &GuestMemoryLoadGuard<GuestMemoryMmap>) -> Option<Chain> {
    let mut state = vring.get_mut();
    state.get_queue_mut().iter(memory.clone()).ok()?.next()
}

/// Interrupts the guest if it wants to be.
fn notify(vring: &VringMutex<Memory>) -> Result<(), virtio_queue::Error> {
    if vring.needs_notification()?
        && let Err(error) = vring.signal_used_queue()
    {
        tracing::warn!(%error, "cannot notify the guest");
    }
    Ok(())
}

/// The calling thread's worker, behind the thread's system call filter.
fn start_worker() -> io::Result<Worker> {
    let worker = Worker::new()?;
    seccomp::install(ThreadKind::FsQueue).map_err(io::Error::other)?;
    Ok(worker)
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        self.workers.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The vrings know.
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // It is the one that we hold.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.workers.len()).map(|queue| 1 << queue).collect()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // Once it can be locked, no request of the queue is under way.
        if let Some(worker) = self.workers.get(queue as usize) {
            drop(lock(worker));
        }
        Ok(())
    }

    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Self::Vring], thread: usize) -> io::Result<()> {
        // One queue a thread.
        let (Some(vring), Some(slot)) = (vrings.first(), self.workers.get(thread)) else { return Ok(()) };
        let mut slot = lock(slot);
        let worker = match &mut *slot {
            Some(worker) => worker,
            None => slot.insert(start_worker().inspect_err(|error| {
                tracing::error!(%error, thread, "cannot serve the queue");
            })?),
        };
        if !vring.get_ref().get_queue().ready() {
            return Ok(());
        }
        // An error ends the thread, so that a broken ring is only told.
        if let Err(error) = self.serve(vring, worker)
            && self.complaints.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        {
            tracing::warn!(%error, thread, "the guest broke its queue");
        }
        Ok(())
    }
}

/// What serves the back end's queues, ready to be started on a listening socket.
pub type Daemon = vhost_user_backend::VhostUserDaemon<Arc<Backend>>;

#[cfg(test)]
#[path = "backend_tests.rs"]
mod tests;
