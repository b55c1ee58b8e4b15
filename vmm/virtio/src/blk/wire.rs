//! What a driver writes into a request (virtio 1.2, 5.2.6): its header, and the ranges of discard and write zeroes.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR;

/// Length of the header in bytes.
pub(super) const HEADER_LEN: usize = 16;
/// Length of a range in bytes.
pub(super) const RANGE_LEN: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Nothing that this device offers.
    Unknown,
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Where reads and writes begin.
    pub(super) sector: u64,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let (kind, sector) = (le32(bytes, 0), le64(bytes, 8));
        let kind = match kind {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        };
        Self { kind, sector }
    }
}

/// A range of sectors (struct virtio_blk_discard_write_zeroes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    /// The storage may be given back; only with write zeroes.
    pub(super) unmap: bool,
    /// Flags that mean nothing.
    pub(super) reserved: bool,
}

impl Range {
    pub(super) fn parse(bytes: &[u8; RANGE_LEN]) -> Self {
        let flags = le32(bytes, 12);
        Self {
            sector: le64(bytes, 0),
            sectors: le32(bytes, 8),
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            reserved: flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        }
    }
}

/// Where `len` bytes from `sector` on begin, in bytes, if they are whole sectors of a disk of `capacity` sectors.
pub(super) fn place(sector: u64, len: u64, capacity: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    // No sooner: a sector beyond the end may be beyond 64 bits, too.
    (len.is_multiple_of(SECTOR) && end <= capacity).then(|| sector * SECTOR)
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn headers_and_ranges() {
        let mut bytes = [0; 16];
        bytes[0] = 13;
        bytes[8..].copy_from_slice(&0x0102_0304_0506_0708u64.to_le_bytes());
        assert_eq!(Header::parse(&bytes), Header { kind: Kind::WriteZeroes, sector: 0x0102_0304_0506_0708 });
        bytes[3] = 1;
        assert_eq!(Header::parse(&bytes).kind, Kind::Unknown);
        let range = Range::parse(&[9, 0, 0, 0, 0, 0, 0, 0x80, 5, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(range, Range { sector: 9 | 0x80 << 56, sectors: 5, unmap: true, reserved: true });
    }

    #[test]
    fn the_disk_has_an_end() {
        assert_eq!(place(0, 0, 0), Some(0));
        assert_eq!(place(7, 512, 8), Some(7 * 512));
        for (sector, len) in [(8, 512), (7, 1024), (0, 513), (u64::MAX, 512), (1 << 55, 512), (9, 0)] {
            assert_eq!(place(sector, len, 8), None, "{sector} {len}");
        }
    }

    proptest! {
        #[test]
        fn no_range_is_beyond_the_end(sector: u64, len: u64, capacity in 0..1u64 << 54) {
            if let Some(start) = place(sector, len, capacity) {
                prop_assert!(start.checked_add(len).unwrap() <= capacity * SECTOR);
            }
        }
    }
}
