//! What every virtio device is to its transport. A device is configured by the transport while the driver negotiates, and
//! activated once, when the driver sets DRIVER_OK; from then on it serves its queues on the VMM's event loop.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::Interrupt;

/// The guest's memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// All that a device gets when the driver is ready (virtio 1.2, 3.1.1, step 8).
pub struct Activation {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// The queues, validated and frozen, each with the event that the driver's notification signals. A queue that the driver
    /// left disabled is absent: `None`.
    pub queues: Vec<Option<(Queue, Arc<EventFd>)>>,
    /// Tells the driver of used buffers and configuration changes.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not be activated; the transport then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[error("Could not activate the {device} device: {reason}")]
pub struct ActivateError {
    /// The device's name.
    pub device: &'static str,
    /// What was missing or failed.
    pub reason: String,
}

/// A virtio device, as its transport drives it. Called on vCPU threads, under the transport's lock: nothing here may block.
pub trait VirtioDevice: Send {
    /// The device's short name, for logs.
    fn name(&self) -> &'static str;
    /// Device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> Vec<u16>;
    /// Features offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;
    /// Reads device-specific configuration; bytes beyond its end read as zero. Any offset and length may come.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device-specific configuration; most devices ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// The driver resets the device: stop using queues and memory before returning.
    fn reset(&mut self);
    /// How far the device is in each queue, for a snapshot; called while the vCPUs stand still. None if the device holds what a
    /// snapshot can't keep.
    fn positions(&self) -> Option<Vec<Position>>;
}

/// How far a device is in a queue: free-running indices (virtio 1.2, 2.7.6 and 2.7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The next entry of the available ring to take.
    pub available: u16,
    /// The next entry of the used ring to fill.
    pub used: u16,
}
