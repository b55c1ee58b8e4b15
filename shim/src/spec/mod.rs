//! The host's OCI runtime spec, read and turned into what the guest runs.

pub(crate) mod annotations;
pub(crate) mod block;
pub(crate) mod guest;
pub(crate) mod load;
#[cfg(test)]
mod malformed_tests;
pub(crate) mod mounts;
#[cfg(test)]
mod refusals_tests;
pub(crate) mod resources;
pub(crate) mod sandbox;
pub(crate) mod size;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use thiserror::Error;

/// Why a spec can't be run in a virtual machine.
#[derive(Debug, Error)]
pub(crate) enum SpecError {
    /// The bundle's config.json can't be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no OCI spec.
    #[error("{path} is no OCI runtime spec", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It is longer than any need be.
    #[error("{path} is longer than {max} bytes", path = .0.display(), max = load::MAX_SIZE)]
    TooLarge(PathBuf),
    /// The guest's spec can't be written.
    #[error("cannot write the guest's OCI spec")]
    Encode(#[source] serde_json::Error),
    /// Another sandbox description than the CRI's.
    #[error("the sandbox is described by {found:?}; only {wanted} is understood")]
    SandboxOptions {
        /// The message's type.
        found: String,
        /// The one that is known.
        wanted: &'static str,
    },
    /// A sandbox description that can't be read.
    #[error("cannot read the sandbox's description")]
    SandboxConfig(#[source] containerd_shim_protos::protobuf::Error),
    /// A file that each container of the pod has.
    #[error("cannot {doing} {path} for the pod's containers", path = path.display())]
    PodFile {
        /// What failed.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A part that husk needs is not there.
    #[error("the spec has no {0}")]
    Missing(&'static str),
    /// A namespace of the host's.
    #[error("the pod wants the host's {0} namespace, which a virtual machine cannot have: run it with runc")]
    HostNamespace(&'static str),
    /// A user namespace whose ids nobody tells, or ids without one.
    #[error(
        "a user namespace and valid uidMappings and gidMappings (of 1 to 340 lines) go together: the spec has not all of them"
    )]
    UserNamespace,
    /// A user namespace in which nobody is root.
    #[error(
        "the user namespace's uidMappings or gidMappings have no line for id 0, as which a container is built: map it to an id of the host"
    )]
    UnmappedRoot,
    /// A user namespace that differs from the pod's.
    #[error(
        "the container's user namespace has other uidMappings or gidMappings than its pod's, with which it must share it"
    )]
    OtherUserNamespace,
    /// A namespace of something that is not the pod.
    #[error("the {0} namespace at {path} is not the pod's", path = .1.display())]
    ForeignNamespace(&'static str, PathBuf),
    /// Hooks run on the host, beside a process that isn't there.
    #[error("the spec has {0} hooks, which cannot reach into a virtual machine: run it with runc")]
    Hooks(&'static str),
    /// A mount that can't be made.
    #[error("the mount on {destination} {why}", destination = destination.display())]
    Mount {
        /// Where in the container.
        destination: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// More mounts than anyone needs.
    #[error("the spec has {0} mounts; {max} are possible", max = mounts::MAX_MOUNTS)]
    TooManyMounts(usize),
    /// A device of the host's.
    #[error("the device {path} ({major}:{minor}) of the host cannot be given to a virtual machine", path = path.display())]
    Device {
        /// Where in the container.
        path: PathBuf,
        /// Major number.
        major: i64,
        /// Minor number.
        minor: i64,
    },
    /// A limit on a device of the host's.
    #[error(
        "the limits name the block device {major}:{minor} of the host, which a virtual machine does not have: leave it out, or run the pod with runc"
    )]
    BlockIo {
        /// Major number.
        major: i64,
        /// Minor number.
        minor: i64,
    },
    /// More block devices than the machine has slots.
    #[error("the spec has {0} block devices; {max} are possible", max = block::MAX_BLOCK_DEVICES)]
    TooManyBlockDevices(usize),
    /// A notification socket on the host.
    #[error("the seccomp profile wants a listener on the host, which a virtual machine cannot reach")]
    SeccompListener,
    /// A working directory that could be anywhere.
    #[error("the process's cwd {path:?} is not an absolute path", path = .0.display().to_string())]
    WorkingDirectory(PathBuf),
    /// Something of the host's hardware.
    #[error("the spec asks for {0}: a virtual machine cannot have it, run the pod with runc")]
    HostOnly(&'static str),
    /// A kernel parameter that is not of the container's own namespaces.
    #[error("the kernel parameter {0} is not of a namespace that is the container's own; set the pod's on the pod")]
    Sysctl(String),
    /// An annotation that husk doesn't know.
    #[error("the annotation {0} is unknown; husk knows {known}", known = annotations::KNOWN)]
    UnknownAnnotation(String),
    /// An annotation with a bad value.
    #[error("the annotation {key} is {value:?}; it must be {wanted}")]
    AnnotationValue {
        /// Its name.
        key: String,
        /// Its value.
        value: String,
        /// What it may be.
        wanted: &'static str,
    },
    /// Too little memory.
    #[error("a memory limit of {limit_bytes} bytes is too small for a pod: at least {min_mib} MiB are needed")]
    MemoryLimit {
        /// The limit.
        limit_bytes: u64,
        /// The least.
        min_mib: u64,
    },
}
