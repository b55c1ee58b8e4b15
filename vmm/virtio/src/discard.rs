//! Gives guest memory that the guest doesn't use back to the host. What it held is gone; touched again, it is zero.

use std::io;

use husk_backend::hole;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::device::GuestMemory;

/// Length of a page in bytes.
const PAGE: u64 = 4096;

/// Gives back the whole pages of a range, all of which must be guest memory.
pub(crate) fn discard(memory: &GuestMemory, address: u64, len: u64) -> io::Result<()> {
    let end = address.checked_add(len).ok_or(io::ErrorKind::InvalidInput)? / PAGE * PAGE;
    let mut at = address.next_multiple_of(PAGE);
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or(io::ErrorKind::InvalidInput)?;
        let file = region.file_offset().ok_or(io::ErrorKind::Unsupported)?;
        let offset = at - region.start_addr().raw_value();
        let piece = (end - at).min(region.len() - offset);
        hole::punch(file.file(), file.start() + offset, piece)?;
        at += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::testing::{blocks, memory_in_files};

    #[test]
    fn whole_pages_go_back_and_no_others() {
        let memory = memory_in_files(&[(0, 1 << 20), (1 << 20, 1 << 20)]);
        memory.write_slice(&[1; 2 << 20], GuestAddress(0)).unwrap();
        discard(&memory, (1 << 20) - 5000, 10_000).unwrap();
        assert_eq!(blocks(&memory), [(1 << 20) - 4096, (1 << 20) - 4096]);
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([read((1 << 20) - 4097), read((1 << 20) - 1), read(1 << 20), read((1 << 20) + 4096)], [1, 0, 0, 1]);
        discard(&memory, 100, 4000).unwrap();
        assert_eq!(read(100), 1);
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let memory = memory_in_files(&[(0, 1 << 20)]);
        assert!(discard(&memory, 1 << 20, 4096).is_err());
        assert!(discard(&memory, u64::MAX - 4096, 8192).is_err());
        assert!(discard(&memory, 0, 2 << 20).is_err());
    }
}
