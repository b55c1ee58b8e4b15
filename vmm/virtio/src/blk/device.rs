//! The device as its transport drives it: features, configuration, and handing queues to their workers.

use std::sync::{Arc, Mutex};

use husk_backend::disk::Disk;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::Medium;
use super::worker::{Lane, Running, Worker};
use super::{
    ID_LEN, MAX_DISCARD_SECTORS, MAX_QUEUES, MAX_RANGES, MAX_ZEROES_SECTORS, QUEUE_SIZE, SECTOR, SEG_MAX, SIZE_MAX,
};
use crate::device::{ActivateError, Activation, Position, VirtioDevice};
use crate::queue::VirtQueue;
use crate::served::{AttachError, read_config};

const NAME: &str = "blk";
/// Length of struct virtio_blk_config up to the end of write zeroes (virtio 1.2, 5.2.4).
const CONFIG_LEN: usize = 60;

/// The block device.
pub struct Blk {
    lanes: Vec<Arc<Lane>>,
    config: [u8; CONFIG_LEN],
    read_only: bool,
}

/// A disk joined with its back end.
pub struct Attached {
    /// Goes to the transport, see [`crate::VirtioPciFunction::new`]. When it is dropped the workers end, each after its present request.
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    /// One for each queue; each wants a thread.
    pub workers: Vec<Worker>,
}

impl Blk {
    /// Joins the device with a disk. `id` is what the guest sees as the disk's serial number, of which 20 bytes count; there are 1 to
    /// 4 queues.
    pub fn attach(disk: Disk, id: &str, queues: u16) -> Result<Attached, AttachError> {
        let lanes = (0..queues.clamp(1, MAX_QUEUES)).map(|_| Ok(Arc::new(Lane::new()?)));
        let lanes = lanes.collect::<Result<Vec<_>, _>>().map_err(|source| AttachError { device: NAME, source })?;
        let mut bytes = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        let medium = Arc::new(Medium { disk, id: bytes });
        let workers = lanes.iter().map(|lane| Worker { lane: lane.clone(), medium: medium.clone() }).collect();
        let device = Self { config: config(&medium, lanes.len() as u16), read_only: medium.disk.is_read_only(), lanes };
        Ok(Attached { device: Arc::new(Mutex::new(device)), workers })
    }
}

/// struct virtio_blk_config (virtio 1.2, 5.2.4).
fn config(medium: &Medium, queues: u16) -> [u8; CONFIG_LEN] {
    let disk = &medium.disk;
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &medium.capacity().to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &disk.logical_block().to_le_bytes());
    // Logical blocks in a physical one, as a power of two.
    let exponent = (disk.physical_block() / disk.logical_block()).max(1).ilog2();
    put(24, &[exponent as u8]);
    put(34, &queues.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &(disk.logical_block() / SECTOR as u32).to_le_bytes());
    put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.lanes.len()]
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let more: &[u32] = match self.read_only {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        always.iter().chain(more).fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // A driver may leave queues out (virtio 1.2, 5.2.5).
        for ((index, queue), lane) in (0..).zip(activation.queues).zip(&self.lanes) {
            if let Some((queue, notified)) = queue {
                let interrupt = activation.interrupt.clone();
                let queue = VirtQueue::new(index, queue, activation.memory.clone(), interrupt.clone());
                lane.start(Running { queue, notified, interrupt });
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.lanes.iter().for_each(|lane| lane.stop());
    }

    fn positions(&self) -> Option<Vec<Position>> {
        // A disk is a pod's, and no snapshot holds one.
        None
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.lanes.iter().for_each(|lane| lane.end());
    }
}
