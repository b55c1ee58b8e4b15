//! Guest memory and its file. The file is as long as all regions together, one behind the other, and sparse: what is a hole there is
//! zero in the guest.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

/// Bytes looked at and moved at a time.
const BLOCK: usize = 64 << 10;

/// What a memory file keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySum {
    /// Bytes that are no hole.
    pub len: u64,
    /// CRC-32 of them, in order.
    pub checksum: u32,
}

/// Why memory could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The snapshot's file.
    #[error("Could not {doing} the memory file")]
    File {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The guest's memory.
    #[error("Could not {doing} guest memory at {address:#x}")]
    Guest {
        /// What was being done.
        doing: &'static str,
        /// Where.
        address: u64,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
    /// The file's length.
    #[error("The memory file has {has} bytes where the machine has {wants}")]
    Length {
        /// Bytes of the file.
        has: u64,
        /// Bytes of guest memory.
        wants: u64,
    },
    /// Its contents.
    #[error("The memory file is damaged: {0}")]
    Damaged(&'static str),
}

fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> MemoryError {
    move |source| MemoryError::File { doing, source: source.into() }
}

/// Bytes of all regions.
fn total(memory: &GuestMemoryMmap<()>) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// Writes what is not zero into an empty file. The vCPUs stand still.
pub fn save(memory: &GuestMemoryMmap<()>, file: &File) -> Result<MemorySum, MemoryError> {
    file.set_len(total(memory)).map_err(failed("size"))?;
    let mut sum = Sum::default();
    let mut block = vec![0; BLOCK];
    let mut base = 0;
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        for part in parts(region)? {
            for offset in part.clone().step_by(BLOCK) {
                let block = &mut block[..BLOCK.min((part.end - offset) as usize)];
                let address = start + offset;
                memory.read_slice(block, GuestAddress(address)).map_err(|source| MemoryError::Guest {
                    doing: "read",
                    address,
                    source,
                })?;
                if block.iter().any(|byte| *byte != 0) {
                    file.write_all_at(block, base + offset).map_err(failed("write"))?;
                    sum.add(block);
                }
            }
        }
        base += region.len();
    }
    file.sync_data().map_err(failed("write"))?;
    Ok(sum.done())
}

/// The parts of a region that the host holds pages for; all of it where that can't be told.
fn parts(region: &impl GuestMemoryRegion) -> Result<Vec<Range<u64>>, MemoryError> {
    match region.file_offset() {
        Some(file) if file.start() == 0 => data(file.file(), region.len(), BLOCK as u64),
        _ => Ok(std::iter::once(0..region.len()).collect()),
    }
}

/// Where the file has data within its first `len` bytes, widened to multiples of `grain`.
fn data(file: &File, len: u64, grain: u64) -> Result<Vec<Range<u64>>, MemoryError> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(failed("find data in")(error)),
        };
        if start >= len {
            break;
        }
        let end = lseek(file, start as i64, Whence::SeekHole).map_err(failed("find holes in"))? as u64;
        let wide = start / grain * grain..end.next_multiple_of(grain).min(len);
        at = wide.end.max(at + 1);
        match parts.last_mut() {
            Some(last) if last.end >= wide.start => last.end = wide.end,
            _ => parts.push(wide),
        }
    }
    Ok(parts)
}

/// Where the machine's memory is not zero: guest-physical ranges in order, from the holes of the memory file.
pub fn filled(memory: &GuestMemoryMmap<()>, file: &File) -> Result<Vec<Range<u64>>, MemoryError> {
    let wants = total(memory);
    let has = file.metadata().map_err(failed("size"))?.len();
    if has != wants {
        return Err(MemoryError::Length { has, wants });
    }
    let parts = data(file, wants, BLOCK as u64)?;
    let mut ranges = Vec::new();
    let mut base = 0;
    for region in memory.iter() {
        let (start, len) = (region.start_addr().raw_value(), region.len());
        for part in &parts {
            let (from, to) = (part.start.max(base), part.end.min(base + len));
            if from < to {
                ranges.push(start + from - base..start + to - base);
            }
        }
        base += len;
    }
    Ok(ranges)
}

/// Fills `ranges` (see [`filled`]) of memory that is still zero.
pub fn restore(memory: &GuestMemoryMmap<()>, file: &File, ranges: &[Range<u64>]) -> Result<(), MemoryError> {
    let mut base = 0;
    for region in memory.iter() {
        let (start, len) = (region.start_addr().raw_value(), region.len());
        for range in ranges.iter().filter(|range| (start..start + len).contains(&range.start)) {
            let mut source = file;
            io::Seek::seek(&mut source, io::SeekFrom::Start(base + range.start - start)).map_err(failed("read"))?;
            memory
                .read_exact_volatile_from(GuestAddress(range.start), &mut source, (range.end - range.start) as usize)
                .map_err(|source| MemoryError::Guest { doing: "fill", address: range.start, source })?;
        }
        base += len;
    }
    Ok(())
}

/// Checks a memory file against its sum. Reads all that it keeps.
pub fn verify(file: &File, expected: MemorySum) -> Result<(), MemoryError> {
    let len = file.metadata().map_err(failed("size"))?.len();
    let mut sum = Sum::default();
    let mut block = vec![0; BLOCK];
    for part in data(file, len, BLOCK as u64)? {
        for offset in part.clone().step_by(BLOCK) {
            let block = &mut block[..BLOCK.min((part.end - offset) as usize)];
            file.read_exact_at(block, offset).map_err(failed("read"))?;
            if block.iter().any(|byte| *byte != 0) {
                sum.add(block);
            }
        }
    }
    match sum.done() {
        found if found == expected => Ok(()),
        found if found.len != expected.len => Err(MemoryError::Damaged("something is missing or too much")),
        _ => Err(MemoryError::Damaged("its checksum is another")),
    }
}

#[derive(Default)]
struct Sum {
    len: u64,
    hasher: crc32fast::Hasher,
}

impl Sum {
    fn add(&mut self, block: &[u8]) {
        self.len += block.len() as u64;
        self.hasher.update(block);
    }

    fn done(self) -> MemorySum {
        MemorySum { len: self.len, checksum: self.hasher.finalize() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const HIGH: u64 = 1 << 32;

    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20), (GuestAddress(HIGH), 2 << 20)]).unwrap()
    }

    fn saved() -> (File, MemorySum) {
        let memory = memory();
        memory.write_slice(&[1; 5000], GuestAddress(MIB)).unwrap();
        memory.write_slice(&[2; 10], GuestAddress(4 * MIB - 10)).unwrap();
        memory.write_slice(&[3; 10], GuestAddress(HIGH + MIB)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let sum = save(&memory, &file).unwrap();
        (file, sum)
    }

    #[test]
    fn what_was_saved_comes_back_and_the_rest_stays_untouched() {
        let (file, sum) = saved();
        assert_eq!(file.metadata().unwrap().len(), 6 * MIB);
        assert_eq!(sum.len, 3 * BLOCK as u64);
        verify(&file, sum).unwrap();
        let memory = memory();
        let ranges = filled(&memory, &file).unwrap();
        let block = BLOCK as u64;
        assert_eq!(ranges, [MIB..MIB + block, 4 * MIB - block..4 * MIB, HIGH + MIB..HIGH + MIB + block]);
        restore(&memory, &file, &ranges).unwrap();
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([read(MIB), read(MIB + 4999), read(MIB + 5000)], [1, 1, 0]);
        assert_eq!([read(4 * MIB - 11), read(4 * MIB - 10), read(HIGH + MIB + 9)], [0, 2, 3]);
    }

    #[test]
    fn damage_is_noticed() {
        let (file, sum) = saved();
        file.write_all_at(&[9], MIB + 3).unwrap();
        assert!(matches!(verify(&file, sum), Err(MemoryError::Damaged(_))));
        let (file, sum) = saved();
        file.write_all_at(&[9], 3 * MIB).unwrap();
        assert!(matches!(verify(&file, sum), Err(MemoryError::Damaged(_))));
        let (file, sum) = saved();
        file.set_len(4 * MIB).unwrap();
        assert!(matches!(verify(&file, sum), Err(MemoryError::Damaged(_))));
        assert!(matches!(filled(&memory(), &file), Err(MemoryError::Length { .. })));
    }
}
