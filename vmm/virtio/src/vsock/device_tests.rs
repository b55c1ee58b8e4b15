//! The device over real queues: both packet layouts, broken packets, and small buffers.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::super::wire::{TYPE_STREAM, op};
use super::*;
use crate::testing::{Counts, Driver, WRITE, memory, seqpacket};

const CID: u32 = 3;

struct World {
    vsock: Vsock,
    queues: Vec<VirtQueue>,
    receive: Driver,
    transmit: Driver,
    shim: std::os::fd::OwnedFd,
}

fn setup() -> World {
    let memory = memory();
    let (ours, shim) = seqpacket();
    let muxer = Muxer::new(DialChannel::new(ours).unwrap(), CID.into()).unwrap();
    let vsock = Vsock { muxer, config: u64::from(CID).to_le_bytes() };
    let drivers = [0x10000, 0x20000, 0x30000].map(|base| Driver::new(&memory, base, 16));
    let counts = Arc::new(Counts::default());
    let queues = (0..)
        .zip(&drivers)
        .map(|(index, driver)| VirtQueue::new(index, driver.queue(true), memory.clone(), counts.clone()))
        .collect();
    let [receive, transmit, _] = drivers;
    World { vsock, queues, receive, transmit, shim }
}

fn header(op: u16, len: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: 2,
        src_port: 10,
        dst_port: 20,
        len,
        socket_type: TYPE_STREAM,
        op,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

impl World {
    fn serve(&mut self) -> bool {
        self.vsock.serve(&mut self.queues).unwrap()
    }

    /// The driver sends a packet, split into buffers of these lengths.
    fn send(&mut self, header: &Header, data: &[u8], pieces: &[usize]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(data);
        assert_eq!(pieces.iter().sum::<usize>(), bytes.len());
        self.transmit.write(0x100000, &bytes);
        let mut at = 0x100000;
        let mut buffers = Vec::new();
        for piece in pieces {
            buffers.push((at, *piece as u32, 0));
            at += *piece as u64;
        }
        self.transmit.add(&buffers);
        self.serve();
        assert!(self.transmit.used().is_some());
    }

    fn shim_end(&self) -> UnixStream {
        use std::io::IoSliceMut;
        use std::os::fd::AsRawFd;

        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let mut bytes = [0; 8];
        let mut control = nix::cmsg_space!([i32; 1]);
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(self.shim.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_DONTWAIT).unwrap();
        match message.cmsgs().unwrap().next() {
            Some(ControlMessageOwned::ScmRights(fds)) => crate::testing::stream(fds[0]),
            other => panic!("{other:?}"),
        }
    }

    /// The next packet in the driver's buffer at this address.
    fn received(&mut self, address: u64) -> Option<(Header, u32)> {
        let (_, len) = self.receive.used()?;
        let bytes: [u8; HEADER_LEN] = self.receive.read(address, HEADER_LEN).try_into().unwrap();
        Some((Header::decode(&bytes), len))
    }
}

#[test]
fn both_layouts_carry_data_both_ways() {
    use std::io::Read;
    for (out, back) in [
        (&[49][..], &[(0x200000, 4140, WRITE)][..]),
        (&[44, 5][..], &[(0x200000, 44, WRITE), (0x20002c, 4096, WRITE)][..]),
        (&[10, 34, 1, 4][..], &[(0x200000, 20, WRITE), (0x200014, 30, WRITE), (0x200032, 4000, WRITE)][..]),
    ] {
        let mut world = setup();
        world.receive.add(&[(0x200000, 4140, WRITE)]);
        world.send(&header(op::REQUEST, 0), &[], &[44]);
        let mut shim = world.shim_end();
        let (response, len) = world.received(0x200000).unwrap();
        assert_eq!((response.op, response.src_port, len), (op::RESPONSE, 20, 44));
        world.send(&header(op::RW, 5), b"hello", out);
        let mut got = [0; 5];
        shim.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        shim.write_all(b"and back").unwrap();
        world.receive.add(back);
        world.vsock.host_event(EventSet::IN);
        world.serve();
        let (data, len) = world.received(0x200000).unwrap();
        assert_eq!((data.op, data.len, data.fwd_cnt, len), (op::RW, 8, 5, 52));
        assert_eq!(world.receive.read(0x20002c, 8), b"and back");
    }
}

#[test]
fn packets_wait_for_buffers_and_come_in_their_sizes() {
    let mut world = setup();
    world.send(&header(op::REQUEST, 0), &[], &[44]);
    let mut shim = world.shim_end();
    shim.write_all(&[7; 3000]).unwrap();
    world.vsock.host_event(EventSet::IN);
    assert!(!world.serve());
    let mut lens = Vec::new();
    for _ in 0..4 {
        world.receive.add(&[(0x200000, 44 + 1000, WRITE)]);
        world.serve();
        lens.push(world.received(0x200000).unwrap().1);
    }
    assert_eq!(lens, [44, 1044, 1044, 1044]);
    world.receive.add(&[(0x200000, 1044, WRITE)]);
    assert!(!world.serve());
    assert!(world.receive.used().is_none());
}

#[test]
fn packets_that_lie_about_their_length_are_reset() {
    let mut world = setup();
    for (len, data) in [(6, 5), (u32::MAX, 5), ((64 << 10) + 1, (64 << 10) + 1)] {
        world.receive.add(&[(0x200000, 4140, WRITE)]);
        world.send(&header(op::RW, len), &vec![0; data], &[44, data]);
        assert_eq!(world.received(0x200000).unwrap().0.op, op::RST);
    }
    // Too short for a header: dropped.
    world.transmit.add(&[(0x100000, 43, 0)]);
    world.transmit.add(&[(0x100000, 43, WRITE)]);
    assert!(!world.serve());
    assert!(world.transmit.used().is_some() && world.transmit.used().is_some());
}

#[test]
fn buffers_without_room_are_returned_unused() {
    let mut world = setup();
    world.receive.add(&[(0x200000, 44, WRITE)]);
    world.receive.add(&[(0x200000, 4140, 0)]);
    world.receive.add(&[(0x200000, 4140, WRITE)]);
    world.send(&header(op::RW, 0), &[], &[44]);
    assert_eq!(world.receive.used().unwrap().1, 0);
    assert_eq!(world.receive.used().unwrap().1, 0);
    assert_eq!(world.received(0x200000).unwrap().0.op, op::RST);
}

#[test]
fn a_wake_has_a_budget() {
    let mut world = setup();
    let bytes = header(op::CREDIT_UPDATE, 0).encode();
    world.transmit.write(0x100000, &bytes);
    let mut rounds = 0;
    let head = world.transmit.add(&[(0x100000, 44, 0)]);
    for _ in 0..15 {
        world.transmit.offer(head);
    }
    while world.serve() {
        rounds += 1;
        assert!(rounds < 10);
    }
}
