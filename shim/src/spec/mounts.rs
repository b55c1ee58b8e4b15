//! A container's mounts: a bind mount's source gets a place in the share directory, or is given by the guest itself where it is a matter of
//! the kernel; every other mount is made by the guest. What can't be done truthfully is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use super::SpecError;
use super::guest::GUEST_DEVICES;
use super::load::Role;
use crate::storage::source::{HugePages, MountPoints, Source};
use crate::storage::{BindOptions, IdMap, Propagation};

/// Most mounts of a container.
pub(crate) const MAX_MOUNTS: usize = 1024;

/// In a container's part of the share directory: bind mounts.
pub(crate) const MOUNTS: &str = "mounts";

/// Beside it: those in which the host's later mounts appear. husk-fs knows this name (its cache.rs).
pub(crate) const LIVE: &str = "live";

/// The pod's /dev/shm in the guest.
const SHARED_SHM: &str = "/run/husk/shm";

/// A file or directory of the host that goes into the container's part of the share directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostBind {
    /// On the host.
    pub(crate) source: PathBuf,
    /// There: `mounts/<number>` or `live/<number>`.
    pub(crate) place: PathBuf,
    /// How.
    pub(crate) options: BindOptions,
    /// Its ids, where they are to be mapped.
    pub(crate) ids: Option<MountIds>,
}

/// The map of a mount's ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountIds {
    /// The map.
    pub(crate) map: IdMap,
    /// Also of the mounts below it.
    pub(crate) recursive: bool,
}

/// What the mounts of a container need.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// Of the host's files.
    pub(crate) binds: Vec<HostBind>,
    /// Of the root file system: files to mount on, made if they are not there. The guest would make them too, for five requests to husk-fs each.
    pub(crate) targets: Vec<PathBuf>,
    /// Of the guest's huge pages: volumes by their names below [`husk_agent_api::HUGE_DIR`].
    pub(crate) huge: BTreeMap<String, HugePages>,
}

/// Turns the host's mounts into the guest's, for a pod whose user namespace, if any, is `pod_ids`.
pub(crate) fn guest_mounts(
    mounts: Vec<Mount>,
    role: &Role,
    pod_ids: Option<&IdMap>,
    shared: &Path,
) -> Result<(Vec<Mount>, Needs), SpecError> {
    if mounts.len() > MAX_MOUNTS {
        return Err(SpecError::TooManyMounts(mounts.len()));
    }
    let mut turn = Turn { role, pod_ids, shared, points: MountPoints::default(), needs: Needs::default() };
    let mounts = mounts.into_iter().map(|mount| turn.mount(mount)).collect::<Result<Vec<_>, _>>()?;
    // In a user namespace they are its root's own, who is nobody to the host.
    turn.needs.targets.retain(|target| {
        let covers = |mount: &Mount| mount.destination() != target && target.starts_with(mount.destination());
        pod_ids.is_none() && !mounts.iter().any(covers)
    });
    Ok((mounts, turn.needs))
}

/// What turning mounts goes by, and what has come out so far.
struct Turn<'a> {
    role: &'a Role,
    pod_ids: Option<&'a IdMap>,
    shared: &'a Path,
    points: MountPoints,
    needs: Needs,
}

impl Turn<'_> {
    fn mount(&mut self, mut mount: Mount) -> Result<Mount, SpecError> {
        let ids = mount_ids(&mount, self.pod_ids)?;
        mount.set_uid_mappings(None).set_gid_mappings(None);
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| option != "idmap" && option != "ridmap");
        let is_bind = mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind");
        let destination = mount.destination().clone();
        let refuse = |why: &'static str| SpecError::Mount { destination: destination.clone(), why };
        if !is_bind {
            return match ids {
                None => Ok(mount),
                Some(_) => {
                    Err(refuse("wants its user ids mapped, which is possible for binds of files and directories only"))
                }
            };
        }
        let source = mount.source().clone().ok_or_else(|| refuse("has no source"))?;
        if is_pod_shm(&source, &destination, self.role) {
            mount.set_source(Some(SHARED_SHM.into()));
            return Ok(mount);
        }
        if !source.is_absolute() {
            return Err(refuse("has a source that is not an absolute path"));
        }
        if options.iter().any(|option| option == "rshared" || option == "shared") {
            return Err(refuse(
                "wants its mounts to appear on the host (Bidirectional), which a virtual machine cannot do",
            ));
        }
        let kind = Source::of(&source);
        if ids.is_some() && matches!(kind, Source::Character { .. } | Source::HugePages(_)) {
            return Err(refuse("wants its user ids mapped, which is possible for binds of files and directories only"));
        }
        match kind {
            Source::Socket => Err(refuse(
                "has a socket of the host as its source, whose other end cannot be reached from a virtual machine: run it with runc",
            )),
            Source::Fifo => Err(refuse(
                "has a fifo of the host as its source, whose other end cannot be reached from a virtual machine: run it with runc",
            )),
            Source::Block => Err(refuse("has a block device as its source: give it as a device (volumeDevices)")),
            Source::Character { major, minor } => {
                let known = GUEST_DEVICES.iter().find(|(a, b, _)| (*a, *b) == (i64::from(major), i64::from(minor)));
                let (_, _, name) = known.ok_or_else(|| {
                    refuse("has a device of the host as its source, which a virtual machine does not have: run it with runc")
                })?;
                mount.set_source(Some(Path::new("/dev").join(name)));
                Ok(mount)
            }
            Source::HugePages(pages) => {
                let name = pages.device.to_string();
                mount.set_source(Some(Path::new(husk_agent_api::HUGE_DIR).join(&name)));
                self.needs.huge.insert(name, pages);
                Ok(mount)
            }
            Source::File | Source::Directory => Ok(self.share(mount, &source, options, ids, kind == Source::Directory)),
        }
    }

    /// A file or directory.
    fn share(
        &mut self,
        mut mount: Mount,
        source: &Path,
        options: Vec<String>,
        ids: Option<MountIds>,
        directory: bool,
    ) -> Mount {
        let has = |name: &str| options.iter().any(|option| option == name);
        let (readonly, below, recursive) = (has("ro") || has("rro"), has("rro"), has("rbind"));
        let live = has("rslave") || has("slave");
        if !directory {
            self.needs.targets.push(mount.destination().clone());
        }
        let place = Path::new(if live { LIVE } else { MOUNTS }).join(self.needs.binds.len().to_string());
        mount.set_source(Some(self.shared.join(&place)));
        // Read-only is enforced on the host's mounts. The guest sees one file system: there the flag is for all that is below, so that it is
        // set only where that makes no difference.
        let one = below || !directory || !recursive || (!live && readonly && !self.points.below(source));
        let guest_options = options.into_iter().filter(|option| one || option != "ro");
        mount.set_options(Some(
            guest_options.map(|option| if option == "rro" { "ro".to_owned() } else { option }).collect(),
        ));
        self.needs.binds.push(HostBind {
            source: source.to_owned(),
            place,
            options: BindOptions {
                readonly,
                readonly_below: below,
                recursive,
                propagation: if live { Propagation::Slave } else { Propagation::Private },
            },
            ids,
        });
        mount
    }
}

/// The map of a mount's ids: its own, or with an option `idmap` or `ridmap` alone the pod's (config.md, "Linux mount options").
fn mount_ids(mount: &Mount, pod_ids: Option<&IdMap>) -> Result<Option<MountIds>, SpecError> {
    let has = |name: &str| mount.options().iter().flatten().any(|option| option == name);
    let (uids, gids) = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
    let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
    let refuse = |why| SpecError::Mount { destination: mount.destination().clone(), why };
    let map = if !uids.is_empty() || !gids.is_empty() {
        let map = IdMap::of_spec(uids, gids);
        map.ok_or_else(|| refuse("has no valid uidMappings and gidMappings of 1 to 340 lines each"))?
    } else if has("idmap") || has("ridmap") {
        let map = pod_ids.cloned();
        map.ok_or_else(|| refuse("wants the ids of a user namespace, and the container has none"))?
    } else {
        return Ok(None);
    };
    Ok(Some(MountIds { map, recursive: has("ridmap") }))
}

/// containerd makes a tmpfs for each sandbox on the host (`.../<sandbox id>/shm`); the guest has one of its own instead.
fn is_pod_shm(source: &Path, destination: &Path, role: &Role) -> bool {
    let Role::Member(sandbox) = role else { return false };
    destination == Path::new("/dev/shm") && source.ends_with(Path::new(sandbox).join("shm"))
}
