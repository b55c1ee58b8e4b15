//! Bind mounts of files and directories of the host: open_tree(2), mount_setattr(2) and move_mount(2), Linux 5.12 and later.
//! The source is looked up once, so that what was judged is what is mounted.

use std::fs::{OpenOptions, create_dir_all};
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree};

use super::idmap::{self, Mapped};
use super::{StorageError, step};

/// Most mounts on top of one another that `unmount` takes away.
const MAX_STACKED: usize = 64;

/// Whether mounts that the host makes later below the source appear below the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// They do not.
    #[default]
    Private,
    /// They do (Kubernetes' HostToContainer).
    Slave,
}

/// How a file or directory is bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BindOptions {
    /// No write through the target.
    pub(crate) readonly: bool,
    /// None through any mount below it either.
    pub(crate) readonly_below: bool,
    /// With all mounts below the source.
    pub(crate) recursive: bool,
    /// What happens later.
    pub(crate) propagation: Propagation,
}

/// Binds `source` (a file, directory, socket or device) on `target`, which is made to fit.
pub(crate) fn bind(source: &Path, target: &Path, options: BindOptions) -> Result<(), StorageError> {
    bind_mapped(source, target, options, None)
}

/// The same with the ids of users and groups mapped.
pub(crate) fn bind_mapped(
    source: &Path,
    target: &Path,
    options: BindOptions,
    mapped: Option<&Mapped>,
) -> Result<(), StorageError> {
    let name = source.display().to_string();
    let (found, directory) = open_source(source, target)?;
    make_target(target, directory).map_err(step(&name, target, "make the target"))?;
    let place = open(target, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(step(
        &name,
        target,
        "open the target",
    ))?;
    attach(&found, &place, &name, target, options, mapped)
}

/// Binds a directory on a place that is open already; `target` names it in errors.
pub(super) fn bind_at(
    source: &Path,
    place: &impl AsFd,
    target: &Path,
    options: BindOptions,
    mapped: Option<&Mapped>,
) -> Result<(), StorageError> {
    let (found, _) = open_source(source, target)?;
    attach(&found, place, &source.display().to_string(), target, options, mapped)
}

/// Opens the source, as a mere place, and tells whether it is a directory.
fn open_source(source: &Path, target: &Path) -> Result<(OwnedFd, bool), StorageError> {
    let name = source.display().to_string();
    // Links of the host lead where its administrator put them; magic links (/proc/PID/fd) lead anywhere.
    let found = openat2(CWD, source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
        .map_err(step(&name, target, "open the source"))?;
    let mode = fstat(&found).map_err(step(&name, target, "stat the source"))?.st_mode;
    Ok((found, FileType::from_raw_mode(mode) == FileType::Directory))
}

/// Clones the mount that the source is in, from the source on, and attaches the clone.
pub(super) fn attach(
    source: &impl AsFd,
    place: &impl AsFd,
    name: &str,
    target: &Path,
    options: BindOptions,
    mapped: Option<&Mapped>,
) -> Result<(), StorageError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(source, "", flags).map_err(step(name, target, "clone the source's mount (open_tree)"))?;
    set_attributes(&tree, options).map_err(step(name, target, "set its attributes (mount_setattr)"))?;
    if let Some(mapped) = mapped {
        idmap::apply(&tree, mapped).map_err(step(name, target, "map its user ids (mount_setattr)"))?;
    }
    let both_open = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", place, "", both_open).map_err(step(name, target, "attach it (move_mount)"))
}

/// Detaches every mount on `target`. None there is success, as is no target.
pub(crate) fn unmount(target: &Path) -> Result<(), StorageError> {
    for _ in 0..MAX_STACKED {
        match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(StorageError::Unmount { target: target.to_owned(), cause: errno.into() }),
        }
    }
    let cause = Error::other(format!("more than {MAX_STACKED} mounts on one another"));
    Err(StorageError::Unmount { target: target.to_owned(), cause })
}

/// Makes a directory or an empty file, with its parents, unless it is there.
fn make_target(target: &Path, directory: bool) -> Result<(), Error> {
    if directory {
        return create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        create_dir_all(parent)?;
    }
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target);
    match made {
        Err(cause) if cause.kind() != ErrorKind::AlreadyExists => Err(cause),
        _ => Ok(()),
    }
}

/// Sets read-only and propagation on a detached tree.
fn set_attributes(tree: &impl AsFd, options: BindOptions) -> Result<(), Error> {
    let propagation = match options.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    // Only husk-fs uses these mounts, for a guest: nothing on the host may open a device or run a program by them.
    let mut everywhere = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    if options.readonly_below {
        everywhere |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attribute(tree, everywhere, propagation, options.recursive)?;
    // A file system below a read-only one stays as it is, as with mount(8)'s `rbind,ro`.
    if options.readonly { set_attribute(tree, libc::MOUNT_ATTR_RDONLY, 0, false) } else { Ok(()) }
}

fn set_attribute(tree: &impl AsFd, set: u64, propagation: u64, recursive: bool) -> Result<(), Error> {
    set_attr(tree, &libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 }, recursive)
}

/// mount_setattr(2) on a detached mount, or with `recursive` on all of its tree.
pub(super) fn set_attr(tree: &impl AsFd, attributes: &libc::mount_attr, recursive: bool) -> Result<(), Error> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, and the kernel reads `size_of::<mount_attr>()` bytes from a live mount_attr.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}
