//! The pod's network: for every interface that CNI left in the pod's network namespace a tap, joined to it by tc in both
//! directions, and what the guest must set up to own the interface's addresses.

pub(crate) mod forward;
mod lookup;
pub(crate) mod netns;
mod read;
mod sysctl;
pub(crate) mod tap;
pub(crate) mod tc;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_api::agent::{Interface, Neighbour};
use rtnetlink::packet_core::Emitable;
use rtnetlink::{Handle, LinkUnspec};

use self::read::Link;

/// Longest time that all netlink work of a call may take together.
const LIMIT: Duration = Duration::from_secs(10);

/// Most interfaces of a pod: each is a PCI device of the guest, whose bus has room for so many beside the other devices.
const MAX_INTERFACES: usize = 9;

/// Most addresses of a pod's interfaces together.
const MAX_ADDRESSES: usize = 256;

/// Most routes of a pod, and most neighbours, and most routing rules.
const MAX_ROUTES: usize = 1024;

/// Taps are called this and the number of the interface that they belong to.
const TAP_PREFIX: &str = "husk";

/// A tap of the pod, attached by its descriptor: it disappears when the last copy of the descriptor is closed.
#[derive(Debug)]
pub(crate) struct Tap {
    /// IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, single queue, non-blocking, close-on-exec.
    pub(crate) fd: OwnedFd,
    /// The guest's hardware address: that of the interface which CNI made.
    pub(crate) mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub(crate) mtu: u16,
}

/// What `prepare` made and found.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The pod's network namespace.
    pub(crate) netns: OwnedFd,
    /// One an interface, in the order of `interfaces`.
    pub(crate) taps: Vec<Tap>,
    /// For the agent's StartPod.
    pub(crate) interfaces: Vec<Interface>,
    /// For the agent's StartPod; on-link routes come before those that need them.
    pub(crate) routes: Vec<Vec<u8>>,
    /// For the agent's StartPod: policy routing.
    pub(crate) rules: Vec<Vec<u8>>,
    /// For the agent's StartPod: static neighbours.
    pub(crate) neighbours: Vec<Neighbour>,
}

/// Why the pod's network could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The namespace's file.
    #[error("cannot open the network namespace {path}", path = path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// Not a network namespace, or no right to it.
    #[error("cannot enter the pod's network namespace")]
    Enter {
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A thread in the namespace.
    #[error("cannot run a thread in the pod's network namespace to {what}")]
    Thread {
        /// Its work.
        what: &'static str,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The netlink socket.
    #[error("cannot open a netlink socket in the pod's network namespace")]
    Netlink {
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A tap.
    #[error("cannot make the tap {name}: {step}")]
    Tap {
        /// Its name.
        name: String,
        /// What failed.
        step: &'static str,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A netlink request.
    #[error("cannot {what}")]
    Request {
        /// What was asked of the kernel.
        what: String,
        /// Its answer.
        #[source]
        cause: rtnetlink::Error,
    },
    /// Took too long.
    #[error("waited {limit:?} to {what}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The forwarding of connections.
    #[error("cannot forward connections in the pod's network namespace to the guest: {step}")]
    Forward {
        /// What failed.
        step: &'static str,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// Not a network namespace.
    #[error("{path} is not a network namespace", path = path.display())]
    NotOne {
        /// What is not.
        path: PathBuf,
    },
    /// The host's.
    #[error("the network namespace {path} is the host's own, which a virtual machine cannot have: run it with runc", path = path.display())]
    Hosts {
        /// Its path.
        path: PathBuf,
    },
    /// Another pod's.
    #[error("the network namespace {path} belongs to another pod on husk: each needs its own", path = path.display())]
    Taken {
        /// Its path.
        path: PathBuf,
    },
    /// Too many of something.
    #[error("the pod's network namespace has {count} {what}; {most} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// Most possible.
        most: usize,
    },
    /// No virtio-net device can have this MTU.
    #[error("the interface {name} has an MTU of {mtu}; 68 to 65535 are possible")]
    Mtu {
        /// The interface.
        name: String,
        /// Its MTU in bytes.
        mtu: u32,
    },
}

impl NetworkError {
    /// Whether what was asked for can't be had; nothing was made then, and nothing in the namespace is the pod's to take back.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::NotOne { .. }
                | Self::Hosts { .. }
                | Self::Taken { .. }
                | Self::TooMany { .. }
                | Self::Mtu { .. }
                | Self::Open { .. }
        )
    }
}

/// Joins a tap to every interface of the namespace at `netns` (e.g. /var/run/netns/cni-...) and reads what the guest must set up.
///
/// Interfaces are those that are up and carry Ethernet frames (veth, macvlan, ipvlan, a moved physical one), without loopback.
pub(crate) async fn prepare(path: &Path) -> Result<Prepared, NetworkError> {
    let netns = netns::open(path)?;
    if netns::is_own(&netns) {
        return Err(NetworkError::Hosts { path: path.to_owned() });
    }
    let connected = connect(&netns).await.map_err(|error| match error {
        NetworkError::Enter { cause } if cause.raw_os_error() == Some(libc::EINVAL) => {
            NetworkError::NotOne { path: path.to_owned() }
        }
        other => other,
    })?;
    let handle = &connected.handle;
    within_limit("set up the pod's network", async {
        let all = read::links(handle).await?;
        if all.iter().any(Link::is_tap) {
            return Err(NetworkError::Taken { path: path.to_owned() });
        }
        let links: Vec<Link> = all.into_iter().filter(Link::is_pods).collect();
        bounded("network interfaces", links.len(), MAX_INTERFACES)?;
        let mtus = links.iter().map(Link::mtu).collect::<Result<Vec<_>, _>>()?;
        let mut interfaces = read::interfaces(handle, &links).await?;
        bounded("addresses", interfaces.iter().map(|interface| interface.addresses.len()).sum(), MAX_ADDRESSES)?;
        let routes = read::routes(handle, &links).await?;
        bounded("routes", routes.len(), MAX_ROUTES)?;
        let rules = read::rules(handle).await?;
        bounded("routing rules", rules.len(), MAX_ROUTES)?;
        let neighbours = read::neighbours(handle, &links).await?;
        bounded("static neighbours", neighbours.len(), MAX_ROUTES)?;

        let names: Vec<String> = links.iter().map(|link| format!("{TAP_PREFIX}{}", link.index)).collect();
        let (taps, settings) = {
            let pairs: Vec<_> = links.iter().map(|link| link.name.clone()).zip(names.clone()).collect();
            let make = move || {
                let taps = pairs.iter().map(|(_, tap)| tap::create(tap)).collect::<Result<Vec<_>, _>>()?;
                Ok((taps, pairs.iter().map(|(link, _)| sysctl::ipv6(link)).collect::<Vec<_>>()))
            };
            netns::within(&netns, "make taps", make).await?
        };
        for (interface, settings) in interfaces.iter_mut().zip(settings) {
            interface.ipv6 = settings;
        }
        let known = read::links(handle).await?;
        for (link, name) in links.iter().zip(&names) {
            join(handle, link, name, &known).await?;
        }
        let taps = links.iter().zip(mtus).zip(taps);
        Ok(Prepared {
            netns,
            taps: taps.map(|((link, mtu), fd)| Tap { fd, mac: link.mac, mtu }).collect(),
            interfaces,
            routes: routes.iter().map(bytes).collect(),
            rules: rules.iter().map(bytes).collect(),
            neighbours,
        })
    })
    .await
}

/// A netlink message's bytes, without its netlink header.
fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn bounded(what: &'static str, count: usize, most: usize) -> Result<(), NetworkError> {
    if count > most { Err(NetworkError::TooMany { what, count, most }) } else { Ok(()) }
}

/// Removes what `prepare` made in a namespace that lives on: redirections and, if their descriptors are still open somewhere,
/// taps. Nothing left to remove is success, as is a namespace that is gone.
pub(crate) async fn teardown(netns: &Path) -> Result<(), NetworkError> {
    let netns = match netns::open(netns) {
        Err(NetworkError::Open { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if netns::is_own(&netns) {
        return Ok(());
    }
    let mut connected = match connect(&netns).await {
        // The file is there but the namespace is no longer mounted on it.
        Err(NetworkError::Enter { cause }) if cause.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
        other => other?,
    };
    let handle = &mut connected.handle;
    within_limit("remove the pod's network", async {
        for link in read::links(handle).await? {
            if link.is_tap() {
                match handle.link().del(link.index).execute().await {
                    Err(cause) if !tc::is_absent(&cause) => {
                        return Err(NetworkError::Request { what: format!("remove the tap {}", link.name), cause });
                    }
                    _ => {}
                }
            } else if link.is_pods() {
                tc::remove(handle, link.index).await.map_err(|cause| NetworkError::Request {
                    what: format!("remove the redirection of {}", link.name),
                    cause,
                })?;
            }
        }
        Ok(())
    })
    .await
}

/// Brings the tap up with the interface's MTU and joins both.
async fn join(handle: &Handle, link: &Link, name: &str, known: &[Link]) -> Result<(), NetworkError> {
    let tap = known.iter().find(|other| other.name == name).ok_or_else(|| NetworkError::Tap {
        name: name.to_owned(),
        step: "find its number",
        cause: std::io::ErrorKind::NotFound.into(),
    })?;
    let up = LinkUnspec::new_with_index(tap.index).mtu(link.mtu).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(|cause| NetworkError::Request { what: format!("bring the tap {name} up"), cause })?;
    for (from, to) in [(link, tap), (tap, link)] {
        tc::redirect(handle, from.index, to.index).await.map_err(|cause| NetworkError::Request {
            what: format!("redirect what comes in on {} to {} (tc ingress, u32, mirred)", from.name, to.name),
            cause,
        })?;
    }
    Ok(())
}

/// A netlink connection into the namespace; the task that carries it ends with it.
struct Connected {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a netlink connection whose socket belongs to the namespace.
async fn connect(netns: &OwnedFd) -> Result<Connected, NetworkError> {
    let (connection, handle, _) = netns::within(netns, "open a netlink socket", || {
        rtnetlink::new_connection().map_err(|cause| NetworkError::Netlink { cause })
    })
    .await?;
    Ok(Connected { handle, task: tokio::spawn(connection) })
}

/// Runs `work`, at most for `LIMIT`.
async fn within_limit<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, NetworkError>>,
) -> Result<T, NetworkError> {
    tokio::time::timeout(LIMIT, work).await.map_err(|_| NetworkError::Deadline { what, limit: LIMIT })?
}
