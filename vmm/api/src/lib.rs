//! What the shim says to husk-vmm: the configuration handed over at start, the control API's generated code, the exit codes.
//! No KVM and no I/O here.

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{vmm, vmm_ttrpc};

pub mod config;
pub mod dial;
pub mod disk;
pub mod exit;
