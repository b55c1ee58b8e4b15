//! The balloon device (virtio 1.3, 5.5) with free page reporting only: the driver names pages that it doesn't use, the device gives
//! them back to the host and says so, and until then the driver leaves them alone. Nothing is ever asked to be inflated.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::discard::discard;
use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

/// Linux' driver wants room for 32 ranges (PAGE_REPORTING_CAPACITY).
const QUEUE_SIZE: u16 = 64;
/// VIRTIO_BALLOON_F_REPORTING (virtio 1.3, 5.5.3).
const REPORTING: u64 = 1 << 5;
/// num_pages, actual, free_page_hint_cmd_id, poison_val (virtio 1.3, 5.5.4): the balloon's size is 0.
const CONFIG: [u8; 16] = [0; 16];

/// The balloon device.
pub struct Balloon;

impl Balloon {
    /// A balloon that stays empty.
    pub fn attach() -> Result<Attached, AttachError> {
        Served::attach(Self)
    }
}

impl Model for Balloon {
    const NAME: &'static str = "balloon";
    const DEVICE_TYPE: u32 = VIRTIO_ID_BALLOON;

    /// inflateq, deflateq, reporting_vq. Linux counts only the queues that are there, as QEMU does; the standard's text (5.5.2) leaves
    /// gaps for the others.
    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | REPORTING
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    /// One report at a time, which is 128 MiB with Linux' driver: the loop has other devices to serve.
    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [_, _, reporting] = queues else { return Ok(false) };
        let memory = reporting.memory().clone();
        let Some(report) = reporting.pop()? else { return Ok(false) };
        for (address, len) in report.writable().ranges() {
            if let Err(error) = discard(&memory, address, len.into()) {
                tracing::debug!(%error, "could not give back what the guest reported free");
            }
        }
        reporting.push_used(&report, 0)?;
        reporting.notify()?;
        Ok(true)
    }
}
