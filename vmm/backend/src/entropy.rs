//! Random bytes from the kernel, by getrandom(2): no file, no state.

use std::io;

/// The kernel's random number generator.
#[derive(Debug, Default)]
pub struct Entropy;

impl Entropy {
    /// Fills `data`.
    pub fn fill(&self, data: &mut [u8]) -> io::Result<()> {
        // Up to 256 bytes the kernel gives all of them at once (getrandom(2)).
        for chunk in data.chunks_mut(256) {
            // SAFETY: the pointer and length are those of a mutable slice.
            let len = unsafe { libc::getrandom(chunk.as_mut_ptr().cast(), chunk.len(), 0) };
            if usize::try_from(len) != Ok(chunk.len()) {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_all_of_it() {
        let mut data = [0; 4096];
        Entropy.fill(&mut data).unwrap();
        assert!(data.chunks(16).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
    }
}
