//! Containers in the guest: their files put into the share directory, the agent asked to build them, and all of it taken back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::api::Mount;
use husk_agent_api::agent::{CreateContainerRequest, HugeVolume};
use oci_spec::runtime::{LinuxResources, Spec};
use tracing::{info, warn};

use super::Pod;
use super::cpusets::CpuSet;
use super::disks::Wanted;
use super::machine::{Machine, unmount_below};
use crate::apparmor;
use crate::container::Container;
use crate::container::process::Process;
use crate::container::stdio::{Pending, Written};
use crate::error::{Error, chain};
use crate::peer::PeerError;
use crate::spec::SpecError;
use crate::spec::guest;
use crate::spec::load::Role;
use crate::spec::mounts::{HostBind, LIVE, MOUNTS};
use crate::spec::resources;
use crate::storage::idmap::Namespaces;
use crate::storage::source::HugePages;
use crate::storage::{self, BindOptions, RootfsMount, StorageError, disk};

/// A container's files on the host, and where they go.
struct Files {
    share: PathBuf,
    scratch: PathBuf,
    rootfs: Vec<RootfsMount>,
    bundle_rootfs: PathBuf,
    /// The root file system is a disk.
    on_disk: bool,
    binds: Vec<HostBind>,
    targets: Vec<PathBuf>,
}

/// All that a container needs before it can be made.
struct Provisions {
    files: Files,
    disks: Wanted,
    huge: Vec<HugeVolume>,
}

impl Pod {
    /// Makes a container in the running guest, up to (not including) the start of its process.
    pub(super) async fn create_guest(
        &self,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        spec: Spec,
        role: &Role,
        rootfs: &[Mount],
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let set = CpuSet::of(limits(&spec));
        let mut guest = guest::convert(spec, &container.id, role, machine.user_namespace.as_ref())?;
        let rootfs: Vec<_> = rootfs.iter().map(rootfs_mount).collect();
        let root = disk::root_disk(&rootfs)?;
        if root.is_some() {
            guest.move_root(&disk_root(container));
        }
        let disks = Wanted { devices: std::mem::take(&mut guest.block_devices), root };
        let files = Files {
            share: machine.shared().join(container.share()),
            scratch: machine.shared().with_file_name(format!("layers-{}", container.id)),
            rootfs,
            on_disk: disks.root.is_some(),
            bundle_rootfs: Path::new(&container.bundle).join(&guest.rootfs),
            binds: guest.needs.binds,
            targets: guest.needs.targets,
        };
        let share = files.share.clone();
        let huge: Vec<_> = guest.needs.huge.into_iter().map(huge_volume).collect();
        machine.cpusets.put(&container.id, set.unwrap_or_default(), machine.cgroup.as_ref())?;
        let outcome = self.build(machine, container, &guest.spec, Provisions { files, disks, huge }, begun).await;
        if outcome.is_err() {
            release_cpus(machine, &container.id);
            machine.forget_limit(&container.id).await;
            machine.detach_disks(&container.id).await;
            take_back(share).await;
        }
        outcome
    }

    /// Mounts, streams, and the agent's part.
    async fn build(
        &self,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        spec: &Spec,
        Provisions { files, disks, huge }: Provisions,
        begun: Instant,
    ) -> Result<(), Error> {
        let init = &container.init;
        let mounting = async {
            tokio::task::spawn_blocking(move || mount(&files)).await.map_err(Error::from)?.map_err(Error::from)
        };
        let opening = async {
            let opened = Pending::open(&init.stdio, &machine.dial, &self.around.namespace, &container.id).await;
            opened.map_err(Error::from)
        };
        let giving = async {
            match apparmor::wanted(spec.process().as_ref()) {
                Some(profile) => machine.profiles.give(&machine.agent, profile).await.map_err(Error::from),
                None => Ok(()),
            }
        };
        let root = disk_root(container);
        let attaching = machine.attach_disks(&container.id, &root, disks);
        let limit = resources::memory_limit(limits(spec));
        let growing = machine.make_room(&container.id, limit, wants_huge_pages(limits(spec), &huge));
        let (mounted, pending, given, disks, ()) = tokio::join!(mounting, opening, giving, attaching, growing);
        mounted?;
        let pending = pending?;
        given?;
        let mounted = begun.elapsed();
        let request = CreateContainerRequest {
            id: container.id.to_string(),
            spec: serde_json::to_vec(spec).map_err(|error| Error::Spec(SpecError::Encode(error)))?,
            stdio: Some(pending.request(init.size())).into(),
            huge_volumes: huge,
            disks: disks?,
            ..Default::default()
        };
        machine.agent.create_container(&request).await?;
        match pending.join().await {
            Ok(streams) => *init.streams.lock().await = Some(streams),
            Err(error) => {
                ignore_absent(machine.agent.delete_container(&container.id).await);
                return Err(error.into());
            }
        }
        if let Some(score) = spec.process().as_ref().and_then(|process| process.oom_score_adj()) {
            machine.lower_oom_score(score);
        }
        info!(
            "container created id={} mounts_ms={:.1} cell_ms={:.1} total_ms={:.1}",
            container.id,
            mounted.as_secs_f64() * 1000.0,
            (begun.elapsed() - mounted).as_secs_f64() * 1000.0,
            begun.elapsed().as_secs_f64() * 1000.0,
        );
        Ok(())
    }

    /// Removes an ended container from the guest and its files from the share directory.
    pub(super) async fn delete_guest(&self, container: &Arc<Container>) -> Result<(), Error> {
        let machine = self.current();
        if let Some(machine) = machine.as_ref().filter(|machine| machine.cause().is_none()) {
            match machine.agent.delete_container(&container.id).await {
                // If it died meanwhile, there is nothing in it that could be left.
                Err(error) if machine.cause().is_some() || matches!(error, PeerError::Connection { .. }) => {
                    warn!("{}", chain(&error));
                }
                Err(error) if error.is_not_found() => {}
                other => other?,
            }
        }
        for process in container.processes() {
            // All who could write are gone.
            drain(&process, &container.id, Written::ALL).await;
        }
        if let Some(machine) = machine {
            machine.detach_disks(&container.id).await;
            machine.forget_limit(&container.id).await;
            release_cpus(&machine, &container.id);
            take_back(machine.shared().join(container.share())).await;
        }
        Ok(())
    }

    /// Forgets an ended exec process.
    pub(super) async fn delete_exec(&self, container: &Container, process: &Arc<Process>) {
        drain(process, &process.exec_id, process.written()).await;
        if let Ok(machine) = self.running("forget a process") {
            ignore_absent(machine.agent.delete_process(&container.id, &process.exec_id).await);
        }
        container.remove_exec(&process.exec_id);
    }
}

/// A container's limits.
fn limits(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
}

/// Whether the container sets huge pages aside or has a volume of them.
fn wants_huge_pages(limits: Option<&LinuxResources>, volumes: &[HugeVolume]) -> bool {
    let pages = limits.and_then(|limits| limits.hugepage_limits().as_deref()).unwrap_or_default();
    !volumes.is_empty() || pages.iter().any(|limit| limit.limit() > 0)
}

/// Lets the others' CPUs count only.
fn release_cpus(machine: &Machine, id: &str) {
    if let Err(error) = machine.cpusets.remove(id, machine.cgroup.as_ref()) {
        warn!("cannot set the pod's CPUs anew: {}", chain(&error));
    }
}

/// Waits until containerd has that much of a process's output, and closes its streams.
async fn drain(process: &Process, id: &str, written: Written) {
    // The lock is not held while waiting: CloseIO may come meanwhile.
    let streams = process.streams.lock().await.take();
    if let Some(streams) = streams {
        streams.drain(id, written).await;
    }
}

/// For clean-up: what is not there is fine, anything else is worth a line.
fn ignore_absent(outcome: Result<(), PeerError>) {
    match outcome {
        Err(error) if !error.is_not_found() => warn!("{}", chain(&error)),
        _ => {}
    }
}

/// Where the guest mounts a container's root file system that is a disk.
fn disk_root(container: &Container) -> String {
    format!("{}/{}", husk_agent_api::DISKS_DIR, &*container.id)
}

fn rootfs_mount(mount: &Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

fn huge_volume((name, pages): (String, HugePages)) -> HugeVolume {
    let HugePages { page_size, size, mode, uid, gid, .. } = pages;
    HugeVolume { name, page_size, size, mode, uid, gid, ..Default::default() }
}

/// Mounts a container's files into its part of the share directory.
fn mount(files: &Files) -> Result<(), StorageError> {
    let root = files.share.join("rootfs");
    if files.on_disk {
        std::fs::create_dir_all(&files.share).map_err(|cause| StorageError::Disk {
            name: files.share.display().to_string(),
            step: "make the container's part of the share directory",
            cause,
        })?;
    } else if files.rootfs.is_empty() {
        // `ctr run --rootfs` and the like: the bundle names a directory that is already there.
        let options = BindOptions { readonly: false, recursive: true, ..BindOptions::default() };
        storage::bind(&files.bundle_rootfs, &root, options)?;
    } else {
        storage::mount_rootfs(&files.rootfs, &root, &files.scratch)?;
        storage::make_targets(&root, &files.targets);
    }
    let mut namespaces = Namespaces::default();
    for bind in &files.binds {
        let ids = bind.ids.as_ref();
        let mapped = ids.map(|ids| namespaces.map(&ids.map, ids.recursive, &bind.source)).transpose()?;
        storage::bind_mapped(&bind.source, &files.share.join(&bind.place), bind.options, mapped.as_ref())?;
    }
    Ok(())
}

/// Unmounts a container's part of the share directory and removes it. The small file system that it is on holds only mount points.
async fn take_back(share: PathBuf) {
    let work = move || {
        unmount_below(&share);
        match remove_mount_points(&share) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!("cannot remove {}: {error}", share.display());
            }
            _ => {}
        }
    };
    if let Err(error) = tokio::task::spawn_blocking(work).await {
        warn!("the removal of a container's files was cut off: {error}");
    }
}

/// Removes empty directories and files that were mount points; whatever is not empty stays, and is an error.
fn remove_mount_points(share: &Path) -> std::io::Result<()> {
    for mounts in [share.join(MOUNTS), share.join(LIVE)] {
        if !mounts.exists() {
            continue;
        }
        for entry in std::fs::read_dir(&mounts)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_dir(&mounts)?;
    }
    let root = share.join("rootfs");
    if root.exists() {
        std::fs::remove_dir(&root)?;
    }
    std::fs::remove_dir(share)
}
