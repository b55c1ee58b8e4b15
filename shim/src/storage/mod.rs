//! What of the host's files goes into the pod's share directory, and how: root file systems and volumes, as mounts in the
//! shim's own mount namespace. `disk` is what goes into the machine as a disk instead.

pub(crate) mod disk;
pub(crate) mod idmap;
pub(crate) mod rootfs;
pub(crate) mod source;
#[cfg(test)]
mod tests;
pub(crate) mod volume;

use std::path::{Path, PathBuf};

pub(crate) use idmap::IdMap;
pub(crate) use rootfs::{RootfsMount, make_targets, mount_rootfs};
pub(crate) use volume::{BindOptions, Propagation, bind, bind_mapped, unmount};

/// Why a mount was not made or not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// A mount.
    #[error("cannot mount {source_name} on {target}: {step}", target = target.display())]
    Mount {
        /// What was to be mounted: a type and source, or a path.
        source_name: String,
        /// Where.
        target: PathBuf,
        /// What failed.
        step: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A disk for the guest.
    #[error("cannot give {name} to the guest as a disk: {step}")]
    Disk {
        /// A path or a device.
        name: String,
        /// What failed.
        step: &'static str,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The removal of a mount.
    #[error("cannot unmount {target}", target = target.display())]
    Unmount {
        /// Of what.
        target: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

/// Names a step in the mounting of `source_name` on `target`, for its error.
fn step<E: Into<std::io::Error>>(
    source_name: &str,
    target: &Path,
    step: impl Into<String>,
) -> impl FnOnce(E) -> StorageError {
    let (source_name, target, step) = (source_name.to_owned(), target.to_owned(), step.into());
    move |cause| StorageError::Mount { source_name, target, step, cause: cause.into() }
}
