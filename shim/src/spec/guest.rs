//! Turns the host's OCI spec into the guest's: paths below the share directory, the guest's namespaces and cgroup, and none of
//! what only means something on the host. What can't be done truthfully is refused.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, Linux, LinuxDevice, LinuxNamespace, LinuxNamespaceType, LinuxResources, Process, Spec};

use super::SpecError;
use super::block::{self, BlockDevice};
use super::load::{self, Role};
use super::mounts::{Needs, guest_mounts};
use super::resources::guest_resources;
use crate::storage::IdMap;

/// The pod's shared pid namespace in the guest.
const SHARED_PID: &str = "/run/husk/ns/pid";

/// The pod's namespaces in the guest, made when the pod has a user namespace: that and those that belong to it.
const POD_NAMESPACES: [(LinuxNamespaceType, &str); 4] = [
    (LinuxNamespaceType::User, "/run/husk/ns/user"),
    (LinuxNamespaceType::Network, "/run/husk/ns/net"),
    (LinuxNamespaceType::Ipc, "/run/husk/ns/ipc"),
    (LinuxNamespaceType::Uts, "/run/husk/ns/uts"),
];

/// Kernel parameters of an ipc namespace (ipc_namespaces(7)), beside fs.mqueue.*.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Device nodes that every guest has: major and minor of character devices (Documentation/admin-guide/devices.txt), and name in /dev.
pub(super) const GUEST_DEVICES: [(i64, i64, &str); 10] = [
    (1, 3, "null"),
    (1, 5, "zero"),
    (1, 7, "full"),
    (1, 8, "random"),
    (1, 9, "urandom"),
    (1, 11, "kmsg"),
    (5, 0, "tty"),
    (5, 2, "ptmx"),
    (10, 200, "net/tun"),
    (10, 229, "fuse"),
];

/// What the guest runs, and what it needs of the host's files.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    /// The guest's spec.
    pub(crate) spec: Spec,
    /// The root file system as the host's spec names it, relative to the bundle.
    pub(crate) rootfs: PathBuf,
    /// What its mounts need.
    pub(crate) needs: Needs,
    /// The host's block devices among its devices.
    pub(crate) block_devices: Vec<BlockDevice>,
}

impl GuestSpec {
    /// Has the root file system at another path of the guest.
    pub(crate) fn move_root(&mut self, path: &str) {
        if let Some(root) = self.spec.root_mut() {
            root.set_path(path.into());
        }
    }
}

/// The guest's spec for container `id`, which is `role` in a pod whose user namespace, if any, is `pod_ids`.
pub(crate) fn convert(mut spec: Spec, id: &str, role: &Role, pod_ids: Option<&IdMap>) -> Result<GuestSpec, SpecError> {
    refuse_hooks(spec.hooks().as_ref())?;
    spec.set_hooks(None).set_annotations(None);
    let own_names = has_own_names(&spec, role);
    if !own_names {
        spec.set_hostname(None).set_domainname(None);
    }
    spec.set_uid_mappings(None).set_gid_mappings(None);
    let shared = Path::new(husk_agent_api::SHARED_DIR).join(id);

    let mut root = spec.root().clone().ok_or(SpecError::Missing("root"))?;
    let rootfs = root.path().clone();
    root.set_path(shared.join("rootfs"));
    spec.set_root(Some(root));

    let (mounts, needs) = guest_mounts(spec.mounts().clone().unwrap_or_default(), role, pod_ids, &shared)?;
    spec.set_mounts(Some(mounts));

    let process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    spec.set_process(Some(guest_process(process)?));

    let linux = spec.linux().clone().ok_or(SpecError::Missing("linux section"))?;
    if load::user_namespace(&linux)?.as_ref() != pod_ids {
        return Err(SpecError::OtherUserNamespace);
    }
    let devices = linux.devices().as_deref().unwrap_or_default();
    let block_devices = block::asked(devices, linux.resources().as_ref())?;
    spec.set_linux(Some(guest_linux(linux, id, role, own_names, &block_devices)?));
    Ok(GuestSpec { spec, rootfs, needs, block_devices })
}

/// A process, of a container's spec or of an exec.
pub(crate) fn guest_process(mut process: Process) -> Result<Process, SpecError> {
    if !process.cwd().is_absolute() {
        return Err(SpecError::WorkingDirectory(process.cwd().clone()));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(SpecError::HostOnly("an execCPUAffinity, whose processors are the host's"));
    }
    // A label of the host's policy says nothing to the guest's kernel.
    process.set_selinux_label(None);
    Ok(process)
}

/// Hooks run on the host and expect the container's process and namespaces there.
fn refuse_hooks(hooks: Option<&Hooks>) -> Result<(), SpecError> {
    let Some(hooks) = hooks else { return Ok(()) };
    #[allow(deprecated)] // Prestart hooks are what older tools still write.
    let kinds = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    match kinds.iter().find(|(_, hooks)| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty())) {
        Some((kind, _)) => Err(SpecError::Hooks(kind)),
        None => Ok(()),
    }
}

/// Whether the container gets a uts namespace in the guest: one in a pod that asks for a new one, and a single one whose NIS domain
/// name is to be set (its host name is the machine's).
fn has_own_names(spec: &Spec, role: &Role) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let new = load::namespace(namespaces, LinuxNamespaceType::Uts).is_some_and(|uts| !joins(uts));
    new && (*role != Role::Single || spec.domainname().as_ref().is_some_and(|name| !name.is_empty()))
}

/// The Linux part.
fn guest_linux(
    mut linux: Linux,
    id: &str,
    role: &Role,
    own_names: bool,
    disks: &[BlockDevice],
) -> Result<Linux, SpecError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let namespaces = guest_namespaces(namespaces, role, own_names)?;
    refuse_sysctls(&linux, &namespaces, role)?;
    refuse_unknown(&linux)?;
    linux.set_namespaces(Some(namespaces));
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(SpecError::SeccompListener);
    }
    let may_drop = allows_all_devices(linux.resources().as_ref());
    let devices = linux.devices().clone().unwrap_or_default();
    linux.set_devices(Some(guest_devices(devices, disks, may_drop)?));
    linux.set_resources(linux.resources().clone().map(guest_resources).transpose()?);
    linux.set_cgroups_path(Some(Path::new("/").join(id)));
    // The pod's parameters are the machine's: the agent sets them when the pod starts.
    if *role == Role::Single {
        linux.set_sysctl(None);
    }
    // A label of the host's policy says nothing to the guest's kernel.
    linux.set_mount_label(None);
    Ok(linux)
}

/// What is about the host's hardware.
fn refuse_unknown(linux: &Linux) -> Result<(), SpecError> {
    let asked = [
        (linux.intel_rdt().is_some(), "intelRdt, which divides the host's cache between processes on the host"),
        (linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()), "netDevices, which are the host's"),
        (linux.memory_policy().is_some(), "a memoryPolicy, which is about the host's memory nodes"),
    ];
    match asked.into_iter().find(|(is_asked, _)| *is_asked) {
        Some((_, what)) => Err(SpecError::HostOnly(what)),
        None => Ok(()),
    }
}

/// A container of a pod may set kernel parameters of namespaces of its own only; the others are the pod's, whose sandbox names them.
fn refuse_sysctls(linux: &Linux, namespaces: &[LinuxNamespace], role: &Role) -> Result<(), SpecError> {
    if *role == Role::Single {
        return Ok(());
    }
    let owns = |kind| load::namespace(namespaces, kind).is_some_and(|namespace| !joins(namespace));
    for name in linux.sysctl().iter().flat_map(|sysctls| sysctls.keys()) {
        let plain = name.replace('/', ".");
        let own = match plain.split('.').next() {
            Some("net") => owns(LinuxNamespaceType::Network),
            Some("fs") => plain.starts_with("fs.mqueue.") && owns(LinuxNamespaceType::Ipc),
            Some("kernel") if plain == "kernel.domainname" => owns(LinuxNamespaceType::Uts),
            Some("kernel") => IPC_SYSCTLS.contains(&plain.as_str()) && owns(LinuxNamespaceType::Ipc),
            _ => false,
        };
        if !own {
            return Err(SpecError::Sysctl(name.clone()));
        }
    }
    Ok(())
}

/// Namespaces as the cell understands them: listed without a path is new, not listed is the pod's.
fn guest_namespaces(
    namespaces: &[LinuxNamespace],
    role: &Role,
    own_names: bool,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut guest = vec![namespace(LinuxNamespaceType::Mount, None)];
    if *role == Role::Single {
        // It has no pod beside it: only its network namespace (that of its virtual machine) can be an existing one.
        for (kind, name) in [
            (LinuxNamespaceType::Pid, "pid"),
            (LinuxNamespaceType::Ipc, "ipc"),
            (LinuxNamespaceType::Uts, "uts"),
            (LinuxNamespaceType::User, "user"),
        ] {
            refuse_joining(namespaces, kind, name)?;
        }
    }
    // The pod's pid namespace is whatever has a path, and what stands for the host's: there is no other that a container could join.
    let own_pid = load::namespace(namespaces, LinuxNamespaceType::Pid).is_some_and(|pid| !joins(pid));
    guest.push(namespace(LinuxNamespaceType::Pid, (!own_pid).then_some(SHARED_PID)));
    // A single container's are the machine's.
    let new =
        |kind| *role != Role::Single && load::namespace(namespaces, kind).is_some_and(|namespace| !joins(namespace));
    let own = [
        (LinuxNamespaceType::Uts, own_names),
        (LinuxNamespaceType::Ipc, new(LinuxNamespaceType::Ipc)),
        (LinuxNamespaceType::Network, new(LinuxNamespaceType::Network)),
    ];
    guest.extend(own.iter().filter(|(_, is_own)| *is_own).map(|(kind, _)| namespace(*kind, None)));
    if load::namespace(namespaces, LinuxNamespaceType::User).is_some() {
        let pods = POD_NAMESPACES.iter().filter(|(kind, _)| !own.contains(&(*kind, true)));
        guest.extend(pods.map(|(kind, path)| namespace(*kind, Some(path))));
    }
    for (kind, name) in [(LinuxNamespaceType::Cgroup, "cgroup"), (LinuxNamespaceType::Time, "time")] {
        refuse_joining(namespaces, kind, name)?;
        if load::namespace(namespaces, kind).is_some() {
            guest.push(namespace(kind, None));
        }
    }
    Ok(guest)
}

/// Refuses to join an existing namespace of a kind.
fn refuse_joining(
    namespaces: &[LinuxNamespace],
    kind: LinuxNamespaceType,
    name: &'static str,
) -> Result<(), SpecError> {
    match load::namespace(namespaces, kind) {
        Some(other) if joins(other) => Err(SpecError::ForeignNamespace(name, other.path().clone().unwrap_or_default())),
        _ => Ok(()),
    }
}

/// Whether the entry names an existing namespace.
fn joins(namespace: &LinuxNamespace) -> bool {
    namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty())
}

fn namespace(kind: LinuxNamespaceType, path: Option<&str>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace.set_path(path.map(PathBuf::from));
    namespace
}

/// A container that may use every device (a privileged one) is given every node of the host by containerd; it asked for none of
/// them in particular.
fn allows_all_devices(resources: Option<&LinuxResources>) -> bool {
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    rules.iter().any(|rule| {
        rule.allow()
            && rule.major().is_none_or(|major| major < 0)
            && rule.minor().is_none_or(|minor| minor < 0)
            && rule.typ().is_none_or(|kind| kind.as_str() == "a")
    })
}

/// The device nodes that the guest has too. Others are dropped where nobody asked for them, else refused.
fn guest_devices(
    devices: Vec<LinuxDevice>,
    disks: &[BlockDevice],
    may_drop: bool,
) -> Result<Vec<LinuxDevice>, SpecError> {
    let mut kept = Vec::new();
    for device in devices {
        let known = device.typ().as_str() == "p"
            || disks.iter().any(|disk| disk.is(&device))
            || (matches!(device.typ().as_str(), "c" | "u")
                && GUEST_DEVICES.iter().any(|(major, minor, _)| (*major, *minor) == (device.major(), device.minor())));
        if known {
            kept.push(device);
        } else if !may_drop {
            return Err(SpecError::Device {
                path: device.path().clone(),
                major: device.major(),
                minor: device.minor(),
            });
        }
    }
    Ok(kept)
}
