//! A pod with a user namespace. What else it has must belong to that namespace, or its root could not use it: the network (bind to low
//! ports, configure, sniff), System V ipc and message queues, the host name, processes. So all of them are made anew, held by the pod's
//! pause process; the pod's network interfaces move there, and the agent's main thread goes with them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use husk_agent_api::agent::{IdRange, StartPodRequest, UserNamespace};
use husk_cell::{CellError, PodNamespaces};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, chown};
use thiserror::Error;
use tokio::task::spawn_blocking;

use crate::boot::SHM_DIR;
use crate::net::{self, NetError};
use crate::sysctl::{self, SysctlError};

/// Where the pod's namespaces are.
const NAMESPACES: &str = "/run/husk/ns";

/// Most lines of a map (kernel: UID_GID_MAP_MAX_EXTENTS).
const MAX_LINES: usize = 340;

/// Why the pod has no user namespace.
#[derive(Debug, Error)]
pub(crate) enum UserError {
    #[error("A map has {0} lines; 1 to {MAX_LINES} are possible, one of them about id 0")]
    Map(usize),
    #[error("Could not make the pod's namespaces")]
    Cell(#[from] CellError),
    #[error("Could not open the pod's network namespace")]
    Open(#[source] io::Error),
    #[error("Could not enter the pod's network namespace")]
    Enter(#[source] Errno),
    #[error("Could not give {SHM_DIR} to the pod's root")]
    Shm(#[source] Errno),
    #[error("Could not set a kernel parameter up")]
    Sysctl(#[from] SysctlError),
    #[error("Could not move the pod's network")]
    Net(#[from] NetError),
    #[error("A thread of the agent ended early")]
    Thread(#[from] tokio::task::JoinError),
}

/// Makes the namespaces and moves the calling thread, which must be the agent's main one, into the network namespace.
pub(crate) async fn enter(map: &UserNamespace, request: &StartPodRequest) -> Result<(), UserError> {
    let (uid, gid) = (root(&map.uids)?, root(&map.gids)?);
    let pod = PodNamespaces {
        uid_map: lines(&map.uids),
        gid_map: lines(&map.gids),
        hostname: request.hostname.clone(),
        ipc_parameters: ipc_parameters(&request.sysctls)?,
    };
    spawn_blocking(move || husk_cell::make_pod_namespaces(Path::new(NAMESPACES), pod)).await??;
    let network = File::open(Path::new(NAMESPACES).join("net")).map_err(UserError::Open)?;
    net::move_to(&request.interfaces, network.as_raw_fd()).await?;
    setns(&network, CloneFlags::CLONE_NEWNET).map_err(UserError::Enter)?;
    chown(SHM_DIR, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(UserError::Shm)
}

/// Those of the pod's kernel parameters that are the network's, which the agent may set: the others are set in the ipc namespace.
pub(crate) fn network_parameters(all: &HashMap<String, String>) -> HashMap<String, String> {
    all.iter().filter(|(name, _)| is_network(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn ipc_parameters(all: &HashMap<String, String>) -> Result<Vec<(String, String)>, SysctlError> {
    let others = all.iter().filter(|(name, _)| !is_network(name));
    others.map(|(name, value)| Ok((sysctl::path(name)?, value.clone()))).collect()
}

fn is_network(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

/// Who root is outside of the namespace.
fn root(ranges: &[IdRange]) -> Result<u32, UserError> {
    let zero = ranges.iter().find(|range| range.inside == 0 && range.size > 0);
    let zero = zero.filter(|_| ranges.len() <= MAX_LINES);
    zero.map(|range| range.outside).ok_or(UserError::Map(ranges.len()))
}

fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.inside, range.outside, range.size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, size: u32) -> IdRange {
        IdRange { inside, outside, size, ..Default::default() }
    }

    #[test]
    fn a_map_must_have_a_root_and_an_end() {
        assert_eq!(root(&[range(1, 5, 1), range(0, 1000, 10)]).unwrap(), 1000);
        assert!(root(&[]).is_err());
        assert!(root(&[range(1, 1000, 10)]).is_err());
        assert!(root(&vec![range(0, 1000, 1); MAX_LINES + 1]).is_err());
    }

    #[test]
    fn parameters_are_set_by_those_who_may() {
        let all: HashMap<_, _> = [("net.ipv4.ip_forward", "1"), ("kernel.shm_rmid_forced", "1")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        assert_eq!(network_parameters(&all).len(), 1);
        assert_eq!(ipc_parameters(&all).unwrap(), [("kernel/shm_rmid_forced".to_owned(), "1".to_owned())]);
        let bad = [("kernel.core_pattern".to_owned(), "x".to_owned())].into();
        assert!(ipc_parameters(&bad).is_err());
    }
}
