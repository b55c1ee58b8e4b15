//! Reads a bundle's config.json and tells what the container is: a pod's sandbox, a container in one, or a pod of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Spec};

use super::SpecError;
use crate::storage::IdMap;

/// Largest config.json in bytes; those with long seccomp profiles have some ten thousand.
pub(crate) const MAX_SIZE: u64 = 8 << 20;

/// What a container is to its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The CRI's sandbox: only the pod itself.
    Sandbox,
    /// A container in the CRI's sandbox with this id.
    Member(String),
    /// A container without a sandbox (`ctr run`): pod and container in one.
    Single,
}

/// Reads the spec of the bundle in `directory`.
pub(crate) fn load(directory: &Path) -> Result<Spec, SpecError> {
    let path = directory.join("config.json");
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut text))
        .map_err(|source| SpecError::Read { path: path.clone(), source })?;
    if text.len() as u64 > MAX_SIZE {
        return Err(SpecError::TooLarge(path));
    }
    serde_json::from_slice(&text).map_err(|source| SpecError::Parse { path, source })
}

/// What the container is, by the annotations of containerd's CRI plugin.
pub(crate) fn role(spec: &Spec) -> Result<Role, SpecError> {
    let none = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&none);
    match annotations.get("io.kubernetes.cri.container-type").map(String::as_str) {
        None => Ok(Role::Single),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => {
            let sandbox = annotations.get("io.kubernetes.cri.sandbox-id");
            sandbox.cloned().map(Role::Member).ok_or(SpecError::Missing("annotation io.kubernetes.cri.sandbox-id"))
        }
        Some(other) => Err(SpecError::AnnotationValue {
            key: "io.kubernetes.cri.container-type".to_owned(),
            value: other.to_owned(),
            wanted: "sandbox or container",
        }),
    }
}

/// What a new pod takes from the spec of its sandbox or single container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PodSpec {
    /// Its host name; may be empty.
    pub(crate) hostname: String,
    /// Its network namespace on the host; none: no network but the guest's own loopback.
    pub(crate) netns: Option<PathBuf>,
    /// Its cgroup on the host, as in the OCI spec; may be empty.
    pub(crate) cgroups_path: String,
    /// Its kernel parameters.
    pub(crate) sysctls: HashMap<String, String>,
    /// The ids of its user namespace, if it is to have one.
    pub(crate) user_namespace: Option<IdMap>,
}

/// The pod's part of the spec. Host namespaces are refused here: only the sandbox's (or single container's) spec shows them.
pub(crate) fn pod(spec: &Spec) -> Result<PodSpec, SpecError> {
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux section"))?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    // The host's processes are not there to be seen: a pod with hostPID sees those of its virtual machine (guest.rs).
    for (kind, name) in [(LinuxNamespaceType::Network, "network"), (LinuxNamespaceType::Ipc, "ipc")] {
        if namespace(namespaces, kind).is_none() {
            return Err(SpecError::HostNamespace(name));
        }
    }
    let network = namespace(namespaces, LinuxNamespaceType::Network);
    Ok(PodSpec {
        hostname: spec.hostname().clone().unwrap_or_default(),
        netns: network.and_then(|network| network.path().clone()).filter(|path| !path.as_os_str().is_empty()),
        cgroups_path: linux.cgroups_path().as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        sysctls: linux.sysctl().clone().unwrap_or_default(),
        user_namespace: user_namespace(linux)?,
    })
}

/// The ids of the user namespace that the spec asks for.
pub(super) fn user_namespace(linux: &Linux) -> Result<Option<IdMap>, SpecError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let uids = linux.uid_mappings().as_deref().unwrap_or_default();
    let gids = linux.gid_mappings().as_deref().unwrap_or_default();
    if namespace(namespaces, LinuxNamespaceType::User).is_some() {
        let map = IdMap::of_spec(uids, gids).ok_or(SpecError::UserNamespace)?;
        return if map.has_root() { Ok(Some(map)) } else { Err(SpecError::UnmappedRoot) };
    }
    if uids.is_empty() && gids.is_empty() { Ok(None) } else { Err(SpecError::UserNamespace) }
}

/// The namespace of a kind, if the spec lists it.
pub(super) fn namespace(namespaces: &[LinuxNamespace], kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}
