//! The change of root: into the container's file system, and out of the agent's.
//!
//! The container's root becomes the process's root before anything is mounted in it, so no path of the image can mean a file of
//! the agent's. The agent's tree stays reachable by one descriptor until [`Root::leave_old`].

use std::{
    ffi::CString,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
    unistd::{chdir, chroot, fchdir, pivot_root},
};

use crate::{
    CellError,
    fault::{Doing, Fault, Step},
    sys::{self, MountAttr},
};

/// The container's root and, for a while, the agent's.
pub(crate) struct Root {
    /// The container's.
    pub(crate) root: OwnedFd,
    /// The agent's, as it was copied into our mount namespace.
    pub(crate) old: OwnedFd,
    /// Mounts of the agent to be detached one by one, where its root itself can't be.
    leftovers: Vec<PathBuf>,
}

/// A detached copy of the container's root file system, taken where the agent sees it.
pub(crate) fn open_rootfs(path: &Path) -> Step<OwnedFd> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Fault::new("root.path has a NUL byte"))?;
    // Recursive: the mounts below it are part of it.
    sys::clone_tree(None, &name, true).doing(|| format!("open the root file system {}", path.display()))
}

/// Makes `tree` our root. We must be in a new mount namespace.
pub(crate) fn enter(tree: OwnedFd) -> Step<Root> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).doing(|| "make all mounts private")?;
    let alone = MountAttr { propagation: MsFlags::MS_PRIVATE.bits(), ..MountAttr::default() };
    sys::set_attributes(&tree, alone, true).doing(|| "make the root file system private")?;

    let old = open_directory("/").doing(|| "open the agent's root")?;
    let leftovers = mount_points();
    sys::attach(&tree, &old).doing(|| "attach the root file system")?;
    fchdir(&tree).doing(|| "enter the root file system")?;
    let leftovers = match pivot_root(".", ".") {
        // The agent's root is stacked on ours now, and goes as a whole.
        Ok(()) => Vec::new(),
        // It is the kernel's own rootfs (initramfs), which can't be moved: ours lies on top of it, and what is mounted in it goes
        // piece by piece.
        Err(Errno::EINVAL) => {
            chroot(".").doing(|| "change the root")?;
            leftovers
        }
        Err(errno) => return Err(errno).doing(|| "pivot the root"),
    };
    Ok(Root { root: tree, old, leftovers })
}

impl Root {
    /// A file of the agent's, for as long as its root is there.
    pub(crate) fn open_old(&self, path: &str) -> nix::Result<OwnedFd> {
        openat(&self.old, path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// Detaches the agent's mounts from our namespace, for good; returns our root.
    pub(crate) fn leave_old(self) -> Step<OwnedFd> {
        fchdir(&self.old).doing(|| "enter the agent's root")?;
        if self.leftovers.is_empty() {
            umount2(".", MntFlags::MNT_DETACH).doing(|| "detach the agent's root")?;
        }
        for path in &self.leftovers {
            // Gone already with one above it, or locked in a user namespace: ours covers it anyway.
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        chdir("/").doing(|| "enter the root")?;
        Ok(self.root)
    }
}

/// Moves the calling process off the kernel's rootfs (initramfs): call it once at boot, in the only thread, before anything is
/// mounted. Then containers can leave the agent's root altogether; without it their namespaces keep it, covered.
pub fn prepare_root() -> Result<(), CellError> {
    let tree = sys::clone_tree(None, c"/", true).map_err(CellError::system("clone the root"))?;
    let root = open_directory("/").map_err(CellError::system("open /"))?;
    sys::attach(&tree, &root).map_err(CellError::system("stack the root"))?;
    fchdir(&tree).map_err(CellError::system("enter the new root"))?;
    chroot(".").map_err(CellError::system("change the root"))
}

fn open_directory(path: &str) -> nix::Result<OwnedFd> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// The mount points of our namespace, relative to the root, outer ones first (proc_pid_mountinfo(5)).
fn mount_points() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4)?.strip_prefix('/'))
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(path.replace("\\040", " ")))
        .collect()
}
