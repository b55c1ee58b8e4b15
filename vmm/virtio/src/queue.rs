//! A running queue: takes descriptor chains off the available ring, publishes used ones in batches, and keeps notifications in both
//! directions as rare as the driver allows (virtio 1.2, 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::chain::{Chain, ChainError};
use crate::device::{GuestMemory, Position};
use crate::interrupt::Interrupt;

/// Length of the flags and the index at the start of a ring, and of an element of the used ring, in bytes.
const RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// What a driver did to a queue that makes it unusable. The device then needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring's own fields make no sense.
    #[error("The ring of queue {queue} is broken: {source}")]
    Ring {
        /// The queue.
        queue: u16,
        /// What virtio-queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A descriptor chain breaks a rule.
    #[error("A descriptor chain of queue {queue} is broken: {source}")]
    Chain {
        /// The queue.
        queue: u16,
        /// The rule.
        #[source]
        source: ChainError,
    },
    /// The rings are no longer in guest memory; they were when the queue was activated.
    #[error("The rings of queue {queue} are not in guest memory")]
    Memory {
        /// The queue.
        queue: u16,
        /// The access.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// One running queue.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    /// Used elements written but not published by the ring's index yet.
    staged: u16,
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// The driver will notify when it adds a chain.
    armed: bool,
}

impl VirtQueue {
    /// A queue that was validated at activation.
    pub fn new(index: u16, queue: Queue, memory: Arc<GuestMemory>, interrupt: Arc<dyn Interrupt>) -> Self {
        let signalled = queue.next_used();
        Self { index, queue, memory, interrupt, staged: 0, signalled, armed: false }
    }

    /// How far the device is in the queue. Between two rounds of serving nothing is staged.
    pub fn position(&self) -> Position {
        Position { available: self.queue.next_avail(), used: self.queue.next_used() }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The next available chain. None if the ring is empty: then the driver will notify of the next one.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        // The second round is for a chain added while notifications were being enabled.
        for _ in 0..2 {
            let memory: &GuestMemory = &self.memory;
            let next = self.queue.iter(memory).map_err(|source| QueueError::Ring { queue: self.index, source })?.next();
            if let Some(descriptors) = next {
                let chain = Chain::read(descriptors, self.queue.size(), memory)
                    .map_err(|source| QueueError::Chain { queue: self.index, source })?;
                if self.armed {
                    self.armed = false;
                    self.queue
                        .disable_notification(memory)
                        .map_err(|source| QueueError::Ring { queue: self.index, source })?;
                }
                return Ok(Some(chain));
            }
            if self.armed {
                return Ok(None);
            }
            let more = self
                .queue
                .enable_notification(memory)
                .map_err(|source| QueueError::Ring { queue: self.index, source })?;
            self.armed = true;
            if !more {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Puts the chains that were popped last, `count` of them, back on the ring.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Returns a chain to the driver, with the number of bytes written to it; seen by the driver after `publish`.
    pub fn push_used(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        if self.staged >= self.queue.size() {
            // Only a driver that offers a chain twice gets here.
            self.publish()?;
        }
        let slot = self.queue.next_used().wrapping_add(self.staged) % self.queue.size();
        let address = GuestAddress(self.queue.used_ring()).unchecked_add(RING_HEADER + USED_ELEMENT * u64::from(slot));
        let element = (u64::from(written) << 32) | u64::from(chain.head());
        self.memory
            .write_obj(element.to_le(), address)
            .map_err(|source| QueueError::Memory { queue: self.index, source })?;
        self.staged += 1;
        Ok(())
    }

    /// Shows the driver all chains returned until now, without an interrupt.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        if self.staged == 0 {
            return Ok(());
        }
        let next = self.queue.next_used().wrapping_add(self.staged);
        self.staged = 0;
        self.queue.set_next_used(next);
        self.memory
            .store(next.to_le(), GuestAddress(self.queue.used_ring()).unchecked_add(2), Ordering::Release)
            .map_err(|source| QueueError::Memory { queue: self.index, source })
    }

    /// Publishes, and interrupts the driver if it wants to hear of it. Call it at the end of each round of serving the queue.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        self.publish()?;
        let (old, new) = (self.signalled, self.queue.next_used());
        if old == new {
            return Ok(());
        }
        self.signalled = new;
        // The used index must be visible before the driver's wishes are read (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        let wanted = if self.queue.event_idx_enabled() {
            let event = self.load(available.unchecked_add(RING_HEADER + 2 * u64::from(self.queue.size())))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(self.load(available)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used(self.index);
        }
        Ok(())
    }

    fn load(&self, address: GuestAddress) -> Result<u16, QueueError> {
        self.memory
            .load::<u16>(address, Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|source| QueueError::Memory { queue: self.index, source })
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
