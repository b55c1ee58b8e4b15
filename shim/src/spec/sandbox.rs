//! A pod as the Sandbox API describes it, by the CRI's PodSandboxConfig alone: the OCI spec of a sandbox that says the same, as containerd
//! itself writes one where it runs a pause container (its podsandbox controller), and the files that it makes there for every container.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message};
use oci_spec::runtime::{Mount, Spec};
use serde_json::{Map, Value, json};

use super::{SpecError, annotations};

#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub(crate) use generated::cri::PodSandboxConfig;
use generated::cri::{DNSConfig, IDMapping, NamespaceMode};

/// The message's name, as containerd's typeurl writes it.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// Largest file of the host's that is copied for a pod, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Reads the options of CreateSandbox.
pub(crate) fn config(options: &Any) -> Result<PodSandboxConfig, SpecError> {
    if options.type_url.rsplit('/').next() != Some(CONFIG_TYPE) {
        return Err(SpecError::SandboxOptions {
            found: options.type_url.chars().take(128).collect(),
            wanted: CONFIG_TYPE,
        });
    }
    PodSandboxConfig::parse_from_bytes(&options.value).map_err(SpecError::SandboxConfig)
}

/// The spec of sandbox `id` in containerd's `namespace`, with its network namespace, if it has one.
pub(crate) fn spec(config: &PodSandboxConfig, id: &str, namespace: &str, netns: &str) -> Result<Spec, SpecError> {
    let linux = &config.linux;
    let wished = &linux.security_context.namespace_options;
    let is_hosts = |mode: EnumOrUnknown<NamespaceMode>| mode.enum_value() == Ok(NamespaceMode::NODE);
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "uts"})];
    if !is_hosts(wished.network) {
        namespaces.push(json!({"type": "network", "path": netns}));
    }
    for (kind, mode) in [("pid", wished.pid), ("ipc", wished.ipc)] {
        if !is_hosts(mode) {
            namespaces.push(json!({"type": kind}));
        }
    }
    // A mode that is none gets a namespace too, which is refused for want of maps.
    let user = wished.userns_options.as_ref().filter(|user| !is_hosts(user.mode));
    if user.is_some() {
        namespaces.push(json!({"type": "user"}));
    }
    let (uids, gids) = match user.filter(|user| user.mode.enum_value() == Ok(NamespaceMode::POD)) {
        Some(user) => (maps(&user.uids), maps(&user.gids)),
        None => Default::default(),
    };
    let mut notes: Map<String, Value> = config
        .annotations
        .iter()
        .filter(|(key, _)| key.starts_with(annotations::PREFIX))
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    notes.insert("io.kubernetes.cri.container-type".to_owned(), json!("sandbox"));
    if let Some(resources) = linux.resources.as_ref() {
        let figures = [
            ("cpu-period", resources.cpu_period),
            ("cpu-quota", resources.cpu_quota),
            ("cpu-shares", resources.cpu_shares),
            ("memory", resources.memory_limit_in_bytes),
        ];
        notes.extend(
            figures.map(|(name, value)| (format!("io.kubernetes.cri.sandbox-{name}"), json!(value.to_string()))),
        );
    }
    let spec = json!({
        "ociVersion": "1.1.0",
        "hostname": config.hostname,
        "annotations": notes,
        "linux": {
            "namespaces": namespaces,
            "uidMappings": uids,
            "gidMappings": gids,
            "sysctl": linux.sysctls,
            "cgroupsPath": cgroups_path(&linux.cgroup_parent, id, namespace),
        },
    });
    serde_json::from_value(spec).map_err(SpecError::Encode)
}

/// Maps of ids as in an OCI spec.
fn maps(lines: &[IDMapping]) -> Vec<Value> {
    let line =
        |line: &IDMapping| json!({"containerID": line.container_id, "hostID": line.host_id, "size": line.length});
    lines.iter().map(line).collect()
}

/// The sandbox's cgroup below the pod's, in systemd's form where the pod's is a slice.
fn cgroups_path(parent: &str, id: &str, namespace: &str) -> String {
    match Path::new(parent).file_name().and_then(|name| name.to_str()) {
        _ if parent.is_empty() => format!("/{namespace}/{id}"),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => Path::new(parent).join(id).to_string_lossy().into_owned(),
    }
}

/// The files that every container of the pod has in /etc: made once, in the pod's directory.
#[derive(Debug)]
pub(crate) struct Files {
    directory: PathBuf,
}

impl Files {
    /// Writes them: the host name, the host's table of hosts, and the resolver's configuration: the pod's if it has one, else the host's.
    pub(crate) fn write(directory: &Path, config: &PodSandboxConfig) -> Result<Self, SpecError> {
        let hostname = match config.hostname.as_str() {
            "" => nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
            name => name.to_owned(),
        };
        let resolver = match config.dns_config.as_ref() {
            Some(dns) => resolver(dns),
            None => of_host("/etc/resolv.conf")?,
        };
        let files =
            [("hostname", format!("{hostname}\n")), ("hosts", of_host("/etc/hosts")?), ("resolv.conf", resolver)];
        for (name, text) in files {
            let path = directory.join(name);
            fs::write(&path, text).map_err(|source| SpecError::PodFile { doing: "write", path, source })?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// Adds them to a container, but where it has something else in their place, and the pod's /dev/shm where it has just one of its own.
    pub(crate) fn add_to(&self, spec: &mut Spec) {
        let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        mounts.retain(|mount| mount.destination() != Path::new("/dev/shm") || mount.typ().as_deref() != Some("tmpfs"));
        // As containerd does, these files belong to the pod's root; its /dev/shm is the guest's own.
        let linux = spec.linux().as_ref();
        let uids = linux.and_then(|linux| linux.uid_mappings().clone()).filter(|lines| !lines.is_empty());
        let gids = linux.and_then(|linux| linux.gid_mappings().clone()).filter(|lines| !lines.is_empty());
        // The name is the one by which containerd's own is known (mounts.rs).
        let mut wanted = vec![("/dev/shm".to_owned(), self.directory.join("shm"), false)];
        wanted.extend(
            ["hostname", "hosts", "resolv.conf"]
                .map(|name| (format!("/etc/{name}"), self.directory.join(name), readonly)),
        );
        for (destination, source, readonly) in wanted {
            if mounts.iter().any(|mount| mount.destination() == Path::new(&destination)) {
                continue;
            }
            let mut mount = Mount::default();
            let access = if readonly { "ro" } else { "rw" };
            mount.set_destination(destination.into()).set_typ(Some("bind".to_owned())).set_source(Some(source));
            mount.set_options(Some(["rbind", "rprivate", access].map(str::to_owned).to_vec()));
            if mount.destination() != Path::new("/dev/shm") {
                mount.set_uid_mappings(uids.clone()).set_gid_mappings(gids.clone());
            }
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

/// A file of the host's; empty if there is none.
fn of_host(path: &str) -> Result<String, SpecError> {
    let mut text = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(SpecError::PodFile { doing: "read", path: path.into(), source: error })
        }
        _ => Ok(String::from_utf8_lossy(&text).into_owned()),
    }
}

/// resolv.conf(5).
fn resolver(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
#[path = "sandbox_tests.rs"]
mod tests;
