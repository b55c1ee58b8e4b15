//! Parts of the machine that the guest sees and that are not virtio.

pub(crate) mod hotplug;
pub(crate) mod power;
pub(crate) mod pvpanic;
pub(crate) mod serial;
