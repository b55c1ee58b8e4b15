//! The first 24 bytes on the RPC connection, sent by the agent: who it is, which protocol it speaks, and the boot nonce that
//! the shim put on the kernel command line, so that a stale guest can't be mistaken for a new one.
#![forbid(unsafe_code)]

use thiserror::Error;

/// The protocol's version: shim and agent come from one build, so any difference is an error.
pub const VERSION: u32 = 1;

/// Length of an encoded hello in bytes.
pub const LEN: usize = 24;

const MAGIC: [u8; 4] = *b"HUSK";

/// What the agent says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version, see [`VERSION`].
    pub version: u32,
    /// The boot nonce of the kernel command line.
    pub nonce: [u8; 16],
}

/// Why a hello was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HelloError {
    /// The bytes are no hello at all.
    #[error("The connection did not begin with husk's hello")]
    Magic,
    /// Another protocol.
    #[error("The agent speaks protocol {0}, this shim {VERSION}: guest image and shim are not of one build")]
    Version(u32),
    /// Another boot.
    #[error("The agent's boot nonce is not the one given to this guest")]
    Nonce,
}

impl Hello {
    /// The bytes to send.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    /// Checks received bytes against the nonce that this guest was given.
    pub fn verify(bytes: &[u8; LEN], nonce: &[u8; 16]) -> Result<(), HelloError> {
        if bytes[..4] != MAGIC {
            return Err(HelloError::Magic);
        }
        let version = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if version != VERSION {
            return Err(HelloError::Version(version));
        }
        if bytes[8..] != nonce[..] {
            return Err(HelloError::Nonce);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_its_own() {
        let hello = Hello { version: VERSION, nonce: [7; 16] };
        assert_eq!(Hello::verify(&hello.encode(), &[7; 16]), Ok(()));
    }

    #[test]
    fn refuses_another_magic_version_or_nonce() {
        let hello = Hello { version: VERSION, nonce: [7; 16] };
        assert_eq!(Hello::verify(&hello.encode(), &[8; 16]), Err(HelloError::Nonce));
        assert_eq!(Hello::verify(&Hello { version: 9, ..hello }.encode(), &[7; 16]), Err(HelloError::Version(9)));
        assert_eq!(Hello::verify(&[0; LEN], &[7; 16]), Err(HelloError::Magic));
    }
}
