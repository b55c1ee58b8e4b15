//! What husk can do, as containerd 2.x asks for it (`-info`): the features document of the OCI runtime specification (features.md,
//! features-linux.md). containerd decides by it whether pods may have user namespaces and recursively read-only mounts.

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use oci_spec::runtime::{
    Apparmor, Arch, Cgroup, Features, IDMap, LinuxFeature, LinuxNamespaceType, LinuxSeccompAction, MountExtensions,
    Seccomp, Selinux,
};

use crate::RUNTIME;

/// The name under which containerd knows Go's `features.Features` as JSON (core/runtime/typeurl.go).
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Versions of the runtime specification whose documents are understood.
const VERSIONS: [&str; 2] = ["1.0.0", "1.3.0"];

/// Mount options that are done, not ignored (config.md, "Linux mount options").
const MOUNT_OPTIONS: [&str; 60] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ridmap",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// The answer to `-info`, with the features as the JSON that containerd expects.
pub(crate) fn info() -> Result<RuntimeInfo, serde_json::Error> {
    let features =
        Any { type_url: FEATURES_TYPE.to_owned(), value: serde_json::to_vec(&features())?, ..Default::default() };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    Ok(RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    })
}

fn features() -> Features {
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(vec![
            LinuxNamespaceType::Cgroup,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::User,
            LinuxNamespaceType::Uts,
        ]))
        .set_cgroup(Some(cgroup()))
        .set_seccomp(Some(seccomp()))
        .set_apparmor(Some(apparmor()))
        .set_selinux(Some(selinux()))
        .set_mount_extensions(Some(mount_extensions()));
    let mut features = Features::default();
    features
        .set_oci_version_min(VERSIONS[0].to_owned())
        .set_oci_version_max(VERSIONS[1].to_owned())
        // Hooks are refused.
        .set_hooks(Some(Vec::new()))
        .set_mount_options(Some(MOUNT_OPTIONS.map(str::to_owned).to_vec()))
        .set_linux(Some(linux));
    features
}

/// The guest has v2 only; the pod's cgroup on the host may be either form of path.
fn cgroup() -> Cgroup {
    let mut cgroup = Cgroup::default();
    cgroup.set_v1(Some(false)).set_v2(Some(true)).set_systemd(Some(false)).set_rdma(Some(false));
    cgroup
}

/// No notifications: their listener would have to cross from the guest's kernel to the host.
fn seccomp() -> Seccomp {
    let mut seccomp = Seccomp::default();
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let flags = ["TSYNC", "LOG", "SPEC_ALLOW"].map(|flag| format!("SECCOMP_FILTER_FLAG_{flag}")).to_vec();
    seccomp
        .set_enabled(Some(true))
        .set_actions(Some(vec![
            LinuxSeccompAction::ScmpActKill,
            LinuxSeccompAction::ScmpActKillThread,
            LinuxSeccompAction::ScmpActKillProcess,
            LinuxSeccompAction::ScmpActTrap,
            LinuxSeccompAction::ScmpActErrno,
            LinuxSeccompAction::ScmpActTrace,
            LinuxSeccompAction::ScmpActLog,
            LinuxSeccompAction::ScmpActAllow,
        ]))
        .set_operators(Some(operators.map(|operator| format!("SCMP_CMP_{operator}")).to_vec()))
        .set_archs(Some(vec![Arch::ScmpArchX86, Arch::ScmpArchX86_64, Arch::ScmpArchX32]))
        .set_known_flags(Some(flags.clone()))
        .set_supported_flags(Some(flags));
    seccomp
}

/// Profiles of the host are loaded into the guest's kernel.
fn apparmor() -> Apparmor {
    let mut apparmor = Apparmor::default();
    apparmor.set_enabled(Some(true));
    apparmor
}

/// The guest's kernel has none.
fn selinux() -> Selinux {
    let mut selinux = Selinux::default();
    selinux.set_enabled(Some(false));
    selinux
}

/// Bind mounts and root file systems with their ids mapped.
fn mount_extensions() -> MountExtensions {
    let (mut idmap, mut extensions) = (IDMap::default(), MountExtensions::default());
    idmap.set_enabled(Some(true));
    extensions.set_idmap(Some(idmap));
    extensions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_containerd_looks_for() {
        let info = info().unwrap();
        assert_eq!(info.name, RUNTIME);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(features["mountOptions"].as_array().unwrap().contains(&"rro".into()));
        assert_eq!(features["linux"]["apparmor"]["enabled"], true);
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&"user".into()));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert_eq!(features["linux"]["selinux"]["enabled"], false);
    }
}
