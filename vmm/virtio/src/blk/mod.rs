//! The block device (virtio 1.2, 5.2): the host's file or device as the guest's disk. It is not on the event loop: each of its queues
//! is served by a thread of its own ([`worker`]), which may wait for the host's storage. `wire` understands what the driver sends.

mod device;
mod request;
mod wire;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Attached, Blk};
pub use worker::Worker;

/// Bytes of a sector, in which everything on the wire is counted (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
const MAX_QUEUES: u16 = 4;
/// Most segments of data in a request: header and status take two more descriptors of the queue.
const SEG_MAX: u32 = 254;
/// Most bytes of a segment.
const SIZE_MAX: u32 = 1 << 20;
/// Most bytes that one request moves.
const MAX_DATA: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Most segments of a discard or write zeroes request.
const MAX_RANGES: u32 = 16;
/// Most sectors of one of them: 1 GiB given back, 64 MiB made zeroes (which the host may have to write).
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const MAX_ZEROES_SECTORS: u32 = 1 << 17;
/// Length of a disk's id in bytes; shorter ones end with a NUL (virtio 1.2, 5.2.6).
const ID_LEN: usize = 20;
