//! The pod's kernel parameters: the namespaced ones that Kubernetes allows, written below /proc/sys.

use std::collections::HashMap;
use std::fs;
use std::io;

use thiserror::Error;

/// Why a parameter was not set.
#[derive(Debug, Error)]
pub(crate) enum SysctlError {
    /// Not one of those that a pod may set, or no name at all.
    #[error("{0:?} is not a kernel parameter that a pod may set")]
    Name(String),
    /// The kernel refused.
    #[error("Could not set the kernel parameter {name} to {value:?}")]
    Write {
        name: String,
        value: String,
        #[source]
        source: io::Error,
    },
}

/// Parameters of the ipc namespace: ipc_namespaces(7).
const IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Sets all parameters.
pub(crate) fn set_all(parameters: &HashMap<String, String>) -> Result<(), SysctlError> {
    parameters.iter().try_for_each(|(name, value)| set(name, value))
}

fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path(name)?;
    fs::write(format!("/proc/sys/{path}"), value).map_err(|source| SysctlError::Write {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The path below /proc/sys of a name with dots, or with slashes where a component has dots of its own (sysctl(8)).
pub(crate) fn path(name: &str) -> Result<String, SysctlError> {
    let slashes = name.find(['.', '/']).is_some_and(|first| name.as_bytes()[first] == b'/');
    let path = if slashes { name.to_owned() } else { name.replace('.', "/") };
    let plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
    };
    let allowed = IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") || path.starts_with("net/");
    if allowed && path.split('/').all(plain) { Ok(path) } else { Err(SysctlError::Name(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_and_slashes() {
        assert_eq!(path("net.core.somaxconn").unwrap(), "net/core/somaxconn");
        assert_eq!(path("net/ipv4/conf/eth0.7/rp_filter").unwrap(), "net/ipv4/conf/eth0.7/rp_filter");
        assert_eq!(path("kernel.shmmax").unwrap(), "kernel/shmmax");
        assert_eq!(path("kernel.shm_rmid_forced").unwrap(), "kernel/shm_rmid_forced");
    }

    #[test]
    fn refuses_what_is_not_the_pods() {
        for name in [
            "",
            ".",
            "kernel.core_pattern",
            "vm.swappiness",
            "net..core",
            "net/../kernel/core_pattern",
            "/net/core",
            "net/a b",
            "net.",
        ] {
            assert!(path(name).is_err(), "{name}");
        }
    }
}
