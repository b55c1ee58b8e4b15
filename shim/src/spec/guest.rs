//! Turns the host's OCI spec into the guest's: paths below the share directory, the guest's namespaces and cgroup, and none of
//! what only means something on the host. What can't be done truthfully is refused.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, Linux, LinuxDevice, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Spec};

use super::SpecError;
use super::load::{self, Role};
use crate::storage::{BindOptions, Propagation};

/// Most mounts of a container.
pub(crate) const MAX_MOUNTS: usize = 1024;

/// The pod's shared pid namespace in the guest.
const SHARED_PID: &str = "/run/husk/ns/pid";

/// The pod's /dev/shm in the guest.
const SHARED_SHM: &str = "/run/husk/shm";

/// Device nodes that every guest has: major and minor of character devices (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// A file or directory of the host that goes into the container's part of the share directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostBind {
    /// On the host.
    pub(crate) source: PathBuf,
    /// Its name there: `mounts/<number>`.
    pub(crate) number: usize,
    /// How.
    pub(crate) options: BindOptions,
}

/// What the guest runs, and what it needs of the host's files.
#[derive(Clone, Debug)]
pub(crate) struct GuestSpec {
    /// The guest's spec.
    pub(crate) spec: Spec,
    /// The root file system as the host's spec names it, relative to the bundle.
    pub(crate) rootfs: PathBuf,
    /// Sources of its bind mounts.
    pub(crate) binds: Vec<HostBind>,
}

/// The guest's spec for container `id`, which is `role` in its pod.
pub(crate) fn convert(mut spec: Spec, id: &str, role: &Role) -> Result<GuestSpec, SpecError> {
    refuse_hooks(spec.hooks().as_ref())?;
    spec.set_hooks(None).set_annotations(None).set_hostname(None).set_domainname(None);
    spec.set_uid_mappings(None).set_gid_mappings(None);
    let shared = Path::new(husk_agent_api::SHARED_DIR).join(id);

    let mut root = spec.root().clone().ok_or(SpecError::Missing("root"))?;
    let rootfs = root.path().clone();
    root.set_path(shared.join("rootfs"));
    spec.set_root(Some(root));

    let mounts = spec.mounts().clone().unwrap_or_default();
    if mounts.len() > MAX_MOUNTS {
        return Err(SpecError::TooManyMounts(mounts.len()));
    }
    let mut binds = Vec::new();
    let mounts =
        mounts.into_iter().map(|mount| guest_mount(mount, role, &shared, &mut binds)).collect::<Result<Vec<_>, _>>()?;
    spec.set_mounts(Some(mounts));

    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    // A label of the host's policy says nothing to the guest's kernel.
    process.set_selinux_label(None);
    spec.set_process(Some(process));

    let linux = spec.linux().clone().ok_or(SpecError::Missing("linux section"))?;
    spec.set_linux(Some(guest_linux(linux, id, role)?));
    Ok(GuestSpec { spec, rootfs, binds })
}

/// The limits that mean something in the guest: no numbers of the host's CPUs, memory nodes and devices.
pub(crate) fn guest_resources(mut resources: LinuxResources) -> LinuxResources {
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None).set_mems(None).set_realtime_period(None).set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    resources.set_block_io(None).set_hugepage_limits(None).set_network(None).set_rdma(None);
    resources
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

/// One mount: binds get a place in the share directory, everything else is made by the guest.
fn guest_mount(mut mount: Mount, role: &Role, shared: &Path, binds: &mut Vec<HostBind>) -> Result<Mount, SpecError> {
    let options = mount.options().clone().unwrap_or_default();
    let is_bind = mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind");
    if !is_bind {
        return Ok(mount);
    }
    let destination = mount.destination().clone();
    let refuse = |why| SpecError::Mount { destination: destination.clone(), why };
    let source = mount.source().clone().ok_or_else(|| refuse("has no source"))?;
    if is_pod_shm(&source, &destination, role) {
        mount.set_source(Some(SHARED_SHM.into()));
        return Ok(mount);
    }
    if !source.is_absolute() {
        return Err(refuse("has a source that is not an absolute path"));
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(refuse("wants its user ids mapped, which husk does not do"));
    }
    if options.iter().any(|option| option == "rshared" || option == "shared") {
        return Err(refuse(
            "wants its mounts to appear on the host (Bidirectional), which a virtual machine cannot do",
        ));
    }
    let has = |name: &str| options.iter().any(|option| option == name);
    let number = binds.len();
    binds.push(HostBind {
        source,
        number,
        options: BindOptions {
            readonly: has("ro") || has("rro"),
            recursive: has("rbind"),
            propagation: if has("rslave") || has("slave") { Propagation::Slave } else { Propagation::Private },
        },
    });
    mount.set_source(Some(shared.join("mounts").join(number.to_string())));
    // Read-only is enforced on the host's mount, so that a writable mount below a read-only one stays writable; the guest, which
    // sees one tree, must not make all of it read-only (but that is just what "rro" asks for).
    let guest_options = options.into_iter().filter(|option| option != "ro").map(|option| match option.as_str() {
        "rro" => "ro".to_owned(),
        _ => option,
    });
    mount.set_options(Some(guest_options.collect()));
    Ok(mount)
}

/// containerd makes a tmpfs for each sandbox on the host (`.../<sandbox id>/shm`); the guest has one of its own instead.
fn is_pod_shm(source: &Path, destination: &Path, role: &Role) -> bool {
    let Role::Member(sandbox) = role else { return false };
    destination == Path::new("/dev/shm") && source.ends_with(Path::new(sandbox).join("shm"))
}

/// The Linux part.
fn guest_linux(mut linux: Linux, id: &str, role: &Role) -> Result<Linux, SpecError> {
    if linux.uid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty()) {
        return Err(SpecError::UserNamespace);
    }
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    linux.set_namespaces(Some(guest_namespaces(namespaces, role)?));
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(SpecError::SeccompListener);
    }
    let may_drop = allows_all_devices(linux.resources().as_ref());
    let devices = linux.devices().clone().unwrap_or_default();
    linux.set_devices(Some(guest_devices(devices, may_drop)?));
    linux.set_resources(linux.resources().clone().map(guest_resources));
    linux.set_cgroups_path(Some(Path::new("/").join(id)));
    // The pod's parameters are the machine's: the agent sets them when the pod starts.
    if *role == Role::Single {
        linux.set_sysctl(None);
    }
    linux.set_mount_label(None).set_intel_rdt(None).set_memory_policy(None).set_net_devices(None);
    Ok(linux)
}

/// Namespaces as the cell understands them: listed without a path is new, not listed is the pod's.
fn guest_namespaces(namespaces: &[LinuxNamespace], role: &Role) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut guest = vec![namespace(LinuxNamespaceType::Mount, None)];
    if load::namespace(namespaces, LinuxNamespaceType::User).is_some() {
        return Err(SpecError::UserNamespace);
    }
    if *role == Role::Single {
        // It has no pod beside it: only its network namespace (that of its virtual machine) can be an existing one.
        for (kind, name) in
            [(LinuxNamespaceType::Pid, "pid"), (LinuxNamespaceType::Ipc, "ipc"), (LinuxNamespaceType::Uts, "uts")]
        {
            refuse_joining(namespaces, kind, name)?;
        }
    }
    // The pod's pid namespace is whatever has a path, and what stands for the host's: there is no other that a container could join.
    let own_pid = load::namespace(namespaces, LinuxNamespaceType::Pid).is_some_and(|pid| !joins(pid));
    guest.push(namespace(LinuxNamespaceType::Pid, (!own_pid).then_some(SHARED_PID)));
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
fn guest_devices(devices: Vec<LinuxDevice>, may_drop: bool) -> Result<Vec<LinuxDevice>, SpecError> {
    let mut kept = Vec::new();
    for device in devices {
        let known = device.typ().as_str() == "p"
            || (matches!(device.typ().as_str(), "c" | "u")
                && GUEST_DEVICES.contains(&(device.major(), device.minor())));
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
