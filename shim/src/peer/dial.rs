//! The dial channel with the VMM: connections that the guest makes to the host's vsock ports come in as descriptors, those that the
//! shim makes to the guest's go out as such. A port of the host is open only while someone waits for it, and for one connection;
//! everything else is refused by closing the descriptor.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_vmm_api::dial::{self, Message};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::PeerError;
use crate::watch;

/// Most connections awaited at a time.
const MAX_EXPECTED: usize = 3072;

/// Longest wait for room on the channel.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Most descriptors looked at in a message; it should carry one.
const MAX_FDS: usize = 8;

/// The shim's end of the channel.
#[derive(Debug)]
pub(crate) struct Dial {
    ports: Ports,
    caller: Caller,
    reader: JoinHandle<()>,
}

/// Makes connections to the guest's ports.
#[derive(Clone, Debug)]
pub(crate) struct Caller(Arc<AsyncFd<OwnedFd>>);

/// Who waits for which port, and the next free one.
#[derive(Clone, Debug)]
struct Ports(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    waiting: HashMap<u32, oneshot::Sender<OwnedFd>>,
    next: u32,
}

/// A port that is open for one connection, until this is dropped.
#[derive(Debug)]
pub(crate) struct Expected {
    /// The host's vsock port.
    pub(crate) port: u32,
    ports: Ports,
    arrival: oneshot::Receiver<OwnedFd>,
}

impl Dial {
    /// Makes the channel and begins to read it; the descriptor is the VMM's end.
    pub(crate) fn new() -> Result<(Self, OwnedFd), PeerError> {
        let failed = |source| PeerError::Socket { doing: "make the channel for the guest's connections", source };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(|errno| failed(errno.into()))?;
        let ours = Arc::new(watch::both_ways(ours).map_err(failed)?);
        let table = Table { waiting: HashMap::new(), next: husk_agent_api::FIRST_STREAM_PORT };
        let ports = Ports(Arc::new(Mutex::new(table)));
        let reader = tokio::spawn(read(Arc::clone(&ours), ports.clone()));
        Ok((Self { ports, caller: Caller(ours), reader }, theirs))
    }

    /// For connections to the guest.
    pub(crate) fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Opens `port` for one connection.
    pub(crate) fn expect(&self, port: u32) -> Result<Expected, PeerError> {
        self.ports.open(|_| port)
    }

    /// Opens a fresh stream port.
    pub(crate) fn expect_stream(&self) -> Result<Expected, PeerError> {
        self.ports.open(|table| {
            loop {
                let port = table.next;
                table.next = port.checked_add(1).unwrap_or(husk_agent_api::FIRST_STREAM_PORT);
                if !table.waiting.contains_key(&port) {
                    return port;
                }
            }
        })
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Caller {
    /// A connection to the guest's vsock port `port`. Where nobody listens it ends at once.
    pub(crate) async fn call(&self, port: u32) -> Result<UnixStream, PeerError> {
        let failed = |source| PeerError::Socket { doing: "connect with a port of the guest", source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let send = |channel: &OwnedFd| {
            let bytes = Message::DialGuest { port }.encode();
            let descriptors = [theirs.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, flags, None)?)
        };
        match tokio::time::timeout(SEND_LIMIT, self.0.async_io(Interest::WRITABLE, send)).await {
            Ok(sent) => sent.map(|_| ours).map_err(failed),
            Err(_) => Err(PeerError::Deadline { what: "room on the VMM's dial channel", limit: SEND_LIMIT }),
        }
    }
}

impl Ports {
    fn open(&self, choose: impl FnOnce(&mut Table) -> u32) -> Result<Expected, PeerError> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.waiting.len() >= MAX_EXPECTED {
            return Err(PeerError::TooManyExpected(table.waiting.len()));
        }
        let port = choose(&mut table);
        let (sender, arrival) = oneshot::channel();
        table.waiting.insert(port, sender);
        Ok(Expected { port, ports: self.clone(), arrival })
    }

    fn take(&self, port: u32) -> Option<oneshot::Sender<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.remove(&port)
    }

    /// Nobody comes any more: ends every wait.
    fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.clear();
    }
}

impl Expected {
    /// Waits for the guest's connection; `what` says in the error what for.
    pub(crate) async fn stream(mut self, what: &'static str, limit: Duration) -> Result<UnixStream, PeerError> {
        let fd = tokio::time::timeout(limit, &mut self.arrival)
            .await
            .map_err(|_| PeerError::Deadline { what, limit })?
            .map_err(|_| PeerError::NotDialled(what))?;
        let failed = |source| PeerError::Socket { doing: "use a connection of the guest", source };
        let stream = std::os::unix::net::UnixStream::from(fd);
        stream.set_nonblocking(true).map_err(failed)?;
        UnixStream::from_std(stream).map_err(failed)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        // The port is this one's own until its connection came; then it is no longer in the table, and nobody else's either.
        self.ports.take(self.port);
    }
}

/// Hands over every connection until the VMM's end is closed.
async fn read(socket: Arc<AsyncFd<OwnedFd>>, ports: Ports) {
    loop {
        match socket.async_io(Interest::READABLE, receive).await {
            Ok(Received::Connection(port, fd)) => match ports.take(port) {
                Some(waiting) => drop(waiting.send(fd)),
                None => debug!("the guest dialled port {port}, which is not open"),
            },
            Ok(Received::Nonsense) => warn!("the VMM sent a message on the dial channel that is none"),
            Ok(Received::End) => break,
            Err(error) => {
                warn!("cannot read the dial channel: {error}");
                break;
            }
        }
    }
    ports.close();
}

/// One message of the channel.
enum Received {
    Connection(u32, OwnedFd),
    Nonsense,
    End,
}

/// Takes one message; every descriptor that came with it is owned at once, so none can leak.
fn receive(socket: &OwnedFd) -> io::Result<Received> {
    let mut bytes = [0; dial::LEN + 1];
    let mut space = nix::cmsg_space!([i32; MAX_FDS]);
    let (length, mut fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        (message.bytes, fds)
    };
    if length == 0 && fds.is_empty() {
        return Ok(Received::End);
    }
    match (Message::decode(&bytes[..length]), fds.pop()) {
        (Some(Message::GuestDialled { port }), Some(fd)) if fds.is_empty() => Ok(Received::Connection(port, fd)),
        _ => Ok(Received::Nonsense),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn send(vmm: &OwnedFd, bytes: &[u8], fds: &[i32]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        sendmsg::<()>(vmm.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
    }

    fn dialled(vmm: &OwnedFd, port: u32) -> UnixStream {
        let (guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
        send(vmm, &Message::GuestDialled { port }.encode(), &[host.as_raw_fd()]);
        guest.set_nonblocking(true).unwrap();
        UnixStream::from_std(guest).unwrap()
    }

    #[tokio::test]
    async fn an_expected_connection_arrives_once_and_others_are_closed() {
        let (dial, vmm) = Dial::new().unwrap();
        let expected = dial.expect(1024).unwrap();
        let mut stranger = dialled(&vmm, 7);
        let mut guest = dialled(&vmm, 1024);
        let mut second = dialled(&vmm, 1024);
        let mut stream = expected.stream("a test", LIMIT).await.unwrap();
        guest.write_all(b"hi").await.unwrap();
        let mut two = [0; 2];
        stream.read_exact(&mut two).await.unwrap();
        assert_eq!(stranger.read(&mut two).await.unwrap(), 0);
        assert_eq!(second.read(&mut two).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn nonsense_harms_nobody() {
        let (dial, vmm) = Dial::new().unwrap();
        let expected = dial.expect_stream().unwrap();
        assert_eq!(expected.port, husk_agent_api::FIRST_STREAM_PORT);
        let message = Message::GuestDialled { port: expected.port }.encode();
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&vmm, &message, &[]);
        send(&vmm, &message[..4], &[null.as_raw_fd()]);
        send(&vmm, &[0xff; 64], &[null.as_raw_fd(); 4]);
        send(&vmm, &message, &[null.as_raw_fd(); 3]);
        let _guest = dialled(&vmm, expected.port);
        expected.stream("a test", LIMIT).await.unwrap();
    }

    #[tokio::test]
    async fn waits_end_by_deadline_or_with_the_vmm() {
        let (dial, vmm) = Dial::new().unwrap();
        let late = dial.expect_stream().unwrap();
        let error = late.stream("nobody", Duration::from_millis(10)).await.unwrap_err();
        assert!(error.to_string().contains("nobody"), "{error}");
        let cut = dial.expect_stream().unwrap();
        drop(vmm);
        assert!(matches!(cut.stream("a test", LIMIT).await, Err(PeerError::NotDialled(_))));
    }

    #[tokio::test]
    async fn calls_the_guest() {
        let (dial, vmm) = Dial::new().unwrap();
        let mut ours = dial.caller().call(1025).await.unwrap();
        let mut bytes = [0; dial::LEN];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(vmm.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
        let Some(ControlMessageOwned::ScmRights(numbers)) = message.cmsgs().unwrap().next() else {
            panic!("no descriptor")
        };
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
        let guest = unsafe { OwnedFd::from_raw_fd(numbers[0]) };
        assert_eq!(Message::decode(&bytes), Some(Message::DialGuest { port: 1025 }));
        drop(guest);
        assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
        drop(vmm);
        assert!(dial.caller().call(1025).await.is_err());
    }

    #[tokio::test]
    async fn what_is_awaited_is_bounded() {
        let (dial, _vmm) = Dial::new().unwrap();
        let all: Vec<_> = (0..MAX_EXPECTED).map(|_| dial.expect_stream().unwrap()).collect();
        assert!(matches!(dial.expect_stream(), Err(PeerError::TooManyExpected(_))));
        drop(all);
        dial.expect_stream().unwrap();
    }
}
