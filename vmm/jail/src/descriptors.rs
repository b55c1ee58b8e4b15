//! Closes what the process does not need of the descriptors that it inherited.

use std::io::Error;
use std::os::fd::RawFd;

use crate::{JailError, failed};

/// Closes every descriptor but 0, 1, 2 and those of `keep` (close_range(2)).
pub(crate) fn close_others(keep: &[RawFd]) -> Result<(), JailError> {
    for (first, last) in gaps(keep) {
        // SAFETY: this closes by number what nobody keeps an owner of: the process has one thread and all that it owns is in `keep`.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if result != 0 {
            return Err(failed("close inherited descriptors")(Error::last_os_error()));
        }
    }
    Ok(())
}

/// The ranges of numbers from 3 on that are not kept, both ends included.
fn gaps(keep: &[RawFd]) -> Vec<(u32, u32)> {
    let mut kept: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd >= 3).collect();
    kept.sort_unstable();
    let mut gaps = Vec::new();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            gaps.push((first, fd - 1));
        }
        first = first.max(fd + 1);
    }
    gaps.push((first, u32::MAX));
    gaps
}

#[cfg(test)]
mod tests {
    use super::gaps;

    #[test]
    fn finds_the_gaps() {
        assert_eq!(gaps(&[]), [(3, u32::MAX)]);
        assert_eq!(gaps(&[3, 4]), [(5, u32::MAX)]);
        assert_eq!(gaps(&[9, 5, 0, 9, -1]), [(3, 4), (6, 8), (10, u32::MAX)]);
    }
}
