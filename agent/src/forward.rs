//! Connections that something on the host makes to the pod's localhost or address within the pod's network namespace there
//! (port-forward, probes). The shim passes each on by vsock; here it is joined to a TCP connection of the guest's own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use husk_agent_api::forward;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::dial::Connection;
use crate::listen::Listener;

/// How long the shim may take to name the destination, and the destination to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Bytes copied at a time, each way.
const CHUNK: usize = 32 << 10;

/// Takes forwarded connections for as long as the machine runs. Without vsock (tests outside a machine) there are none.
pub(crate) async fn serve() {
    let listener = match Listener::new(forward::PORT, forward::MAX) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!("Connections can't be forwarded to the pod: {error}"),
    };
    let places = Arc::new(Semaphore::new(forward::MAX));
    loop {
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => return tracing::warn!("No more connections can be forwarded to the pod: {error}"),
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        tokio::spawn(async move {
            if let Err(error) = join(connection).await {
                tracing::debug!("A forwarded connection failed: {error}");
            }
            drop(place);
        });
    }
}

/// Connects to where the client wants to go, and copies both ways until both ends are told or one side breaks.
async fn join(mut connection: Connection) -> io::Result<()> {
    let mut destination = [0; forward::LEN];
    timeout(DEADLINE, connection.read_exact(&mut destination)).await??;
    let mut server = match timeout(DEADLINE, connect(forward::decode(&destination))).await {
        Ok(Ok(server)) => server,
        refused => {
            connection.write_all(&[forward::REFUSED]).await?;
            return refused?.map(drop);
        }
    };
    connection.write_all(&[forward::CONNECTED]).await?;
    // What is small must not wait for more: the client's own side decides on that.
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional_with_sizes(&mut connection, &mut server, CHUNK, CHUNK).await?;
    Ok(())
}

/// Connects within the guest. To be at the loopback in one family is to be at the pod's localhost: the other is tried too, as a
/// client that the shim has to accept before the guest is asked no longer will.
async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    match (TcpStream::connect(to).await, other_loopback(to.ip())) {
        (Err(_), Some(other)) => TcpStream::connect(SocketAddr::new(other, to.port())).await,
        (outcome, _) => outcome,
    }
}

fn other_loopback(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Ipv4Addr::LOCALHOST.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket, UnixStream};

    async fn asked(to: SocketAddr) -> (UnixStream, u8) {
        let (mut shim, agent) = UnixStream::pair().unwrap();
        tokio::spawn(join(agent));
        shim.write_all(&forward::encode(to)).await.unwrap();
        let answer = shim.read_u8().await.unwrap();
        (shim, answer)
    }

    #[tokio::test]
    async fn joins_client_and_server_with_half_close() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut server, peer) = listener.accept().await.unwrap();
            let mut all = Vec::new();
            server.read_to_end(&mut all).await.unwrap();
            server.write_all(&all).await.unwrap();
            peer
        });
        let (mut shim, answer) = asked(to).await;
        assert_eq!(answer, forward::CONNECTED);
        shim.write_all(b"all of it").await.unwrap();
        shim.shutdown().await.unwrap();
        let mut back = Vec::new();
        shim.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"all of it");
        assert!(server.await.unwrap().ip().is_loopback());
    }

    /// A port that both loopbacks have free. Bound sockets that don't listen refuse connections, and keep it from others. (Closing one that
    /// listens does not end that at once: a child that another test has just forked holds it too, until its exec.)
    fn bound() -> (TcpSocket, TcpSocket, u16) {
        loop {
            let (v4, v6) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v6().unwrap());
            v4.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let port = v4.local_addr().unwrap().port();
            if v6.bind((Ipv6Addr::LOCALHOST, port).into()).is_ok() {
                return (v4, v6, port);
            }
        }
    }

    #[tokio::test]
    async fn tries_the_other_loopback_and_says_when_nobody_listens() {
        let (v4, _v6, port) = bound();
        let to = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        assert_eq!(asked(to).await.1, forward::REFUSED);
        let _listener = v4.listen(1).unwrap();
        assert_eq!(asked(to).await.1, forward::CONNECTED);
    }
}
