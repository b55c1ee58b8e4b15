//! Tests of the dial channel against a shim's end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{AddressFamily, SockFlag, socketpair};

use super::*;

fn pair() -> (DialChannel, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (DialChannel::new(ours).unwrap(), theirs)
}

fn send(socket: &OwnedFd, bytes: &[u8], fds: &[RawFd]) {
    let control = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
}

#[test]
fn hands_over_what_the_guest_dialled() {
    let (channel, shim) = pair();
    let (ours, theirs) = Stream::pair().unwrap();
    channel.guest_dialled(1024, theirs).unwrap();
    let mut bytes = [0; 16];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(shim.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::empty()).unwrap();
    let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else { panic!("no descriptor") };
    let len = message.bytes;
    assert_eq!(Message::decode(&bytes[..len]), Some(Message::GuestDialled { port: 1024 }));
    // SAFETY: just received.
    let mut end = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fds[0]) });
    assert_eq!(ours.write_bytes(b"hi"), crate::stream::Transfer::Bytes(2));
    let mut got = [0; 2];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hi");
}

#[test]
fn takes_dials_and_drops_everything_else() {
    let (channel, shim) = pair();
    assert!(matches!(channel.receive(), Received::Empty));
    let (a, mut b) = UnixStream::pair().unwrap();
    let dial = Message::DialGuest { port: 7 }.encode();
    send(&shim, &dial, &[a.as_raw_fd()]);
    let Received::Dial { port: 7, stream } = channel.receive() else { panic!("no dial") };
    drop(a);
    b.write_all(b"x").unwrap();
    drop(stream);
    let (a, mut b) = UnixStream::pair().unwrap();
    send(&shim, &dial, &[]);
    send(&shim, &dial, &[a.as_raw_fd(), a.as_raw_fd()]);
    send(&shim, &[1; 64], &[a.as_raw_fd()]);
    send(&shim, &Message::GuestDialled { port: 1 }.encode(), &[a.as_raw_fd()]);
    let (pipe, _write) = std::io::pipe().unwrap();
    send(&shim, &dial, &[pipe.as_raw_fd()]);
    for _ in 0..5 {
        assert!(matches!(channel.receive(), Received::Malformed));
    }
    // Nothing keeps the descriptors that came with them.
    drop(a);
    assert_eq!(b.read(&mut [0; 1]).unwrap(), 0);
    drop(shim);
    assert!(matches!(channel.receive(), Received::Closed));
}

#[test]
fn a_full_channel_is_an_error_and_not_a_wait() {
    let (channel, _shim) = pair();
    let full = (0..100_000).any(|port| {
        let (_ours, theirs) = Stream::pair().unwrap();
        channel.guest_dialled(port, theirs).is_err()
    });
    assert!(full);
}
