//! Masks, routes and pending bits.

use super::*;
use crate::testing::{FakeVector, fake_vectors};

fn setup() -> (Msix, Vec<Arc<FakeVector>>) {
    let vectors = fake_vectors(3);
    (Msix::new(vectors.iter().map(|vector| vector.clone() as Arc<dyn MsiVector>).collect()), vectors)
}

fn write_entry(msix: &Msix, index: u64, address: u64, data: u32, control: u32) {
    msix.write_table(16 * index, &(address as u32).to_le_bytes());
    msix.write_table(16 * index + 4, &((address >> 32) as u32).to_le_bytes());
    msix.write_table(16 * index + 8, &data.to_le_bytes());
    msix.write_table(16 * index + 12, &control.to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut bits = [0; 8];
    msix.read_pending(0, &mut bits);
    u64::from_le_bytes(bits)
}

#[test]
fn a_vector_is_routed_once_when_everything_lets_it_through() {
    let (msix, vectors) = setup();
    write_entry(&msix, 1, 0xfee0_0000, 0x41, 0);
    assert_eq!(*vectors[1].route.lock().unwrap(), None);
    msix.set_control(true, true);
    assert_eq!(*vectors[1].route.lock().unwrap(), None);
    msix.set_control(true, false);
    assert_eq!(*vectors[1].route.lock().unwrap(), Some((0xfee0_0000, 0x41)));
    msix.set_control(true, false);
    assert_eq!(vectors[1].routes.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert!(msix.raise(1));
    assert_eq!((vectors[1].fired(), vectors[0].fired()), (1, 0));
    msix.set_control(false, false);
    assert_eq!(*vectors[1].route.lock().unwrap(), None);
}

#[test]
fn what_is_raised_while_masked_is_delivered_later_once() {
    let (msix, vectors) = setup();
    msix.set_control(true, false);
    assert!(msix.raise(2));
    assert!(msix.raise(2));
    assert_eq!((vectors[2].fired(), pending(&msix)), (0, 0b100));
    write_entry(&msix, 2, 0xfee0_1000, 7, 0);
    assert_eq!((vectors[2].fired(), pending(&msix)), (1, 0));
}

#[test]
fn off_means_off_and_unknown_vectors_do_nothing() {
    let (msix, vectors) = setup();
    assert!(!msix.raise(0));
    msix.set_control(true, false);
    assert!(msix.raise(99));
    assert!(msix.event(99).is_none());
    assert_eq!(vectors.iter().map(|vector| vector.fired()).sum::<u64>(), 0);
}

#[test]
fn the_table_reads_back_and_ends() {
    let (msix, _) = setup();
    write_entry(&msix, 0, 0x1_fee0_0007, 5, 0xffff_ffff);
    let mut bytes = [0; 8];
    msix.read_table(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), 0x1_fee0_0004);
    msix.read_table(8, &mut bytes);
    assert_eq!(bytes, [5, 0, 0, 0, 1, 0, 0, 0]);
    for (offset, len) in [(48, 8), (u64::MAX - 7, 8), (1, 4), (4, 8), (0, 3)] {
        let mut bytes = [0xff; 8];
        msix.read_table(offset, &mut bytes[..len]);
        assert!(bytes[..len].iter().all(|byte| *byte == 0));
        msix.write_table(offset, &bytes[..len]);
    }
    msix.read_pending(u64::MAX, &mut bytes);
}

#[test]
fn what_a_restore_will_route_is_announced() {
    let (saved, _) = setup();
    write_entry(&saved, 1, 0xfee0_0000, 0x41, 0);
    write_entry(&saved, 2, 0xfee0_0000, 0x42, ENTRY_MASKED);
    let states = saved.save();
    let (msix, vectors) = setup();
    msix.announce(&states);
    msix.restore(&states);
    msix.set_control(true, false);
    let seen = vectors.iter().map(|vector| (*vector.announced.lock().unwrap(), *vector.route.lock().unwrap()));
    let routed = Some((0xfee0_0000, 0x41));
    assert_eq!(seen.collect::<Vec<_>>(), [(None, None), (routed, routed), (None, None)]);
}
