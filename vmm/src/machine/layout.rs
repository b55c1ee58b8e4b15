//! The map of guest-physical memory and of I/O ports: every fixed address of the machine, once. `vmm/docs/memory-map.md` draws it.

use std::ops::Range;

/// One mebibyte in bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// PVH: `struct hvm_start_info` (Linux, include/xen/interface/hvm/start_info.h).
pub(crate) const START_INFO: u64 = 0x6000;
/// PVH: the list of modules, of which the initramfs is the only one.
pub(crate) const MODULE_LIST: u64 = 0x6800;
/// PVH: the memory map.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its final NUL (Linux x86, COMMAND_LINE_SIZE).
pub(crate) const CMDLINE_MAX: usize = 2048;

/// End of conventional memory: the PC's hole for video memory and ROMs begins.
pub(crate) const CONVENTIONAL_END: u64 = 0xA_0000;
/// The ACPI tables, where a PC's BIOS ROM is.
pub(crate) const ACPI_TABLES: u64 = 0xE_0000;
/// Room for the ACPI tables in bytes.
pub(crate) const ACPI_TABLES_LEN: u64 = 0x1_F000;
/// The VM's generation id, on a page of its own, as its specification has it.
pub(crate) const GENERATION_ID: u64 = ACPI_TABLES + ACPI_TABLES_LEN;
/// Extended memory begins.
pub(crate) const HIGH_MEMORY: u64 = MIB;
/// Where husk's kernel is linked to run (Linux, CONFIG_PHYSICAL_START); another may be elsewhere.
pub(crate) const KERNEL: u64 = 16 * MIB;

/// End of RAM below 4 GiB: 3 GiB.
pub(crate) const LOW_RAM_END: u64 = 0xC000_0000;
/// RAM that doesn't fit below goes on here: 4 GiB.
pub(crate) const HIGH_RAM: u64 = 1 << 32;

/// Linux plugs memory by blocks of 128 MiB, in a machine of 64 GiB or more by up to 2 GiB (arch/x86/mm/init_64.c,
/// probe_memory_block_size).
const MEMORY_BLOCK: u64 = 128 * MIB;
const LARGE_MEMORY_BLOCK: u64 = 2048 * MIB;
const LARGE_MEMORY: u64 = 64 << 30;

/// Where PCI functions have their BARs.
pub(crate) const PCI_WINDOW: u64 = LOW_RAM_END;
/// Length of the window in bytes.
pub(crate) const PCI_WINDOW_LEN: u64 = 0x2000_0000;
/// Distance between two functions' BARs, and so the largest BAR.
pub(crate) const BAR_SLOT: u64 = MIB;
/// PCI Express enhanced configuration (PCIe 6.0, section 7.2.2) of bus 0, the only one.
pub(crate) const ECAM: u64 = 0xE000_0000;
/// Length of one bus' configuration space.
pub(crate) const ECAM_LEN: u64 = MIB;

/// I/O APIC (KVM's own; Linux, arch/x86/kvm/ioapic.h).
pub(crate) const IOAPIC: u32 = 0xFEC0_0000;
/// Pins of KVM's I/O APIC; GSIs above them are for message-signalled interrupts.
pub(crate) const IOAPIC_PINS: u32 = 24;
/// Local APIC of each vCPU (Intel SDM volume 3, 12.4.1).
pub(crate) const LAPIC: u32 = 0xFEE0_0000;
/// One page that KVM needs on Intel processors for real mode (KVM_SET_IDENTITY_MAP_ADDR).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for the same purpose (KVM_SET_TSS_ADDR).
pub(crate) const KVM_TSS: u64 = 0xFFFB_D000;

/// ttyS0's ports.
pub(crate) const SERIAL_PORT: u16 = 0x3F8;
/// Number of ports of a 16550.
pub(crate) const SERIAL_PORTS: u16 = 8;
/// ttyS0's interrupt line.
pub(crate) const SERIAL_GSI: u32 = 4;
/// pvpanic (QEMU, docs/specs/pvpanic.rst).
pub(crate) const PVPANIC_PORT: u16 = 0x505;
/// ACPI's sleep control register; sleep status and reset follow it.
pub(crate) const POWER_PORT: u16 = 0x600;
/// Hot-plug of PCI devices: three registers of 32 bits, see `hw::hotplug`.
pub(crate) const HOTPLUG_PORT: u16 = 0x610;
/// Interrupt of ACPI's generic event device.
pub(crate) const GED_GSI: u32 = 9;
/// Its interrupt for a new generation id.
pub(crate) const GENERATION_GSI: u32 = 10;
/// PCI configuration mechanism 1: address at this port, data at the next four (PCI 3.0, section 3.2.2.3.2).
pub(crate) const PCI_CONFIG_PORT: u16 = 0xCF8;
/// Number of ports of mechanism 1.
pub(crate) const PCI_CONFIG_PORTS: u16 = 8;

/// Splits RAM around the hole below 4 GiB: start and length of each region in bytes.
pub(crate) fn ram(len: u64) -> Vec<(u64, u64)> {
    let low = len.min(LOW_RAM_END);
    let mut regions = vec![(0, low)];
    if len > low {
        regions.push((HIGH_RAM, len - low));
    }
    regions
}

/// Where memory can be plugged into a machine that boots with `ram` bytes: beyond all RAM and 4 GiB, where any of Linux' blocks begins.
pub(crate) fn hotplug(ram: u64, len: u64) -> Range<u64> {
    let start = (HIGH_RAM + ram.saturating_sub(LOW_RAM_END)).next_multiple_of(LARGE_MEMORY_BLOCK);
    start..start + len
}

/// Length of the blocks by which Linux plugs memory into such a machine.
pub(crate) fn memory_block(ram: u64) -> u64 {
    // The hole below 4 GiB counts.
    if ram + (HIGH_RAM - LOW_RAM_END) < LARGE_MEMORY { MEMORY_BLOCK } else { LARGE_MEMORY_BLOCK }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram(512 * MIB), [(0, 512 * MIB)]);
        assert_eq!(ram(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(ram(LOW_RAM_END + MIB), [(0, LOW_RAM_END), (HIGH_RAM, MIB)]);
    }

    #[test]
    fn memory_is_plugged_beyond_all_ram() {
        assert_eq!(hotplug(256 * MIB, 4096 * MIB), HIGH_RAM..2 * HIGH_RAM);
        assert_eq!(hotplug(LOW_RAM_END, MIB).start, HIGH_RAM);
        assert_eq!(hotplug(LOW_RAM_END + MIB, MIB).start, HIGH_RAM + 2048 * MIB);
        assert_eq!(memory_block(256 * MIB), 128 * MIB);
        assert_eq!(memory_block(63 * 1024 * MIB), 2048 * MIB);
    }

    #[test]
    fn nothing_overlaps_below_4_gib() {
        let ranges = [
            (START_INFO, 0x800),
            (MODULE_LIST, 0x800),
            (MEMORY_MAP, 0x1000),
            (CMDLINE, CMDLINE_MAX as u64),
            (ACPI_TABLES, ACPI_TABLES_LEN),
            (GENERATION_ID, 0x1000),
            (HIGH_MEMORY, LOW_RAM_END - HIGH_MEMORY),
            (PCI_WINDOW, PCI_WINDOW_LEN),
            (ECAM, ECAM_LEN),
            (u64::from(IOAPIC), 0x1000),
            (u64::from(LAPIC), 0x1000),
            (KVM_IDENTITY_MAP, 0x1000),
            (KVM_TSS, 0x3000),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(ranges[ranges.len() - 1].0 < HIGH_RAM);
    }
}
