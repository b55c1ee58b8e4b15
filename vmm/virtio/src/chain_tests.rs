//! Chains that break each rule, and those that don't.

use std::sync::Arc;

use super::*;
use crate::queue::{QueueError, VirtQueue};
use crate::testing::{Counts, Driver, INDIRECT, NEXT, WRITE, memory};

fn pop(driver: &Driver) -> Result<Chain, ChainError> {
    let mut queue = VirtQueue::new(0, driver.queue(false), driver.memory.clone(), Arc::new(Counts::default()));
    match queue.pop() {
        Ok(chain) => Ok(chain.unwrap()),
        Err(QueueError::Chain { source, .. }) => Err(source),
        Err(error) => panic!("{error}"),
    }
}

fn driver() -> Driver {
    Driver::new(&memory(), 0x1000, 16)
}

#[test]
fn reads_and_writes_across_buffers() {
    let mut driver = driver();
    driver.add(&[(0x20000, 3, 0), (0x21000, 0, 0), (0x22000, 5, 0), (0x23000, 2, WRITE), (0x24000, 6, WRITE)]);
    driver.write(0x20000, b"abc");
    driver.write(0x22000, b"defgh");
    let chain = pop(&driver).unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (8, 8));
    let mut data = [0; 5];
    chain.readable().read_at(&driver.memory, 2, &mut data).unwrap();
    assert_eq!(&data, b"cdefg");
    assert!(matches!(
        chain.readable().read_at(&driver.memory, 4, &mut data),
        Err(ChainError::Short { has: 8, needs: 9 })
    ));
    chain.writable().write_at(&driver.memory, 1, b"XYZ").unwrap();
    assert_eq!(driver.read(0x23000, 2), b"\0X");
    assert_eq!(driver.read(0x24000, 3), b"YZ\0");
    assert!(chain.writable().write_at(&driver.memory, 6, b"XYZ").is_err());
    let slices = chain.readable().slices(&driver.memory, 1, 100).unwrap();
    assert_eq!(slices.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [2, 5]);
    assert!(chain.readable().slices(&driver.memory, 8, 1).unwrap().is_empty());
}

#[test]
fn refuses_a_head_outside_the_table() {
    let mut driver = driver();
    driver.offer(16);
    assert!(matches!(pop(&driver), Err(ChainError::Head(16))));
}

#[test]
fn refuses_chains_that_do_not_end() {
    let mut looped = driver();
    looped.write_descriptor(looped.descriptors(), 0, 0x20000, 1, NEXT, 0);
    looped.offer(0);
    assert!(matches!(pop(&looped), Err(ChainError::Endless(16))));
    let mut outside = driver();
    outside.write_descriptor(outside.descriptors(), 0, 0x20000, 1, NEXT, 99);
    outside.offer(0);
    assert!(matches!(pop(&outside), Err(ChainError::Endless(1))));
}

#[test]
fn refuses_readable_after_writable() {
    let mut driver = driver();
    driver.add(&[(0x20000, 1, WRITE), (0x21000, 1, 0)]);
    assert!(matches!(pop(&driver), Err(ChainError::Order)));
}

#[test]
fn refuses_buffers_outside_memory() {
    for (address, len) in [(4 << 20, 1), ((4 << 20) - 1, 2), (u64::MAX, 1), (0, u32::MAX), (u64::MAX - 1, u32::MAX)] {
        let mut driver = driver();
        driver.add(&[(address, len, 0)]);
        assert!(matches!(pop(&driver), Err(ChainError::Buffer(..))), "{address:#x} {len}");
    }
}

#[test]
fn indirect_tables_are_followed_once_and_bounded() {
    let mut good = driver();
    good.write_descriptor(0x30000, 0, 0x20000, 4, NEXT, 1);
    good.write_descriptor(0x30000, 1, 0x21000, 4, WRITE, 0);
    good.add(&[(0x30000, 32, INDIRECT)]);
    let chain = pop(&good).unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (4, 4));

    let mut nested = driver();
    nested.write_descriptor(0x30000, 0, 0x30000, 16, INDIRECT, 0);
    nested.add(&[(0x30000, 16, INDIRECT)]);
    assert!(matches!(pop(&nested), Err(ChainError::Endless(0))));

    let mut odd = driver();
    odd.add(&[(0x30000, 15, INDIRECT)]);
    assert!(matches!(pop(&odd), Err(ChainError::Endless(0))));

    let mut long = driver();
    for index in 0..60_000 {
        long.write_descriptor(0x100000, index, 0x20000, 1, NEXT, index + 1);
    }
    long.add(&[(0x100000, 16 * 60_000, INDIRECT)]);
    assert!(matches!(pop(&long), Err(ChainError::Endless(MAX_DESCRIPTORS))));
}
