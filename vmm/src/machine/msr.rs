//! Model-specific registers that KVM does not already set as firmware would.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// IA32_MISC_ENABLE: fast string operations on (Intel SDM volume 4, table 2-2).
const MISC_ENABLE: (u32, u64) = (0x1A0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs on (bit 11), all memory write-back (6).
const MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 1 << 11 | 6);

/// Sets them on one vCPU.
pub(crate) fn set(vcpu: &VcpuFd) -> io::Result<()> {
    let entries = [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
    let set = vcpu.set_msrs(&msrs)?;
    match entries.get(set) {
        Some(refused) => Err(io::Error::other(format!("KVM refused MSR {:#x}", refused.index))),
        None => Ok(()),
    }
}
