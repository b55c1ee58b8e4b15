//! The console device (virtio 1.2, 5.3) with its one port: what the guest prints goes to a sink; nothing is ever typed into it.

use husk_backend::sink::Sink;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

const QUEUE_SIZE: u16 = 64;
/// Most bytes taken of one buffer; a driver's buffer is a page or less.
const MAX_WRITE: usize = 64 << 10;
/// Buffers served a wake.
const BUDGET: usize = 64;
/// cols, rows, max_nr_ports, emerg_wr (virtio 1.2, 5.3.4): all of features that are not offered.
const CONFIG: [u8; 12] = [0; 12];

/// The console device.
pub struct Console {
    sink: Sink,
}

impl Console {
    /// Joins the device with where its output goes.
    pub fn attach(sink: Sink) -> Result<Attached, AttachError> {
        Served::attach(Self { sink })
    }
}

impl Model for Console {
    const NAME: &'static str = "console";
    const DEVICE_TYPE: u32 = VIRTIO_ID_CONSOLE;

    fn queue_max_sizes(&self) -> Vec<u16> {
        // receiveq, transmitq
        vec![QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [_receive, transmit] = queues else { return Ok(false) };
        let memory = transmit.memory().clone();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = transmit.pop()? else {
                more = false;
                break;
            };
            let readable = chain.readable();
            if let Ok(slices) = readable.slices(&memory, 0, readable.len().min(MAX_WRITE)) {
                self.sink.write(&slices);
            }
            transmit.push_used(&chain, 0)?;
        }
        transmit.notify()?;
        Ok(more)
    }
}
