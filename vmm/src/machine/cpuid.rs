//! CPUID of each vCPU: what KVM supports, with the machine's own topology (one package, a core per vCPU, no siblings). KVM's
//! signature leaves at 0x4000_0000 pass through unchanged.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: the local APIC's timer can be armed with a TSC value.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: EBX[23:16] is valid.
const HTT: u32 = 1 << 28;
/// Leaves with the extended topology: Intel SDM volume 2A, CPUID, 0x0B and 0x1F.
const TOPOLOGY_LEAVES: [u32; 2] = [0xB, 0x1F];

/// The entries for vCPU `id` of `count`; its APIC id is its number.
pub(crate) fn entries(supported: &CpuId, id: u8, count: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let (id, count) = (u32::from(id), u32::from(count));
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|entry| !TOPOLOGY_LEAVES.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_FFFF | id << 24 | count << 16;
                entry.ecx = set(entry.ecx, TSC_DEADLINE, tsc_deadline) | HYPERVISOR;
                entry.edx = set(entry.edx, HTT, count > 1);
            }
            // Intel's and AMD's caches: the last level is everyone's, the others a core's own.
            0x4 | 0x8000_001D => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x0000_3FFF | sharing << 14;
                if entry.function == 0x4 && level > 0 {
                    entry.eax |= (count - 1) << 26;
                }
            }
            // AMD: APIC id size and number of threads less one.
            0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | core_bits(count) << 12 | (count - 1),
            // AMD: extended APIC id, core id with one thread a core, one node.
            0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xFF, 0),
            _ => {}
        }
    }
    let highest = supported.as_slice().iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in TOPOLOGY_LEAVES.into_iter().filter(|leaf| *leaf <= highest) {
        // Level type in ECX[15:8]: 1 thread, 2 core, 0 the end.
        for (index, (shift, processors, level)) in
            [(0, 1, 1), (core_bits(count), count, 2), (0, 0, 0)].into_iter().enumerate()
        {
            entries.push(kvm_cpuid_entry2 {
                function,
                index: index as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: level << 8 | index as u32,
                edx: id,
                ..Default::default()
            });
        }
    }
    entries
}

/// Bits of an APIC id that tell cores apart.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn set(register: u32, bit: u32, on: bool) -> u32 {
    if on { register | bit } else { register & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        CpuId::from_entries(&[
            entry(0, 0x16),
            entry(1, 0),
            entry(4, 3 << 5),
            entry(0xB, 9),
            entry(0x4000_0000, 0x4000_0001),
        ])
        .unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_of_its_own() {
        let entries = entries(&supported(), 2, 3, true);
        let leaf = |function, index| entries.iter().find(|e| e.function == function && e.index == index).unwrap();
        assert_eq!(leaf(1, 0).ebx >> 16, 2 << 8 | 3);
        assert_eq!(leaf(1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!(leaf(1, 0).edx, HTT);
        assert_eq!(leaf(4, 0).eax, 3 << 5 | 2 << 14 | 2 << 26);
        assert_eq!((leaf(0xB, 0).ecx, leaf(0xB, 0).edx), (0x100, 2));
        assert_eq!((leaf(0xB, 1).eax, leaf(0xB, 1).ebx, leaf(0xB, 1).ecx), (2, 3, 0x201));
        assert_eq!(leaf(0xB, 2).ecx, 2);
        assert!(!entries.iter().any(|e| e.function == 0x1F), "not below the highest leaf");
        assert_eq!(leaf(0x4000_0000, 0).eax, 0x4000_0001);
    }

    #[test]
    fn one_vcpu_needs_no_bits() {
        assert_eq!((core_bits(1), core_bits(2), core_bits(3), core_bits(64)), (0, 1, 2, 6));
    }
}
