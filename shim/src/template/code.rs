//! Where the guest kernel's code lies: what no kernel ever frees, nor has a device read or write, and so can be one and the same for all pods
//! from a template. Found in the kernel's ELF file (System V ABI, chapters 4 and 5), whose every number is checked.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is mapped is mapped by huge pages.
const HUGE_PAGE: u64 = 2 << 20;

/// Most headers of segments or sections; Linux has about 30.
const MAX_HEADERS: u16 = 256;

/// Longest table of sections' names in bytes.
const MAX_NAMES: u64 = 64 << 10;

/// Length of the file's header, a segment's and a section's.
const FILE: usize = 64;
const SEGMENT: usize = 56;
const SECTION: usize = 64;

/// ELF's magic number, 64 bits, little-endian.
const IDENT: [u8; 6] = [0x7F, b'E', b'L', b'F', 2, 1];

/// PT_LOAD, and the flags PF_X and PF_W.
const LOAD: u32 = 1;
const EXECUTABLE: u32 = 1;
const WRITABLE: u32 = 2;

/// Guest-physical addresses, multiples of 2 MiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Code {
    /// The first.
    pub(super) start: u64,
    /// The first after it.
    pub(super) end: u64,
}

impl Code {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// The whole huge pages of a kernel's section .text. (The rest of that segment holds gaps that Linux frees once it is up.) Nothing where there
/// are none, or the file is no such kernel.
pub(super) fn of_kernel(path: &Path) -> io::Result<Option<Code>> {
    let file = File::open(path)?;
    match find(&file) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        found => Ok(found?.and_then(whole_pages)),
    }
}

fn find(file: &File) -> io::Result<Option<Range<u64>>> {
    let mut header = [0; FILE];
    read(file, &mut header, 0)?;
    let (segments, sections, names) = (half(&header, 56), half(&header, 60), half(&header, 62));
    let sizes = (usize::from(half(&header, 54)), usize::from(half(&header, 58)));
    let is_kernel = header.starts_with(&IDENT) && sizes == (SEGMENT, SECTION) && names < sections;
    if !is_kernel || segments > MAX_HEADERS || sections > MAX_HEADERS {
        return Ok(None);
    }
    let sections: Vec<[u8; SECTION]> = table(file, long(&header, 40), sections)?;
    let segments: Vec<[u8; SEGMENT]> = table(file, long(&header, 32), segments)?;
    let table_of_names = &sections[usize::from(names)];
    let mut names = vec![0; long(table_of_names, 32).min(MAX_NAMES) as usize];
    read(file, &mut names, long(table_of_names, 24))?;
    let is_text = |section: &&[u8; SECTION]| {
        names.get(word(*section, 0) as usize..).is_some_and(|name| name.starts_with(b".text\0"))
    };
    let Some(text) = sections.iter().find(is_text) else { return Ok(None) };
    let (offset, len) = (long(text, 24), long(text, 32));
    let physical = segments.iter().find_map(|segment| {
        let flags = word(segment, 4);
        let (from, size) = (long(segment, 8), long(segment, 32));
        let before = offset.checked_sub(from)?;
        let is_within = before.checked_add(len)? <= size;
        let is_code = word(segment, 0) == LOAD && flags & EXECUTABLE != 0 && flags & WRITABLE == 0;
        let start = long(segment, 24).checked_add(before)?;
        (is_code && is_within).then_some(start..start.checked_add(len)?)
    });
    Ok(physical)
}

fn whole_pages(range: Range<u64>) -> Option<Code> {
    let (start, end) = (range.start.checked_next_multiple_of(HUGE_PAGE)?, range.end / HUGE_PAGE * HUGE_PAGE);
    (start < end).then_some(Code { start, end })
}

fn table<const LEN: usize>(file: &File, offset: u64, number: u16) -> io::Result<Vec<[u8; LEN]>> {
    let entry = |number: u16| {
        let mut entry = [0; LEN];
        read(file, &mut entry, offset.saturating_add(u64::from(number) * LEN as u64))?;
        Ok(entry)
    };
    (0..number).map(entry).collect()
}

/// Reads at an offset that may be beyond any file.
fn read(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    match offset.checked_add(bytes.len() as u64) {
        Some(end) if i64::try_from(end).is_ok() => file.read_exact_at(bytes, offset),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) | u32::from(half(bytes, at + 2)) << 16
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    /// A kernel with one segment of code at 16 MiB, in which .text begins at `offset` and has `len` bytes.
    fn kernel(offset: u64, len: u64, flags: u32) -> Vec<u8> {
        let mut header = [0; FILE];
        header[..6].copy_from_slice(&IDENT);
        let segments = FILE as u64;
        let sections = segments + SEGMENT as u64;
        header[32..40].copy_from_slice(&segments.to_le_bytes());
        header[40..48].copy_from_slice(&sections.to_le_bytes());
        for (at, value) in [(54, SEGMENT), (56, 1), (58, SECTION), (60, 2), (62, 0)] {
            header[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
        let mut segment = [0; SEGMENT];
        segment[..4].copy_from_slice(&LOAD.to_le_bytes());
        segment[4..8].copy_from_slice(&flags.to_le_bytes());
        for (at, value) in [(8, 2 * MIB), (24, 16 * MIB), (32, 12 * MIB)] {
            segment[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let names = b"\0.text\0";
        let section = |name: u32, offset: u64, len: u64| {
            let mut section = [0; SECTION];
            section[..4].copy_from_slice(&name.to_le_bytes());
            section[24..32].copy_from_slice(&offset.to_le_bytes());
            section[32..40].copy_from_slice(&len.to_le_bytes());
            section
        };
        let first = section(0, sections + 2 * SECTION as u64, names.len() as u64);
        [&header[..], &segment, &first, &section(1, offset, len), names].concat()
    }

    fn found(bytes: &[u8]) -> Option<(u64, u64)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(bytes, 0).unwrap();
        of_kernel(file.path()).unwrap().map(|code| (code.start, code.end))
    }

    #[test]
    fn only_whole_huge_pages_of_text_count() {
        assert_eq!(found(&kernel(2 * MIB, 10 * MIB, 5)), Some((16 * MIB, 26 * MIB)));
        assert_eq!(found(&kernel(2 * MIB + 1, 10 * MIB, 5)), Some((18 * MIB, 26 * MIB)));
        assert_eq!(found(&kernel(3 * MIB, 2 * MIB, 5)), None);
    }

    #[test]
    fn what_can_be_written_or_is_no_kernel_has_none() {
        assert_eq!(found(&kernel(2 * MIB, 10 * MIB, 7)), None);
        assert_eq!(found(&kernel(2 * MIB, 10 * MIB, 4)), None);
        assert_eq!(found(&kernel(2 * MIB, 13 * MIB, 5)), None);
        assert_eq!(found(&kernel(MIB, 10 * MIB, 5)), None);
        assert_eq!(found(&kernel(2 * MIB, u64::MAX, 5)), None);
        assert_eq!(found(b"#!/bin/sh\n"), None);
        let whole = kernel(2 * MIB, 10 * MIB, 5);
        for len in 0..whole.len() {
            assert_eq!(found(&whole[..len]), None, "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_headers_are_answered(at in 0..300usize, bytes in proptest::collection::vec(any::<u8>(), 1..9)) {
            let mut kernel = kernel(2 * MIB, 10 * MIB, 5);
            for (to, from) in kernel.iter_mut().skip(at).zip(bytes) {
                *to = from;
            }
            found(&kernel);
        }
    }
}
