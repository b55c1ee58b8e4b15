//! The device over a real tap, with a packet socket as the rest of the network; skipped where taps can't be made.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::*;
use crate::testing::{Counts, Driver, WRITE, memory};

struct World {
    net: Net,
    queues: Vec<VirtQueue>,
    receive: Driver,
    transmit: Driver,
    /// The other side: frames written here come out of the tap, and the reverse.
    wire: OwnedFd,
}

/// A tap that is up, and a raw socket bound to it. None without the right to make one.
fn tap(name: &str) -> Option<(Tap, OwnedFd)> {
    let (tap, wire) = crate::testing::tap(name)?;
    Some((Tap::new(tap).unwrap(), wire))
}

fn setup(name: &str, features: u64) -> Option<World> {
    let memory = memory();
    let (tap, wire) = tap(name)?;
    let mut net = Net::new(Some(tap), [2, 0, 0, 0, 0, 1], 1500);
    let drivers = [0x10000, 0x20000].map(|base| Driver::new(&memory, base, 256));
    let counts = Arc::new(Counts::default());
    let interrupt: Arc<dyn Interrupt> = counts.clone();
    net.start(features, &interrupt).unwrap();
    let queues = (0..)
        .zip(&drivers)
        .map(|(index, driver)| VirtQueue::new(index, driver.queue(true), memory.clone(), counts.clone()))
        .collect();
    let [receive, transmit] = drivers;
    Some(World { net, queues, receive, transmit, wire })
}

/// An Ethernet frame of a protocol nobody else sends.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    frame.resize(len, 0x5a);
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x88, 0xb5])
}

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn frames_go_out_and_broken_ones_are_dropped() {
    let Some(mut world) = setup("husk-t0", 0) else { return };
    let sent = frame(200);
    world.transmit.write(0x100000, &[0; HEADER_LEN]);
    world.transmit.write(0x10000c, &sent);
    world.transmit.add(&[(0x100000, 12, 0), (0x10000c, 200, 0)]);
    world.transmit.add(&[(0x100000, 11, 0)]);
    world.transmit.add(&[(0x100000, MAX_FRAME as u32 + 1, 0)]);
    // A header that makes no sense.
    world.transmit.write(0x180000, &[0xff; 300]);
    world.transmit.add(&[(0x180000, 300, 0)]);
    assert!(!world.net.serve(&mut world.queues).unwrap());
    assert_eq!(std::iter::from_fn(|| world.transmit.used()).count(), 4);
    assert_eq!(world.net.dropped, 3);
    let mut wire = std::fs::File::from(world.wire);
    let mut buffer = [0; 2000];
    loop {
        let len = wire.read(&mut buffer).unwrap();
        if is_ours(&buffer[..len]) {
            assert_eq!(buffer[..len], sent);
            break;
        }
    }
}

#[test]
fn a_frame_is_spread_over_small_buffers_and_waits_for_them() {
    let Some(mut world) = setup("husk-t1", MERGEABLE) else { return };
    let sent = frame(1000);
    nix::unistd::write(&world.wire, &sent).unwrap();
    let mut got = Vec::new();
    let mut next = 0;
    let mut buffers = Vec::new();
    while !is_ours(got.get(HEADER_LEN..).unwrap_or_default()) {
        buffers.push(0x100000 + 0x1000 * (next % 200));
        world.receive.add(&[(0x100000 + 0x1000 * (next % 200), 100, WRITE)]);
        next += 1;
        assert!(next < 10_000);
        world.net.host_event(EventSet::IN);
        world.net.serve(&mut world.queues).unwrap();
        // All buffers of a frame appear together.
        let lens: Vec<_> = std::iter::from_fn(|| world.receive.used()).map(|(_, len)| len as usize).collect();
        if lens.is_empty() {
            continue;
        }
        got.clear();
        for len in &lens {
            got.extend(world.receive.read(buffers.remove(0), *len));
        }
        assert_eq!(u16::from_le_bytes([got[10], got[11]]) as usize, lens.len());
    }
    assert_eq!(got[HEADER_LEN..], sent);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let Some(mut world) = setup("husk-t2", 0) else { return };
    nix::unistd::write(&world.wire, &frame(1000)).unwrap();
    for index in 0..20 {
        world.receive.add(&[(0x100000 + 0x1000 * index, 13, WRITE)]);
    }
    world.net.host_event(EventSet::IN);
    world.net.serve(&mut world.queues).unwrap();
    assert_eq!(world.receive.used().unwrap().1, 0);
    assert!(world.net.dropped >= 1);
}

#[test]
fn configuration_is_as_given() {
    let Some((tap, _wire)) = tap("husk-t3") else { return };
    let net = Net::new(Some(tap), [2, 0, 0, 0, 0, 1], 1400);
    let mut data = [0xaa; 16];
    crate::served::read_config(net.config(), 0, &mut data);
    assert_eq!(data[..12], [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5]);
    assert_eq!(data[12..], [0xaa; 4]);
    crate::served::read_config(net.config(), u64::MAX, &mut data);
}
