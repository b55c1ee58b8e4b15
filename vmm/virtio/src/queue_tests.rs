//! The ring's protocol in both directions, and drivers that break it.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::testing::{Counts, Driver, WRITE, memory};

fn setup(event_idx: bool) -> (Driver, VirtQueue, Arc<Counts>) {
    let driver = Driver::new(&memory(), 0x1000, 8);
    let counts = Arc::new(Counts::default());
    let queue = VirtQueue::new(0, driver.queue(event_idx), driver.memory.clone(), counts.clone());
    (driver, queue, counts)
}

#[test]
fn used_chains_appear_in_one_step() {
    let (mut driver, mut queue, counts) = setup(false);
    let first = driver.add(&[(0x20000, 8, WRITE)]);
    let second = driver.add(&[(0x21000, 8, WRITE)]);
    for written in [5, 7] {
        let chain = queue.pop().unwrap().unwrap();
        queue.push_used(&chain, written).unwrap();
        assert_eq!(driver.used(), None);
    }
    assert!(queue.pop().unwrap().is_none());
    queue.notify().unwrap();
    assert_eq!(driver.used(), Some((first.into(), 5)));
    assert_eq!(driver.used(), Some((second.into(), 7)));
    assert_eq!(driver.used(), None);
    assert_eq!(counts.used.load(SeqCst), 1);
    queue.notify().unwrap();
    assert_eq!(counts.used.load(SeqCst), 1);
}

#[test]
fn unpopped_chains_come_again() {
    let (mut driver, mut queue, _) = setup(true);
    let heads = [driver.add(&[(0x20000, 8, 0)]), driver.add(&[(0x21000, 8, 0)])];
    for _ in 0..3 {
        for head in heads {
            assert_eq!(queue.pop().unwrap().unwrap().head(), head);
        }
        queue.unpop(2);
    }
}

#[test]
fn interrupts_only_when_the_driver_wants_them() {
    let (mut driver, mut queue, counts) = setup(true);
    driver.set_used_event(1);
    for expected in [0, 1, 1] {
        driver.add(&[(0x20000, 8, 0)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.push_used(&chain, 0).unwrap();
        queue.notify().unwrap();
        assert_eq!(counts.used.load(SeqCst), expected);
    }
    let (mut driver, mut queue, counts) = setup(false);
    driver.memory.write_obj(1u16, GuestAddress(driver.available())).unwrap();
    driver.add(&[(0x20000, 8, 0)]);
    let chain = queue.pop().unwrap().unwrap();
    queue.push_used(&chain, 0).unwrap();
    queue.notify().unwrap();
    assert_eq!(counts.used.load(SeqCst), 0);
}

#[test]
fn asks_for_notifications_when_empty_and_not_before() {
    let (mut driver, mut queue, _) = setup(false);
    let suppressed = |driver: &Driver| driver.memory.read_obj::<u16>(GuestAddress(driver.used_ring())).unwrap();
    assert!(queue.pop().unwrap().is_none());
    assert_eq!(suppressed(&driver), 0);
    driver.add(&[(0x20000, 8, 0)]);
    assert!(queue.pop().unwrap().is_some());
    assert_eq!(suppressed(&driver), 1);
    let (mut driver, mut queue, _) = setup(true);
    driver.add(&[(0x20000, 8, 0)]);
    assert!(queue.pop().unwrap().is_some());
    assert!(queue.pop().unwrap().is_none());
    assert_eq!(driver.available_event(), 1);
}

#[test]
fn an_index_that_runs_ahead_is_an_error() {
    let (driver, mut queue, _) = setup(false);
    driver.set_available(9);
    assert!(matches!(queue.pop(), Err(QueueError::Ring { .. })));
}

#[test]
fn a_chain_offered_again_and_again_stays_within_the_ring() {
    let (mut driver, mut queue, _) = setup(false);
    let head = driver.add(&[(0x20000, 8, 0)]);
    for _ in 0..100 {
        let chain = queue.pop().unwrap().unwrap();
        queue.push_used(&chain, 0).unwrap();
        driver.offer(head);
    }
    queue.notify().unwrap();
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(driver.used_ring() + 2)).unwrap(), 100);
    // What lies behind the used ring's 8 elements and its event index was not touched.
    assert!(driver.read(driver.used_ring() + 4 + 64 + 2, 256).iter().all(|byte| *byte == 0));
}

#[test]
fn wraps_around_the_indices() {
    let (mut driver, mut queue, _) = setup(true);
    for round in 0..70_000u32 {
        let head = driver.add(&[(0x20000, 8, WRITE)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.push_used(&chain, round).unwrap();
        queue.notify().unwrap();
        assert_eq!(driver.used(), Some((head.into(), round)));
    }
}
