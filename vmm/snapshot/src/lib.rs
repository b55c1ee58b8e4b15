//! A stopped machine on disk: a state file (what is not memory) and a sparse memory file. `wire` is the state file's format,
//! `memory` moves guest memory to and from its file. What the state is made of belongs to the machine, see husk-vmm.
//!
//! The two files are one snapshot: the state file's header holds the length and the checksum of what the memory file keeps.
#![forbid(unsafe_code)]

pub mod memory;
pub mod wire;

use std::fs::File;
use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use memory::{MemoryError, MemorySum};
pub use wire::FormatError;

/// Longest state in bytes: far more than a machine of 64 vCPUs has.
pub const STATE_MAX: u64 = 4 << 20;

/// Why a state file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file.
    #[error("Could not {doing} the state file")]
    File {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A state that can't be written down.
    #[error("Could not encode the state")]
    Encode(#[source] postcard::Error),
}

/// Writes a state file.
pub fn write_state(file: &mut File, state: &impl Serialize, memory: MemorySum) -> Result<(), StateError> {
    let body = postcard::to_stdvec(state).map_err(StateError::Encode)?;
    let failed = |source| StateError::File { doing: "write", source };
    file.write_all(&wire::encode(&body, memory)).map_err(failed)?;
    file.sync_data().map_err(failed)
}

/// Reads a state file: the state, and what the memory file must hold.
pub fn read_state<T: DeserializeOwned>(file: &mut File) -> Result<(T, MemorySum), StateError> {
    let mut bytes = Vec::new();
    let limit = STATE_MAX + wire::HEADER_LEN as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(|source| StateError::File { doing: "read", source })?;
    let (body, memory) = wire::decode(&bytes)?;
    let state = postcard::from_bytes(body).map_err(|_| FormatError::Body)?;
    Ok((state, memory))
}
