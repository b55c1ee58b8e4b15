//! The entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes.

use husk_backend::entropy::Entropy;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; a driver asks again for more.
const MAX_REQUEST: usize = 64 << 10;
/// Requests served a wake.
const BUDGET: usize = 16;

/// The entropy device.
pub struct Rng {
    entropy: Entropy,
    buffer: Vec<u8>,
}

impl Rng {
    /// Joins the device with the host's source.
    pub fn attach(entropy: Entropy) -> Result<Attached, AttachError> {
        Served::attach(Self { entropy, buffer: vec![0; 4096] })
    }
}

impl Model for Rng {
    const NAME: &'static str = "rng";
    const DEVICE_TYPE: u32 = VIRTIO_ID_RNG;

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [queue] = queues else { return Ok(false) };
        let memory = queue.memory().clone();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop()? else {
                more = false;
                break;
            };
            let wanted = chain.writable().len().min(MAX_REQUEST);
            let mut written = 0;
            while written < wanted {
                let piece = &mut self.buffer[..(wanted - written).min(4096)];
                if let Err(error) = self.entropy.fill(piece) {
                    tracing::error!(%error, "no random bytes");
                    break;
                }
                if chain.writable().write_at(&memory, written, piece).is_err() {
                    break;
                }
                written += piece.len();
            }
            // At most MAX_REQUEST.
            queue.push_used(&chain, written as u32)?;
        }
        queue.notify()?;
        Ok(more)
    }
}
