//! Holes in the files of guest memory: what a file held there goes back to the host, in every process that maps it, and reads as zero.

use std::fs::File;
use std::io;

use nix::fcntl::{FallocateFlags, fallocate};

/// Makes a hole of `len` bytes at `offset` (fallocate(2), FALLOC_FL_PUNCH_HOLE). Pages that are only partly in it stay, with zeroes.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, number(offset)?, number(len)?)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_hole_is_zero_and_takes_no_room() {
        let file = File::from(memfd_create(c"hole", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&[7; 3 * 4096], 0).unwrap();
        let before = file.metadata().unwrap();
        punch(&file, 4096, 4096).unwrap();
        let after = file.metadata().unwrap();
        assert_eq!((after.blocks(), after.len()), (before.blocks() - 8, before.len()));
        let mut bytes = [1; 3 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 7) && bytes[4096..8192].iter().all(|byte| *byte == 0));
        assert!(punch(&file, u64::MAX, 1).is_err());
    }
}
