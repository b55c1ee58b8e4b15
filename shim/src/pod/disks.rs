//! Disks of the pod's machine: plugged in for containers, shared by those that ask for the same device, and taken back with the last.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use husk_agent_api::agent::disk::Use;
use husk_agent_api::agent::{Disk, DiskMount, DiskNode};
use tracing::warn;

use super::machine::Machine;
use crate::error::{Error, chain};
use crate::spec::block::BlockDevice;
use crate::storage::disk::{RootDisk, open_device};

/// A machine's disks.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    /// Held while one is plugged in, so that two containers don't plug in the same device.
    attaching: tokio::sync::Mutex<()>,
    table: Mutex<Vec<Attached>>,
}

#[derive(Debug)]
struct Attached {
    /// Device number on the guest's PCI bus.
    device: u32,
    /// What of the host it is, if others may share it.
    origin: Option<Origin>,
    /// Ids of the containers that have it.
    users: Vec<String>,
}

/// The host's device, and whether it can only be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    major: i64,
    minor: i64,
    read_only: bool,
}

/// What a container wants of disks.
pub(crate) struct Wanted {
    /// Its root file system.
    pub(crate) root: Option<RootDisk>,
    /// Raw devices.
    pub(crate) devices: Vec<BlockDevice>,
}

impl Machine {
    /// Plugs in what container `id` wants, for the agent. What was plugged in stays when a later one fails: see [`Self::detach_disks`].
    pub(super) async fn attach_disks(&self, id: &str, root: &str, wanted: Wanted) -> Result<Vec<Disk>, Error> {
        let mut disks = Vec::new();
        if wanted.root.is_none() && wanted.devices.is_empty() {
            return Ok(disks);
        }
        let _attaching = self.disks.attaching.lock().await;
        if let Some(RootDisk { file, read_only, kind, flags, data }) = wanted.root {
            let device = self.attach(id, 0, file, read_only, None).await?;
            let mount = DiskMount { target: root.to_owned(), type_: kind, flags, data, ..Default::default() };
            disks.push(Disk { device, use_: Some(Use::Mount(mount)), ..Default::default() });
        }
        for (index, wanted) in (1..).zip(wanted.devices) {
            let (major, minor, read_only) = (wanted.major, wanted.minor, wanted.read_only());
            let origin = Origin { major, minor, read_only };
            let device = match self.disks.share(id, origin) {
                Some(device) => device,
                None => {
                    let open = move || open_device(major, minor, read_only);
                    let file = tokio::task::spawn_blocking(open).await??;
                    self.attach(id, index, file, read_only, Some(origin)).await?
                }
            };
            let path = wanted.path.to_string_lossy().into_owned();
            let node = DiskNode { path, access: wanted.access, ..Default::default() };
            disks.push(Disk { device, use_: Some(Use::Node(node)), ..Default::default() });
        }
        Ok(disks)
    }

    async fn attach(
        &self,
        id: &str,
        index: usize,
        file: std::os::fd::OwnedFd,
        read_only: bool,
        origin: Option<Origin>,
    ) -> Result<u32, Error> {
        let held = self.held.read().await;
        let vmm = held.vmm.as_ref().ok_or(Error::Down { doing: "attach a disk", cause: String::new() })?;
        let device = vmm.attach_disk(file, &serial(id, index), read_only).await?;
        self.disks.lock().push(Attached { device, origin, users: vec![id.to_owned()] });
        Ok(device)
    }

    /// Takes back the disks that only container `id` has. The agent has let go of them, or is not to be trusted with them any more.
    pub(super) async fn detach_disks(&self, id: &str) {
        let devices = self.disks.leave(id);
        if devices.is_empty() || self.cause().is_some() {
            return;
        }
        let held = self.held.read().await;
        let Some(vmm) = &held.vmm else { return };
        for device in devices {
            match vmm.detach_disk(device).await {
                Ok(true) => {}
                Ok(false) => warn!("the guest did not let go of container {id}'s disk {device}: it was taken away"),
                // If the machine ended meanwhile, the disk has gone with it.
                Err(_) if self.cause().is_some() => {}
                Err(error) => warn!("{}", chain(&error)),
            }
        }
    }
}

impl Disks {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Attached>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk that is this device already; container `id` has it too from now on.
    fn share(&self, id: &str, origin: Origin) -> Option<u32> {
        let mut table = self.lock();
        let known = table.iter_mut().find(|attached| attached.origin == Some(origin))?;
        if !known.users.iter().any(|user| user == id) {
            known.users.push(id.to_owned());
        }
        Some(known.device)
    }

    /// Container `id` has none any more: those that nobody has then.
    fn leave(&self, id: &str) -> Vec<u32> {
        let mut table = self.lock();
        table.iter_mut().for_each(|attached| attached.users.retain(|user| user != id));
        let gone = table.extract_if(.., |attached| attached.users.is_empty());
        gone.map(|attached| attached.device).collect()
    }
}

/// What the guest sees as the disk's serial number: 16 hexadecimal digits, the same for the same container and disk.
fn serial(id: &str, index: usize) -> String {
    let mut hasher = DefaultHasher::new();
    (id, index).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_disk_goes_with_its_last_container() {
        let disks = Disks::default();
        let origin = Origin { major: 7, minor: 0, read_only: false };
        assert_eq!(disks.share("a", origin), None);
        disks.lock().push(Attached { device: 16, origin: Some(origin), users: vec!["a".into()] });
        disks.lock().push(Attached { device: 17, origin: None, users: vec!["a".into()] });
        assert_eq!((disks.share("b", origin), disks.share("b", origin)), (Some(16), Some(16)));
        assert_eq!(disks.share("b", Origin { read_only: true, ..origin }), None);
        assert_eq!((disks.leave("a"), disks.leave("a")), (vec![17], vec![]));
        assert_eq!((disks.leave("b"), disks.share("c", origin)), (vec![16], None));
    }

    #[test]
    fn serials_are_short_and_differ() {
        assert_eq!(serial("a", 1).len(), 16);
        assert_ne!(serial("a", 1), serial("a", 2));
        assert_ne!(serial("a", 1), serial("b", 1));
    }
}
