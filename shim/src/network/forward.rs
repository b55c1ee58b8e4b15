//! TCP connections that something in the pod's network namespace on the host makes to the pod's localhost or address: containerd's
//! port-forward, and probes. All of the pod's servers are in the guest, so each connection is taken here and passed on to the agent by
//! vsock, which connects within the guest. What comes by the pod's interfaces never gets here: it goes to the guest's tap.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_agent_api::forward;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::lookup::{self, Lookup};
use super::{NetworkError, netns};
use crate::error::chain;
use crate::peer::PeerError;
use crate::peer::dial::Caller;

/// How long the guest may take to connect: the agent gives up after 10 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(12);

/// Bytes copied at a time, each way.
const CHUNK: usize = 32 << 10;

/// Forwards for as long as this lives; every connection ends with it.
#[derive(Debug)]
pub(crate) struct Forwarder {
    _lookup: Lookup,
    _accepting: JoinSet<()>,
}

/// Why a connection was not forwarded, or broke.
#[derive(Debug, Error)]
enum ForwardError {
    #[error(transparent)]
    Guest(#[from] PeerError),
    #[error("nobody listens there in the guest")]
    Refused,
    #[error("the guest gave no answer within {ANSWER_LIMIT:?}")]
    Silent,
    #[error("the connection broke")]
    Broken(#[from] io::Error),
}

impl Forwarder {
    /// Takes every TCP connection to an address of the namespace from now on.
    pub(crate) async fn start(netns: &OwnedFd, caller: Caller) -> Result<Self, NetworkError> {
        let namespace =
            netns.try_clone().map_err(|cause| NetworkError::Forward { step: "hold the namespace", cause })?;
        let (listener, lookup) = netns::within(netns, "forward connections", move || {
            let failed = |step| move |cause| NetworkError::Forward { step, cause };
            let listener = listen().map_err(failed("listen"))?;
            let lookup = lookup::attach(&namespace, &listener).map_err(failed("attach a BPF program (sk_lookup)"))?;
            listener.set_nonblocking(true).map_err(failed("listen"))?;
            Ok((TcpListener::from_std(listener).map_err(failed("listen"))?, lookup))
        })
        .await?;
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, caller));
        Ok(Self { _lookup: lookup, _accepting: accepting })
    }
}

/// A listener for both families; for IPv4 alone where the kernel has no IPv6. Its own port is of no meaning.
fn listen() -> io::Result<StdListener> {
    StdListener::bind((Ipv6Addr::UNSPECIFIED, 0)).or_else(|_| StdListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
}

/// Takes connections until the pod's end, when its tasks are dropped with it.
async fn accept(listener: TcpListener, caller: Caller) {
    let places = Arc::new(Semaphore::new(forward::MAX));
    let mut connections = JoinSet::new();
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) if is_transient(&error) => continue,
            Err(error) => return warn!("no more connections are forwarded to the pod: {error}"),
        };
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            warn!("a connection to the pod's localhost is refused: {} are open already", forward::MAX);
            reset(&client);
            continue;
        };
        let caller = caller.clone();
        connections.spawn(async move {
            if let Err(error) = join(client, &caller).await {
                debug!("a connection to the pod's localhost is over: {}", chain(&error));
            }
            drop(place);
        });
    }
}

/// What accept(2) tells of one connection, or asks to try again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR | libc::ECONNRESET | libc::EPROTO))
}

/// Joins a client with the guest until both ends are told or one side breaks, which the client sees as a reset.
async fn join(mut client: TcpStream, caller: &Caller) -> Result<(), ForwardError> {
    let outcome = pass_on(&mut client, caller).await;
    if outcome.is_err() {
        reset(&client);
    }
    outcome
}

async fn pass_on(client: &mut TcpStream, caller: &Caller) -> Result<(), ForwardError> {
    // The address that the client asked for: the listener's own is of no meaning.
    let asked = client.local_addr()?;
    let to = SocketAddr::new(asked.ip().to_canonical(), asked.port());
    let mut guest = connect(caller, to).await?;
    client.set_nodelay(true)?;
    tokio::io::copy_bidirectional_with_sizes(client, &mut guest, CHUNK, CHUNK).await?;
    Ok(())
}

/// A connection to the destination within the guest.
async fn connect(caller: &Caller, to: SocketAddr) -> Result<UnixStream, ForwardError> {
    let asking = async {
        let mut guest = caller.call(forward::PORT).await?;
        guest.write_all(&forward::encode(to)).await?;
        match guest.read_u8().await? {
            forward::CONNECTED => Ok(guest),
            _ => Err(ForwardError::Refused),
        }
    };
    timeout(ANSWER_LIMIT, asking).await.map_err(|_| ForwardError::Silent)?
}

/// Lets the connection end with a reset (tcp(7), SO_LINGER) when it is closed.
fn reset(client: &TcpStream) {
    if let Err(error) = client.set_zero_linger() {
        debug!("cannot reset a connection: {error}");
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
