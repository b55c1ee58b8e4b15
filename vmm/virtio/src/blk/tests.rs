//! A driver that uses the disk as it should, and ones that break each bound.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use husk_backend::disk::Disk;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::Medium;
use super::*;
use crate::chain::Chain;
use crate::device::Activation;
use crate::queue::VirtQueue;
use crate::testing::{Counts, Driver, WRITE, memory};

const LEN: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where the driver has a request's parts.
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
const DATA: u64 = 0x20_0000;

fn backing(len: u64) -> File {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn disk(file: &File, read_only: bool) -> Disk {
    Disk::new(file.try_clone().unwrap().into(), read_only).unwrap()
}

/// A disk and a driver whose requests are served in place, without a worker.
struct Bench {
    file: File,
    medium: Medium,
    driver: Driver,
    queue: VirtQueue,
}

impl Bench {
    fn new(read_only: bool) -> Self {
        let file = backing(LEN);
        let mut id = [0; ID_LEN];
        id[..5].copy_from_slice(b"disk7");
        let medium = Medium { disk: disk(&file, read_only), id };
        let memory = memory();
        let driver = Driver::new(&memory, 0x10000, QUEUE_SIZE);
        let queue = VirtQueue::new(0, driver.queue(false), memory, Arc::new(Counts::default()));
        Self { file, medium, driver, queue }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.write(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    }

    fn chain(&mut self, buffers: &[(u64, u32, u16)]) -> Chain {
        self.driver.add(buffers);
        self.queue.pop().unwrap().unwrap()
    }

    /// The status and the number of bytes written, of a request with these buffers between header and status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        self.driver.write(STATUS, &[0xee]);
        let buffers = [&[(HEADER, 16, 0)], data, &[(STATUS, 1, WRITE)]].concat();
        let chain = self.chain(&buffers);
        let written = self.medium.serve(&self.driver.memory, &chain);
        (self.driver.read(STATUS, 1)[0], written)
    }

    fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn reads_writes_flushes_and_tells_its_id() {
    let mut bench = Bench::new(false);
    bench.driver.write(DATA, &[5; 1024]);
    // Two pieces, of which the first is no whole sector.
    assert_eq!(bench.request(1, 3, &[(DATA, 100, 0), (DATA, 924, 0)]), (OK, 1));
    assert_eq!(bench.content(3 * 512, 1024), [5; 1024]);
    bench.file.write_all_at(&[9; 512], LEN - 512).unwrap();
    assert_eq!(bench.request(0, LEN / 512 - 1, &[(DATA + 0x1000, 512, WRITE)]), (OK, 513));
    assert_eq!(bench.driver.read(DATA + 0x1000, 512), [9; 512]);
    assert_eq!(bench.request(4, 0, &[]), (OK, 1));
    assert_eq!(bench.request(8, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(bench.driver.read(DATA, 20), b"disk7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(bench.request(8, 0, &[(DATA, 4, WRITE)]), (OK, 5));
    assert_eq!(bench.request(99, 0, &[]), (UNSUPP, 1));
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut bench = Bench::new(false);
    bench.header(1, 1);
    bench.driver.write(HEADER + 16, &[6; 512]);
    // Header and data in one buffer; then data and status in one.
    let chain = bench.chain(&[(HEADER, 10, 0), (HEADER + 10, 518, 0), (STATUS, 1, WRITE)]);
    assert_eq!(bench.medium.serve(&bench.driver.memory, &chain), 1);
    assert_eq!((bench.driver.read(STATUS, 1)[0], bench.content(512, 512)), (OK, vec![6; 512]));
    bench.header(0, 1);
    let chain = bench.chain(&[(HEADER, 16, 0), (DATA, 513, WRITE)]);
    assert_eq!(bench.medium.serve(&bench.driver.memory, &chain), 513);
    assert_eq!(bench.driver.read(DATA, 513), [&[6; 512][..], &[OK]].concat());
}

#[test]
fn nothing_reaches_beyond_the_disk() {
    let mut bench = Bench::new(false);
    let end = LEN / 512;
    for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, LEN as u32 + 512)]
    {
        assert_eq!(bench.request(0, sector, &[(DATA, len, WRITE)]), (IOERR, 1), "read {sector} {len}");
        assert_eq!(bench.request(1, sector, &[(DATA, len, 0)]), (IOERR, 1), "write {sector} {len}");
    }
    assert_eq!(bench.file.metadata().unwrap().len(), LEN);
    // More than seg_max segments of size_max bytes, made of one MiB of memory over and over.
    let large = backing(1 << 30);
    bench.medium.disk = disk(&large, false);
    let data = vec![(DATA, 2 << 20, 0); 200];
    assert_eq!(bench.request(1, 0, &data), (IOERR, 1));
    // A file that was cut under our feet.
    large.set_len(512).unwrap();
    assert_eq!(bench.request(0, 0, &[(DATA, 1024, WRITE)]), (IOERR, 1));
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut bench = Bench::new(true);
    bench.driver.write(DATA, &range(0, 1, 0));
    for kind in [1, 11, 13] {
        assert_eq!(bench.request(kind, 0, &[(DATA, 512, 0)]), (IOERR, 1));
    }
    assert_eq!(bench.request(0, 0, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(bench.request(4, 0, &[]), (OK, 1));
}

#[test]
fn ranges_are_given_back_and_made_zeroes_within_limits() {
    let mut bench = Bench::new(false);
    bench.file.write_all_at(&[1; 64 << 10], 0).unwrap();
    bench.driver.write(DATA, &[range(8, 8, 0), range(32, 1, 1)].concat());
    assert_eq!(bench.request(13, 0, &[(DATA, 32, 0)]), (OK, 1));
    assert_eq!((bench.content(8 * 512, 8 * 512), bench.content(32 * 512, 512)), (vec![0; 8 * 512], vec![0; 512]));
    assert_eq!(bench.content(33 * 512, 512), [1; 512]);
    bench.driver.write(DATA, &range(64, 8, 0));
    assert_eq!(bench.request(11, 0, &[(DATA, 16, 0)]), (OK, 1));
    assert_eq!(bench.content(64 * 512, 8 * 512), vec![0; 8 * 512]);
    let end = LEN / 512;
    for (kind, bytes, status) in [
        (11, range(0, 8, 1), UNSUPP),
        (13, range(0, 8, 2), UNSUPP),
        (13, range(end, 1, 0), IOERR),
        (11, range(u64::MAX, u32::MAX, 0), IOERR),
        (13, range(0, MAX_ZEROES_SECTORS + 1, 0), IOERR),
        (13, range(0, 8, 0)[..15].to_vec(), IOERR),
        (11, Vec::new(), IOERR),
        (11, range(0, 1, 0).repeat(MAX_RANGES as usize + 1), IOERR),
    ] {
        bench.driver.write(DATA, &bytes);
        let data = [(DATA, bytes.len() as u32, 0)];
        assert_eq!(bench.request(kind, 0, &data[..usize::from(!bytes.is_empty())]), (status, 1), "{kind} {bytes:?}");
    }
    assert_eq!(bench.content(0, 512), [1; 512]);
}

#[test]
fn requests_without_header_or_status_harm_nobody() {
    let mut bench = Bench::new(false);
    bench.header(4, 0);
    let chain = bench.chain(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
    assert_eq!(bench.medium.serve(&bench.driver.memory, &chain), 1);
    assert_eq!(bench.driver.read(STATUS, 1), [IOERR]);
    let chain = bench.chain(&[(HEADER, 16, 0)]);
    assert_eq!(bench.medium.serve(&bench.driver.memory, &chain), 0);
    let chain = bench.chain(&[(DATA, 1, WRITE)]);
    assert_eq!(bench.medium.serve(&bench.driver.memory, &chain), 1);
}

proptest! {
    #[test]
    fn no_request_panics_or_changes_the_length(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0..4096u64, any::<u64>()],
        lens in proptest::collection::vec((0u32..5000, any::<bool>()), 0..6),
        bytes in proptest::collection::vec(any::<u8>(), 64),
    ) {
        let mut bench = Bench::new(false);
        bench.header(kind, sector);
        bench.driver.write(DATA, &bytes);
        let mut buffers = vec![(HEADER, 16, 0)];
        let mut lens = lens;
        lens.sort_by_key(|(_, writable)| *writable);
        buffers.extend(lens.into_iter().map(|(len, writable)| (DATA, len, if writable { WRITE } else { 0 })));
        let chain = bench.chain(&buffers);
        bench.medium.serve(&bench.driver.memory, &chain);
        prop_assert_eq!(bench.file.metadata().unwrap().len(), LEN);
    }
}

/// Waits for what a worker does.
fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "waited 10 s for a worker");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn workers_serve_from_activation_to_reset_and_end_with_the_device() {
    let file = backing(LEN);
    let Attached { device, workers } = Blk::attach(disk(&file, false), "serial", 2).unwrap();
    let threads: Vec<_> = workers.into_iter().map(|worker| std::thread::spawn(move || worker.run().unwrap())).collect();
    let memory = memory();
    let counts = Arc::new(Counts::default());
    for round in 0..2u64 {
        // The second queue is left out.
        let mut driver = Driver::new(&memory, 0x10000, QUEUE_SIZE);
        driver.set_available(0);
        driver.write(driver.used_ring(), &[0; 4]);
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queues = vec![Some((driver.queue(false), event.clone())), None];
        let interrupt = counts.clone();
        device.lock().unwrap().activate(Activation { memory: memory.clone(), features: 0, queues, interrupt }).unwrap();
        driver.write(HEADER, &[&1u32.to_le_bytes()[..], &[0; 4], &round.to_le_bytes()].concat());
        driver.write(DATA, &[round as u8 + 1; 512]);
        driver.add(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        event.write(1).unwrap();
        until(|| driver.used().is_some());
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, round * 512).unwrap();
        assert_eq!(bytes, [round as u8 + 1; 512]);
        device.lock().unwrap().reset();
        // Nothing is served any more.
        driver.add(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        event.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(driver.used().is_none());
    }
    assert_eq!(counts.used.load(Ordering::SeqCst), 2);
    // A chain that loops breaks the queue, not the worker.
    let driver = Driver::new(&memory, 0x10000, QUEUE_SIZE);
    driver.write_descriptor(driver.descriptors(), 0, DATA, 16, 1, 0);
    driver.write(driver.used_ring(), &[0; 4]);
    driver.set_available(1);
    driver.write(driver.available() + 4, &[0; 2]);
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    event.write(1).unwrap();
    let queues = vec![Some((driver.queue(false), event)), None];
    let interrupt = counts.clone();
    device.lock().unwrap().activate(Activation { memory, features: 0, queues, interrupt }).unwrap();
    until(|| counts.needs_reset.load(Ordering::SeqCst) == 1);
    drop(device);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn the_configuration_tells_the_disks_measures() {
    let file = backing(LEN + 100);
    let Attached { device, workers } = Blk::attach(disk(&file, true), &"x".repeat(40), 9).unwrap();
    assert_eq!((workers.len(), device.lock().unwrap().queue_max_sizes()), (4, vec![QUEUE_SIZE; 4]));
    let mut config = [0xff; 64];
    device.lock().unwrap().read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12), word(20)), (2048, 0, 1 << 20, 254, 512));
    assert_eq!((config[24], config[34], config[56]), (3, 4, 1));
    assert_ne!(device.lock().unwrap().features() & 1 << 5, 0);
    assert_eq!(device.lock().unwrap().features() & (1 << 13 | 1 << 14), 0);
}
