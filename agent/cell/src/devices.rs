//! /dev of a container: the usual devices and links, and the spec's own devices.

use std::{
    ffi::OsStr,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
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

/// A device to make.
struct Device {
    kind: SFlag,
    number: libc::dev_t,
    mode: Mode,
    uid: Option<Uid>,
    gid: Option<Gid>,
}

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
    for (name, major, minor) in USUAL {
        let device = Device {
            kind: SFlag::S_IFCHR,
            number: makedev(major, minor),
            mode: Mode::from_bits_truncate(0o666),
            uid: None,
            gid: None,
        };
        make(root, &dev, OsStr::new(name), &device, user_namespace).doing(|| format!("make /dev/{name}"))?;
    }
    for (target, name) in LINKS {
        link(&dev, target, name).doing(|| format!("link /dev/{name}"))?;
    }
    for device in spec.linux().iter().flat_map(|l| l.devices().iter().flatten()) {
        let path = device.path();
        let doing = || format!("make device {}", path.display());
        let (directory, name) = paths::parent(&root.root, path).doing(doing)?;
        make(root, &directory, name, &of_spec(device)?, user_namespace).doing(doing)?;
    }
    Ok(())
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

fn make(root: &Root, directory: &OwnedFd, name: &OsStr, device: &Device, user_namespace: bool) -> Step<()> {
    if user_namespace && device.kind != SFlag::S_IFIFO {
        return bind(root, directory, name, device);
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

/// In a user namespace nobody may mknod: the agent's device of that name is bound, if it has the right number.
fn bind(root: &Root, directory: &OwnedFd, name: &OsStr, device: &Device) -> Step<()> {
    let path = format!("dev/{}", name.to_string_lossy());
    let source = root.open_old(&path).doing(|| format!("open the agent's /{path}"))?;
    let stat = nix::sys::stat::fstat(&source).doing(|| "look at it")?;
    if !paths::is(&stat, device.kind) || stat.st_rdev != device.number {
        return Err(Fault::new(format!("the agent's /{path} is another device")));
    }
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
