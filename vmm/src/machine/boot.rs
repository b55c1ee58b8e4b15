//! Boot through PVH (xen.git, docs/misc/pvh.pandoc): the ELF kernel and the initramfs are loaded, `hvm_start_info` tells the
//! kernel where all is, and vCPU 0 enters it in flat 32-bit protected mode.

use std::fs::File;
use std::io;
use std::ops::Range;

use husk_virtio::device::GuestMemory;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::{layout, memory};

/// XEN_HVM_START_MAGIC_VALUE.
const START_MAGIC: u32 = 0x336E_C578;
/// Types of the memory map: XEN_HVM_MEMMAP_TYPE_RAM and _RESERVED.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Why the guest can't boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The kernel.
    #[error("Could not load the kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    /// Not a PVH kernel.
    #[error("The kernel has no PVH entry point (CONFIG_PVH)")]
    NoPvh,
    /// The kernel's length.
    #[error("Could not tell the kernel's length")]
    KernelLen(#[source] io::Error),
    /// The initramfs' length.
    #[error("Could not tell the initramfs' length")]
    InitramfsLen(#[source] io::Error),
    /// The initramfs does not fit.
    #[error(
        "An initramfs of {initramfs} bytes does not fit above the kernel's end at {kernel_end:#x} in {memory} bytes of memory"
    )]
    InitramfsTooLarge {
        /// Its length.
        initramfs: u64,
        /// First byte after the kernel.
        kernel_end: u64,
        /// Memory below 4 GiB.
        memory: u64,
    },
    /// The command line is too long.
    #[error("The kernel's command line has {0} bytes, more than {max}", max = layout::CMDLINE_MAX - 1)]
    Cmdline(usize),
    /// A write into guest memory.
    #[error("Could not write the {what} into guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

/// What is booted.
pub(crate) struct Images<'a> {
    /// The ELF kernel.
    pub(crate) kernel: &'a mut File,
    /// The initramfs.
    pub(crate) initramfs: &'a mut File,
    /// The kernel's command line.
    pub(crate) cmdline: &'a str,
    /// The ACPI tables, see [`super::acpi::tables`].
    pub(crate) acpi: &'a [u8],
}

/// Loads all that the guest finds in its memory; returns the kernel's entry point.
pub(crate) fn load(memory: &GuestMemory, images: Images<'_>) -> Result<u64, BootError> {
    let kernel_len = images.kernel.metadata().map_err(BootError::KernelLen)?.len();
    let initramfs_len = images.initramfs.metadata().map_err(BootError::InitramfsLen)?.len();
    for part in touched_at_boot(memory, kernel_len, initramfs_len) {
        memory::make_huge(memory, part);
    }
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    let kernel = Elf::load(memory, None, images.kernel, high).map_err(BootError::Kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else { return Err(BootError::NoPvh) };
    let initramfs = load_initramfs(memory, images.initramfs, initramfs_len, kernel.kernel_end)?;

    if images.cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::Cmdline(images.cmdline.len()));
    }
    let cmdline = [images.cmdline.as_bytes(), &[0]].concat();
    write(memory, "command line", layout::CMDLINE, &cmdline)?;
    write(memory, "ACPI tables", layout::ACPI_TABLES, images.acpi)?;

    let map = memory_map(memory);
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: 1,
        modlist_paddr: layout::MODULE_LIST,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_TABLES,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let failed = |what| move |source| BootError::Write { what, source };
    memory.write_obj(start_info, GuestAddress(layout::START_INFO)).map_err(failed("start information"))?;
    memory.write_obj(initramfs, GuestAddress(layout::MODULE_LIST)).map_err(failed("list of modules"))?;
    for (entry, number) in map.into_iter().zip(0u64..) {
        let address = layout::MEMORY_MAP + number * size_of::<hvm_memmap_table_entry>() as u64;
        memory.write_obj(entry, GuestAddress(address)).map_err(failed("memory map"))?;
    }
    Ok(entry.raw_value())
}

/// The parts of memory that every boot fills, as counted by 2 MiB in the test host: the kernel and the free memory below it, of which it
/// takes its first pages; at the top, downwards, the initramfs, the page descriptors (64 bytes a page), the hash tables of files and
/// sockets (about as much as 1/512 of memory), and the processors' own data.
fn touched_at_boot(memory: &GuestMemory, kernel_len: u64, initramfs_len: u64) -> Vec<Range<u64>> {
    const LOWEST: u64 = 8 * layout::MIB;
    const PER_CPU: u64 = 2 * layout::MIB;
    let total: u64 = memory.iter().map(|region| region.len()).sum();
    let top = total / 64 + total / 512 + PER_CPU;
    let kernel = LOWEST..(layout::KERNEL + kernel_len).next_multiple_of(memory::HUGE_PAGE);
    // The initramfs is in the lowest region, below 4 GiB, the rest in the highest.
    let ends = (1..).zip(memory.iter()).map(|(number, region)| {
        let initramfs = if number == 1 { initramfs_len } else { 0 };
        let rest = if number == memory.num_regions() { top } else { 0 };
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        end.saturating_sub(initramfs + rest).max(start)..end
    });
    std::iter::once(kernel).chain(ends).collect()
}

fn write(memory: &GuestMemory, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Write { what, source })
}

/// As high as possible below 4 GiB, out of the way of the kernel's own early allocations.
fn load_initramfs(
    memory: &GuestMemory,
    file: &mut File,
    size: u64,
    kernel_end: u64,
) -> Result<hvm_modlist_entry, BootError> {
    let low = memory.iter().next().map_or(0, |region| region.len());
    let address = low.checked_sub(size).map(|address| address / PAGE * PAGE).filter(|address| *address >= kernel_end);
    let Some(paddr) = address else {
        return Err(BootError::InitramfsTooLarge { initramfs: size, kernel_end, memory: low });
    };
    memory
        .read_exact_volatile_from(GuestAddress(paddr), file, size as usize)
        .map_err(|source| BootError::Write { what: "initramfs", source })?;
    Ok(hvm_modlist_entry { paddr, size, ..Default::default() })
}

fn memory_map(memory: &GuestMemory) -> Vec<hvm_memmap_table_entry> {
    let range = |addr, end, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, ..Default::default() };
    let mut map =
        vec![range(0, layout::CONVENTIONAL_END, RAM), range(layout::ACPI_TABLES, layout::HIGH_MEMORY, RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        if start == 0 {
            map.push(range(layout::HIGH_MEMORY, end, RAM));
            map.push(range(layout::ECAM, layout::ECAM + layout::ECAM_LEN, RESERVED));
        } else {
            map.push(range(start, end, RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory;
    use std::io::{Seek, Write};

    fn file(bytes: &[u8]) -> File {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn the_map_covers_ram_above_one_mebibyte() {
        let memory = memory::create(64 * layout::MIB).unwrap();
        let ram: u64 = memory_map(&memory)
            .iter()
            .filter(|e| e.type_ == RAM && e.addr >= layout::HIGH_MEMORY)
            .map(|e| e.size)
            .sum();
        assert_eq!(ram, 63 * layout::MIB);
    }

    #[test]
    fn what_a_boot_fills_is_within_memory() {
        let whole = |mib: u64| touched_at_boot(&memory::create(mib * layout::MIB).unwrap(), 18 << 20, 5 << 20);
        assert_eq!(whole(2048), [8 << 20..34 << 20, (2048 - 43) << 20..2048 << 20]);
        let high = layout::HIGH_RAM;
        assert_eq!(whole(3072 + 32)[1..], [3067 << 20..3072 << 20, high..high + (32 << 20)]);
    }

    #[test]
    fn the_initramfs_goes_to_the_top_and_never_over_the_kernel() {
        let memory = memory::create(4 * layout::MIB).unwrap();
        let module = load_initramfs(&memory, &mut file(&[7; 5000]), 5000, layout::HIGH_MEMORY).unwrap();
        assert_eq!((module.paddr, module.size), (4 * layout::MIB - 8192, 5000));
        let refused = load_initramfs(&memory, &mut file(&[7; 5000]), 5000, 4 * layout::MIB - 4096);
        assert!(matches!(refused, Err(BootError::InitramfsTooLarge { .. })));
    }

    #[test]
    fn a_kernel_that_is_none_is_refused() {
        let memory = memory::create(4 * layout::MIB).unwrap();
        let images = Images { kernel: &mut file(b"#!/bin/sh\n"), initramfs: &mut file(b""), cmdline: "", acpi: &[] };
        assert!(matches!(load(&memory, images), Err(BootError::Kernel(_))));
    }
}
