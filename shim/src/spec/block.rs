//! Block devices of the host that a container gets as disks: raw block volumes.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxResources};

use super::SpecError;

/// Most block devices of a container: the machine has a slot for each.
pub(crate) const MAX_BLOCK_DEVICES: usize = 16;

/// A block device of the host that the container gets as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// In the container.
    pub(crate) path: PathBuf,
    /// The host's major number.
    pub(crate) major: i64,
    /// The host's minor number.
    pub(crate) minor: i64,
    /// What the container may do with it, of "rwm".
    pub(crate) access: String,
}

impl BlockDevice {
    /// Whether it is never written.
    pub(crate) fn read_only(&self) -> bool {
        !self.access.contains('w')
    }

    /// Whether it is this device of the spec.
    pub(super) fn is(&self, device: &LinuxDevice) -> bool {
        is_block(device) && (&self.path, self.major, self.minor) == (device.path(), device.major(), device.minor())
    }
}

/// The block devices that the container was given by a rule of their own, as raw volumes are. Those without one are the host's, with
/// which containerd fills a privileged container.
pub(super) fn asked(
    devices: &[LinuxDevice],
    resources: Option<&LinuxResources>,
) -> Result<Vec<BlockDevice>, SpecError> {
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let asked = devices.iter().filter(|device| is_block(device)).filter_map(|device| {
        let (major, minor) = (device.major(), device.minor());
        let of_it = |rule: &&LinuxDeviceCgroup| {
            of_blocks(rule) && (rule.major(), rule.minor()) == (Some(major), Some(minor)) && rule.allow()
        };
        let access = rules.iter().rfind(of_it)?.access().clone().unwrap_or_else(|| "rwm".into());
        Some(BlockDevice { path: device.path().clone(), major, minor, access })
    });
    let asked: Vec<_> = asked.collect();
    if asked.len() > MAX_BLOCK_DEVICES {
        return Err(SpecError::TooManyBlockDevices(asked.len()));
    }
    Ok(asked)
}

/// Drops rules with numbers of the host's block devices, which are others' in the guest; a container's disks get rules of their own there.
pub(super) fn drop_rules(resources: &mut LinuxResources) {
    if let Some(mut rules) = resources.devices().clone() {
        rules.retain(|rule| !(of_blocks(rule) && rule.major().is_some_and(|major| major >= 0)));
        resources.set_devices(Some(rules));
    }
}

fn is_block(device: &LinuxDevice) -> bool {
    device.typ().as_str() == "b"
}

fn of_blocks(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ().is_some_and(|kind| kind.as_str() == "b")
}
