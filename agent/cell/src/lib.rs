//! husk-cell: makes containers and processes in the guest, and keeps their cgroups.
//!
//! The agent has threads, so nothing here forks and then runs Rust in its memory. [`create`] and [`exec`] start the agent's own
//! program again as `husk-agent cell` (see [`child::main`]): single-threaded, told what to do over a socket, gone when done.
//!
//! All functions block (at most [`DEADLINE`], in practice some milliseconds): call them in `spawn_blocking`.
//! Several may run at the same time; there is no lock.
//!
//! Reaping: `create`/`exec` reap the helper processes that they start, and what they made if they fail. The process that they
//! return is the agent's own child and the agent reaps it. An agent that waits for any child (`waitpid(-1)`) may also collect
//! the helpers: that does no harm.

/// The longest that [`create`], [`exec`] and [`Starter::start`] wait.
pub const DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

mod capabilities;
pub mod cgroup;
pub mod child;
mod copy_up;
mod devices;
mod error;
mod fault;
mod message;
mod mount_options;
mod mounts;
mod namespaces;
mod paths;
mod pause;
mod process;
mod request;
mod rootfs;
mod scheduling;
mod seccomp;
mod spawn;
mod sys;
mod terminal;
mod user;

pub use error::{CellError, CgroupError};
pub use namespaces::Namespaces;
pub use pause::{ensure_pod_pid_namespace, make_pod_namespaces};
pub use request::{CreateRequest, Created, ExecRequest, PodNamespaces, Process, Stdio};
pub use rootfs::prepare_root;
pub use spawn::{Starter, create, exec, profile_is_listed};
