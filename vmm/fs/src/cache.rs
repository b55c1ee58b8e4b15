//! What the guest may remember, and for how long.
//!
//! | where | names and attributes | contents |
//! |---|---|---|
//! | `<container>/rootfs/…` | an hour, missing names too: only the guest changes it | kept across opens |
//! | `<container>/live/…` | names 0 s, attributes 1 s | as below |
//! | everything else (`<container>/mounts/…`) | 1 s, symlinks' names 0 s | kept across opens if size and times are as at the last open |
//!
//! Below `live` are volumes in which the host mounts and unmounts while the pod runs: such a mount is seen at once, and one that no
//! process uses is not held, which would make its unmounting on the host fail (a guest forgets what it may not remember).
//!
//! A ConfigMap or Secret changes by swapping the symlink `..data`: with 0 s for symlinks it is seen at once. Besides, AUTO_INVAL_DATA
//! makes the guest drop cached contents whenever it sees another size or modification time.

use std::time::Duration;

use crate::sys::node::Statx;

/// Names and attributes of a container's own root.
const ROOTFS: Duration = Duration::from_secs(3600);
/// Names and attributes of volumes.
const VOLUME: Duration = Duration::from_secs(1);

/// The policy of a subtree, decided by the first two names below the share's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The share's root.
    Share,
    /// A container's directory.
    Container,
    /// A container's root file system and all below it.
    Rootfs,
    /// A volume that the host mounts in.
    Live,
    /// Everything else.
    Volume,
}

impl Policy {
    /// The policy of `name` in a directory with this policy.
    pub fn below(self, name: &[u8]) -> Self {
        match (self, name) {
            (Self::Share, _) => Self::Container,
            (Self::Container, b"rootfs") => Self::Rootfs,
            (Self::Container, b"live") | (Self::Live, _) => Self::Live,
            (Self::Container | Self::Volume, _) => Self::Volume,
            (Self::Rootfs, _) => Self::Rootfs,
        }
    }

    /// How long the guest may take a name in a directory with this policy for what it was; `kind` is the entry's S_IFMT.
    pub fn entry(self, kind: u32) -> Duration {
        match self {
            Self::Rootfs => ROOTFS,
            // What the shim, or the host, adds and takes away while the pod runs.
            Self::Share | Self::Container | Self::Live => Duration::ZERO,
            Self::Volume if kind == libc::S_IFLNK => Duration::ZERO,
            Self::Volume => VOLUME,
        }
    }

    /// How long the guest may take a name for missing.
    pub fn missing(self) -> Duration {
        match self {
            Self::Rootfs => ROOTFS,
            Self::Share | Self::Container | Self::Live | Self::Volume => Duration::ZERO,
        }
    }

    /// How long the guest may keep attributes.
    pub fn attributes(self) -> Duration {
        match self {
            Self::Rootfs => ROOTFS,
            Self::Share | Self::Container | Self::Live | Self::Volume => VOLUME,
        }
    }
}

/// What a file's contents were like at an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
}

impl Stamp {
    /// The stamp in `stat`.
    pub fn of(stat: &Statx) -> Self {
        Self {
            size: stat.stx_size,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_follows_the_layout() {
        let container = Policy::Share.below(b"c1");
        assert_eq!(container.below(b"rootfs").below(b"mounts").below(b"etc"), Policy::Rootfs);
        assert_eq!(container.below(b"mounts").below(b"0").below(b"rootfs"), Policy::Volume);
        assert_eq!(Policy::Share.below(b"rootfs"), Policy::Container);
        assert_eq!(container.below(b"live").below(b"0").below(b"mounts").entry(libc::S_IFDIR), Duration::ZERO);
        assert_eq!(Policy::Volume.entry(libc::S_IFLNK), Duration::ZERO);
        assert_eq!(Policy::Volume.missing(), Duration::ZERO);
    }
}
