//! The muxer under random interleavings of everything that guest and shim may do.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::wire::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::world::{GUEST, Guest, World};
use super::*;

/// One step of a random run.
#[derive(Clone, Debug)]
enum Step {
    GuestWrites(usize, u32),
    GuestReads(usize, usize),
    ShimWrites(usize, usize),
    ShimReads(usize, usize),
    Poll,
    Packets(usize, usize),
}

/// How a connection ends after the random steps.
#[derive(Clone, Copy, Debug)]
enum End {
    HalfByHalf,
    GuestCloses,
    ShimCloses,
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0usize..3;
    prop_oneof![
        (which.clone(), 1u32..100_000).prop_map(|(which, len)| Step::GuestWrites(which, len)),
        (which.clone(), 1usize..100_000).prop_map(|(which, len)| Step::GuestReads(which, len)),
        (which.clone(), 1usize..100_000).prop_map(|(which, len)| Step::ShimWrites(which, len)),
        (which, 1usize..100_000).prop_map(|(which, len)| Step::ShimReads(which, len)),
        Just(Step::Poll),
        (1usize..8, prop_oneof![Just(1usize), 2usize..200, Just(4096usize), Just(65536usize)])
            .prop_map(|(count, room)| Step::Packets(count, room)),
    ]
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::HalfByHalf), Just(End::GuestCloses), Just(End::ShimCloses)]
}

/// A connection with both its ends, and what each wrote and read.
struct Pair {
    guest: Guest,
    shim: Option<UnixStream>,
    guest_wrote: u64,
    guest_read: u64,
    shim_wrote: u64,
    shim_read: u64,
    shim_ended: bool,
}

/// The byte at a position of a stream.
fn byte(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn bytes(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(byte).collect()
}

impl Pair {
    fn guest_writes(&mut self, world: &mut World, len: u32) {
        let len = len.min(self.guest.credit()).min(64 << 10);
        if len > 0 && !self.guest.reset && self.guest.shutdown & SHUTDOWN_RECEIVE == 0 {
            world.send(&self.guest.header(op::RW, len, 0), &bytes(self.guest_wrote, len as usize));
            self.guest.sent = self.guest.sent.wrapping_add(len);
            self.guest_wrote += u64::from(len);
        }
    }

    fn guest_reads(&mut self, world: &mut World, len: usize) {
        let len = len.min(self.guest.buffer.len());
        for got in self.guest.buffer.drain(..len) {
            assert_eq!(got, byte(self.guest_read));
            self.guest_read += 1;
        }
        self.guest.forwarded = self.guest.forwarded.wrapping_add(len as u32);
        if len > 0 && !self.guest.reset {
            world.send(&self.guest.header(op::CREDIT_UPDATE, 0, 0), &[]);
        }
    }

    fn shim_writes(&mut self, len: usize) {
        if let Some(shim) = &mut self.shim
            && let Ok(len) = shim.write(&bytes(self.shim_wrote, len))
        {
            self.shim_wrote += len as u64;
        }
    }

    fn shim_reads(&mut self, len: usize) {
        let mut buffer = vec![0; len];
        if let Some(shim) = &mut self.shim {
            match shim.read(&mut buffer) {
                Ok(0) => self.shim_ended = true,
                Ok(len) => {
                    assert_eq!(buffer[..len], bytes(self.shim_read, len));
                    self.shim_read += len as u64;
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }
}

fn packets(world: &mut World, pairs: &mut [Pair], count: usize, room: usize) -> bool {
    let mut any = false;
    for _ in 0..count {
        let Some((header, data)) = world.packet(room) else { return any };
        any = true;
        let pair = pairs
            .iter_mut()
            .find(|pair| (pair.guest.host_port, pair.guest.guest_port) == (header.src_port, header.dst_port))
            .unwrap();
        if let Some(answer) = pair.guest.take(&header, &data) {
            world.send(&answer, &[]);
        }
    }
    any
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_interleaving_delivers_every_byte_in_order(
        steps in proptest::collection::vec(step(), 0..120),
        ends in (end(), end(), end()),
    ) {
        let mut world = World::new();
        let mut pairs = Vec::new();
        for index in 0..3u32 {
            let (guest, shim) = if index == 1 {
                let shim = world.dial(1);
                let (request, _) = world.packet(1).unwrap();
                let mut guest = Guest::new(1, request.src_port);
                let answer = guest.take(&request, &[]).unwrap();
                world.send(&answer, &[]);
                (guest, shim)
            } else {
                world.connect(1000 + index, 2)
            };
            pairs.push(Pair {
                guest, shim: Some(shim), guest_wrote: 0, guest_read: 0, shim_wrote: 0, shim_read: 0, shim_ended: false,
            });
        }
        for step in steps {
            match step {
                Step::GuestWrites(which, len) => pairs[which].guest_writes(&mut world, len),
                Step::GuestReads(which, len) => pairs[which].guest_reads(&mut world, len),
                Step::ShimWrites(which, len) => pairs[which].shim_writes(len),
                Step::ShimReads(which, len) => pairs[which].shim_reads(len),
                Step::Poll => world.muxer.poll(),
                Step::Packets(count, room) => { packets(&mut world, &mut pairs, count, room); }
            }
        }
        let ends = [ends.0, ends.1, ends.2];
        // Someone says that it will say no more, with bytes still anywhere on the way.
        for (pair, end) in pairs.iter_mut().zip(ends) {
            match end {
                End::HalfByHalf => {
                    world.send(&pair.guest.header(op::SHUTDOWN, 0, SHUTDOWN_SEND), &[]);
                    pair.shim.as_ref().unwrap().shutdown(Shutdown::Write).unwrap();
                }
                End::GuestCloses => world.send(&pair.guest.header(op::SHUTDOWN, 0, SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]),
                End::ShimCloses => {
                    // What it did not read is lost by its own will; what it wrote is not.
                    pair.shim = None;
                }
            }
        }
        for _ in 0..20_000 {
            world.muxer.poll();
            packets(&mut world, &mut pairs, 16, 4096);
            for pair in &mut pairs {
                pair.shim_reads(1 << 16);
                pair.guest_reads(&mut world, 1 << 16);
            }
            let done = pairs.iter().zip(ends).all(|(pair, end)| match end {
                End::HalfByHalf => pair.shim_ended && pair.guest.shutdown & SHUTDOWN_SEND != 0 && pair.guest.buffer.is_empty(),
                End::GuestCloses => pair.shim_ended && pair.guest.reset,
                End::ShimCloses => pair.guest.shutdown == SHUTDOWN_SEND | SHUTDOWN_RECEIVE && pair.guest.buffer.is_empty(),
            });
            if done {
                break;
            }
        }
        for (pair, end) in pairs.iter().zip(ends) {
            match end {
                End::HalfByHalf => {
                    prop_assert!(pair.shim_ended && pair.guest.shutdown & SHUTDOWN_SEND != 0);
                    prop_assert_eq!(pair.shim_read, pair.guest_wrote);
                    prop_assert_eq!(pair.guest_read, pair.shim_wrote);
                }
                End::GuestCloses => {
                    prop_assert!(pair.shim_ended && pair.guest.reset);
                    prop_assert_eq!(pair.shim_read, pair.guest_wrote);
                }
                End::ShimCloses => {
                    prop_assert_eq!(pair.guest.shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
                    prop_assert_eq!(pair.guest_read, pair.shim_wrote);
                }
            }
            if !pair.guest.reset {
                world.send(&pair.guest.header(op::RST, 0, 0), &[]);
            }
        }
        prop_assert_eq!(world.muxer.len(), 0);
        prop_assert!(world.muxer.by_key.is_empty());
        while world.packet(1).is_some() {}
        prop_assert!(!world.muxer.has_packets());
    }

    #[test]
    fn no_sequence_of_packets_panics(
        sequence in proptest::collection::vec(
            (0u32..4, 0u32..3, 0u16..10, 0u16..3, any::<u32>(), any::<u32>(), any::<u32>(), 0usize..3000), 0..200)
    ) {
        let mut world = World::new();
        for (guest_port, host_port, op, socket_type, flags, buf_alloc, fwd_cnt, len) in sequence {
            let header = Header {
                src_cid: GUEST, dst_cid: HOST_CID, src_port: guest_port, dst_port: host_port,
                len: len as u32, socket_type, op, flags, buf_alloc, fwd_cnt,
            };
            world.send(&header, &vec![0; len]);
            if flags & 1 == 0 {
                world.packet(64);
            }
            world.muxer.poll();
        }
        prop_assert!(world.muxer.len() <= 12 + world.muxer.connections.values().filter(|connection| !connection.is_dead()).count());
        prop_assert!(world.muxer.by_key.len() <= 12);
    }
}
