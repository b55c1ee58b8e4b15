//! The device: answers the driver's requests, and tells it when the host wants another size.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::EventSet;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::blocks::Blocks;
use super::wire::{CONFIG_LEN, REQUEST_LEN, Request, Response};
use crate::chain::Chain;
use crate::device::GuestMemory;
use crate::discard::discard;
use crate::interrupt::Interrupt;
use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

const QUEUE_SIZE: u16 = 16;
/// Requests served a wake; Linux' driver has one under way.
const BUDGET: usize = 4;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (virtio 1.3, 5.15.3): the driver must not even read what is unplugged. It would get host memory by
/// that, or no memory at all where nothing was ever plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The memory device.
pub struct Mem {
    blocks: Blocks,
    config: [u8; CONFIG_LEN],
    orders: Arc<Orders>,
    /// Gets the plugged bytes after each change.
    tell: Box<dyn Fn(u64) + Send>,
    /// The driver's, while there is one.
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// The host's way to ask for another size. Cheap to clone.
#[derive(Clone)]
pub struct Resizer(Arc<Orders>);

/// The size that the host wants last.
struct Orders {
    wanted: Mutex<(u64, u64)>,
    event: EventFd,
}

impl Mem {
    /// A device over a region of guest memory (guest-physical, multiples of [`super::BLOCK`]) of which nothing is plugged. `tell` is
    /// called on the event loop with the plugged bytes whenever the guest has plugged or unplugged some.
    pub fn attach(region: Range<u64>, tell: impl Fn(u64) + Send + 'static) -> Result<(Attached, Resizer), AttachError> {
        let (device, resizer) = Self::new(region, tell).map_err(|source| AttachError { device: Self::NAME, source })?;
        Ok((Served::attach(device)?, resizer))
    }

    pub(super) fn new(region: Range<u64>, tell: impl Fn(u64) + Send + 'static) -> io::Result<(Self, Resizer)> {
        let orders = Arc::new(Orders { wanted: Mutex::default(), event: EventFd::new(EFD_NONBLOCK)? });
        let blocks = Blocks::new(region);
        let config = blocks.config().encode();
        let device = Self { blocks, config, orders: orders.clone(), tell: Box::new(tell), interrupt: None };
        Ok((device, Resizer(orders)))
    }

    fn answer(&mut self, chain: &Chain, memory: &GuestMemory) -> Response {
        let mut bytes = [0; REQUEST_LEN];
        if chain.readable().read_at(memory, 0, &mut bytes).is_err() {
            return Response::Error;
        }
        let discard = |address, len| {
            discard(memory, address, len)
                .inspect_err(|error| tracing::warn!(%error, "could not give back what was unplugged"))
        };
        let response = match Request::parse(&bytes) {
            Request::Plug(range) => self.blocks.plug(range),
            Request::Unplug(range) => self.blocks.unplug(range, discard),
            Request::UnplugAll => self.blocks.unplug_all(discard),
            Request::State(range) => self.blocks.state(range),
            Request::Unknown => Response::Error,
        };
        self.config = self.blocks.config().encode();
        response
    }
}

impl Resizer {
    /// Asks the guest to have `requested` bytes plugged, all of them in the region's first `usable` bytes, which stay usable for ever.
    pub fn ask(&self, requested: u64, usable: u64) {
        *self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner) = (requested, usable);
        // Fails only if the event is signalled already.
        let _ = self.0.event.write(1);
    }
}

impl Model for Mem {
    const NAME: &'static str = "mem";
    const DEVICE_TYPE: u32 = VIRTIO_ID_MEM;

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn watched(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.orders.event.as_raw_fd(), EventSet::IN)]
    }

    fn host_event(&mut self, _events: EventSet) {
        let _ = self.orders.event.read();
        let (requested, usable) = *self.orders.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        self.blocks.request(requested, usable);
        self.config = self.blocks.config().encode();
        if let Some(interrupt) = &self.interrupt {
            interrupt.config_changed();
        }
    }

    /// What is plugged stays so when a driver goes and another comes.
    fn start(&mut self, features: u64, interrupt: &Arc<dyn Interrupt>) -> Result<(), io::Error> {
        if features & UNPLUGGED_INACCESSIBLE == 0 {
            return Err(io::Error::other("the driver would read memory that is not plugged"));
        }
        self.interrupt = Some(interrupt.clone());
        Ok(())
    }

    fn stop(&mut self) {
        self.interrupt = None;
    }

    /// A snapshot keeps no blocks: it is of a machine in which none was ever asked for.
    fn is_quiet(&self) -> bool {
        self.blocks.usable() == 0
    }

    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [queue] = queues else { return Ok(false) };
        let memory = queue.memory().clone();
        let before = self.blocks.plugged();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop()? else {
                more = false;
                break;
            };
            let response = self.answer(&chain, &memory).encode();
            let written = chain.writable().write_at(&memory, 0, &response).map_or(0, |()| response.len());
            queue.push_used(&chain, written as u32)?;
        }
        queue.notify()?;
        if self.blocks.plugged() != before {
            (self.tell)(self.blocks.plugged());
        }
        Ok(more)
    }
}
