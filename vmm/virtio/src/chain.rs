//! Checked descriptor chains: a chain is read once, every rule is checked, and from then on only its copy is used, so that a driver
//! that changes its descriptors meanwhile changes nothing (virtio 1.2, 2.7.4 to 2.7.7).

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions, VolatileSlice};

use crate::device::GuestMemory;

/// Most descriptors of a chain, indirect ones included. Linux' drivers here use at most 19.
pub const MAX_DESCRIPTORS: usize = 512;

/// The rule that a chain breaks.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The head is not an index of the descriptor table.
    #[error("its head {0} is outside the descriptor table")]
    Head(u16),
    /// It has no descriptor, loops, is too long, or goes on outside the table or memory.
    #[error("it does not end after {0} descriptors")]
    Endless(usize),
    /// A device-readable buffer after a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer is not in guest memory.
    #[error("its buffer at {0:#x}, {1} bytes, is not in guest memory")]
    Buffer(u64, u32),
    /// The access that failed.
    #[error("its buffers could not be accessed")]
    Access(#[source] GuestMemoryError),
    /// It holds fewer bytes than the request needs.
    #[error("it has {has} bytes where {needs} are needed")]
    Short {
        /// What is there.
        has: usize,
        /// What is needed.
        needs: usize,
    },
}

/// A buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buffer {
    address: GuestAddress,
    len: u32,
}

/// A checked chain.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Buffers,
    writable: Buffers,
}

/// The buffers of one direction, in order.
#[derive(Debug, Default)]
pub struct Buffers {
    list: Vec<Buffer>,
    len: usize,
}

impl Chain {
    /// Reads and checks a chain.
    pub(crate) fn read(
        mut descriptors: DescriptorChain<&GuestMemory>,
        queue_size: u16,
        memory: &GuestMemory,
    ) -> Result<Self, ChainError> {
        let head = descriptors.head_index();
        if head >= queue_size {
            return Err(ChainError::Head(head));
        }
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut ended = false;
        let mut count = 0;
        for descriptor in descriptors.by_ref().take(MAX_DESCRIPTORS) {
            count += 1;
            ended = !descriptor.has_next();
            let buffer = Buffer { address: descriptor.addr(), len: descriptor.len() };
            if buffer.len != 0 && !memory.check_range(buffer.address, buffer.len as usize, Permissions::ReadWrite) {
                return Err(ChainError::Buffer(buffer.address.0, buffer.len));
            }
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.list.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(ChainError::Order);
            }
        }
        if ended { Ok(chain) } else { Err(ChainError::Endless(count)) }
    }

    /// Index of its first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads.
    pub fn readable(&self) -> &Buffers {
        &self.readable
    }

    /// What the device writes.
    pub fn writable(&self) -> &Buffers {
        &self.writable
    }
}

impl Buffers {
    fn push(&mut self, buffer: Buffer) {
        if buffer.len != 0 {
            // At most MAX_DESCRIPTORS times 4 GiB.
            self.len += buffer.len as usize;
            self.list.push(buffer);
        }
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address and length of each buffer, for a device to which the place itself is what matters.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u32)> {
        self.list.iter().map(|buffer| (buffer.address.0, buffer.len))
    }

    /// Copies bytes from `offset` on out of the buffers.
    pub fn read_at(&self, memory: &GuestMemory, offset: usize, data: &mut [u8]) -> Result<(), ChainError> {
        let needs = offset.saturating_add(data.len());
        let mut done = 0;
        self.pieces(offset, data.len(), |address, len| {
            memory.read_slice(&mut data[done..done + len], address)?;
            done += len;
            Ok(())
        })?;
        if done < data.len() { Err(ChainError::Short { has: self.len, needs }) } else { Ok(()) }
    }

    /// Copies bytes into the buffers from `offset` on.
    pub fn write_at(&self, memory: &GuestMemory, offset: usize, data: &[u8]) -> Result<(), ChainError> {
        let needs = offset.saturating_add(data.len());
        let mut done = 0;
        self.pieces(offset, data.len(), |address, len| {
            memory.write_slice(&data[done..done + len], address)?;
            done += len;
            Ok(())
        })?;
        if done < data.len() { Err(ChainError::Short { has: self.len, needs }) } else { Ok(()) }
    }

    /// The memory of `len` bytes from `offset` on, or up to the end if that is nearer, for a vectored transfer.
    pub fn slices<'a>(
        &self,
        memory: &'a GuestMemory,
        offset: usize,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'a>>, ChainError> {
        let mut slices = Vec::with_capacity(self.list.len());
        self.pieces(offset, len, |address, len| {
            for slice in memory.get_slices(address, len, Permissions::ReadWrite)? {
                slices.push(slice?);
            }
            Ok(())
        })?;
        Ok(slices)
    }

    /// Calls `each` for the pieces of the buffers that make up `len` bytes from `offset` on.
    fn pieces(
        &self,
        offset: usize,
        len: usize,
        mut each: impl FnMut(GuestAddress, usize) -> Result<(), GuestMemoryError>,
    ) -> Result<(), ChainError> {
        let (mut skip, mut left) = (offset, len);
        for buffer in &self.list {
            if left == 0 {
                break;
            }
            let buffer_len = buffer.len as usize;
            if skip >= buffer_len {
                skip -= buffer_len;
                continue;
            }
            let piece = left.min(buffer_len - skip);
            // Within a range that was checked when the chain was read: can't overflow.
            each(GuestAddress(buffer.address.0 + skip as u64), piece).map_err(ChainError::Access)?;
            left -= piece;
            skip = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
