//! One side (readable or writable) of a descriptor chain, or of a test's request: pieces of memory that another party may change at any
//! time. Bytes are copied out before they are looked at; file contents go between the pieces and a file without us.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Most pieces that a chain may have: IOV_MAX, so that one preadv(2) always takes them all.
const MOST_PIECES: usize = 1024;

/// Pieces of memory, as if they were one.
#[derive(Debug, Default)]
pub struct Buffers<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    length: usize,
}

impl<'a> Buffers<'a> {
    /// No memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece at the end; false when there are too many.
    pub fn push(&mut self, piece: VolatileSlice<'a>) -> bool {
        if piece.is_empty() {
            return true;
        }
        let Some(length) = self.length.checked_add(piece.len()) else { return false };
        if self.pieces.len() == MOST_PIECES {
            return false;
        }
        self.length = length;
        self.pieces.push(piece);
        true
    }

    /// Adds what `descriptor` points to; false when that is not the guest's memory, or there are too many pieces.
    pub fn push_descriptor(&mut self, memory: &'a GuestMemoryMmap, descriptor: Descriptor) -> bool {
        let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
        let Ok(slices) = memory.get_slices(descriptor.addr(), descriptor.len() as usize, access) else { return false };
        for slice in slices {
            match slice {
                Ok(slice) if self.push(slice) => {}
                _ => return false,
            }
        }
        true
    }

    /// Bytes of all pieces.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Up to `length` bytes from `offset` on, as pieces.
    pub fn range(&self, mut offset: usize, mut length: usize) -> Vec<VolatileSlice<'a>> {
        let mut out = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            if length == 0 {
                break;
            }
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let count = (piece.len() - offset).min(length);
            // Within the piece by the lines above, so that it can't fail.
            if let Ok(part) = piece.subslice(offset, count) {
                out.push(part);
            }
            offset = 0;
            length -= count;
        }
        out
    }

    /// Copies from `offset` on to `out`, as far as both go; bytes copied.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.range(offset, out.len()) {
            done += piece.copy_to(&mut out[done..]);
        }
        done
    }

    /// Copies `bytes` to the place `offset` on, as far as both go; bytes copied.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.range(offset, bytes.len()) {
            piece.copy_from(&bytes[done..]);
            done += piece.len();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_one() {
        let (mut a, mut b) = (*b"hello", *b" world");
        let mut buffers = Buffers::new();
        assert!(buffers.push(VolatileSlice::from(&mut a[..])));
        assert!(buffers.push(VolatileSlice::from(&mut b[..])));
        assert_eq!(buffers.len(), 11);
        let mut out = [0; 20];
        assert_eq!(buffers.copy_to(3, &mut out), 8);
        assert_eq!(&out[..8], b"lo world");
        assert_eq!(buffers.copy_from(4, b"O, W!!!!!!!!!"), 7);
        assert_eq!(buffers.copy_to(0, &mut out), 11);
        assert_eq!(&out[..11], b"hellO, W!!!");
        assert_eq!(buffers.copy_to(11, &mut out), 0);
        assert_eq!(buffers.copy_to(usize::MAX, &mut out), 0);
    }

    #[test]
    fn pieces_are_counted() {
        let mut bytes = vec![0u8; MOST_PIECES + 1];
        let mut buffers = Buffers::new();
        let mut taken = 0;
        for piece in bytes.chunks_mut(1) {
            taken += usize::from(buffers.push(VolatileSlice::from(piece)));
        }
        assert_eq!(taken, MOST_PIECES);
    }
}
