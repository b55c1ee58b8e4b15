//! What shim and agent say to each other: the generated ttrpc code of `agent.proto`, the hello before it, and the fixed names.

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};

pub mod forward;
pub mod hello;

/// The host's vsock port that the agent dials for its RPC connection; the guest's own that the shim dials in a restored template.
pub const RPC_PORT: u32 = 1024;

/// First host port that the shim gives to streams; each stream has a port of its own, used once.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;

/// Where the guest mounts the pod's share directory (virtio-fs).
pub const SHARED_DIR: &str = "/run/husk/shared";

/// Where the guest mounts the pod's huge page volumes, each by its name in CreateContainer.
pub const HUGE_DIR: &str = "/run/husk/huge";

/// Where the guest mounts containers' own disks.
pub const DISKS_DIR: &str = "/run/husk/disks";

/// Kernel command line key that carries the boot nonce: 32 lower-case hexadecimal digits.
pub const NONCE_KEY: &str = "husk.nonce";

/// Kernel command line word of a machine that is to be saved as a template: the agent does not dial, it listens on [`RPC_PORT`], and
/// says [`TEMPLATE_READY`] when the machine may be saved.
pub const TEMPLATE_KEY: &str = "husk.template";

/// The line on the console of a template that waits to be saved.
pub const TEMPLATE_READY: &str = "husk-agent: template ready";
