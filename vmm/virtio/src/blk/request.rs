//! One request: checked against the disk, done, answered. Whatever is wrong with it becomes its status, and nothing else.

use std::io;

use husk_backend::disk::Disk;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::wire::{HEADER_LEN, Header, Kind, RANGE_LEN, Range, place};
use super::{ID_LEN, MAX_DATA, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS, SECTOR};
use crate::chain::{Buffers, Chain, ChainError};
use crate::device::GuestMemory;

/// Length of the status in bytes.
const STATUS_LEN: usize = 1;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// The driver breaks a rule.
    #[error("the request {0}")]
    Rule(&'static str),
    /// The device does not do this.
    #[error("the device can't do it")]
    Unsupported,
    /// Its buffers.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The host's storage.
    #[error("the host's storage failed: {0}")]
    Storage(io::Error),
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported { Self::Unsupported } else { Self::Storage(error) }
    }
}

impl RequestError {
    fn status(&self) -> u8 {
        // Numbers of a byte.
        match self {
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// A disk and its name.
#[derive(Debug)]
pub(super) struct Medium {
    pub(super) disk: Disk,
    pub(super) id: [u8; ID_LEN],
}

impl Medium {
    /// Sectors that the guest may use.
    pub(super) fn capacity(&self) -> u64 {
        self.disk.len() / SECTOR
    }

    /// Does a request and writes its status; the number of bytes written to the driver's buffers.
    pub(super) fn serve(&self, memory: &GuestMemory, chain: &Chain) -> u32 {
        // The last writable byte is the status, whatever descriptors it is spread over (virtio 1.2, 2.7.4).
        let Some(room) = chain.writable().len().checked_sub(STATUS_LEN) else {
            tracing::debug!("a request without room for its status");
            return 0;
        };
        let (status, written) = match self.attempt(memory, chain, room) {
            Ok(written) => (VIRTIO_BLK_S_OK as u8, written),
            Err(error) => {
                tracing::debug!(%error, "a request to a disk failed");
                (error.status(), 0)
            }
        };
        // The buffers were checked with the chain.
        let _ = chain.writable().write_at(memory, room, &[status]);
        u32::try_from(written + STATUS_LEN).unwrap_or(u32::MAX)
    }

    /// Does it; the number of bytes read from the disk into the driver's buffers.
    fn attempt(&self, memory: &GuestMemory, chain: &Chain, room: usize) -> Result<usize, RequestError> {
        let mut header = [0; HEADER_LEN];
        chain.readable().read_at(memory, 0, &mut header)?;
        let Header { kind, sector } = Header::parse(&header);
        let sent = chain.readable().len() - HEADER_LEN;
        if matches!(kind, Kind::Write | Kind::Discard | Kind::WriteZeroes) && self.disk.is_read_only() {
            return Err(RequestError::Rule("writes to a read-only disk"));
        }
        match kind {
            Kind::Read => {
                let start = self.start(sector, room)?;
                transfer(memory, chain.writable(), 0, room, |slices, done| self.disk.read_at(slices, start + done))?;
                Ok(room)
            }
            Kind::Write => {
                let start = self.start(sector, sent)?;
                let readable = chain.readable();
                transfer(memory, readable, HEADER_LEN, sent, |slices, done| self.disk.write_at(slices, start + done))?;
                Ok(0)
            }
            Kind::Flush => {
                self.disk.flush()?;
                Ok(0)
            }
            Kind::GetId => {
                let len = room.min(ID_LEN);
                chain.writable().write_at(memory, 0, &self.id[..len])?;
                Ok(len)
            }
            Kind::Discard | Kind::WriteZeroes => {
                let most = if kind == Kind::Discard { MAX_DISCARD_SECTORS } else { MAX_ZEROES_SECTORS };
                for range in ranges(memory, chain.readable(), sent)? {
                    let (start, len) = self.range(&range, most)?;
                    match kind {
                        // A driver must not set it (virtio 1.2, 5.2.6.1).
                        Kind::Discard if range.unmap => return Err(RequestError::Unsupported),
                        Kind::Discard => self.disk.discard(start, len)?,
                        _ => self.disk.write_zeroes(start, len, range.unmap)?,
                    }
                }
                Ok(0)
            }
            Kind::Unknown => Err(RequestError::Unsupported),
        }
    }

    /// Where a transfer begins, in bytes.
    fn start(&self, sector: u64, len: usize) -> Result<u64, RequestError> {
        if len > MAX_DATA {
            return Err(RequestError::Rule("moves more than seg_max segments of size_max bytes"));
        }
        place(sector, len as u64, self.capacity()).ok_or(RequestError::Rule("is not within the disk"))
    }

    /// Where a range begins and its length, in bytes.
    fn range(&self, range: &Range, most: u32) -> Result<(u64, u64), RequestError> {
        if range.reserved {
            return Err(RequestError::Unsupported);
        }
        if range.sectors > most {
            return Err(RequestError::Rule("has a range longer than the device's limit"));
        }
        let len = u64::from(range.sectors) * SECTOR;
        let start = place(range.sector, len, self.capacity());
        Ok((start.ok_or(RequestError::Rule("has a range beyond the disk's end"))?, len))
    }
}

/// Moves `len` bytes of the buffers from `offset` on by calls that may each do a part.
fn transfer(
    memory: &GuestMemory,
    buffers: &Buffers,
    offset: usize,
    len: usize,
    mut each: impl FnMut(&[vm_memory::VolatileSlice<'_>], u64) -> io::Result<usize>,
) -> Result<(), RequestError> {
    let mut done = 0;
    while done < len {
        let slices = buffers.slices(memory, offset + done, len - done)?;
        match each(&slices, done as u64)? {
            // The file became shorter than it was.
            0 => return Err(RequestError::Storage(io::ErrorKind::UnexpectedEof.into())),
            moved => done += moved,
        }
    }
    Ok(())
}

/// All ranges, read before the first is acted upon.
fn ranges(memory: &GuestMemory, readable: &Buffers, sent: usize) -> Result<Vec<Range>, RequestError> {
    if sent == 0 || !sent.is_multiple_of(RANGE_LEN) || sent / RANGE_LEN > MAX_RANGES as usize {
        return Err(RequestError::Rule("has no ranges, half of one, or more than the device's limit"));
    }
    (0..sent / RANGE_LEN)
        .map(|index| {
            let mut bytes = [0; RANGE_LEN];
            readable.read_at(memory, HEADER_LEN + index * RANGE_LEN, &mut bytes)?;
            Ok(Range::parse(&bytes))
        })
        .collect()
}
