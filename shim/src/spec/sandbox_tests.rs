//! The Sandbox API's pods read as those of containerd's pause containers are.

use generated::cri::{
    LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, UserNamespace,
};

use super::*;
use crate::config::Config;
use crate::spec::load::{self, Role};
use crate::spec::size::{self, Host};

fn config_of(linux: LinuxPodSandboxConfig) -> PodSandboxConfig {
    PodSandboxConfig { hostname: "fig".to_owned(), linux: Some(linux).into(), ..Default::default() }
}

fn with_network(mode: NamespaceMode) -> LinuxPodSandboxConfig {
    let options = NamespaceOption { network: mode.into(), ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: Some(options).into(), ..Default::default() };
    LinuxPodSandboxConfig { security_context: Some(context).into(), ..Default::default() }
}

#[test]
fn options_are_the_cris() {
    let value = config_of(LinuxPodSandboxConfig::default()).write_to_bytes().unwrap();
    let any = |type_url: &str| Any { type_url: type_url.to_owned(), value: value.clone(), ..Default::default() };
    assert_eq!(config(&any("runtime.v1.PodSandboxConfig")).unwrap().hostname, "fig");
    assert_eq!(config(&any("type.googleapis.com/runtime.v1.PodSandboxConfig")).unwrap().hostname, "fig");
    let error = config(&any("x.Options")).unwrap_err().to_string();
    assert!(error.contains("x.Options") && error.contains(CONFIG_TYPE), "{error}");
    let broken = Any { value: vec![0xff; 9], ..any(CONFIG_TYPE) };
    assert!(matches!(config(&broken), Err(SpecError::SandboxConfig(_))));
}

#[test]
fn a_pod_is_what_its_config_says() {
    let mut linux = with_network(NamespaceMode::POD);
    linux.cgroup_parent = "/kubepods/pod1".to_owned();
    linux.sysctls.insert("net.core.somaxconn".to_owned(), "7".to_owned());
    let resources = LinuxContainerResources {
        cpu_quota: 250_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 256 << 20,
        ..Default::default()
    };
    linux.resources = Some(resources).into();
    let mut config = config_of(linux);
    config.annotations.insert("io.kubernetes.cri.sandbox-memory".to_owned(), "1".to_owned());
    let spec = spec(&config, "s1", "k8s.io", "/run/netns/x").unwrap();
    assert_eq!(load::role(&spec).unwrap(), Role::Sandbox);
    let pod = load::pod(&spec).unwrap();
    assert_eq!((pod.hostname.as_str(), pod.cgroups_path.as_str()), ("fig", "/kubepods/pod1/s1"));
    assert_eq!(pod.netns.as_deref(), Some(Path::new("/run/netns/x")));
    assert_eq!(pod.sysctls["net.core.somaxconn"], "7");
    let host = Host { cpus: 8, memory_mib: 8192 };
    let size = size::of(&spec, &Role::Sandbox, &Config::default(), host).unwrap();
    assert_eq!((size.vcpus, size.ceiling_mib), (3, 256 + Config::default().memory_overhead_mib));
    config.annotations.insert("io.husk.vcpus".to_owned(), "2".to_owned());
    let spec = super::spec(&config, "s1", "k8s.io", "").unwrap();
    assert_eq!(size::of(&spec, &Role::Sandbox, &Config::default(), host).unwrap().vcpus, 2);
}

#[test]
fn a_user_namespace_is_the_pods() {
    let wish = |mode: NamespaceMode| {
        let ids = vec![IDMapping { container_id: 0, host_id: 1000, length: 65536, ..Default::default() }];
        let user = UserNamespace { mode: mode.into(), uids: ids.clone(), gids: ids, ..Default::default() };
        let options = NamespaceOption { userns_options: Some(user).into(), ..Default::default() };
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options).into(), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context).into(), ..Default::default() };
        load::pod(&spec(&config_of(linux), "s1", "k8s.io", "/run/netns/x").unwrap())
    };
    let ids = crate::storage::IdMap::of_options("0:1000:65536", "0:1000:65536");
    assert_eq!(wish(NamespaceMode::POD).unwrap().user_namespace, ids);
    assert_eq!(wish(NamespaceMode::NODE).unwrap().user_namespace, None);
    for mode in [NamespaceMode::CONTAINER, NamespaceMode::TARGET] {
        assert!(matches!(wish(mode), Err(SpecError::UserNamespace)), "{mode:?}");
    }
}

#[test]
fn the_hosts_network_is_refused() {
    let spec = spec(&config_of(with_network(NamespaceMode::NODE)), "s1", "k8s.io", "").unwrap();
    assert!(matches!(load::pod(&spec), Err(SpecError::HostNamespace("network"))));
}

#[test]
fn cgroups_are_where_containerd_puts_them() {
    assert_eq!(cgroups_path("", "s", "k8s.io"), "/k8s.io/s");
    assert_eq!(cgroups_path("/kubepods/pod1", "s", "k8s.io"), "/kubepods/pod1/s");
    assert_eq!(
        cgroups_path("/kubepods.slice/kubepods-pod1.slice", "s", "k8s.io"),
        "kubepods-pod1.slice:cri-containerd:s"
    );
}

#[test]
fn containers_get_the_pods_files_unless_they_have_their_own() {
    let directory = std::env::temp_dir().join(format!("husk-pod-files-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let dns = DNSConfig {
        servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
        searches: vec!["a.b".to_owned()],
        options: vec!["ndots:5".to_owned()],
        ..Default::default()
    };
    let mut config = config_of(LinuxPodSandboxConfig::default());
    config.dns_config = Some(dns).into();
    let files = Files::write(&directory, &config).unwrap();
    assert_eq!(
        fs::read_to_string(directory.join("resolv.conf")).unwrap(),
        "search a.b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
    );
    assert_eq!(fs::read_to_string(directory.join("hostname")).unwrap(), "fig\n");
    let mut spec: Spec = serde_json::from_value(json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts", "options": ["rbind"]},
        ],
    }))
    .unwrap();
    files.add_to(&mut spec);
    fs::remove_dir_all(&directory).unwrap();
    let found = |destination: &str| {
        let mounts =
            spec.mounts().as_ref().unwrap().iter().filter(|mount| mount.destination() == Path::new(destination));
        let found: Vec<_> =
            mounts.map(|mount| (mount.source().clone().unwrap(), mount.options().clone().unwrap())).collect();
        assert_eq!(found.len(), 1, "{destination}");
        found[0].clone()
    };
    assert_eq!(found("/etc/hosts").0, Path::new("/kubelet/hosts"));
    assert_eq!(found("/etc/hostname").0, directory.join("hostname"));
    assert!(found("/etc/resolv.conf").1.contains(&"ro".to_owned()));
    assert_eq!(found("/dev/shm").0, directory.join("shm"));
    assert!(!found("/dev/shm").1.contains(&"ro".to_owned()));
}
