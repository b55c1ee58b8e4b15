//! Specs as containerd's CRI plugin and `ctr` write them, turned into the guest's.

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Value, json};

use super::guest::{GuestSpec, convert};
use super::load::{self, Role};
use super::mounts::MountIds;
use super::size::{self, Host, Size};
use super::{SpecError, annotations};
use crate::config::Config;
use crate::storage::{IdMap, Propagation};

pub(super) const SANDBOX: &str = "f00d";

fn spec(value: Value) -> Spec {
    serde_json::from_value(value).unwrap()
}

/// A container's spec as containerd 1.6's CRI plugin writes it.
pub(super) fn member() -> Value {
    let sandboxes = format!("/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/{SANDBOX}");
    let shm = format!("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{SANDBOX}/shm");
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0", "oomScoreAdj": 999
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": format!("{sandboxes}/hosts"), "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/data", "type": "bind", "source": "/etc", "options": ["rbind", "rslave", "ro"]}
        ],
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": SANDBOX},
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 15728640},
                "cpu": {"shares": 2, "cpus": "0-3", "mems": "0"}
            },
            "cgroupsPath": "test.slice:cri-containerd:c0ffee",
            "namespaces": [
                {"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "ipc", "path": "/proc/77/ns/ipc"},
                {"type": "uts", "path": "/proc/77/ns/uts"}, {"type": "mount"},
                {"type": "network", "path": "/proc/77/ns/net"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore"]
        }
    })
}

/// One with raw block volumes, each with a rule of its own.
fn container_with_block_devices(count: usize) -> Value {
    let mut value = member();
    let device = |minor| json!({"path": format!("/dev/data{minor}"), "type": "b", "major": 7, "minor": minor});
    value["linux"]["devices"] = (0..count).map(device).collect();
    let rules = value["linux"]["resources"]["devices"].as_array_mut().unwrap();
    rules.extend(
        (0..count).map(|minor| json!({"allow": true, "type": "b", "major": 7, "minor": minor, "access": "rw"})),
    );
    value
}

fn role() -> Role {
    Role::Member(SANDBOX.to_owned())
}

fn converted(value: Value) -> Result<GuestSpec, SpecError> {
    convert(spec(value), "c0ffee", &role(), None)
}

fn namespaces(guest: &GuestSpec) -> Vec<(LinuxNamespaceType, Option<String>)> {
    let listed = guest.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    listed.iter().map(|n| (n.typ(), n.path().as_ref().map(|path| path.display().to_string()))).collect()
}

#[test]
fn tells_roles() {
    assert_eq!(load::role(&spec(member())).unwrap(), role());
    let sandbox = json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox"}});
    assert_eq!(load::role(&spec(sandbox)).unwrap(), Role::Sandbox);
    assert_eq!(load::role(&spec(json!({}))).unwrap(), Role::Single);
    assert!(load::role(&spec(json!({"annotations": {"io.kubernetes.cri.container-type": "x"}}))).is_err());
    assert!(load::role(&spec(json!({"annotations": {"io.kubernetes.cri.container-type": "container"}}))).is_err());
}

#[test]
fn member_joins_the_pods_namespaces_and_gets_a_cgroup_of_its_own() {
    let guest = converted(member()).unwrap();
    assert_eq!(
        namespaces(&guest),
        [
            (LinuxNamespaceType::Mount, None),
            (LinuxNamespaceType::Pid, Some("/run/husk/ns/pid".to_owned())),
            (LinuxNamespaceType::Cgroup, None),
        ]
    );
    let linux = guest.spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_ref().unwrap().to_str(), Some("/c0ffee"));
    let cpu = linux.resources().as_ref().unwrap().cpu().clone().unwrap();
    assert_eq!((cpu.cpus(), cpu.mems(), cpu.shares()), (&None, &None, Some(2)));
    assert_eq!(linux.masked_paths().as_ref().unwrap(), &["/proc/kcore"]);
    let process = guest.spec.process().as_ref().unwrap();
    assert_eq!(process.apparmor_profile().as_deref(), Some("cri-containerd.apparmor.d"));
    assert_eq!(process.selinux_label(), &None);
    assert!(guest.spec.annotations().is_none());
}

#[test]
fn own_pid_namespace_and_privileged_without_cgroup_namespace() {
    let mut value = member();
    value["linux"]["namespaces"] =
        json!([{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": "/proc/77/ns/net"}]);
    let guest = converted(value).unwrap();
    assert_eq!(namespaces(&guest), [(LinuxNamespaceType::Mount, None), (LinuxNamespaceType::Pid, None)]);
}

#[test]
fn binds_go_to_the_share_directory_and_shm_stays_in_the_guest() {
    let guest = converted(member()).unwrap();
    assert_eq!(guest.rootfs.to_str(), Some("rootfs"));
    assert_eq!(guest.spec.root().as_ref().unwrap().path().to_str(), Some("/run/husk/shared/c0ffee/rootfs"));
    let mounts = guest.spec.mounts().clone().unwrap();
    let source = |at: usize| mounts[at].source().as_ref().unwrap().display().to_string();
    assert_eq!(source(0), "proc");
    assert_eq!(mounts[1].typ().as_deref(), Some("cgroup"));
    assert_eq!(source(2), "/run/husk/shared/c0ffee/mounts/0");
    assert_eq!(source(3), "/run/husk/shm");
    assert_eq!(source(4), "/run/husk/shared/c0ffee/live/1");
    assert_eq!(mounts[4].options().as_ref().unwrap(), &["rbind", "rslave"]);
    let binds = guest.needs.binds;
    assert_eq!(binds.len(), 2);
    assert_eq!((binds[1].source.to_str(), binds[1].place.to_str()), (Some("/etc"), Some("live/1")));
    let options = binds[1].options;
    assert_eq!((options.readonly, options.recursive, options.propagation), (true, true, Propagation::Slave));
    assert!(!options.readonly_below && !binds[0].options.readonly);
}

#[test]
fn targets_of_files_are_made_on_the_host_where_they_are_in_the_root_file_system() {
    let targets = |value: &Value, ids: Option<&IdMap>| {
        let targets = convert(spec(value.clone()), "c0ffee", &role(), ids).unwrap().needs.targets;
        targets.into_iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
    };
    let mut value = member();
    value["mounts"][4] =
        json!({"destination": "/proc/x", "type": "bind", "source": "/etc/passwd", "options": ["bind"]});
    assert_eq!(targets(&value, None), ["/etc/hosts"]);
    value["mounts"][1]["destination"] = json!("/etc");
    assert!(targets(&value, None).is_empty());
    let ids = IdMap::of_options("0:1000:65536", "0:1000:65536").unwrap();
    let mapped = with_user_namespace(member(), json!("/proc/77/ns/user"));
    assert!(targets(&mapped, Some(&ids)).is_empty());
}

#[test]
fn a_volume_on_dev_shm_is_a_volume() {
    let mut value = member();
    value["mounts"][3]["source"] = json!("/var/lib/kubelet/pods/x/volumes/kubernetes.io~empty-dir/shm");
    let guest = converted(value).unwrap();
    assert_eq!(guest.needs.binds.len(), 3);
}

#[test]
fn the_guest_shows_read_only_where_it_is_so_throughout() {
    let options = |source: &str, options: Value| {
        let mut value = member();
        value["mounts"] = json!([{"destination": "/x", "type": "bind", "source": source, "options": options}]);
        let guest = converted(value).unwrap();
        let mounts = guest.spec.mounts().clone().unwrap();
        (mounts[0].options().clone().unwrap().contains(&"ro".to_owned()), guest.needs.binds[0].options)
    };
    // A file, a directory without mounts below it, one with some, and those with all made read-only.
    assert!(options("/etc/passwd", json!(["rbind", "ro"])).0);
    assert!(options("/etc", json!(["rbind", "ro"])).0);
    let (shown, host) = options("/", json!(["rbind", "ro"]));
    assert!(!shown && host.readonly && !host.readonly_below);
    assert!(!options("/etc", json!(["rbind", "rslave", "ro"])).0);
    let (shown, host) = options("/", json!(["rbind", "rro"]));
    assert!(shown && host.readonly && host.readonly_below);
    assert!(!options("/etc", json!(["rbind"])).0);
}

#[test]
fn sources_of_the_hosts_kernel_are_the_guests_or_refused() {
    let with = |source: &str| {
        let mut value = member();
        value["mounts"] = json!([{"destination": "/x", "type": "bind", "source": source, "options": ["bind"]}]);
        converted(value)
    };
    let guest = with("/dev/null").unwrap();
    assert_eq!(guest.spec.mounts().as_ref().unwrap()[0].source().as_ref().unwrap().to_str(), Some("/dev/null"));
    assert!(guest.needs.binds.is_empty());
    let directory = std::env::temp_dir().join(format!("husk-spec-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(directory.join("socket")).unwrap();
    nix::unistd::mkfifo(&directory.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["socket", "fifo"] {
        let error = with(directory.join(name).to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("/x") && error.contains("run it with runc"), "{error}");
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_machine_follows_what_it_has_room_for() {
    let size = size(json!({"io.husk.vcpus": "2"})).unwrap();
    let fit = |value: Value, host| super::resources::fit(&serde_json::from_value(value).unwrap(), size, host);
    assert!(fit(json!({"cpu": {"quota": 200000, "period": 100000}}), 8).is_ok());
    assert!(fit(json!({"cpu": {"quota": -1}}), 8).is_ok());
    let error = fit(json!({"cpu": {"quota": 200001, "period": 100000}}), 8).unwrap_err().to_string();
    assert!(error.contains("3 CPUs") && error.contains("(2)"), "{error}");
    // The host itself has no more.
    assert!(fit(json!({"cpu": {"quota": 800000, "period": 100000}}), 2).is_ok());
}

#[test]
fn limits_on_the_hosts_devices_are_refused() {
    let mut value = member();
    value["linux"]["resources"]["blockIO"] = json!({"weight": 500});
    assert!(converted(value.clone()).is_ok());
    value["linux"]["resources"]["blockIO"] =
        json!({"throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 1000}]});
    let error = converted(value).unwrap_err().to_string();
    assert!(error.contains("8:16"), "{error}");
}

#[test]
fn refuses_what_cannot_be_done_truthfully() {
    let mut bidirectional = member();
    bidirectional["mounts"][4]["options"] = json!(["rbind", "rshared"]);
    assert!(matches!(converted(bidirectional), Err(SpecError::Mount { .. })));

    let mut hooks = member();
    hooks["hooks"] = json!({"createRuntime": [{"path": "/bin/hook"}]});
    assert!(matches!(converted(hooks), Err(SpecError::Hooks("createRuntime"))));
    let mut empty_hooks = member();
    empty_hooks["hooks"] = json!({"createRuntime": []});
    assert!(converted(empty_hooks).is_ok());

    let mut user = member();
    user["linux"]["uidMappings"] = json!([{"hostID": 1000, "containerID": 0, "size": 1}]);
    assert!(matches!(converted(user), Err(SpecError::UserNamespace)));

    let mut listener = member();
    listener["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"});
    assert!(matches!(converted(listener), Err(SpecError::SeccompListener)));

    let mut relative = member();
    relative["mounts"][4]["source"] = json!("data");
    assert!(matches!(converted(relative), Err(SpecError::Mount { .. })));
}

#[test]
fn mounts_are_bounded() {
    let mut value = member();
    let mount = json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs"});
    value["mounts"] = Value::Array(vec![mount; super::mounts::MAX_MOUNTS + 1]);
    assert!(matches!(converted(value), Err(SpecError::TooManyMounts(_))));
}

#[test]
fn privileged_loses_the_hosts_devices_and_others_are_refused_by_name() {
    let devices = json!([
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
    ]);
    let mut privileged = member();
    privileged["linux"]["devices"] = devices.clone();
    privileged["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let guest = converted(privileged).unwrap();
    let kept = guest.spec.linux().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!(kept.iter().map(|device| device.path().display().to_string()).collect::<Vec<_>>(), ["/dev/null"]);

    let mut asked = member();
    asked["linux"]["devices"] = devices;
    let error = converted(asked).unwrap_err();
    assert!(error.to_string().contains("/dev/sda (8:0)"), "{error}");
}

/// A sandbox's spec.
fn sandbox(annotations: Value) -> Value {
    let mut all = json!({"io.kubernetes.cri.container-type": "sandbox"});
    all.as_object_mut().unwrap().extend(annotations.as_object().unwrap().clone());
    json!({
        "hostname": "web-0", "annotations": all,
        "linux": {
            "sysctl": {"kernel.shm_rmid_forced": "1"}, "cgroupsPath": "/kubepods/pod1/f00d",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/var/run/netns/cni-1"}
            ]
        }
    })
}

#[test]
fn pod_takes_network_name_and_sysctls_from_the_sandbox() {
    let pod = load::pod(&spec(sandbox(json!({})))).unwrap();
    assert_eq!(pod.hostname, "web-0");
    assert_eq!(pod.netns.unwrap().to_str(), Some("/var/run/netns/cni-1"));
    assert_eq!(pod.cgroups_path, "/kubepods/pod1/f00d");
    assert_eq!(pod.sysctls["kernel.shm_rmid_forced"], "1");
}

#[test]
fn host_namespaces_are_refused_with_words() {
    for kind in ["network", "ipc"] {
        let mut value = sandbox(json!({}));
        value["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != kind);
        let error = load::pod(&spec(value)).unwrap_err().to_string();
        assert!(error.contains(kind) && error.contains("run it with runc"), "{error}");
    }
}

#[test]
fn the_hosts_processes_are_those_of_the_virtual_machine() {
    let mut value = sandbox(json!({}));
    value["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    assert!(load::pod(&spec(value)).is_ok());
    let mut value = member();
    value["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    let pid = (LinuxNamespaceType::Pid, Some("/run/husk/ns/pid".to_owned()));
    assert!(namespaces(&converted(value).unwrap()).contains(&pid));
}

/// A pod with a user namespace, as containerd 2.4 writes it.
fn with_user_namespace(mut value: Value, path: Value) -> Value {
    let ids = json!([{"containerID": 0, "hostID": 1000, "size": 65536}]);
    value["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user", "path": path}));
    value["linux"]["uidMappings"] = ids.clone();
    value["linux"]["gidMappings"] = ids.clone();
    value["mounts"][2]["uidMappings"] = ids.clone();
    value["mounts"][2]["gidMappings"] = ids;
    value
}

#[test]
fn containers_share_the_user_namespace_of_their_pod() {
    let ids = IdMap::of_options("0:1000:65536", "0:1000:65536").unwrap();
    let mut value = sandbox(json!({}));
    value["mounts"] = json!([{"destination": "/a"}, {"destination": "/b"}, {"destination": "/c"}]);
    let value = with_user_namespace(value, json!("/run/containerd/x/userns"));
    assert_eq!(load::pod(&spec(value)).unwrap().user_namespace, Some(ids.clone()));

    let value = with_user_namespace(member(), json!("/proc/77/ns/user"));
    let guest = convert(spec(value.clone()), "c0ffee", &role(), Some(&ids)).unwrap();
    let found = namespaces(&guest);
    for (kind, name) in [
        (LinuxNamespaceType::User, "user"),
        (LinuxNamespaceType::Network, "net"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Pid, "pid"),
    ] {
        assert!(found.contains(&(kind, Some(format!("/run/husk/ns/{name}")))), "{found:?}");
    }
    assert_eq!(guest.needs.binds[0].ids, Some(MountIds { map: ids.clone(), recursive: false }));
    assert_eq!(guest.needs.binds[1].ids, None);
    let mount = &guest.spec.mounts().as_ref().unwrap()[2];
    assert!(mount.uid_mappings().is_none() && mount.gid_mappings().is_none());

    assert!(matches!(converted(value), Err(SpecError::OtherUserNamespace)));
    let alone = convert(spec(member()), "c0ffee", &role(), Some(&ids));
    assert!(matches!(alone, Err(SpecError::OtherUserNamespace)));
    let mut nameless = with_user_namespace(member(), json!("/proc/77/ns/user"));
    nameless["linux"]["gidMappings"] = json!([]);
    assert!(matches!(convert(spec(nameless), "c0ffee", &role(), Some(&ids)), Err(SpecError::UserNamespace)));
    for map in ["uidMappings", "gidMappings"] {
        let mut rootless = with_user_namespace(member(), json!("/run/containerd/x/userns"));
        rootless["linux"][map] = json!([{"containerID": 1, "hostID": 1000, "size": 65536}]);
        let converted = convert(spec(rootless), "c0ffee", &role(), Some(&ids));
        assert!(matches!(converted, Err(SpecError::UnmappedRoot)), "{map}");
    }
}

#[test]
fn mounts_are_mapped_by_their_own_ids_or_the_pods() {
    let ids = IdMap::of_options("0:1000:65536", "0:1000:65536").unwrap();
    let mut value = with_user_namespace(member(), json!("/proc/77/ns/user"));
    value["mounts"][4]["options"] = json!(["rbind", "ridmap"]);
    let guest = convert(spec(value.clone()), "c0ffee", &role(), Some(&ids)).unwrap();
    assert_eq!(guest.needs.binds[1].ids, Some(MountIds { map: ids.clone(), recursive: true }));
    assert_eq!(guest.spec.mounts().as_ref().unwrap()[4].options().as_deref(), Some(&["rbind".to_owned()][..]));
    value["mounts"][4]["uidMappings"] = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
    assert!(convert(spec(value.clone()), "c0ffee", &role(), Some(&ids)).is_err(), "no gidMappings");
    value["mounts"][4] = json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["idmap"]});
    assert!(convert(spec(value), "c0ffee", &role(), Some(&ids)).is_err(), "a tmpfs");
    let mut value = member();
    value["mounts"][4]["options"] = json!(["rbind", "idmap"]);
    assert!(converted(value).is_err(), "no user namespace");
}

/// A host with 8 CPUs and 5 GiB.
const HOST: Host = Host { cpus: 8, memory_mib: 5000 };

fn size(annotations: Value) -> Result<Size, SpecError> {
    size::of(&spec(sandbox(annotations)), &Role::Sandbox, &Config::default(), HOST)
}

/// vCPUs and the ceiling.
fn figures(size: Size) -> (u8, u64) {
    (size.vcpus, size.ceiling_mib)
}

#[test]
fn size_follows_wishes_then_limits_then_the_default() {
    let default = size(json!({})).unwrap();
    let wanted = Size {
        vcpus: 1,
        memory_mib: 256,
        hotplug_mib: 4096,
        ceiling_mib: 2048,
        follows_limits: false,
        overhead_mib: 64,
    };
    assert_eq!((default, default.growth_mib()), (wanted, 1792));
    let limits = json!({
        "io.kubernetes.cri.sandbox-cpu-period": "100000", "io.kubernetes.cri.sandbox-cpu-quota": "250000",
        "io.kubernetes.cri.sandbox-memory": "268435456"
    });
    let limited = size(limits).unwrap();
    assert_eq!((figures(limited), limited.memory_mib, limited.follows_limits), ((3, 320), 256, true));
    let unlimited = json!({
        "io.kubernetes.cri.sandbox-cpu-period": "100000", "io.kubernetes.cri.sandbox-cpu-quota": "0",
        "io.kubernetes.cri.sandbox-cpu-shares": "2048", "io.kubernetes.cri.sandbox-memory": "0"
    });
    assert_eq!(figures(size(unlimited).unwrap()), (2, 2048));
    let wishes =
        json!({"io.husk.vcpus": "4", "io.husk.memory-mib": "96", "io.kubernetes.cri.sandbox-memory": "268435456"});
    let small = size(wishes).unwrap();
    assert_eq!((figures(small), small.memory_mib, small.growth_mib()), ((4, 96), 96, 0));
    assert!(!small.follows_limits);
    // No more than the host can plug in.
    assert_eq!(size(json!({"io.husk.memory-mib": "8192"})).unwrap().ceiling_mib, 256 + 4096);
    assert_eq!(size(json!({"io.husk.vcpus": "64"})).unwrap().vcpus, 8);
}

#[test]
fn size_of_a_single_container_follows_its_limits() {
    let value =
        json!({"linux": {"resources": {"memory": {"limit": 134217728}, "cpu": {"quota": 150000, "period": 100000}}}});
    let size = size::of(&spec(value), &Role::Single, &Config::default(), HOST).unwrap();
    assert_eq!((figures(size), size.memory_mib), ((2, 192), 192));
}

#[test]
fn too_small_a_limit_is_refused_with_words() {
    let error = size(json!({"io.kubernetes.cri.sandbox-memory": "1048576"})).unwrap_err();
    assert!(error.to_string().contains("too small"), "{error}");
    assert!(size(json!({"io.kubernetes.cri.sandbox-memory": "much"})).is_err());
}

#[test]
fn unknown_and_bad_annotations_are_refused_by_name() {
    let parse = |value: Value| annotations::parse(&serde_json::from_value(value).unwrap());
    let error = parse(json!({"io.husk.kernel": "/evil"})).unwrap_err().to_string();
    assert!(error.contains("io.husk.kernel") && error.contains("io.husk.vcpus"), "{error}");
    for (key, value) in [
        ("io.husk.vcpus", "0"),
        ("io.husk.vcpus", "65"),
        ("io.husk.vcpus", "two"),
        ("io.husk.memory-mib", "63"),
        ("io.husk.memory-mib", "-1"),
        ("io.husk.memory-mib", "99999999999999999999"),
    ] {
        let mut annotations = serde_json::Map::new();
        annotations.insert(key.to_owned(), json!(value));
        assert!(matches!(parse(Value::Object(annotations)), Err(SpecError::AnnotationValue { .. })), "{key}={value}");
    }
    assert_eq!(parse(json!({"other.io/x": "y"})).unwrap(), annotations::Wishes::default());
}

#[test]
fn raw_block_volumes_become_disks_with_their_access() {
    let mut spec = container_with_block_devices(2);
    spec["linux"]["resources"]["devices"].as_array_mut().unwrap()[1]["access"] = json!("r");
    let guest = converted(spec).unwrap();
    let disks: Vec<_> = guest
        .block_devices
        .iter()
        .map(|disk| (disk.path.to_str().unwrap(), disk.major, disk.minor, disk.read_only()))
        .collect();
    assert_eq!(disks, [("/dev/data0", 7, 0, true), ("/dev/data1", 7, 1, false)]);
    let linux = guest.spec.linux().as_ref().unwrap();
    assert_eq!(linux.devices().as_ref().unwrap().len(), 2);
    // The host's numbers mean nothing in the guest.
    assert_eq!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
    let error = converted(container_with_block_devices(17)).unwrap_err();
    assert!(error.to_string().contains("17 block devices; 16 are possible"), "{error}");
}

#[test]
fn a_privileged_container_gets_the_block_devices_that_it_asked_for() {
    let mut spec = container_with_block_devices(2);
    let rules = spec["linux"]["resources"]["devices"].as_array_mut().unwrap();
    rules[0] = json!({"allow": true, "access": "rwm"});
    rules.truncate(2);
    let guest = converted(spec).unwrap();
    assert_eq!(guest.block_devices.len(), 1);
    assert_eq!(guest.spec.linux().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
}
