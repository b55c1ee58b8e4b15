//! Guest memory: one sealed memfd per region, mapped shared, since husk-fs maps it too. What can be plugged in later is a region from
//! the start, of which the guest is shown as much as it was ever asked to plug.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use husk_virtio::device::GuestMemory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
};

use super::layout;

/// Why the guest has no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The memfd.
    #[error("Could not make the memory file of {len} bytes")]
    File {
        /// Its length.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The mapping.
    #[error("Could not map guest memory at {address:#x}")]
    Map {
        /// Guest-physical start.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest kernel's code.
    #[error("Could not map the kernel's code at {address:#x}")]
    Code {
        /// Guest-physical start.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// All regions together.
    #[error("Could not make guest memory of its regions")]
    Regions(#[source] GuestRegionCollectionError),
    /// The KVM slot.
    #[error("Could not give KVM the memory at {address:#x}")]
    Slot {
        /// Guest-physical start.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Length of a huge page in bytes.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// Makes `len` bytes of guest memory; nothing of it is there before it is touched.
pub(crate) fn create(len: u64) -> Result<Arc<GuestMemory>, MemoryError> {
    let regions = layout::ram(len).into_iter().map(|(address, len)| region(address, len));
    let regions = regions.collect::<Result<_, MemoryError>>()?;
    GuestMemory::from_regions(regions).map(Arc::new).map_err(MemoryError::Regions)
}

/// The same memory and a region for what is plugged in later.
pub(crate) fn with_hotplug(memory: &GuestMemory, hotplug: &Range<u64>) -> Result<Arc<GuestMemory>, MemoryError> {
    let region = region(hotplug.start, hotplug.end - hotplug.start)?;
    memory.insert_region(Arc::new(region)).map(Arc::new).map_err(MemoryError::Regions)
}

fn region(address: u64, len: u64) -> Result<GuestRegionMmap, MemoryError> {
    let file = memory_file(len).map_err(|source| MemoryError::File { len, source })?;
    map(file, address, len).map_err(|source| MemoryError::Map { address, source })
}

/// Maps a region for as long as the process lives, at a multiple of the huge page, so that KVM can map huge pages of it to the guest.
fn map(file: File, address: u64, len: u64) -> io::Result<GuestRegionMmap> {
    let impossible = || io::Error::from(io::ErrorKind::InvalidInput);
    let size = NonZeroUsize::new(len as usize).ok_or_else(impossible)?;
    let room = size.saturating_add(HUGE_PAGE as usize);
    let (protection, flags) =
        (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE);
    // SAFETY: the kernel chooses a range that is free.
    let reserved =
        unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE) }?;
    let aligned = (reserved.addr().get() as u64).next_multiple_of(HUGE_PAGE) as usize;
    let aligned = NonZeroUsize::new(aligned).ok_or_else(impossible)?;
    // SAFETY: `aligned` and `size` bytes from it are within the range just reserved, which nobody else knows.
    let mapped = unsafe { mmap(Some(aligned), size, protection, flags | MapFlags::MAP_FIXED, &file, 0) }?;
    // SAFETY: the mapping is of this size and is never unmapped.
    let builder = unsafe { MmapRegionBuilder::new(size.get()).with_raw_mmap_pointer(mapped.as_ptr().cast()) };
    let region = builder
        .with_mmap_prot(protection.bits())
        .with_mmap_flags(flags.bits())
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(address)).ok_or_else(impossible)
}

/// Sealed, so that whoever else maps the file can't shrink it and have this process killed by SIGBUS.
fn memory_file(len: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Puts huge pages, zeroed, under this part of guest memory, which still is empty and which the guest is going to fill anyhow. Each
/// then costs the guest one nested page fault in place of 512. A beginning within a huge page counts as its start, an end too.
///
/// MADV_COLLAPSE (Linux 6.1, madvise(2)) does so whatever /sys/kernel/mm/transparent_hugepage says of shared memory. Where the host
/// can't, or has no free huge page, the memory stays as it is: that is slower and nothing else.
pub(crate) fn make_huge(memory: &GuestMemory, part: Range<u64>) {
    let start = part.start / HUGE_PAGE * HUGE_PAGE;
    let len = (part.end / HUGE_PAGE * HUGE_PAGE).saturating_sub(start) as usize;
    let Ok(slice) = memory.get_slice(GuestAddress(start), len) else { return };
    // The kernel refuses where nothing is mapped yet.
    for address in (start..start + len as u64).step_by(HUGE_PAGE as usize) {
        let _ = memory.read_obj::<u8>(GuestAddress(address));
    }
    let host = slice.ptr_guard_mut();
    // SAFETY: the range is within guest memory's own mapping, which `memory` keeps; what it holds stays the same.
    let outcome = unsafe { libc::madvise(host.as_ptr().cast(), len, libc::MADV_COLLAPSE) };
    if outcome != 0 {
        tracing::debug!("No huge pages for guest memory from {start:#x}: {}", io::Error::last_os_error());
    }
}

/// Maps the code of a saved machine's kernel in the place of guest memory that still is empty; where that is. All machines that do so have one
/// copy of it. What a guest writes there nevertheless is its own (MAP_PRIVATE): a kernel that mends its code does.
///
/// husk-fs sees nothing there. It has no need to: a kernel neither frees its code nor has devices read or write it.
pub(crate) fn map_code(memory: &GuestMemory, file: &File, address: u64) -> Result<Range<u64>, MemoryError> {
    let failed = |source| MemoryError::Code { address, source };
    let len = file.metadata().map_err(failed)?.len();
    let size =
        NonZeroUsize::new(len as usize).filter(|_| address.is_multiple_of(HUGE_PAGE) && len.is_multiple_of(HUGE_PAGE));
    let size = size.ok_or_else(|| failed(io::Error::other(format!("{len} bytes there are no whole huge pages"))))?;
    let slice = memory.get_slice(GuestAddress(address), size.get()).map_err(|error| failed(io::Error::other(error)))?;
    let host = slice.ptr_guard_mut().as_ptr() as usize;
    let (protection, flags) =
        (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE);
    // SAFETY: the range is within guest memory's own mapping, of one region, to which nobody has a reference; it stays mapped.
    unsafe { mmap(NonZeroUsize::new(host), size, protection, flags | MapFlags::MAP_FIXED, file, 0) }
        .map_err(|errno| failed(errno.into()))?;
    Ok(address..address + len)
}

/// Takes `part` out of ranges that are sorted.
pub(crate) fn leave_out(ranges: &mut Vec<Range<u64>>, part: &Range<u64>) {
    let rest =
        ranges.iter().flat_map(|range| [range.start..range.end.min(part.start), range.start.max(part.end)..range.end]);
    *ranges = rest.filter(|range| range.start < range.end).collect();
}

/// Of the ranges, sorted, that a saved machine fills: the huge pages that are worth it, a quarter of each filled at
/// least: with an eighth a pod took 7 MiB more and started no sooner.
pub(crate) fn worth_huge(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut pages: Vec<(u64, u64)> = Vec::new();
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let page = start / HUGE_PAGE * HUGE_PAGE;
            let end = range.end.min(page + HUGE_PAGE);
            match pages.last_mut() {
                Some((last, filled)) if *last == page => *filled += end - start,
                _ => pages.push((page, end - start)),
            }
            start = end;
        }
    }
    let worth = pages.into_iter().filter(|(_, filled)| *filled >= HUGE_PAGE / 4);
    let mut parts: Vec<Range<u64>> = Vec::new();
    for (page, _) in worth {
        match parts.last_mut() {
            Some(last) if last.end == page => last.end = page + HUGE_PAGE,
            _ => parts.push(page..page + HUGE_PAGE),
        }
    }
    parts
}

/// Shows all of the memory to the guest, in slots from 0 on; returns the first slot that is free.
///
/// The caller keeps `memory` for as long as the VM lives.
pub(crate) fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<u32, MemoryError> {
    let mut slot = 0;
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        show(vm, slot, memory, start..start + region.len())?;
        slot += 1;
    }
    Ok(slot)
}

/// Shows a part of one region to the guest, in a slot that is free, by which the guest has no memory there yet.
///
/// The caller keeps `memory` for as long as the VM lives.
pub(crate) fn show(vm: &VmFd, slot: u32, memory: &GuestMemory, part: Range<u64>) -> Result<(), MemoryError> {
    let address = part.start;
    let failed = |source| MemoryError::Slot { address, source };
    let len = part.end - part.start;
    let slice = memory.get_slice(GuestAddress(address), len as usize).map_err(|e| failed(io::Error::other(e)))?;
    let region = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: slice.ptr_guard_mut().as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the range is within a mapping that outlives the VM, as the caller warrants; KVM refuses what overlaps another slot.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn well_filled_huge_pages_are_worth_it() {
        let (page, quarter) = (HUGE_PAGE, HUGE_PAGE / 4);
        let filled =
            [0..quarter, page - 10..page + quarter, 2 * page..2 * page + quarter - 1, 5 * page..5 * page + quarter / 2];
        let one = |range: Range<u64>| std::iter::once(range).collect::<Vec<_>>();
        assert_eq!(worth_huge(&filled), one(0..2 * page));
        assert_eq!(worth_huge(&one(page..4 * page)), one(page..4 * page));
        assert!(worth_huge(&[]).is_empty());
    }

    #[test]
    fn code_is_shared_until_it_is_written() {
        let memory = create(64 * layout::MIB).unwrap();
        let mut file = tempfile();
        file.set_len(2 * HUGE_PAGE).unwrap();
        std::io::Write::write_all(&mut file, &[7; 100]).unwrap();
        let address = 16 * layout::MIB;
        let mapped = map_code(&memory, &file, address).unwrap();
        assert_eq!(mapped, address..address + 2 * HUGE_PAGE);
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((read(address), read(address + 99), read(address + 100)), (7, 7, 0));
        memory.write_obj(8u8, GuestAddress(address + 1)).unwrap();
        assert_eq!((read(address), read(address + 1)), (7, 8));
        let mut bytes = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [7, 7]);
        assert_eq!(blocks(&memory), 0, "nothing of it is in the memory file");
    }

    #[test]
    fn code_that_does_not_fit_is_refused() {
        let memory = create(64 * layout::MIB).unwrap();
        let file = tempfile();
        let refused = |len, address| {
            file.set_len(len).unwrap();
            map_code(&memory, &file, address).unwrap_err();
        };
        refused(0, 0);
        refused(HUGE_PAGE - 4096, 0);
        refused(HUGE_PAGE, 4096);
        refused(2 * HUGE_PAGE, 62 * layout::MIB);
        refused(HUGE_PAGE, u64::MAX - HUGE_PAGE + 1);
        refused(1 << 50, 0);
    }

    #[test]
    fn what_is_mapped_is_not_filled() {
        let left = |part: Range<u64>| {
            let mut ranges = vec![0..10, 20..30, 40..50];
            leave_out(&mut ranges, &part);
            ranges
        };
        assert_eq!(left(10..20), [0..10, 20..30, 40..50]);
        assert_eq!(left(5..25), [0..5, 25..30, 40..50]);
        assert_eq!(left(42..44), [0..10, 20..30, 40..42, 44..50]);
        assert_eq!(left(0..60), []);
    }

    fn tempfile() -> File {
        File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap())
    }

    fn blocks(memory: &GuestMemory) -> u64 {
        let files = memory.iter().map(|region| region.file_offset().unwrap().file().metadata().unwrap());
        files.map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata)).sum()
    }

    #[test]
    fn a_region_to_plug_memory_into_costs_nothing() {
        let boot = create(4 * layout::MIB).unwrap();
        let hotplug = layout::hotplug(4 * layout::MIB, 1 << 40);
        let all = with_hotplug(&boot, &hotplug).unwrap();
        boot.write_obj(7u32, GuestAddress(0x1000)).unwrap();
        assert_eq!(all.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 7);
        all.write_obj(8u32, GuestAddress(hotplug.end - 4)).unwrap();
        let file = all.iter().last().unwrap().file_offset().unwrap().file();
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()), 8);
        assert_eq!((boot.num_regions(), all.num_regions()), (1, 2));
    }

    #[test]
    fn memory_is_shared_and_sealed() {
        let memory = create(4 * layout::MIB).unwrap();
        memory.write_obj(7u32, GuestAddress(0x1000)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(0).is_err());
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0x1000).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 7);
    }
}
