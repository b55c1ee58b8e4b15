//! Ports of the guest that the host dials.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_HOST};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptor;
use crate::dial::{self, Connection};

/// A vsock port that takes connections from the host alone.
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens; `waiting` connections may wait to be accepted.
    pub(crate) fn new(port: u32, waiting: usize) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        bind(listener.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
        listen(&listener, Backlog::new(i32::try_from(waiting).unwrap_or(Backlog::MAXCONN.into()))?)?;
        descriptor::watch(listener, Interest::READABLE).map(Self)
    }

    /// The host's next connection. One of a container, which can reach the port by vsock(7)'s local address, is closed.
    pub(crate) async fn accept(&self) -> io::Result<Connection> {
        loop {
            match self.0.async_io(Interest::READABLE, accept).await {
                Ok(connection) if is_of_host(&connection) => return dial::from_descriptor(connection),
                Ok(_) => {}
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What accept(2) tells of one connection, or asks to try again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ECONNABORTED | Errno::EINTR | Errno::ECONNRESET))
}

fn is_of_host(connection: &OwnedFd) -> bool {
    getpeername::<VsockAddr>(connection.as_raw_fd()).is_ok_and(|peer| peer.cid() == VMADDR_CID_HOST)
}
