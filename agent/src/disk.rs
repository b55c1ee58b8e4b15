//! Disks that the shim plugs in for a container: found by their place on the PCI bus, then made the device of a spec or mounted.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_api::DISKS_DIR;
use husk_agent_api::agent::disk::Use;
use husk_agent_api::agent::{Disk, DiskMount, DiskNode};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxDeviceCgroupBuilder, LinuxDeviceType, Spec};
use thiserror::Error;
use tokio::io::Interest;
use tokio::task::spawn_blocking;

use crate::descriptor;

/// Longest wait for the kernel to find a disk that was plugged in.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most disks of a container: as many as the machine has slots.
const MOST: usize = 16;

/// Why a container can't have its disk.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    #[error("A container can have {MOST} disks, not {0}")]
    TooMany(usize),
    #[error("Device {0} is no place of a disk on the PCI bus")]
    Place(u32),
    #[error("Could not listen to the kernel's events")]
    Listen(#[source] io::Error),
    #[error("Waited {PATIENCE:?} for the kernel to find the disk at device {0} of the PCI bus")]
    Absent(u32),
    #[error("The disk at device {device} of the PCI bus is not understood")]
    Sysfs {
        device: u32,
        #[source]
        source: io::Error,
    },
    #[error("The spec has no block device {0}")]
    NoDevice(String),
    #[error("The rule for device {path} is not understood")]
    Rule {
        path: String,
        #[source]
        source: oci_spec::OciSpecError,
    },
    #[error("{0:?} is no place for a mount of a disk")]
    Target(String),
    #[error("Could not {step} {target}")]
    Mount {
        step: &'static str,
        target: String,
        #[source]
        source: io::Error,
    },
    #[error("A thread of the agent ended early")]
    Thread(#[from] tokio::task::JoinError),
}

/// A disk that the kernel knows.
struct Block {
    name: String,
    major: i64,
    minor: i64,
}

/// What was mounted for a container, to be taken back by [`Mounted::undo`].
#[derive(Default)]
pub(crate) struct Mounted(Vec<(String, PathBuf)>);

/// Makes a container's disks what its request says. On failure nothing is left mounted.
pub(crate) async fn prepare(disks: &[Disk], spec: &mut Spec) -> Result<Mounted, DiskError> {
    let mut mounted = Mounted::default();
    if disks.len() > MOST {
        return Err(DiskError::TooMany(disks.len()));
    }
    for disk in disks {
        if let Err(error) = one(disk, spec, &mut mounted).await {
            mounted.undo().await;
            return Err(error);
        }
    }
    Ok(mounted)
}

async fn one(disk: &Disk, spec: &mut Spec, mounted: &mut Mounted) -> Result<(), DiskError> {
    let block = find(disk.device).await?;
    match &disk.use_ {
        Some(Use::Node(node)) => set_numbers(spec, node, &block),
        Some(Use::Mount(request)) => {
            let (request, name) = (request.clone(), block.name.clone());
            let target = spawn_blocking(move || mount_disk(&request, &name)).await??;
            mounted.0.push((block.name, target));
            Ok(())
        }
        _ => Ok(()),
    }
}

impl Mounted {
    /// Unmounts everything. Comes after the container's processes and namespaces are gone, so that the file systems are whole afterwards.
    pub(crate) async fn undo(&mut self) {
        let mounts = std::mem::take(&mut self.0);
        if mounts.is_empty() {
            return;
        }
        let work = move || {
            for (name, target) in mounts {
                if let Err(error) = umount2(&target, MntFlags::UMOUNT_NOFOLLOW) {
                    tracing::warn!("Could not unmount {}: {error}", target.display());
                }
                if let Err(error) = fs::remove_dir(&target) {
                    tracing::warn!("Could not remove {}: {error}", target.display());
                }
                // Whoever has a device mounted claims it (open(2), O_EXCL on block devices).
                let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                if let Err(Errno::EBUSY) = open(&Path::new("/dev").join(&name), flags, Mode::empty()) {
                    tracing::warn!("The file system on {name} is still in use");
                }
            }
        };
        if let Err(error) = spawn_blocking(work).await {
            tracing::warn!("{}", crate::context("Disks may be left mounted", error));
        }
    }
}

/// Waits until the kernel has found the disk and opens it; woken by the kernel's events.
async fn find(device: u32) -> Result<Block, DiskError> {
    if !(1..32).contains(&device) {
        return Err(DiskError::Place(device));
    }
    // Before the first look, so that nothing is missed between look and wait.
    let events =
        listen().and_then(|socket| descriptor::watch(socket, Interest::READABLE)).map_err(DiskError::Listen)?;
    let found = async {
        loop {
            if let Some(block) = look(device).map_err(|source| DiskError::Sysfs { device, source })? {
                return Ok(block);
            }
            // What they say does not matter: any is a reason to look again.
            events.async_io(Interest::READABLE, drain).await.map_err(DiskError::Listen)?;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or(Err(DiskError::Absent(device)))
}

/// A socket that gets the kernel's events (netlink(7), NETLINK_KOBJECT_UEVENT; group 1 is the kernel's own).
fn listen() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(socket)
}

/// Takes the events that are there.
fn drain(socket: &OwnedFd) -> io::Result<()> {
    let mut some = false;
    loop {
        match recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC) {
            // Too many to be kept: then something has happened, too.
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => some = true,
            Err(Errno::EAGAIN) if some => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The disk, if it can be used already.
fn look(device: u32) -> io::Result<Option<Block>> {
    let function = PathBuf::from(format!("/sys/bus/pci/devices/0000:00:{device:02x}.0"));
    let Some(virtio) = entry(&function, |name| name.starts_with("virtio"))? else { return Ok(None) };
    let Some(disk) = entry(&virtio.join("block"), |_| true)? else { return Ok(None) };
    let Some(name) = disk.file_name().and_then(|name| name.to_str()) else { return Ok(None) };
    // It is in sysfs a moment before it can be opened; an event follows then (Linux, block/genhd.c, device_add_disk).
    match open(&Path::new("/dev").join(name), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(Errno::ENXIO | Errno::ENOENT) => return Ok(None),
        other => other?,
    };
    let numbers = fs::read_to_string(disk.join("dev"))?;
    let numbers =
        numbers.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = numbers.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some(Block { name: name.to_owned(), major, minor }))
}

/// The first entry of a directory that fits; none also where there is no directory.
fn entry(directory: &Path, fits: impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&fits) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Gives the spec's device the disk's numbers, and a rule for it.
fn set_numbers(spec: &mut Spec, node: &DiskNode, block: &Block) -> Result<(), DiskError> {
    let absent = || DiskError::NoDevice(node.path.clone());
    let linux = spec.linux_mut().as_mut().ok_or_else(absent)?;
    let mut devices = linux.devices().clone().unwrap_or_default();
    let ours = devices.iter_mut().find(|one| one.path() == Path::new(&node.path) && one.typ() == LinuxDeviceType::B);
    ours.ok_or_else(absent)?.set_major(block.major).set_minor(block.minor);
    linux.set_devices(Some(devices));
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(block.major)
        .minor(block.minor)
        .access(node.access.clone())
        .build()
        .map_err(|source| DiskError::Rule { path: node.path.clone(), source })?;
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

/// Mounts a disk; where.
fn mount_disk(request: &DiskMount, name: &str) -> Result<PathBuf, DiskError> {
    let target = Path::new(&request.target);
    let plain = |part: &std::ffi::OsStr| part.to_str().is_some_and(|part| !part.starts_with('.'));
    let inside = target.strip_prefix(DISKS_DIR).is_ok_and(|rest| rest.iter().count() > 0 && rest.iter().all(plain));
    if !inside {
        return Err(DiskError::Target(request.target.clone()));
    }
    let failed = |step| move |source: io::Error| DiskError::Mount { step, target: request.target.clone(), source };
    fs::create_dir_all(target).map_err(failed("make"))?;
    let flags = MsFlags::from_bits_truncate(request.flags);
    let data = (!request.data.is_empty()).then_some(request.data.as_str());
    let mounted = mount(Some(&Path::new("/dev").join(name)), target, Some(request.type_.as_str()), flags, data);
    if mounted.is_err() {
        let _ = fs::remove_dir(target);
    }
    mounted.map_err(|errno| failed("mount the disk's file system on")(errno.into()))?;
    Ok(target.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let json = serde_json::json!({
            "ociVersion": "1.2.0",
            "linux": {
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                    {"path": "/dev/data", "type": "b", "major": 7, "minor": 0},
                ],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_device_gets_the_disks_numbers_and_a_rule() {
        let mut spec = spec();
        let block = Block { name: "vda".into(), major: 254, minor: 16 };
        let node = |path: &str| DiskNode { path: path.into(), access: "r".into(), ..Default::default() };
        set_numbers(&mut spec, &node("/dev/data"), &block).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let device = &linux.devices().as_ref().unwrap()[1];
        assert_eq!((device.major(), device.minor()), (254, 16));
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!((rules[1].allow(), rules[1].major(), rules[1].access().as_deref()), (true, Some(254), Some("r")));
        for path in ["/dev/null", "/dev/other"] {
            assert!(matches!(set_numbers(&mut spec, &node(path), &block), Err(DiskError::NoDevice(_))));
        }
    }

    #[test]
    fn mounts_are_made_in_their_place_only() {
        for target in ["/run/husk/disks", "/run/husk/disks/../x", "/etc", "", "/run/husk/disks/a/.b"] {
            let request = DiskMount { target: target.into(), ..Default::default() };
            assert!(matches!(mount_disk(&request, "vda"), Err(DiskError::Target(_))), "{target}");
        }
    }

    #[tokio::test]
    async fn places_and_numbers_of_disks_are_bounded() {
        for device in [0, 32, u32::MAX] {
            assert!(matches!(find(device).await, Err(DiskError::Place(_))));
        }
        let many = vec![Disk::default(); MOST + 1];
        assert!(matches!(prepare(&many, &mut spec()).await, Err(DiskError::TooMany(_))));
    }
}
