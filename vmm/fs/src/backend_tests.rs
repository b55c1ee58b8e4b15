//! A queue in plain memory, as a driver makes it and as a hostile one does.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::*;
use crate::sys::open::{SelfFd, directory_path};
use crate::wire::{InHeader, InitIn, OutHeader, opcode};

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x4000;
const REPLY: u64 = 0x8000;
const SIZE: u16 = 16;
const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;

struct Driver {
    backend: Backend,
    worker: Worker,
    memory: Memory,
    vring: VringMutex<Memory>,
    made: u16,
    _share: tempfile::TempDir,
}

impl Driver {
    fn new() -> Self {
        let share = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(share.path().to_str().unwrap()).unwrap();
        let server = Server::new(directory_path(&path).unwrap(), SelfFd::open().unwrap()).unwrap();
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let vring = VringMutex::new(memory.clone(), 1024).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(TABLE, AVAILABLE, USED).unwrap();
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        let backend = Backend::new(server, memory.clone(), 1);
        Self { backend, worker: Worker::new().unwrap(), memory, vring, made: 0, _share: share }
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u32, next: u16) {
        let memory = self.memory.memory();
        let at = GuestAddress(table + 16 * u64::from(index));
        memory.write_obj(address, at).unwrap();
        memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(flags as u16, GuestAddress(at.0 + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let memory = self.memory.memory();
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(self.made % SIZE))).unwrap();
        self.made += 1;
        memory.store(self.made, GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        self.backend.serve(&self.vring, &mut self.worker)
    }

    /// The used ring's index, and its last entry's length.
    fn used(&self) -> (u16, u32) {
        let memory = self.memory.memory();
        let index: u16 = memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        let last = u64::from(index.wrapping_sub(1) % SIZE);
        (index, memory.read_obj(GuestAddress(USED + 4 + 8 * last + 4)).unwrap())
    }

    fn init_request(&self) -> u32 {
        let init = InitIn { major: 7, minor: 41, max_readahead: 0, flags: 0 };
        let length = (size_of::<InHeader>() + size_of::<InitIn>()) as u32;
        let header = InHeader { len: length, opcode: opcode::INIT, unique: 77, ..InHeader::default() };
        let memory = self.memory.memory();
        memory.write_slice(header.as_bytes(), GuestAddress(REQUEST)).unwrap();
        memory.write_slice(init.as_bytes(), GuestAddress(REQUEST + 40)).unwrap();
        length
    }

    fn reply(&self) -> OutHeader {
        let mut header = OutHeader::default();
        self.memory.memory().read_slice(header.as_mut_bytes(), GuestAddress(REPLY)).unwrap();
        header
    }
}

#[test]
fn requests_are_answered_direct_and_indirect() {
    let mut driver = Driver::new();
    let length = driver.init_request();
    driver.descriptor(TABLE, 0, REQUEST, 40, NEXT, 1);
    driver.descriptor(TABLE, 1, REQUEST + 40, length - 40, NEXT, 2);
    driver.descriptor(TABLE, 2, REPLY, 16, NEXT | WRITE, 3);
    driver.descriptor(TABLE, 3, REPLY + 16, 64, WRITE, 0);
    driver.offer(0);
    driver.serve().unwrap();
    assert_eq!(driver.used(), (1, 80));
    assert_eq!((driver.reply().unique, driver.reply().error), (77, 0));
    let table = 0x9000;
    driver.descriptor(TABLE, 5, table, 32, VRING_DESC_F_INDIRECT, 0);
    driver.descriptor(table, 0, REQUEST, length, NEXT, 1);
    driver.descriptor(table, 1, REPLY, 80, WRITE, 0);
    driver.offer(5);
    driver.offer(5);
    driver.serve().unwrap();
    assert_eq!(driver.used(), (3, 80));
}

#[test]
fn broken_chains_are_given_back_unanswered() {
    let mut driver = Driver::new();
    let length = driver.init_request();
    // Out of memory; across its end; writable before readable; a loop; an indirect table out of memory; no descriptor's length.
    driver.descriptor(TABLE, 0, 1 << 40, length, NEXT, 1);
    driver.descriptor(TABLE, 1, REPLY, 80, WRITE, 0);
    driver.descriptor(TABLE, 2, 0xfff0, length, NEXT, 1);
    driver.descriptor(TABLE, 3, REPLY, 80, NEXT | WRITE, 4);
    driver.descriptor(TABLE, 4, REQUEST, length, 0, 0);
    driver.descriptor(TABLE, 5, REQUEST, length, NEXT, 5);
    driver.descriptor(TABLE, 6, 1 << 40, 160, VRING_DESC_F_INDIRECT, 0);
    driver.descriptor(TABLE, 7, REQUEST, 0, NEXT, 1);
    driver.descriptor(TABLE, 8, REQUEST, length, NEXT, 500);
    driver.descriptor(TABLE, 9, u64::MAX - 1, u32::MAX, NEXT, 1);
    for (served, head) in [0, 2, 3, 5, 6, 7, 8, 9].into_iter().enumerate() {
        driver.offer(head);
        driver.serve().unwrap();
        assert_eq!(driver.used(), (served as u16 + 1, 0), "chain {head}");
    }
}

#[test]
fn a_broken_ring_ends_the_turn() {
    let mut driver = Driver::new();
    // A head beyond the table.
    driver.offer(SIZE);
    driver.serve().unwrap_err();
    // An index far ahead of what the ring holds.
    let mut driver = Driver::new();
    driver.memory.memory().store(5000u16, GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
    driver.serve().unwrap();
    assert_eq!(driver.used().0, 0);
    // A stopped queue.
    let mut driver = Driver::new();
    driver.offer(0);
    driver.vring.set_queue_ready(false);
    driver.serve().unwrap();
    assert_eq!(driver.used().0, 0);
}

#[test]
fn each_queue_has_a_thread() {
    let driver = Driver::new();
    assert_eq!(driver.backend.queues_per_thread(), [1, 2]);
    assert_eq!(driver.backend.num_queues(), 2);
    driver.backend.stop_vring(0).unwrap();
    driver.backend.stop_vring(99).unwrap();
}
