//! A driver for tests: guest memory, rings written by hand, and interrupts that are counted.

mod back_end;
mod tap;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::GuestMemory;
use crate::interrupt::{Interrupt, Machine, MsiVector};

pub(crate) use back_end::BackEnd;
pub(crate) use tap::tap;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Guest memory of 4 MiB at address 0.
pub(crate) fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap())
}

/// Guest memory whose regions (address and length) are files, as a machine's are.
pub(crate) fn memory_in_files(regions: &[(u64, usize)]) -> Arc<GuestMemory> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let regions = regions.iter().map(|(address, len)| {
        let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(*len as u64).unwrap();
        (GuestAddress(*address), *len, Some(FileOffset::new(file, 0)))
    });
    Arc::new(GuestMemory::from_ranges_with_files(regions).unwrap())
}

/// Bytes that the host has for each of those regions.
pub(crate) fn blocks(memory: &GuestMemory) -> Vec<u64> {
    memory.iter().map(|region| region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512).collect()
}

/// The driver's side of a queue. Its rings take less than 64 KiB from `base` on.
pub(crate) struct Driver {
    pub(crate) memory: Arc<GuestMemory>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Driver {
    pub(crate) fn new(memory: &Arc<GuestMemory>, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, next_descriptor: 0, available: 0, used: 0 }
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(crate) fn available(&self) -> u64 {
        self.base + 0x8000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// The device's side of it.
    pub(crate) fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.descriptors())).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    pub(crate) fn write_descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    pub(crate) fn set_available(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.available() + 2), Ordering::Release).unwrap();
    }

    /// Adds a chain of (address, length, flags) and returns its head. The caller sees to it that descriptors are free.
    pub(crate) fn add(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (index, (address, len, flags)) in buffers.iter().enumerate() {
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % self.size;
            let next = if index + 1 < buffers.len() { NEXT } else { 0 };
            self.write_descriptor(self.descriptors(), this, *address, *len, flags | next, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// The next used chain: head and length.
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let slot = GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.used % self.size));
        self.used = self.used.wrapping_add(1);
        let element: [u32; 2] = self.memory.read_obj(slot).unwrap();
        Some((element[0], element[1]))
    }

    /// When the driver wants to be interrupted (VIRTIO_F_EVENT_IDX).
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.available() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// When the device wants to be notified (VIRTIO_F_EVENT_IDX).
    pub(crate) fn available_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.size))).unwrap()
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// A pair of seqpacket sockets.
pub(crate) fn seqpacket() -> (OwnedFd, OwnedFd) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A stream socket that a message brought.
pub(crate) fn stream(fd: i32) -> UnixStream {
    // SAFETY: the kernel just made the descriptor for the receiver of the message, who hands it over.
    UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Counts what the device tells the driver.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) used: AtomicU32,
    pub(crate) config: AtomicU32,
    pub(crate) needs_reset: AtomicU32,
}

impl Interrupt for Counts {
    fn used(&self, _queue: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }

    fn queue_event(&self, _queue: u16) -> Option<EventFd> {
        None
    }
}

/// A vector that remembers its route.
pub(crate) struct FakeVector {
    pub(crate) announced: Mutex<Option<(u64, u32)>>,
    pub(crate) route: Mutex<Option<(u64, u32)>>,
    pub(crate) routes: AtomicU32,
    event: EventFd,
}

impl FakeVector {
    /// Number of interrupts since the last call.
    pub(crate) fn fired(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }
}

impl MsiVector for FakeVector {
    fn announce(&self, address: u64, data: u32) {
        *self.announced.lock().unwrap() = Some((address, data));
    }

    fn route(&self, address: u64, data: u32) -> std::io::Result<()> {
        *self.route.lock().unwrap() = Some((address, data));
        self.routes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn mask(&self) -> std::io::Result<()> {
        *self.route.lock().unwrap() = None;
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

pub(crate) fn fake_vectors(count: u16) -> Vec<Arc<FakeVector>> {
    (0..count)
        .map(|_| {
            Arc::new(FakeVector {
                announced: Mutex::new(None),
                route: Mutex::new(None),
                routes: AtomicU32::new(0),
                event: EventFd::new(EFD_NONBLOCK).unwrap(),
            })
        })
        .collect()
}

/// A machine that remembers what it was asked for.
#[derive(Default)]
pub(crate) struct FakeMachine {
    pub(crate) vectors: Mutex<Vec<Arc<FakeVector>>>,
    pub(crate) notifications: Mutex<Vec<(u64, i32)>>,
}

impl Machine for FakeMachine {
    fn msi_vectors(&self, count: u16) -> std::io::Result<Vec<Arc<dyn MsiVector>>> {
        let vectors = fake_vectors(count);
        *self.vectors.lock().unwrap() = vectors.clone();
        Ok(vectors.into_iter().map(|vector| vector as Arc<dyn MsiVector>).collect())
    }

    fn notify_on_write(&self, address: u64, event: &EventFd) -> std::io::Result<()> {
        self.notifications.lock().unwrap().push((address, event.as_raw_fd()));
        Ok(())
    }

    fn forget_write(&self, address: u64, event: &EventFd) -> std::io::Result<()> {
        self.notifications.lock().unwrap().retain(|known| *known != (address, event.as_raw_fd()));
        Ok(())
    }
}
