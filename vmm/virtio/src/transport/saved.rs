//! A transport's state in a snapshot. It is restored by the writes with which the guest's driver once made it, so a damaged or
//! hostile state meets the same checks as a hostile driver.

use serde::{Deserialize, Serialize};

use super::state::{Half, QueueField, StatusChange, Transport};
use crate::device::Position;
use crate::interrupt::Interrupt;
use std::sync::Arc;

/// The state of one device's transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device type (virtio 1.2, section 5).
    device_type: u32,
    /// The device status field.
    status: u8,
    /// Features that driver and device agreed on.
    features: u64,
    queues: Vec<QueueState>,
}

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueState {
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    position: Position,
}

/// Why a device is not in a snapshot, or not restored from one.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The device can't be saved now.
    #[error("The {0} device is in use by the host and can't be saved")]
    Busy(&'static str),
    /// The snapshot is of another machine.
    #[error("The snapshot has a device of type {} with {} queues where the {device} device has type {} with {}",
        has.0, has.1, wants.0, wants.1)]
    Other {
        /// The device.
        device: &'static str,
        /// Type and number of queues in the snapshot.
        has: (u32, usize),
        /// Type and number of queues of the machine's device.
        wants: (u32, usize),
    },
    /// The snapshot is of another machine, too.
    #[error("The snapshot has another number of interrupt vectors or queues than the {0} device")]
    Vectors(&'static str),
    /// The replayed set-up was refused.
    #[error("The {0} device refuses the snapshot's device status")]
    Refused(&'static str),
}

impl Transport {
    /// The state, while the vCPUs stand still.
    pub fn save(&self) -> Result<TransportState, SavedError> {
        let positions = self.positions().ok_or(SavedError::Busy(self.name()))?;
        let queues = self.queues().iter().zip(positions).map(|(queue, position)| QueueState {
            size: queue.size,
            enabled: queue.enabled,
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            position,
        });
        Ok(TransportState {
            device_type: self.device_type(),
            status: self.status(),
            features: self.features(),
            queues: queues.collect(),
        })
    }

    /// Brings a device that was just reset into the state. `interrupt` is asked for when the device is activated.
    pub fn restore(
        &mut self,
        state: &TransportState,
        interrupt: impl Fn() -> Arc<dyn Interrupt>,
    ) -> Result<(), SavedError> {
        let name = self.name();
        let (has, wants) = ((state.device_type, state.queues.len()), (self.device_type(), self.queues().len()));
        if has != wants {
            return Err(SavedError::Other { device: name, has, wants });
        }
        let mut reached = 0;
        for bit in super::state::ORDER {
            if state.status & bit == 0 {
                break;
            }
            if bit == super::state::FEATURES_OK {
                for (select, half) in [(0, state.features as u32), (1, (state.features >> 32) as u32)] {
                    self.driver_feature_select = select;
                    self.set_driver_features(half);
                }
            }
            if bit == super::state::DRIVER_OK {
                self.restore_queues(&state.queues);
            }
            reached |= bit;
            match self.set_status(reached, &interrupt) {
                StatusChange::Accepted | StatusChange::Activated => {}
                _ => return Err(SavedError::Refused(name)),
            }
        }
        if self.status() != state.status {
            return Err(SavedError::Refused(name));
        }
        Ok(())
    }

    fn restore_queues(&mut self, queues: &[QueueState]) {
        for (index, queue) in (0..).zip(queues) {
            self.queue_select = index;
            let halves = |address: u64| [(Half::Low, address as u32), (Half::High, (address >> 32) as u32)];
            self.set_queue(QueueField::Size(queue.size));
            for (half, value) in halves(queue.descriptors) {
                self.set_queue(QueueField::Descriptors(half, value));
            }
            for (half, value) in halves(queue.available) {
                self.set_queue(QueueField::Available(half, value));
            }
            for (half, value) in halves(queue.used) {
                self.set_queue(QueueField::Used(half, value));
            }
            self.set_position(index, queue.position);
            self.set_queue(QueueField::Enable(queue.enabled.into()));
        }
        self.queue_select = 0;
    }
}
