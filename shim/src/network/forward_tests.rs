//! Connections within a namespace of the test's own, with a VMM and an agent played by the test.

use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd};

use husk_vmm_api::dial;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rtnetlink::LinkUnspec;

use super::*;
use crate::network::tests::namespace;
use crate::peer::dial::Dial;

/// A namespace with its loopback up and an address.
async fn pod() -> OwnedFd {
    let pod = namespace();
    let connected = crate::network::connect(&pod).await.unwrap();
    let handle = &connected.handle;
    handle.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
    let address: IpAddr = "10.9.0.2".parse().unwrap();
    handle.address().add(1, address, 32).execute().await.unwrap();
    pod
}

/// Connects from within the namespace.
async fn client(pod: &OwnedFd, to: &'static str) -> TcpStream {
    let stream = netns::within(pod, "connect", move || {
        let stream = std::net::TcpStream::connect(to).map_err(|cause| NetworkError::Netlink { cause })?;
        stream.set_nonblocking(true).unwrap();
        Ok(TcpStream::from_std(stream).unwrap())
    });
    stream.await.unwrap()
}

/// The VMM's part: the next connection to the guest, as the agent has it.
fn next(vmm: &OwnedFd) -> UnixStream {
    let mut bytes = [0; dial::LEN];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    // The socket does not block: the caller has seen that something is there.
    let message = recvmsg::<()>(vmm.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let Some(ControlMessageOwned::ScmRights(numbers)) = message.cmsgs().unwrap().next() else {
        panic!("no descriptor")
    };
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    let stream = unsafe { std::os::unix::net::UnixStream::from_raw_fd(numbers[0]) };
    assert_eq!(dial::Message::decode(&bytes), Some(dial::Message::DialGuest { port: forward::PORT }));
    stream.set_nonblocking(true).unwrap();
    UnixStream::from_std(stream).unwrap()
}

/// The agent's part: takes the next connection, and says where it wants to go.
async fn taken(vmm: &OwnedFd, answer: u8) -> (UnixStream, SocketAddr) {
    let readable = crate::watch::readable(vmm.try_clone().unwrap()).unwrap();
    readable.readable().await.unwrap().retain_ready();
    let mut guest = next(vmm);
    let mut destination = [0; forward::LEN];
    guest.read_exact(&mut destination).await.unwrap();
    guest.write_all(&[answer]).await.unwrap();
    (guest, forward::decode(&destination))
}

#[tokio::test]
#[ignore = "needs root"]
async fn takes_what_is_for_the_namespaces_own_addresses() {
    let pod = pod().await;
    let (dial, vmm) = Dial::new().unwrap();
    let forwarder = Forwarder::start(&pod, dial.caller()).await.unwrap();
    for to in ["127.0.0.1:80", "[::1]:8080", "10.9.0.2:65535", "127.9.9.9:1"] {
        let mut client = client(&pod, to).await;
        let (mut guest, wanted) = taken(&vmm, forward::CONNECTED).await;
        assert_eq!(wanted.to_string(), to);
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        guest.read_to_end(&mut all).await.unwrap();
        guest.write_all(b"answer").await.unwrap();
        drop(guest);
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        assert_eq!((&all[..], &back[..]), (&b"question"[..], &b"answer"[..]));
    }
    drop(forwarder);
    // Its task is dropped by the runtime, its program with the link.
    let refused = async {
        while netns::within(&pod, "connect", || {
            std::net::TcpStream::connect("127.0.0.1:80").map_err(|cause| NetworkError::Netlink { cause })
        })
        .await
        .is_ok()
        {}
    };
    timeout(Duration::from_secs(5), refused).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root"]
async fn resets_what_the_guest_refuses_or_cannot_take() {
    let pod = pod().await;
    let (dial, vmm) = Dial::new().unwrap();
    let _forwarder = Forwarder::start(&pod, dial.caller()).await.unwrap();
    let mut refused = client(&pod, "127.0.0.1:81").await;
    let _guest = taken(&vmm, forward::REFUSED).await;
    assert_eq!(refused.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(vmm);
    let mut down = client(&pod, "127.0.0.1:81").await;
    assert_eq!(down.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
#[ignore = "needs root"]
async fn the_number_of_connections_is_bounded() {
    let pod = pod().await;
    let (dial, vmm) = Dial::new().unwrap();
    let _forwarder = Forwarder::start(&pod, dial.caller()).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..forward::MAX {
        let client = client(&pod, "127.0.0.1:80").await;
        open.push((client, taken(&vmm, forward::CONNECTED).await));
    }
    let mut one_more = client(&pod, "127.0.0.1:80").await;
    assert_eq!(one_more.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(open);
    let again = async {
        loop {
            let mut client = client(&pod, "127.0.0.1:80").await;
            let readable = tokio::select! {
                broken = client.read_u8() => broken.is_ok(),
                (_guest, _) = taken(&vmm, forward::CONNECTED) => true,
            };
            if readable {
                break;
            }
        }
    };
    timeout(Duration::from_secs(5), again).await.unwrap();
}
