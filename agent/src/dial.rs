//! Connections from the guest to the shim: by vsock in a machine, by Unix sockets in tests.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use tokio::net::UnixStream;

/// A connected stream socket. Reading, writing and shutting down are the same system calls for every family, so tokio's
/// type for Unix sockets serves vsock too.
pub(crate) type Connection = UnixStream;

/// How long the shim may take to accept; it listens before the machine runs.
const DEADLINE: Duration = Duration::from_secs(10);

/// Where connections go.
#[derive(Clone, Debug)]
pub(crate) enum Dialler {
    /// To the host, `VMADDR_CID_HOST` of vsock(7).
    Vsock,
    /// To the Unix socket `<directory>/<port>`.
    Unix(PathBuf),
}

impl Dialler {
    /// Connects to a port of the shim. `ETIMEDOUT` when nobody answered in time.
    pub(crate) async fn dial(&self, port: u32) -> io::Result<Connection> {
        let dialled = async {
            match self {
                Self::Vsock => vsock(port).await,
                Self::Unix(directory) => UnixStream::connect(directory.join(port.to_string())).await,
            }
        };
        match tokio::time::timeout(DEADLINE, dialled).await {
            Ok(result) => result,
            Err(_) => Err(Errno::ETIMEDOUT.into()),
        }
    }
}

/// A connection that is there already.
pub(crate) fn from_descriptor(descriptor: OwnedFd) -> io::Result<Connection> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn vsock(port: u32) -> io::Result<Connection> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    match connect(descriptor.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_HOST, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let stream = from_descriptor(descriptor)?;
    // The outcome of a connect that was in progress: connect(2), EINPROGRESS: writable, then SO_ERROR.
    stream.writable().await?;
    match stream.take_error()? {
        None => Ok(stream),
        Some(error) => Err(error),
    }
}
