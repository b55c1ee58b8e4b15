//! The state file: a header of 40 bytes, then the state. Versions are in vmm/docs/snapshot.md; there is no reading of an older one, since
//! a template is made again in a second.
//!
//! | offset | length | field (little-endian) |
//! |---|---|---|
//! | 0 | 8 | `HUSKSNAP` |
//! | 8 | 4 | version |
//! | 12 | 4 | CRC-32 of the state |
//! | 16 | 8 | length of the state in bytes |
//! | 24 | 8 | bytes that the memory file keeps |
//! | 32 | 4 | CRC-32 of them, in order |
//! | 36 | 4 | CRC-32 of the header's first 36 bytes |
#![forbid(unsafe_code)]

use crate::STATE_MAX;
use crate::memory::MemorySum;

/// What a state file begins with.
const MAGIC: [u8; 8] = *b"HUSKSNAP";
/// The format's version. Any change of the machine's state is a new one.
pub const VERSION: u32 = 2;
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 40;

/// Why bytes are no state file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Too short for a header, or it begins with something else.
    #[error("It is no snapshot of husk's")]
    Magic,
    /// Another version.
    #[error("The snapshot has version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// A checksum.
    #[error("The snapshot's {0} is damaged")]
    Checksum(&'static str),
    /// The file's length.
    #[error("The snapshot's state has {has} bytes where its header says {says}")]
    Length {
        /// Bytes that are there.
        has: u64,
        /// Bytes that should be.
        says: u64,
    },
    /// The state is not what this program expects.
    #[error("The snapshot's state can't be understood")]
    Body,
}

/// A whole state file.
pub fn encode(body: &[u8], memory: MemorySum) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(memory.len.to_le_bytes());
    bytes.extend(memory.checksum.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The state in a file's bytes, and what the memory file must hold.
pub fn decode(bytes: &[u8]) -> Result<(&[u8], MemorySum), FormatError> {
    let (header, body) = bytes.split_at_checked(HEADER_LEN).ok_or(FormatError::Magic)?;
    if header[..8] != MAGIC {
        return Err(FormatError::Magic);
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    if word(36) != crc32fast::hash(&header[..36]) {
        return Err(FormatError::Checksum("header"));
    }
    if word(8) != VERSION {
        return Err(FormatError::Version(word(8)));
    }
    let (has, says) = (body.len() as u64, long(16));
    if has != says || says > STATE_MAX {
        return Err(FormatError::Length { has, says });
    }
    if word(12) != crc32fast::hash(body) {
        return Err(FormatError::Checksum("state"));
    }
    Ok((body, MemorySum { len: long(24), checksum: word(32) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SUM: MemorySum = MemorySum { len: 1 << 40, checksum: 7 };

    #[test]
    fn decodes_what_it_encodes() {
        let bytes = encode(b"state", SUM);
        assert_eq!(decode(&bytes), Ok((&b"state"[..], SUM)));
        assert_eq!(bytes.len(), HEADER_LEN + 5);
    }

    #[test]
    fn every_single_changed_or_missing_byte_is_noticed() {
        let bytes = encode(b"the state of a machine", SUM);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "{at}");
            assert!(decode(&bytes[..at]).is_err(), "{at}");
        }
        assert!(decode(&[&bytes[..], b"x"].concat()).is_err());
    }

    #[test]
    fn another_version_is_told_by_its_number() {
        let mut bytes = encode(b"", SUM);
        bytes[8..12].copy_from_slice(&9u32.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..36]).to_le_bytes();
        bytes[36..40].copy_from_slice(&sum);
        assert_eq!(decode(&bytes), Err(FormatError::Version(9)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
