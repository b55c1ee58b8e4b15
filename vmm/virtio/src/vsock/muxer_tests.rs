//! The muxer step by step, and under guests that break the rules.

use std::io::{self, Read, Write};

use super::super::wire::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::world::{Guest, World};
use super::*;
use crate::testing::seqpacket;

#[test]
fn a_guest_dials_and_both_sides_talk() {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(5000, 1024);
    world.send(&guest.header(op::RW, 5, 0), b"hello");
    guest.sent += 5;
    let mut got = [0; 5];
    shim.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    shim.write_all(b"world!").unwrap();
    world.muxer.poll();
    let (header, data) = world.packet(4096).unwrap();
    assert_eq!((header.op, data.as_slice(), header.fwd_cnt), (op::RW, &b"world!"[..], 5));
    assert!(world.packet(4096).is_none());
    assert!(!world.muxer.has_packets());
}

#[test]
fn a_shim_that_closes_at_once_refuses() {
    let mut world = World::new();
    let (mut guest, shim) = world.connect(5000, 77);
    drop(shim);
    world.muxer.poll();
    while let Some((header, data)) = world.packet(16) {
        guest.take(&header, &data);
    }
    assert_eq!(guest.shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    world.send(&guest.header(op::RST, 0, 0), &[]);
    assert_eq!(world.muxer.len(), 0);
}

#[test]
fn a_full_or_closed_dial_channel_refuses() {
    let mut world = World::new();
    drop(std::mem::replace(&mut world.shim, seqpacket().0));
    let guest = Guest::new(1, 2);
    world.send(&guest.header(op::REQUEST, 0, 0), &[]);
    assert_eq!(world.packet(1).unwrap().0.op, op::RST);
    world.muxer.poll();
    world.send(&guest.header(op::REQUEST, 0, 0), &[]);
    assert_eq!(world.packet(1).unwrap().0.op, op::RST);
    assert_eq!(world.muxer.len(), 0);
}

#[test]
fn the_shim_dials_and_the_guest_grants_or_refuses() {
    let mut world = World::new();
    let mut shim = world.dial(9);
    shim.write_all(b"early").unwrap();
    world.muxer.poll();
    let (request, _) = world.packet(64).unwrap();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 9));
    assert!(world.packet(64).is_none());
    let guest = Guest::new(9, request.src_port);
    world.send(&guest.header(op::RESPONSE, 0, 0), &[]);
    assert_eq!(world.packet(64).unwrap().1, b"early");

    let mut shim = world.dial(10);
    let (request, _) = world.packet(64).unwrap();
    let guest = Guest::new(10, request.src_port);
    world.send(&guest.header(op::RST, 0, 0), &[]);
    assert_eq!(shim.read(&mut [0]).unwrap(), 0);
    assert_eq!(world.muxer.len(), 1);
}

#[test]
fn a_request_that_the_guest_does_not_answer_expires() {
    let mut world = World::new();
    let mut shim = world.dial(9);
    world.packet(64).unwrap();
    world.muxer.expire(Instant::now() + CONNECT_DEADLINE / 2);
    assert_eq!(shim.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    world.muxer.expire(Instant::now() + CONNECT_DEADLINE);
    assert_eq!(shim.read(&mut [0]).unwrap(), 0);
    assert_eq!(world.packet(64).unwrap().0.op, op::RST);
    assert_eq!(world.muxer.len(), 0);
}

#[test]
fn unknown_connections_and_foreign_types_are_reset() {
    let mut world = World::new();
    let guest = Guest::new(1, 2);
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        world.send(&guest.header(op, 0, 0), &[]);
        assert_eq!(world.packet(1).unwrap().0.op, op::RST, "{op}");
    }
    world.send(&Header { socket_type: 2, ..guest.header(op::REQUEST, 0, 0) }, &[]);
    assert_eq!(world.packet(1).unwrap().0.op, op::RST);
    world.send(&guest.header(op::RST, 0, 0), &[]);
    assert!(world.packet(1).is_none());
    for header in [
        Header { src_cid: 4, ..guest.header(op::REQUEST, 0, 0) },
        Header { dst_cid: 9, ..guest.header(op::REQUEST, 0, 0) },
    ] {
        world.send(&header, &[]);
        assert!(world.packet(1).is_none());
    }
}

#[test]
fn refusals_are_bounded() {
    let mut world = World::new();
    for port in 0..10_000 {
        world.send(&Guest::new(port, 2).header(op::RW, 0, 0), &[]);
    }
    assert_eq!(std::iter::from_fn(|| world.packet(1)).count(), MAX_REFUSALS);
}

#[test]
fn connections_are_bounded() {
    let mut world = World::new();
    let mut shims = Vec::new();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 8192, 8192).unwrap();
    for port in 0..MAX_CONNECTIONS as u32 {
        shims.push(world.connect(port, 1).1);
    }
    world.send(&Guest::new(u32::MAX, 1).header(op::REQUEST, 0, 0), &[]);
    assert_eq!(world.packet(1).unwrap().0.op, op::RST);
    let mut shim = world.dial(1);
    assert_eq!(shim.read(&mut [0]).unwrap(), 0);
    assert_eq!(world.muxer.len(), MAX_CONNECTIONS);
    world.muxer.reset();
    assert_eq!(world.muxer.len(), 0);
}

#[test]
fn violations_end_the_connection() {
    type Break = fn(&mut World, &Guest);
    let breaks: [Break; 6] = [
        |world, guest| {
            let data = vec![0; (256 << 10) + 1];
            world.send(&guest.header(op::RW, data.len() as u32, 0), &data);
        },
        |world, guest| {
            world.send(&guest.header(op::SHUTDOWN, 0, SHUTDOWN_SEND), &[]);
            world.send(&guest.header(op::RW, 1, 0), b"x");
        },
        |world, guest| world.send(&guest.header(op::RESPONSE, 0, 0), &[]),
        |world, guest| world.send(&guest.header(op::REQUEST, 0, 0), &[]),
        |world, guest| world.send(&guest.header(99, 0, 0), &[]),
        |world, guest| world.muxer.reject(&guest.header(op::RW, u32::MAX, 0)),
    ];
    for (index, violate) in breaks.into_iter().enumerate() {
        let mut world = World::new();
        let (guest, mut shim) = world.connect(1, 2);
        violate(&mut world, &guest);
        let last = std::iter::from_fn(|| world.packet(1)).last().unwrap().0;
        assert_eq!(last.op, op::RST, "case {index}");
        assert_eq!(shim.read(&mut [0]).unwrap(), 0);
        assert_eq!(world.muxer.len(), 0);
    }
}

#[test]
fn credit_is_respected_though_the_shim_does_not_read() {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(1, 2);
    let mut total = 0;
    loop {
        while let Some((header, data)) = world.packet(16) {
            guest.take(&header, &data);
        }
        let len = guest.credit().min(50_000);
        if len == 0 {
            break;
        }
        guest.sent += len;
        total += len as usize;
        world.send(&guest.header(op::RW, len, 0), &vec![1; len as usize]);
    }
    assert!(total >= 256 << 10);
    // The guest closes: all of it must still arrive.
    world.send(&guest.header(op::SHUTDOWN, 0, SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    assert!(world.packet(16).is_none(), "no reset before the last byte is written");
    let mut got = 0;
    let mut buffer = vec![0; 10_000];
    loop {
        world.muxer.poll();
        match shim.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => got += len,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
    assert_eq!(got, total);
    assert_eq!(world.packet(16).unwrap().0.op, op::RST);
    assert_eq!(world.muxer.len(), 0);
}

#[test]
fn a_guest_that_gives_up_closing_loses_nothing_and_may_use_its_port_again() {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(1, 2);
    let mut total = 0;
    while guest.credit() > 0 {
        let len = guest.credit().min(60_000);
        guest.sent += len;
        total += len as usize;
        world.send(&guest.header(op::RW, len, 0), &vec![1; len as usize]);
        while let Some((header, data)) = world.packet(16) {
            guest.take(&header, &data);
        }
    }
    world.send(&guest.header(op::SHUTDOWN, 0, 3), &[]);
    world.send(&guest.header(op::RST, 0, 0), &[]);
    let (_guest, _shim) = world.connect(1, 2);
    assert_eq!(world.muxer.len(), 2);
    let mut got = Vec::new();
    while world.muxer.len() == 2 {
        world.muxer.poll();
        let mut buffer = [0; 9000];
        if let Ok(len) = shim.read(&mut buffer) {
            got.extend_from_slice(&buffer[..len]);
        }
    }
    shim.set_nonblocking(false).unwrap();
    shim.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), total);
}

#[test]
fn zero_credit_asks_once_and_waits() {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(1, 2);
    guest.alloc = 0;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    shim.write_all(b"data").unwrap();
    world.muxer.poll();
    assert_eq!(world.packet(16).unwrap().0.op, op::CREDIT_REQUEST);
    for _ in 0..3 {
        assert!(world.packet(16).is_none());
        world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    }
    guest.alloc = 3;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    assert_eq!(world.packet(16).unwrap().1, b"dat");
    guest.forwarded = 3;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    assert_eq!(std::iter::from_fn(|| world.packet(16)).last().unwrap().1, b"a");
}

#[test]
fn counters_wrap() {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(1, 2);
    let mut buffer = vec![0; 64 << 10];
    // 4 GiB would take long: the guest's own counters may start anywhere, ours do not show.
    guest.forwarded = u32::MAX - 10;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    shim.write_all(&buffer[..100]).unwrap();
    world.muxer.poll();
    // sent - forwarded = 11: so much of the credit is in use.
    assert_eq!(world.packet(64 << 10).unwrap().0.len, 100);
    guest.forwarded = 100;
    guest.alloc = u32::MAX;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    shim.write_all(&buffer[..1000]).unwrap();
    world.muxer.poll();
    assert_eq!(world.packet(64 << 10).unwrap().0.len, 1000);
    buffer.clear();
}

#[test]
fn busy_connections_take_turns() {
    let mut world = World::new();
    let mut pairs: Vec<_> = (0..4).map(|port| world.connect(port, 2)).collect();
    for (_, shim) in &mut pairs {
        shim.write_all(&[0; 8000]).unwrap();
    }
    world.muxer.poll();
    let order: Vec<u32> = (0..8).map(|_| world.packet(1000).unwrap().0.dst_port).collect();
    let mut first = order[..4].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
    assert_eq!(order[..4], order[4..]);
}

#[test]
fn a_flood_of_empty_packets_costs_no_memory() {
    let mut world = World::new();
    let (guest, _shim) = world.connect(1, 2);
    for _ in 0..100_000 {
        world.send(&guest.header(op::RW, 0, 0), &[]);
        world.send(&guest.header(op::CREDIT_REQUEST, 0, 0), &[]);
    }
    assert_eq!(std::iter::from_fn(|| world.packet(1)).count(), 1);
}

/// Streams so many bytes from guest to host and from host to guest.
fn stream(up: usize, down: usize) {
    let mut world = World::new();
    let (mut guest, mut shim) = world.connect(1, 2);
    guest.alloc = 256 << 10;
    world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
    let (mut guest_wrote, mut guest_read, mut shim_wrote, mut shim_read) = (0, 0, 0, 0);
    let mut buffer = vec![0; 64 << 10];
    let mut told = 0;
    while guest_read < down || shim_read < up {
        let before = (guest_wrote, guest_read, shim_wrote, shim_read);
        let len = guest.credit().min(64 << 10).min((up - guest_wrote) as u32);
        if len > 0 {
            world.send(&guest.header(op::RW, len, 0), &buffer[..len as usize]);
            guest.sent += len;
            guest_wrote += len as usize;
            told = guest.forwarded;
        }
        if let Ok(len) = shim.read(&mut buffer) {
            shim_read += len;
        }
        let most = (down - shim_wrote).min(buffer.len());
        if most > 0
            && let Ok(len) = shim.write(&buffer[..most])
        {
            shim_wrote += len;
        }
        world.muxer.poll();
        for _ in 0..4 {
            let Some((header, data)) = world.packet(4096) else { break };
            if let Some(answer) = guest.take(&header, &data) {
                world.send(&answer, &[]);
            }
        }
        guest_read += guest.buffer.len();
        guest.forwarded += guest.buffer.len() as u32;
        guest.buffer.clear();
        // As Linux does: only when its credit runs low does the guest tell.
        if guest.forwarded - told > 192 << 10 {
            told = guest.forwarded;
            world.send(&guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
        }
        assert_ne!(before, (guest_wrote, guest_read, shim_wrote, shim_read), "stalled");
    }
}

#[test]
fn long_streams_never_stall() {
    const LEN: usize = 8 << 20;
    stream(LEN, 0);
    stream(0, LEN);
    stream(LEN, LEN);
}
