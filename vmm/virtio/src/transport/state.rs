//! The transport's state machine (virtio 1.2, 2.1 and 3.1): device status, feature negotiation, queue configuration. Bus-independent.
//! What a driver configured is frozen when it sets DRIVER_OK; only a reset opens it again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{Activation, GuestMemory, Position, VirtioDevice};
use crate::interrupt::Interrupt;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// Status bits in the order in which a driver sets them (virtio 1.2, 3.1.1).
pub(super) const ORDER: [u8; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// One queue, as the driver configures it.
#[derive(Debug)]
pub struct QueueConfig {
    /// Largest size the device takes.
    pub max_size: u16,
    /// Size the driver chose: a power of two up to `max_size`.
    pub size: u16,
    /// The driver enabled it; from then on it is frozen.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Where the device begins: at 0, but in a restored queue.
    pub position: Position,
    /// Signalled by the driver's notification. Stays the same for the device's whole life.
    pub event: Arc<EventFd>,
}

impl QueueConfig {
    fn new(max_size: u16, event: Arc<EventFd>) -> Self {
        let position = Position::default();
        Self { max_size, size: max_size, enabled: false, descriptors: 0, available: 0, used: 0, position, event }
    }

    fn reset(&mut self) {
        *self = Self::new(self.max_size, self.event.clone());
    }

    /// The queue to serve; an error says which rule the driver broke.
    fn build(&self, memory: &GuestMemory, event_idx: bool) -> Result<Queue, String> {
        let mut queue = Queue::new(self.max_size).map_err(|error| error.to_string())?;
        queue.try_set_size(self.size).map_err(|error| error.to_string())?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(|error| error.to_string())?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(|error| error.to_string())?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(|error| error.to_string())?;
        queue.set_next_avail(self.position.available);
        queue.set_next_used(self.position.used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // virtio-queue holds an available ring at address 0 for a queue that was never configured.
        if self.available == 0 || !queue.is_valid(memory) {
            return Err("its rings are not in guest memory".into());
        }
        Ok(queue)
    }
}

/// A field of a queue that the driver may write.
#[derive(Clone, Copy, Debug)]
pub enum QueueField {
    /// Number of descriptors.
    Size(u16),
    /// 1 enables the queue; nothing else may be written.
    Enable(u16),
    /// A half of the descriptor table's address.
    Descriptors(Half, u32),
    /// A half of the available ring's address.
    Available(Half, u32),
    /// A half of the used ring's address.
    Used(Half, u32),
}

/// Which 32 bits of a 64-bit field.
#[derive(Clone, Copy, Debug)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    fn set(self, field: &mut u64, value: u32) {
        *field = match self {
            Self::Low => (*field & !0xffff_ffff) | u64::from(value),
            Self::High => (*field & 0xffff_ffff) | (u64::from(value) << 32),
        };
    }
}

/// What a write of the device status led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusChange {
    /// The status is what was written.
    Accepted,
    /// The write broke a rule and changed nothing.
    Refused,
    /// The device was reset.
    Reset,
    /// The device was activated.
    Activated,
    /// The device could not be activated and needs a reset.
    Failed,
}

/// The state machine of one device.
pub struct Transport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: Arc<GuestMemory>,
    name: &'static str,
    device_type: u32,
    offered: u64,
    accepted: u64,
    status: u8,
    needs_reset: Arc<AtomicBool>,
    queues: Vec<QueueConfig>,
    /// Which 32 feature bits of the device the driver reads.
    pub device_feature_select: u32,
    /// Which 32 feature bits the driver writes.
    pub driver_feature_select: u32,
    /// Which queue the queue fields are of.
    pub queue_select: u16,
}

impl Transport {
    /// A device that was just reset. `events` holds one event a queue.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, memory: Arc<GuestMemory>, events: Vec<Arc<EventFd>>) -> Self {
        let (name, device_type, offered, sizes) = {
            let device = lock(&device);
            (device.name(), device.device_type(), device.features(), device.queue_max_sizes())
        };
        let queues = sizes.into_iter().zip(events).map(|(size, event)| QueueConfig::new(size, event)).collect();
        Self {
            device,
            memory,
            name,
            device_type,
            offered,
            accepted: 0,
            status: 0,
            needs_reset: Arc::new(AtomicBool::new(false)),
            queues,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        }
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The device's type (virtio 1.2, section 5).
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        // A device has a handful of queues; the transport refuses more than 255 when it is built.
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Set from any thread when the device can't go on; shows as DEVICE_NEEDS_RESET.
    pub fn needs_reset(&self) -> Arc<AtomicBool> {
        self.needs_reset.clone()
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        self.status | if self.needs_reset.load(Ordering::Acquire) { NEEDS_RESET } else { 0 }
    }

    /// The driver finished the set-up: nothing that it configured may change until it resets the device.
    pub fn is_frozen(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Features that driver and device agreed on, or the driver's choice so far.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues, as they are configured.
    pub(super) fn queues(&self) -> &[QueueConfig] {
        &self.queues
    }

    /// How far the device is in each queue; none if that can't be kept.
    pub(super) fn positions(&self) -> Option<Vec<Position>> {
        lock(&self.device).positions()
    }

    /// Where the device is to begin in a queue that is not running yet.
    pub(super) fn set_position(&mut self, queue: u16, position: Position) {
        if !self.is_frozen()
            && let Some(queue) = self.queues.get_mut(usize::from(queue))
        {
            queue.position = position;
        }
    }

    /// The 32 offered feature bits that the driver selected.
    pub fn device_features(&self) -> u32 {
        word(self.offered, self.device_feature_select)
    }

    /// The 32 accepted feature bits that the driver selected.
    pub fn driver_features(&self) -> u32 {
        word(self.accepted, self.driver_feature_select)
    }

    /// Writes 32 accepted feature bits; only while the driver negotiates.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        match self.driver_feature_select {
            0 => Half::Low.set(&mut self.accepted, value),
            1 => Half::High.set(&mut self.accepted, value),
            _ => {}
        }
    }

    /// The selected queue; none if there is no such queue.
    pub fn queue(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The event of each queue.
    pub fn events(&self) -> impl Iterator<Item = &EventFd> {
        self.queues.iter().map(|queue| &*queue.event)
    }

    /// Signals the queue's event as the driver's notification does.
    pub fn notify(&self, queue: usize) {
        if let Some(queue) = self.queues.get(queue) {
            // The counter can't overflow in practice, and a failed write means that the event is signalled already.
            let _ = queue.event.write(1);
        }
    }

    /// Writes a field of the selected queue; ignored once the queue is enabled or the driver is ready.
    pub fn set_queue(&mut self, field: QueueField) {
        if self.status & (DRIVER | DRIVER_OK | FAILED) != DRIVER {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled {
            return;
        }
        match field {
            QueueField::Size(size) => {
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            QueueField::Enable(value) => queue.enabled = value == 1,
            QueueField::Descriptors(half, value) => half.set(&mut queue.descriptors, value),
            QueueField::Available(half, value) => half.set(&mut queue.available, value),
            QueueField::Used(half, value) => half.set(&mut queue.used, value),
        }
    }

    /// Reads device-specific configuration.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        lock(&self.device).read_config(offset, data);
    }

    /// Writes device-specific configuration.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        lock(&self.device).write_config(offset, data);
    }

    /// Writes the device status. `interrupt` is the device's once it is activated.
    pub fn set_status(&mut self, value: u8, interrupt: impl Fn() -> Arc<dyn Interrupt>) -> StatusChange {
        if value == 0 {
            self.reset();
            return StatusChange::Reset;
        }
        let value = value & !NEEDS_RESET;
        if value & self.status != self.status {
            // A driver must not clear a bit (virtio 1.2, 2.1.1).
            return StatusChange::Refused;
        }
        if value & FAILED != 0 {
            self.status |= FAILED;
            return StatusChange::Accepted;
        }
        if !is_ordered(value) {
            return StatusChange::Refused;
        }
        let new = value & !self.status;
        if new & FEATURES_OK != 0 && !self.features_fit() {
            self.status |= new & (ACKNOWLEDGE | DRIVER);
            return StatusChange::Refused;
        }
        self.status = value;
        if new & DRIVER_OK == 0 {
            return StatusChange::Accepted;
        }
        match self.activate(interrupt()) {
            Ok(()) => StatusChange::Activated,
            Err(reason) => {
                tracing::warn!(device = self.name, %reason, "the driver could not start the device");
                self.needs_reset.store(true, Ordering::Release);
                StatusChange::Failed
            }
        }
    }

    fn features_fit(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&mut self, interrupt: Arc<dyn Interrupt>) -> Result<(), String> {
        if self.needs_reset.load(Ordering::Acquire) {
            return Err("it needs a reset first".into());
        }
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, config) in self.queues.iter().enumerate() {
            queues.push(match config.enabled {
                false => None,
                true => {
                    let queue =
                        config.build(&self.memory, event_idx).map_err(|error| format!("queue {index}: {error}"))?;
                    Some((queue, config.event.clone()))
                }
            });
        }
        let activation = Activation { memory: self.memory.clone(), features: self.accepted, queues, interrupt };
        lock(&self.device).activate(activation).map_err(|error| error.reason)
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 {
            lock(&self.device).reset();
        }
        self.status = 0;
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueConfig::reset);
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// Locks the device. A panic on another thread ends the process or is a defect there; the state itself is still whole.
fn lock(device: &Arc<Mutex<dyn VirtioDevice>>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Every bit's predecessors are set, and no bit is foreign.
fn is_ordered(status: u8) -> bool {
    let mut expected = 0;
    for bit in ORDER {
        if status == expected {
            break;
        }
        expected |= bit;
    }
    status == expected
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
