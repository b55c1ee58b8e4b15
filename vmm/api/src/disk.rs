//! Hand-over of disks' files: one message on a SOCK_SEQPACKET pair for each, with the open file as SCM_RIGHTS. It is sent before the
//! AttachDisk call that names it by the same number.
#![forbid(unsafe_code)]

/// Length of a message in bytes.
pub const LEN: usize = 8;

/// The message of a disk's file.
pub fn encode(number: u64) -> [u8; LEN] {
    number.to_le_bytes()
}

/// The number in a message; nothing if it is none.
pub fn decode(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_what_it_encodes_and_nothing_else() {
        assert_eq!(decode(&encode(u64::MAX - 7)), Some(u64::MAX - 7));
        assert_eq!(decode(&[0; 7]), None);
        assert_eq!(decode(&[0; 9]), None);
    }
}
