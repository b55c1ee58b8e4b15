//! The new root of a jailed process's own mount namespace.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, fchdir, pivot_root};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    move_mount,
};

use crate::{JailError, failed};

/// An empty tmpfs that has no room for anything and is read-only.
pub(crate) fn empty() -> Result<(), JailError> {
    set_propagation(MsFlags::MS_PRIVATE)?;
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("open a tmpfs"))?;
    // Its root takes the one inode.
    for (key, value) in [("size", "4k"), ("nr_inodes", "1"), ("mode", "0555")] {
        fsconfig_set_string(&tmpfs, key, value).map_err(failed("configure the empty root"))?;
    }
    fsconfig_create(&tmpfs).map_err(failed("make the empty root"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount the empty root"))?;
    // On top of the present root, which needs no directory to exist.
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("attach the empty root"))?;
    fchdir(&root).map_err(failed("go to the empty root"))?;
    pivot()
}

/// The share directory. Mounts that are made below it outside appear here; nothing goes the other way.
pub(crate) fn share(directory: &Path) -> Result<(), JailError> {
    set_propagation(MsFlags::MS_SLAVE)?;
    chdir(directory).map_err(failed("go to the share directory"))?;
    pivot()?;
    // The guest must not put names where the shim looks for mount points: a link there would lead it astray.
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).map_err(failed("make the share's root read-only"))
}

fn set_propagation(how: MsFlags) -> Result<(), JailError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>)
        .map_err(failed("stop mounts from leaving the namespace"))
}

/// Makes the working directory the root and lets go of the old one, which pivot_root(2) then has on top of it.
fn pivot() -> Result<(), JailError> {
    pivot_root(".", ".").map_err(failed("change the root (it must be a mount point)"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("let go of the old root"))?;
    chdir("/").map_err(failed("go to the new root"))
}
