//! The spec's mounts, and the masked and read-only paths.
//!
//! Sources are opened before we leave the agent's namespaces (so a source is what the agent sees, and a user namespace needs no
//! access to it); each mount is made detached, gets its attributes, and only then is attached to a descriptor of its target.

use std::{
    ffi::CString,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::MsFlags,
    sys::stat::{Mode, SFlag, fstat},
};
use oci_spec::runtime::{Mount, Spec};

use crate::{
    copy_up,
    devices::NULL,
    fault::{Doing, Fault, Step},
    mount_options::Options,
    paths::{Links, Missing, is, walk},
    rootfs::Root,
    sys::{self, MountAttr, attr},
};

/// File systems without a source, whose own read-only flag means nothing.
const VIRTUAL: [&str; 6] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"];

/// A mount of the spec, with its source opened.
pub(crate) struct Prepared {
    kind: String,
    source: Option<PathBuf>,
    destination: PathBuf,
    options: Options,
    /// A bind's source; for sysfs: the agent's, for where a user namespace may not mount one.
    tree: Option<OwnedFd>,
}

/// Opens the sources. Runs in the agent's namespaces.
pub(crate) fn prepare(spec: &Spec, user_namespace: bool) -> Step<Vec<Prepared>> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let mut sources = Sources::default();
    mounts.iter().map(|mount| prepare_one(mount, user_namespace, &mut sources)).collect()
}

/// The directory of the last source. Most are in the same, and each name on the way there costs a request to husk-fs.
#[derive(Default)]
struct Sources(Option<(PathBuf, OwnedFd)>);

impl Sources {
    /// A detached copy of the mount at `path`.
    fn clone_tree(&mut self, path: &Path, recursive: bool) -> Step<nix::Result<OwnedFd>> {
        let (Some(directory), Some(name)) = (path.parent().filter(|parent| parent.is_absolute()), path.file_name())
        else {
            return Ok(sys::clone_tree(None, &c_path(path)?, recursive));
        };
        if self.0.as_ref().is_none_or(|(last, _)| last != directory) {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            match open(directory, flags, Mode::empty()) {
                Ok(opened) => self.0 = Some((directory.to_owned(), opened)),
                Err(errno) => return Ok(Err(errno)),
            }
        }
        let opened = self.0.as_ref().map(|(_, directory)| directory.as_fd());
        Ok(sys::clone_tree(opened, &c_path(Path::new(name))?, recursive))
    }
}

fn prepare_one(mount: &Mount, user_namespace: bool, sources: &mut Sources) -> Step<Prepared> {
    let destination = mount.destination().clone();
    let mut options = Options::parse(mount.options().iter().flatten().map(String::as_str));
    let mut kind = mount.typ().clone().unwrap_or_default();
    match kind.as_str() {
        "bind" => options.bind = options.bind.or(Some(false)),
        "rbind" => options.bind = Some(true),
        // The guest has v2 only.
        "cgroup" => kind = "cgroup2".into(),
        _ => {}
    }
    let source = mount.source().clone();
    let tree = match (options.bind, &source) {
        (Some(recursive), Some(source)) => {
            let tree = sources
                .clone_tree(source, recursive)?
                .doing(|| format!("mount {}: open the source {}", destination.display(), source.display()))?;
            Some(tree)
        }
        (Some(_), None) => {
            return Err(Fault::new(format!("mount {}: a bind mount without source", destination.display())));
        }
        (None, _) if kind == "sysfs" && user_namespace => sys::clone_tree(None, c"/sys", true).ok(),
        (None, _) if kind.is_empty() => {
            return Err(Fault::new(format!("mount {}: no type", destination.display())));
        }
        (None, _) => None,
    };
    Ok(Prepared { kind, source, destination, options, tree })
}

/// Makes the mounts, in order. Those returned are to become read-only at the end ([`seal`]).
pub(crate) fn mount_all(root: &Root, mounts: Vec<Prepared>) -> Step<Vec<OwnedFd>> {
    let mut sealed = Vec::new();
    for mount in mounts {
        let destination = mount.destination.clone();
        let late = mount_one(root, mount).doing(|| format!("mount {}", destination.display()))?;
        sealed.extend(late);
    }
    Ok(sealed)
}

/// Makes the late read-only mounts read-only.
pub(crate) fn seal(mounts: &[OwnedFd]) -> Step<()> {
    mounts
        .iter()
        .try_for_each(|mount| sys::set_attributes(mount, read_only(), false).doing(|| "make a tmpfs read-only"))
}

fn mount_one(root: &Root, mut mount: Prepared) -> Step<Option<OwnedFd>> {
    let bind = mount.options.bind.is_some();
    // What a new file system covers is looked at before; a tmpfs is filled (by us, for mounts in it, or by a copy) before it is sealed.
    let late = !bind && mount.kind == "tmpfs" && mount.options.read_only();
    if late {
        mount.options.attributes.set &= !attr::RDONLY;
    }
    let tree =
        if bind { mount.tree.take().ok_or_else(|| Fault::new("no source"))? } else { new_filesystem(&mut mount)? };
    let file = bind && !is(&fstat(&tree).doing(|| "look at the source")?, SFlag::S_IFDIR);
    // A link at /proc or /sys would put the kernel's files elsewhere, and ours to write to with it (CVE-2019-19921).
    let links = if matches!(mount.kind.as_str(), "proc" | "sysfs") { Links::Refuse } else { Links::Follow };
    let missing = if file { Missing::File } else { Missing::Directory };
    let target = walk(&root.root, &mount.destination, missing, links).doing(|| "make the target")?;

    if mount.options.copy_up && !bind {
        copy_up::copy(&target, &tree)?;
    }
    let options = &mount.options;
    if bind {
        sys::set_attributes(&tree, options.attributes, false).doing(|| "set the options")?;
    }
    sys::set_attributes(&tree, options.recursive, true).doing(|| "set the recursive options")?;
    // A copy of a shared mount is its peer: what is mounted in it would appear in the agent's, unless the spec wants just that.
    let private = [MsFlags::MS_PRIVATE | MsFlags::MS_REC];
    let propagation = if options.propagation.is_empty() { &private[..] } else { &options.propagation };
    for &flags in propagation {
        set_propagation(&tree, flags).doing(|| "set the propagation")?;
    }
    sys::attach(&tree, &target).doing(|| "attach")?;
    Ok(late.then_some(tree))
}

fn new_filesystem(mount: &mut Prepared) -> Step<OwnedFd> {
    let options = &mut mount.options;
    if options.read_only() && !VIRTUAL.contains(&mount.kind.as_str()) {
        // A disk must not be written to even by its own driver.
        options.data.push(("ro".into(), None));
    }
    let source = mount.source.as_deref().and_then(Path::to_str);
    match sys::new_filesystem(&mount.kind, source, &options.data, options.attributes.set) {
        Ok(tree) => Ok(tree),
        // A user namespace that doesn't own the network namespace may not mount a sysfs; the agent's will do, read-only.
        Err((_, Errno::EPERM)) if mount.kind == "sysfs" && mount.tree.is_some() => {
            let tree = mount.tree.take().ok_or_else(|| Fault::new("no sysfs"))?;
            sys::set_attributes(
                &tree,
                MountAttr { set: options.attributes.set | attr::RDONLY, ..MountAttr::default() },
                true,
            )
            .doing(|| "make the agent's sysfs read-only")?;
            Ok(tree)
        }
        Err((what, errno)) => Err(errno).doing(|| what),
    }
}

/// Propagation by mount_setattr(2), which takes one type at a time and recursion apart.
pub(crate) fn set_propagation(mount: &OwnedFd, flags: MsFlags) -> nix::Result<()> {
    let change = MountAttr { propagation: (flags & !MsFlags::MS_REC).bits(), ..MountAttr::default() };
    sys::set_attributes(mount, change, flags.contains(MsFlags::MS_REC))
}

pub(crate) fn read_only() -> MountAttr {
    MountAttr { set: attr::RDONLY, ..MountAttr::default() }
}

/// Hides a path: a file behind /dev/null, a directory behind an empty read-only tmpfs. Absent is fine.
pub(crate) fn mask(root: &Root, path: &Path) -> Step<()> {
    let target = match walk(&root.root, path, Missing::Fail, Links::Follow) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        other => other.doing(|| format!("mask {}", path.display()))?,
    };
    let doing = || format!("mask {}", path.display());
    let cover = if is(&fstat(&target).doing(doing)?, SFlag::S_IFDIR) {
        let options = [
            ("size".to_owned(), Some("0".to_owned())),
            ("nr_inodes".to_owned(), Some("1".to_owned())),
            ("mode".to_owned(), Some("755".to_owned())),
        ];
        sys::new_filesystem("tmpfs", Some("tmpfs"), &options, attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
            .map_err(|(_, errno)| errno)
            .doing(doing)?
    } else {
        // The agent's, and checked: one in the image could be anything (CVE-2025-31133).
        let null = root.open_old("dev/null").doing(|| "open /dev/null")?;
        let stat = fstat(&null).doing(|| "look at /dev/null")?;
        if !is(&stat, SFlag::S_IFCHR) || stat.st_rdev != NULL {
            return Err(Fault::new("the agent's /dev/null is not the null device"));
        }
        sys::clone_tree(Some(null.as_fd()), c"", false).doing(doing)?
    };
    sys::attach(cover, target).doing(doing)
}

/// Makes a path and all below read-only. Absent is fine.
pub(crate) fn make_read_only(root: &Root, path: &Path) -> Step<()> {
    let target = match walk(&root.root, path, Missing::Fail, Links::Follow) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        other => other.doing(|| format!("open read-only path {}", path.display()))?,
    };
    let doing = || format!("make {} read-only", path.display());
    let tree = sys::clone_tree(Some(target.as_fd()), c"", true).doing(doing)?;
    sys::set_attributes(&tree, read_only(), true).doing(doing)?;
    sys::attach(tree, target).doing(doing)
}

fn c_path(path: &Path) -> Step<CString> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Fault::new("a path has a NUL byte"))
}
