//! What callers hand to [`create`](crate::create) and [`exec`](crate::exec), and what they get back.

use std::os::fd::OwnedFd;

use oci_spec::runtime::{LinuxSeccomp, Process as OciProcess, Spec};
use serde::{Deserialize, Serialize};

use crate::{Starter, cgroup::Cgroup, namespaces::Namespaces};

/// A container to be made.
pub struct CreateRequest {
    /// The container's id: only shown in the list of processes until the exec.
    pub id: String,
    /// The guest's OCI spec; `root.path` and the sources of bind mounts are paths of the agent's own namespace.
    pub spec: Spec,
    /// The first process's streams.
    pub stdio: Stdio,
    /// Where it is born. The agent makes it first: [`Cgroup::create`], [`Cgroup::set`], [`Cgroup::restrict_devices`].
    pub cgroup: Cgroup,
}

/// A further process in a running container.
pub struct ExecRequest {
    /// The container's namespaces, pinned when it was made.
    pub namespaces: Namespaces,
    /// The process: arguments, environment, user, capabilities, terminal, ...
    pub process: OciProcess,
    /// The seccomp profile of the container's spec (`linux.seccomp`); it holds for its later processes too.
    pub seccomp: Option<LinuxSeccomp>,
    /// The streams.
    pub stdio: Stdio,
    /// The container's cgroup.
    pub cgroup: Cgroup,
}

/// The namespaces of a pod with a user namespace: that, and network, ipc, uts and pid namespaces that belong to it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PodNamespaces {
    /// The map of user ids, as /proc/PID/uid_map takes it (user_namespaces(7)).
    pub uid_map: String,
    /// The map of group ids.
    pub gid_map: String,
    /// The host name; empty: the kernel's default.
    pub hostname: String,
    /// Kernel parameters of the ipc namespace, which only its own root may set: path below /proc/sys, and value.
    pub ipc_parameters: Vec<(String, String)>,
}

/// Standard input, output and error of a process.
pub enum Stdio {
    /// Descriptors that become 0, 1 and 2 (pipes, sockets or /dev/null). They are closed in the agent once handed over.
    Fds {
        /// Descriptor 0.
        stdin: OwnedFd,
        /// Descriptor 1.
        stdout: OwnedFd,
        /// Descriptor 2.
        stderr: OwnedFd,
    },
    /// A new terminal in the container's devpts; its master comes back in [`Process::terminal`].
    Terminal {
        /// Columns; 0 leaves the kernel's default.
        width: u16,
        /// Rows.
        height: u16,
    },
}

/// A container that was made and waits before its exec.
pub struct Created {
    /// Its first process.
    pub process: Process,
    /// Its namespaces, for [`ExecRequest::namespaces`]. Keep them as long as the container is known.
    pub namespaces: Namespaces,
}

/// A process that was made and waits before its exec.
pub struct Process {
    /// Its pid as the agent sees it. It is the agent's own child, which must reap it.
    pub pid: u32,
    /// Readable once the process has exited (fit for `AsyncFd`); `waitid(P_PIDFD)` reaps it without a race about pids.
    pub pidfd: OwnedFd,
    /// Lets it exec.
    pub starter: Starter,
    /// The terminal's master, blocking, close-on-exec; set O_NONBLOCK before AsyncFd.
    pub terminal: Option<OwnedFd>,
    /// What the spec asks for and this guest can't do (an AppArmor profile that is not loaded, ...): for the log.
    pub warnings: Vec<String>,
}
