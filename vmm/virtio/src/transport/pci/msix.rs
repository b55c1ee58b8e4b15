//! MSI-X (PCI Local Bus 3.0, 6.8.2): the vectors' table, its masks and the pending bits. Shared by vCPU threads, which configure it,
//! and the event loop, which raises vectors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_backend::event::duplicate;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::MsiVector;

/// Bytes of a table entry.
const ENTRY_LEN: u64 = 16;
/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;

struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    vector: Arc<dyn MsiVector>,
    /// Where the machine's vector is routed to now; none while it is masked.
    routed: Option<(u64, u32)>,
}

/// One vector in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

struct Table {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

/// The MSI-X part of a function.
pub(super) struct Msix {
    table: Mutex<Table>,
}

impl Msix {
    pub(super) fn new(vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        let entries = vectors
            .into_iter()
            .map(|vector| Entry { address: 0, data: 0, control: ENTRY_MASKED, pending: false, vector, routed: None })
            .collect();
        Self { table: Mutex::new(Table { enabled: false, masked: false, entries }) }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub(super) fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// The capability's enable and function mask bits.
    pub(super) fn control(&self) -> (bool, bool) {
        let table = self.lock();
        (table.enabled, table.masked)
    }

    /// Sets the capability's enable and function mask bits.
    pub(super) fn set_control(&self, enabled: bool, masked: bool) {
        let mut table = self.lock();
        (table.enabled, table.masked) = (enabled, masked);
        (0..table.entries.len()).for_each(|index| table.update(index));
    }

    /// Raises a vector. False if MSI-X is off, so that the ISR status has to tell.
    pub(super) fn raise(&self, vector: u16) -> bool {
        let mut table = self.lock();
        if !table.enabled {
            return false;
        }
        if let Some(entry) = table.entries.get_mut(usize::from(vector)) {
            entry.raise();
        }
        true
    }

    /// The event that delivers a vector.
    pub(super) fn event(&self, vector: u16) -> Option<EventFd> {
        let table = self.lock();
        let entry = table.entries.get(usize::from(vector))?;
        duplicate(entry.vector.event()).ok()
    }

    /// Reads 4 or 8 aligned bytes of the table; anything else reads as zero.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_aligned(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (index, chunk) in data.chunks_exact_mut(4).enumerate() {
            let offset = offset + 4 * index as u64;
            let Some(entry) = table.entries.get((offset / ENTRY_LEN) as usize) else { return };
            chunk.copy_from_slice(
                &match offset % ENTRY_LEN {
                    0 => entry.address as u32,
                    4 => (entry.address >> 32) as u32,
                    8 => entry.data,
                    _ => entry.control,
                }
                .to_le_bytes(),
            );
        }
    }

    /// Writes 4 or 8 aligned bytes of the table; anything else is ignored.
    pub(super) fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_aligned(offset, data.len()) {
            return;
        }
        let mut table = self.lock();
        for (index, chunk) in data.chunks_exact(4).enumerate() {
            let offset = offset + 4 * index as u64;
            let value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            let Some(entry) = table.entries.get_mut((offset / ENTRY_LEN) as usize) else { return };
            match offset % ENTRY_LEN {
                0 => entry.address = (entry.address & !0xffff_ffff) | u64::from(value & !3),
                4 => entry.address = (entry.address & 0xffff_ffff) | (u64::from(value) << 32),
                8 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
        }
        table.update((offset / ENTRY_LEN) as usize);
    }

    /// Address, data, control and pending bit of each entry, for a snapshot.
    pub(super) fn save(&self) -> Vec<VectorState> {
        let table = self.lock();
        let state = |entry: &Entry| VectorState {
            address: entry.address,
            data: entry.data,
            masked: entry.control & ENTRY_MASKED != 0,
            pending: entry.pending,
        };
        table.entries.iter().map(state).collect()
    }

    /// Writes the table as it was saved, while MSI-X is off; [`Self::set_control`] then connects the vectors.
    pub(super) fn restore(&self, vectors: &[VectorState]) {
        let mut table = self.lock();
        for (entry, vector) in table.entries.iter_mut().zip(vectors) {
            entry.address = vector.address & !3;
            entry.data = vector.data;
            entry.control = if vector.masked { ENTRY_MASKED } else { 0 };
            entry.pending = vector.pending;
        }
    }

    /// Announces the routes that [`Self::restore`] and then [`Self::set_control`] will set.
    pub(super) fn announce(&self, vectors: &[VectorState]) {
        let table = self.lock();
        for (entry, vector) in table.entries.iter().zip(vectors).filter(|(_, vector)| !vector.masked) {
            entry.vector.announce(vector.address & !3, vector.data);
        }
    }

    /// Reads the pending bit array.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |byte, bit| {
                let pending = usize::try_from(first.saturating_add(bit))
                    .ok()
                    .and_then(|index| table.entries.get(index))
                    .is_some_and(|entry| entry.pending);
                byte | (u8::from(pending) << bit)
            });
        }
    }
}

impl Table {
    /// Brings the machine's vector in line with the entry and the masks.
    fn update(&mut self, index: usize) {
        let open = self.enabled && !self.masked;
        let Some(entry) = self.entries.get_mut(index) else { return };
        let wanted = (open && entry.control & ENTRY_MASKED == 0).then_some((entry.address, entry.data));
        if wanted == entry.routed {
            return;
        }
        let result = match wanted {
            Some((address, data)) => entry.vector.route(address, data),
            None => entry.vector.mask(),
        };
        match result {
            Ok(()) => entry.routed = wanted,
            Err(error) => {
                entry.routed = None;
                tracing::warn!(vector = index, %error, "could not change the route of an interrupt");
            }
        }
        if entry.routed.is_some() && std::mem::take(&mut entry.pending) {
            entry.raise();
        }
    }
}

impl Entry {
    fn raise(&mut self) {
        if self.routed.is_none() {
            self.pending = true;
        } else if let Err(error) = self.vector.event().write(1) {
            // Only a counter at its limit fails: the interrupt is signalled already.
            tracing::debug!(%error, "could not signal an interrupt");
        }
    }
}

fn is_aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
