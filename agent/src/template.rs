//! A machine that is booted to be saved, and from which pods are restored: it comes to rest where it waits for a shim's connection.
//! What it holds then is in every pod's memory file, so free memory is made zero before.

use std::fs;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;

use husk_agent_api::{RPC_PORT, TEMPLATE_READY};
use nix::libc::{O_NONBLOCK, c_void};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::dial::Connection;
use crate::listen::Listener;

/// Memory taken at a time in bytes.
const CHUNK: u64 = 16 << 20;

/// What stays free in bytes, beyond what the kernel keeps for itself. Linux takes up to 8 MiB at once from there for one kind of pages (63
/// pages << PCP_BATCH_SCALE_MAX, mm/page_alloc.c), which then are there for no other.
const SPARE: u64 = 12 << 20;

/// Page size of x86-64.
const PAGE: u64 = 4096;

/// What the kernel keeps free at least, in KiB (Documentation/admin-guide/sysctl/vm.rst, min_free_kbytes).
const MIN_FREE: &str = "/proc/sys/vm/min_free_kbytes";

/// As little of it as does no harm while nothing else runs.
const MIN_FREE_KIB: &str = "1024";

/// Says on the console that the machine can be saved, and waits until a shim dials the restored one. No connection exists before.
pub(crate) async fn restored() -> io::Result<Connection> {
    let listener = Listener::new(RPC_PORT, 1)?;
    if let Err(error) = zero_free_memory() {
        tracing::warn!("Free memory of the template is not all zero: {error}");
    }
    // To the console itself, whatever the log's level.
    writeln!(io::stderr(), "{TEMPLATE_READY}")?;
    listener.accept().await
}

/// Bytes that the kernel may keep of what the host's entropy device gave it before the machine was saved: 64 each in the core of hw_random
/// and in virtio-rng (SMP_CACHE_BYTES; drivers/char/hw_random of Linux).
const KEPT_ENTROPY: usize = 128;

/// Throws those away, which each pod from this template would read from /dev/hwrng.
pub(crate) fn forget_entropy() -> io::Result<()> {
    let device = fs::File::options().read(true).custom_flags(O_NONBLOCK).open("/dev/hwrng");
    match device.and_then(|mut device| device.read(&mut [0; KEPT_ENTROPY])) {
        // There is nothing; there is no such device.
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotFound) => Ok(()),
        done => done.map(drop),
    }
}

/// The kernel clears each page that it gives, and the page stays so when it is given back.
fn zero_free_memory() -> io::Result<()> {
    let usual = fs::read_to_string(MIN_FREE)?;
    fs::write(MIN_FREE, MIN_FREE_KIB)?;
    let zeroed = take_free_memory().map(drop);
    fs::write(MIN_FREE, usual)?;
    zeroed
}

/// Takes as much as can be had without the kernel running out of it: there would be nobody to kill but this process.
fn take_free_memory() -> io::Result<Vec<Taken>> {
    let mut taken = Vec::new();
    loop {
        let free = untouched(&fs::read_to_string("/proc/meminfo")?).unwrap_or(0);
        let length = free.saturating_sub(SPARE).min(CHUNK) / PAGE * PAGE;
        let Some(length) = NonZeroUsize::new(length as usize) else { return Ok(taken) };
        taken.push(Taken::new(length)?);
    }
}

/// Bytes of /proc/meminfo (proc_meminfo(5)) that are free and whose use makes the kernel reclaim nothing.
fn untouched(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(kib("MemFree")?.min(kib("MemAvailable")?) << 10)
}

/// Zeroed memory, given back when dropped.
struct Taken(NonNull<c_void>, NonZeroUsize);

impl Taken {
    fn new(length: NonZeroUsize) -> io::Result<Self> {
        let (protection, flags) =
            (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE);
        // SAFETY: the kernel chooses a range that is free.
        let taken = Self(unsafe { mmap_anonymous(None, length, protection, flags) }?, length);
        // SAFETY: the range is the mapping just made, which nobody else knows; it is zero before and after.
        unsafe { madvise(taken.0, length.get(), MmapAdvise::MADV_POPULATE_WRITE) }?;
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own, and nothing refers to it. Unmapping a whole mapping can't fail.
        let _ = unsafe { munmap(self.0, self.1.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_is_free_and_not_needed() {
        let meminfo = "MemTotal:         233444 kB\nMemFree:          201232 kB\nMemAvailable:     198400 kB\n";
        assert_eq!(untouched(meminfo), Some(198_400 << 10));
        assert_eq!(untouched(&meminfo.replace("201232", "512")), Some(512 << 10));
        for broken in ["", "MemFree: 1 kB", "MemFree: x kB\nMemAvailable: 1 kB", "MemFree: 1\nMemAvailable: 1"] {
            assert_eq!(untouched(broken), None, "{broken}");
        }
        assert!(untouched(&fs::read_to_string("/proc/meminfo").unwrap()).is_some());
    }
}
