//! /dev of a container: the usual devices and links, and the spec's own devices.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use crate::{
    fault::{Doing, Fault, Step},
    paths::{self, Links, Missing},
    rootfs::Root,
    sys,
};

/// A device number of a memory device (Documentation/admin-guide/devices.txt, major 1), as glibc's makedev packs it.
pub(crate) const NULL: libc::dev_t = 1 << 8 | 3;

/// Name, major, minor (runtime-spec, config-linux.md, "Default devices").
const USUAL: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Most nodes that a container is given: far above what a guest has.
const MAX_NODES: usize = 1024;

/// A device to make.
struct Device {
    kind: SFlag,
    number: libc::dev_t,
    mode: Mode,
    uid: Option<Uid>,
    gid: Option<Gid>,
}

/// A node of the guest's own, by its path below its /dev.
type Node = (PathBuf, Device);

/// Makes the usual devices and links and those of the spec. A /dev that is bound from elsewhere is left as it is.
pub(crate) fn populate(root: &Root, spec: &Spec, user_namespace: bool) -> Step<()> {
    let bound = |m: &oci_spec::runtime::Mount| {
        let bind = |o: &String| o == "bind" || o == "rbind";
        m.destination() == Path::new("/dev")
            && (m.typ().as_deref() == Some("bind") || m.options().iter().flatten().any(bind))
    };
    if spec.mounts().iter().flatten().any(bound) {
        return Ok(());
    }
    let dev = paths::walk(&root.root, Path::new("/dev"), Missing::Directory, Links::Follow).doing(|| "open /dev")?;
    let all = may_use_all(spec);
    let nodes = if user_namespace || all { of_agent(root).doing(|| "list the guest's devices")? } else { Vec::new() };
    // In a user namespace nobody may mknod.
    let bound_from = user_namespace.then_some(nodes.as_slice());
    for (name, major, minor) in USUAL {
        let device = Device {
            kind: SFlag::S_IFCHR,
            number: makedev(major, minor),
            mode: Mode::from_bits_truncate(0o666),
            uid: None,
            gid: None,
        };
        make(root, &dev, OsStr::new(name), &device, bound_from).doing(|| format!("make /dev/{name}"))?;
    }
    for (target, name) in LINKS {
        link(&dev, target, name).doing(|| format!("link /dev/{name}"))?;
    }
    for device in spec.linux().iter().flat_map(|l| l.devices().iter().flatten()) {
        let path = device.path();
        let doing = || format!("make device {}", path.display());
        let (directory, name) = paths::parent(&root.root, path).doing(doing)?;
        make(root, &directory, name, &of_spec(device)?, bound_from).doing(doing)?;
    }
    for (path, device) in nodes.iter().filter(|_| all) {
        add(root, &dev, path, device, bound_from).doing(|| format!("make /dev/{}", path.display()))?;
    }
    Ok(())
}

/// Whether the container may use every device there is (a privileged one).
fn may_use_all(spec: &Spec) -> bool {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources.iter().flat_map(|resources| resources.devices().iter().flatten()).any(|rule| {
        rule.allow()
            && rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
            && rule.major().is_none_or(|major| major < 0)
            && rule.minor().is_none_or(|minor| minor < 0)
    })
}

/// Makes one of the guest's devices in the container's /dev, unless the container has something of that name.
fn add(root: &Root, dev: &OwnedFd, path: &Path, device: &Device, bound_from: Option<&[Node]>) -> Step<()> {
    let (directory, name) = paths::parent(dev, path).doing(|| "make its directory")?;
    match paths::stat_entry(&directory, name) {
        Err(Errno::ENOENT) => make(root, &directory, name, device, bound_from),
        other => other.map(drop).doing(|| "look at what is there"),
    }
}

/// The nodes in the agent's /dev, which are those of the guest's kernel (devtmpfs), by their paths there; without the console, which is
/// the machine's own.
fn of_agent(root: &Root) -> Step<Vec<Node>> {
    let mut found = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(&root.old, &Path::new("dev").join(&below), flags, Mode::empty())
            .doing(|| format!("open /dev/{}", below.display()))?;
        let mut listing =
            Dir::from_fd(directory.try_clone().doing(|| "duplicate a descriptor")?).doing(|| "list it")?;
        for entry in listing.iter() {
            let entry = entry.doing(|| "list it")?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if matches!(name.as_bytes(), b"." | b".." | b"console") || found.len() + pending.len() >= MAX_NODES {
                continue;
            }
            let path = below.join(name);
            let stat = paths::stat_entry(&directory, name).doing(|| format!("look at /dev/{}", path.display()))?;
            let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
            if kind == SFlag::S_IFDIR {
                pending.push(path);
            } else if kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK {
                let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
                found.push((path, Device { kind, number: stat.st_rdev, mode, uid: None, gid: None }));
            }
        }
    }
    Ok(found)
}

fn of_spec(device: &LinuxDevice) -> Step<Device> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(Fault::new(format!("device {}: type \"a\"", device.path().display()))),
    };
    let part =
        |n: i64| u64::try_from(n).map_err(|_| Fault::new(format!("device {}: number {n}", device.path().display())));
    let number = if kind == SFlag::S_IFIFO { 0 } else { makedev(part(device.major())?, part(device.minor())?) };
    Ok(Device {
        kind,
        number,
        mode: Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666) & 0o7777),
        uid: device.uid().map(Uid::from_raw),
        gid: device.gid().map(Gid::from_raw),
    })
}

/// Makes a device, or binds one of the guest's if they are given; FIFOs are made in any case.
fn make(root: &Root, directory: &OwnedFd, name: &OsStr, device: &Device, bound_from: Option<&[Node]>) -> Step<()> {
    if let (Some(nodes), false) = (bound_from, device.kind == SFlag::S_IFIFO) {
        return bind(root, directory, name, device, nodes);
    }
    match mknodat(directory, name, device.kind, device.mode, device.number) {
        Err(Errno::EEXIST) => {
            let stat = paths::stat_entry(directory, name).doing(|| "look at what is there")?;
            if paths::is(&stat, device.kind) && stat.st_rdev == device.number {
                return Ok(());
            }
            unlinkat(directory, name, UnlinkatFlags::NoRemoveDir).doing(|| "replace what is there")?;
            mknodat(directory, name, device.kind, device.mode, device.number).doing(|| "mknod")?;
        }
        other => other.doing(|| "mknod")?,
    }
    if device.uid.is_some() || device.gid.is_some() {
        fchownat(directory, name, device.uid, device.gid, AtFlags::AT_SYMLINK_NOFOLLOW).doing(|| "set the owner")?;
        fchmodat(directory, name, device.mode, FchmodatFlags::NoFollowSymlink)
            .or_else(|errno| {
                // Kernels before 6.6 can't change a mode without following; mknod has set it already (our umask is 0).
                if errno == Errno::EOPNOTSUPP { Ok(()) } else { Err(errno) }
            })
            .doing(|| "set the mode")?;
    }
    Ok(())
}

/// Binds the one of the guest's devices that has this kind and number.
fn bind(root: &Root, directory: &OwnedFd, name: &OsStr, device: &Device, nodes: &[Node]) -> Step<()> {
    let node = nodes.iter().find(|(_, node)| node.kind == device.kind && node.number == device.number);
    let (path, _) = node.ok_or_else(|| Fault::new("the guest has no such device"))?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let source = openat(&root.old, &Path::new("dev").join(path), flags, Mode::empty()).doing(|| "open the agent's")?;
    let target = paths::walk(directory, Path::new(name), Missing::File, Links::Refuse).doing(|| "make the target")?;
    let tree = sys::clone_tree(Some(source.as_fd()), c"", false).doing(|| "clone it")?;
    sys::attach(tree, target).doing(|| "bind it")
}

fn link(dev: &OwnedFd, target: &str, name: &str) -> Step<()> {
    match symlinkat(target, dev, name) {
        Err(Errno::EEXIST) if name == "ptmx" => {
            // An image's own ptmx would be of another devpts.
            unlinkat(dev, name, UnlinkatFlags::NoRemoveDir).doing(|| "replace")?;
            symlinkat(target, dev, name).doing(|| "link")
        }
        Err(Errno::EEXIST) => Ok(()),
        other => other.doing(|| "link"),
    }
}
