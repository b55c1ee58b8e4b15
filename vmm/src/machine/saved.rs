//! The machine's state in a snapshot, but for memory: vCPUs, interrupt controllers, clock, and the PCI functions' own states.

use std::io;
use std::sync::{Arc, Mutex};

use husk_virtio::transport::pci::FunctionState;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) controllers: Controllers,
    pub(crate) functions: Vec<FunctionState>,
    /// Memory that can be plugged in, of which the guest knows; none of it is plugged.
    pub(crate) hotplug_mib: u64,
}

/// Where a paused vCPU leaves its state.
pub(crate) type Slot = Arc<Mutex<Option<Result<VcpuState, VcpuStateError>>>>;

/// What a vCPU needs to leave its state.
pub(crate) struct Saver {
    pub(crate) slot: Slot,
    pub(crate) msrs: Arc<[u32]>,
}

/// Why a vCPU's state could not be read or set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuStateError {
    /// An ioctl.
    #[error("Could not {doing} a vCPU's {what}")]
    Kvm {
        /// Read or set.
        doing: &'static str,
        /// Which part.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// KVM takes no such value.
    #[error("KVM refuses the saved value of MSR {0:#x}")]
    Msr(u32),
    /// Another processor.
    #[error("The saved time stamp counter runs at {has} kHz, this processor's at {here} kHz")]
    Frequency {
        /// The snapshot's.
        has: u32,
        /// This one's.
        here: u32,
    },
}

fn read<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { doing: "read", what, source: source.into() }
}

fn set<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { doing: "set", what, source: source.into() }
}

/// One vCPU.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
    tsc_khz: u32,
}

/// MSRs moved by one ioctl.
const MSRS_AT_ONCE: usize = 64;

impl VcpuState {
    /// Of a vCPU that left KVM_RUN with nothing half done.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, VcpuStateError> {
        Ok(Self {
            mp: vcpu.get_mp_state().map_err(read("run state"))?,
            regs: vcpu.get_regs().map_err(read("registers"))?,
            sregs: vcpu.get_sregs().map_err(read("system registers"))?,
            xcrs: vcpu.get_xcrs().map_err(read("extended control registers"))?,
            xsave: vcpu.get_xsave().map_err(read("extended state"))?,
            debug: vcpu.get_debug_regs().map_err(read("debug registers"))?,
            lapic: vcpu.get_lapic().map_err(read("local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(read("pending events"))?,
            msrs: read_msrs(vcpu, msrs)?,
            tsc_khz: vcpu.get_tsc_khz().map_err(read("time stamp counter's frequency"))?,
        })
    }

    /// Sets it all. The local APIC comes after the registers that say where it is, and the MSRs, of which its timer is one, after it.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let here = vcpu.get_tsc_khz().map_err(read("time stamp counter's frequency"))?;
        if here != self.tsc_khz {
            return Err(VcpuStateError::Frequency { has: self.tsc_khz, here });
        }
        vcpu.set_mp_state(self.mp).map_err(set("run state"))?;
        vcpu.set_sregs(&self.sregs).map_err(set("system registers"))?;
        vcpu.set_regs(&self.regs).map_err(set("registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(set("extended control registers"))?;
        // SAFETY: the guest may use no dynamically enabled feature (AMX), with which KVM would read more than the 4 KiB given here.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(set("extended state"))?;
        vcpu.set_debug_regs(&self.debug).map_err(set("debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(set("local APIC"))?;
        for entries in self.msrs.chunks(MSRS_AT_ONCE) {
            let done = vcpu.set_msrs(&msrs(entries.iter().copied())?).map_err(set("MSRs"))?;
            if let Some((index, _)) = entries.get(done) {
                return Err(VcpuStateError::Msr(*index));
            }
        }
        vcpu.set_vcpu_events(&self.events).map_err(set("pending events"))
    }
}

fn msrs(entries: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, VcpuStateError> {
    let entries: Vec<_> = entries.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|error| set("MSRs")(io::Error::other(format!("{error:?}"))))
}

/// Reads what can be read; of the list that KVM gives for all its machines, this one may lack some.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let mut entries = msrs(now.iter().map(|index| (*index, 0)))?;
        let done = vcpu.get_msrs(&mut entries).map_err(read("MSRs"))?;
        values.extend(entries.as_slice()[..done].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it can't read.
        rest = &rest[if done < now.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// The in-kernel interrupt controllers and the guest's clock.
#[derive(Serialize, Deserialize)]
pub(crate) struct Controllers {
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Controllers {
    /// Of a VM whose vCPUs stand still.
    pub(crate) fn save(vm: &VmFd) -> io::Result<Self> {
        let chips = CHIPS.into_iter().map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map(|()| chip)
        });
        Ok(Self { chips: chips.collect::<Result<_, _>>()?, clock: vm.get_clock()? })
    }

    /// Sets them; the clock goes on from where it stood.
    pub(crate) fn restore(&self, vm: &VmFd) -> io::Result<()> {
        self.chips.iter().try_for_each(|chip| vm.set_irqchip(chip))?;
        Ok(vm.set_clock(&kvm_clock_data { clock: self.clock.clock, ..Default::default() })?)
    }
}
