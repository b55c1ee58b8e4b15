//! The memory device (virtio 1.3, 5.15): a region of guest memory of which the host asks the guest to plug or unplug so much. `blocks`
//! keeps account, `wire` understands the driver's requests.

mod blocks;
mod device;
mod wire;

#[cfg(test)]
mod tests;

pub use device::{Mem, Resizer};

/// Bytes of a block, the smallest part that is plugged or unplugged: a huge page, as the guest's driver counts too.
pub const BLOCK: u64 = 2 << 20;
