//! The function: routes accesses of configuration space and BAR 0 to the state machine, the MSI-X table and the device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::ConfigSpace;
use super::layout;
use super::msix::Msix;
use super::saved::FunctionState;
use crate::device::{GuestMemory, VirtioDevice};
use crate::interrupt::{Interrupt, Machine, PciFunction};
use crate::transport::saved::SavedError;
use crate::transport::state::{Half, QueueField, StatusChange, Transport};

/// A field that has no vector (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status bits (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Why a function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// More queues than the notification area and the vectors' table hold.
    #[error("The {0} device has {1} queues, more than {max}", max = layout::MAX_QUEUES)]
    TooManyQueues(&'static str, usize),
    /// No event for a queue.
    #[error("Could not make an event for a queue of the {0} device")]
    Event(&'static str, #[source] io::Error),
    /// No vectors.
    #[error("Could not get the interrupt vectors of the {0} device")]
    Vectors(&'static str, #[source] io::Error),
    /// The machine does not signal the queue's event.
    #[error("Could not register the notification address of queue {1} of the {0} device")]
    Notify(&'static str, usize, #[source] io::Error),
}

/// A virtio device on the PCI bus.
pub struct VirtioPciFunction {
    machine: Arc<dyn Machine>,
    /// Where the machine takes notifications, if it does.
    notified_at: Option<u64>,
    pub(super) transport: Transport,
    pub(super) config: ConfigSpace,
    pub(super) shared: Arc<Shared>,
    pub(super) queue_vectors: Vec<u16>,
}

/// What the function shares with its device's way to interrupt.
pub(super) struct Shared {
    pub(super) msix: Msix,
    pub(super) config_vector: AtomicU16,
    generation: AtomicU8,
    isr: AtomicU8,
    needs_reset: Arc<AtomicBool>,
}

impl VirtioPciFunction {
    /// Makes the function for a device. `bar_address` is where BAR 0 is at first, as if firmware had placed it; 0 leaves that to the
    /// guest, as with what is plugged in while it runs.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        machine: Arc<dyn Machine>,
        bar_address: u64,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, PciError> {
        let (name, queues) = {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            (device.name(), device.queue_max_sizes().len())
        };
        if queues > layout::MAX_QUEUES {
            return Err(PciError::TooManyQueues(name, queues));
        }
        let mut events = Vec::with_capacity(queues);
        for _ in 0..queues {
            events.push(Arc::new(EventFd::new(EFD_NONBLOCK).map_err(|error| PciError::Event(name, error))?));
        }
        // One vector a queue and one for configuration changes; at most 256.
        let count = queues as u16 + 1;
        let vectors = machine.msi_vectors(count).map_err(|error| PciError::Vectors(name, error))?;
        let transport = Transport::new(device, memory, events);
        let shared = Shared {
            msix: Msix::new(vectors),
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            needs_reset: transport.needs_reset(),
        };
        let mut function = Self {
            machine,
            notified_at: None,
            config: ConfigSpace::new(transport.device_type(), bar_address, count),
            transport,
            shared: Arc::new(shared),
            queue_vectors: vec![NO_VECTOR; queues],
        };
        if bar_address != 0 {
            function.place_notifications(bar_address).map_err(|(index, error)| PciError::Notify(name, index, error))?;
        }
        Ok(function)
    }

    /// Has the machine take notifications of a BAR at `bar`, and no longer where it was before.
    fn place_notifications(&mut self, bar: u64) -> Result<(), (usize, io::Error)> {
        self.forget_notifications();
        self.notified_at = Some(bar);
        for (index, event) in self.transport.events().enumerate() {
            self.machine.notify_on_write(notification(bar, index), event).map_err(|error| (index, error))?;
        }
        Ok(())
    }

    fn forget_notifications(&mut self) {
        let Some(bar) = self.notified_at.take() else { return };
        for (index, event) in self.transport.events().enumerate() {
            // Fails for those that were refused before.
            let _ = self.machine.forget_write(notification(bar, index), event);
        }
    }

    /// Follows the guest's placing of the BAR. While it sizes BARs it turns memory decoding off and on again, which changes nothing here.
    pub(super) fn follow_bar(&mut self) {
        if let Some(bar) = self.config.bar()
            && self.notified_at != Some(bar)
            && let Err((queue, error)) = self.place_notifications(bar)
        {
            // Then the notification is an access like any other, and slower.
            tracing::warn!(device = self.transport.name(), queue, %error, "no short way for notifications");
        }
    }

    fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        let queue = self.transport.queue();
        let addresses = queue.map_or((0, 0, 0), |queue| (queue.descriptors, queue.available, queue.used));
        // (offset, length in bytes, value): virtio 1.2, 4.1.4.3.
        let (start, len, value): (u64, usize, u64) = match offset {
            0..4 => (0, 4, self.transport.device_feature_select.into()),
            4..8 => (4, 4, self.transport.device_features().into()),
            8..12 => (8, 4, self.transport.driver_feature_select.into()),
            12..16 => (12, 4, self.transport.driver_features().into()),
            16..18 => (16, 2, self.shared.config_vector.load(Ordering::Acquire).into()),
            18..20 => (18, 2, self.transport.queue_count().into()),
            20 => (20, 1, self.transport.status().into()),
            21 => (21, 1, self.shared.generation.load(Ordering::Acquire).into()),
            22..24 => (22, 2, self.transport.queue_select.into()),
            24..26 => (24, 2, queue.map_or(0, |queue| queue.size).into()),
            26..28 => (26, 2, self.queue_vector().map_or(NO_VECTOR, |vector| *vector).into()),
            28..30 => (28, 2, u64::from(self.transport.queue().is_some_and(|queue| queue.enabled))),
            30..32 => (30, 2, self.transport.queue().map_or(0, |_| self.transport.queue_select).into()),
            32..40 => (32, 8, addresses.0),
            40..48 => (40, 8, addresses.1),
            48..56 => (48, 8, addresses.2),
            _ => (offset, 0, 0),
        };
        let bytes = value.to_le_bytes();
        // Bytes of one field; what lies beyond it was not asked for by any rule-abiding driver and reads as zero.
        for (index, byte) in data.iter_mut().enumerate() {
            let at = (offset - start) as usize + index;
            *byte = if at < len { bytes[at] } else { 0 };
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        // A driver writes each field whole, a 64-bit field also by halves (virtio 1.2, 4.1.3.1).
        if let (32 | 40 | 48, Ok(bytes)) = (offset, <[u8; 8]>::try_from(data)) {
            let value = u64::from_le_bytes(bytes);
            self.write_common(offset, &(value as u32).to_le_bytes());
            self.write_common(offset + 4, &((value >> 32) as u32).to_le_bytes());
            return;
        }
        let mut bytes = [0; 4];
        let Some(target) = bytes.get_mut(..data.len()) else { return };
        target.copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0, 4) => self.transport.device_feature_select = value,
            (8, 4) => self.transport.driver_feature_select = value,
            (12, 4) => self.transport.set_driver_features(value),
            (16, 2) => {
                let vector = self.known_vector(value as u16);
                self.shared.config_vector.store(vector, Ordering::Release);
            }
            (20, 1) => self.set_status(value as u8),
            (22, 2) => self.transport.queue_select = value as u16,
            (24, 2) => self.transport.set_queue(QueueField::Size(value as u16)),
            (26, 2) => {
                let vector = self.known_vector(value as u16);
                if !self.transport.is_frozen()
                    && let Some(selected) = self.queue_vector()
                {
                    *selected = vector;
                }
            }
            (28, 2) => self.transport.set_queue(QueueField::Enable(value as u16)),
            (32, 4) => self.transport.set_queue(QueueField::Descriptors(Half::Low, value)),
            (36, 4) => self.transport.set_queue(QueueField::Descriptors(Half::High, value)),
            (40, 4) => self.transport.set_queue(QueueField::Available(Half::Low, value)),
            (44, 4) => self.transport.set_queue(QueueField::Available(Half::High, value)),
            (48, 4) => self.transport.set_queue(QueueField::Used(Half::Low, value)),
            (52, 4) => self.transport.set_queue(QueueField::Used(Half::High, value)),
            _ => {}
        }
    }

    /// The selected queue's vector.
    fn queue_vector(&mut self) -> Option<&mut u16> {
        self.queue_vectors.get_mut(usize::from(self.transport.queue_select))
    }

    /// The vector, or none if the function has no such vector.
    pub(super) fn known_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.shared.msix.len() { vector } else { NO_VECTOR }
    }

    fn set_status(&mut self, value: u8) {
        let (shared, vectors) = (&self.shared, &self.queue_vectors);
        let change = self
            .transport
            .set_status(value, || Arc::new(PciInterrupt { shared: shared.clone(), queue_vectors: vectors.clone() }));
        match change {
            StatusChange::Reset => {
                self.queue_vectors.fill(NO_VECTOR);
                self.shared.config_vector.store(NO_VECTOR, Ordering::Release);
                self.shared.isr.store(0, Ordering::Release);
            }
            StatusChange::Failed => self.shared.config_changed(),
            StatusChange::Refused => {
                tracing::warn!(
                    device = self.transport.name(),
                    value,
                    status = self.transport.status(),
                    "the driver wrote a device status against the rules"
                );
            }
            StatusChange::Accepted => {}
            StatusChange::Activated => tracing::debug!(device = self.transport.name(), "device activated"),
        }
    }
}

impl PciFunction for VirtioPciFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((bar_offset, len)) = self.config.window(offset, data.len()) {
            let mut value = [0; 4];
            self.bar_read(bar_offset, &mut value[..len]);
            self.config.window_data().copy_from_slice(&value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.follow_bar();
        let (enabled, masked) = self.config.msix_control();
        if (enabled, masked) != self.shared.msix.control() {
            self.shared.msix.set_control(enabled, masked);
        }
        if let Some((bar_offset, len)) = self.config.window(offset, data.len()) {
            let mut value = [0; 4];
            value.copy_from_slice(self.config.window_data());
            self.bar_write(bar_offset, &value[..len]);
        }
    }

    fn save(&self) -> Result<FunctionState, SavedError> {
        self.saved()
    }

    fn announce(&self, state: &FunctionState) {
        self.announce_vectors(state);
    }

    fn restore(&mut self, state: &FunctionState) -> Result<(), SavedError> {
        self.replay(state)
    }

    fn bar_len(&self) -> u64 {
        layout::BAR_LEN
    }

    fn bar(&self) -> Option<u64> {
        self.config.bar()
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            layout::COMMON..layout::ISR => self.read_common(offset - layout::COMMON, data),
            layout::ISR => {
                if let Some(byte) = data.first_mut() {
                    // Reading clears it (virtio 1.2, 4.1.4.5).
                    *byte = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            layout::DEVICE..layout::NOTIFY => self.transport.read_config(offset - layout::DEVICE, data),
            layout::MSIX_TABLE..layout::MSIX_PBA => self.shared.msix.read_table(offset - layout::MSIX_TABLE, data),
            layout::MSIX_PBA..layout::BAR_LEN => self.shared.msix.read_pending(offset - layout::MSIX_PBA, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            layout::COMMON..layout::ISR => self.write_common(offset - layout::COMMON, data),
            layout::DEVICE..layout::NOTIFY => self.transport.write_config(offset - layout::DEVICE, data),
            // Only where the machine does not signal the event by itself, as in the configuration space's window.
            layout::NOTIFY..layout::MSIX_TABLE => {
                self.transport.notify(((offset - layout::NOTIFY) / u64::from(layout::NOTIFY_MULTIPLIER)) as usize);
            }
            layout::MSIX_TABLE..layout::MSIX_PBA => self.shared.msix.write_table(offset - layout::MSIX_TABLE, data),
            _ => {}
        }
    }
}

impl Drop for VirtioPciFunction {
    fn drop(&mut self) {
        self.forget_notifications();
    }
}

/// The address by which a driver notifies of a queue.
fn notification(bar: u64, queue: usize) -> u64 {
    bar + layout::NOTIFY + u64::from(layout::NOTIFY_MULTIPLIER) * queue as u64
}

impl Shared {
    fn raise(&self, vector: u16, isr: u8) {
        if !self.msix.raise(vector) {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }
}

/// The device's way to interrupt; the queues' vectors are those at DRIVER_OK.
pub(super) struct PciInterrupt {
    pub(super) shared: Arc<Shared>,
    pub(super) queue_vectors: Vec<u16>,
}

impl PciInterrupt {
    fn vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
    }
}

impl Interrupt for PciInterrupt {
    fn used(&self, queue: u16) {
        self.shared.raise(self.vector(queue), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.shared.config_changed();
    }

    fn needs_reset(&self) {
        if !self.shared.needs_reset.swap(true, Ordering::AcqRel) {
            self.shared.config_changed();
        }
    }

    fn queue_event(&self, queue: u16) -> Option<EventFd> {
        self.shared.msix.event(self.vector(queue))
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
