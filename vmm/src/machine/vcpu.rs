//! One vCPU: its registers at start, and the loop that runs it and hands its exits to the buses.

use std::io;
use std::sync::Arc;

use husk_vmm_api::exit::ExitReason;
use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::gate::Gate;
use super::saved::{Saver, Slot, VcpuState, VcpuStateError};
use super::{cpuid, kick, layout, msr};
use crate::bus::mmio::MmioBus;
use crate::bus::pio::PioBus;
use crate::lock::lock;

/// Why a vCPU could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("Could not set the {what} of vCPU {id}")]
pub(crate) struct VcpuError {
    id: u8,
    what: &'static str,
    #[source]
    source: io::Error,
}

/// What vCPUs need to know of the machine.
pub(crate) struct Template<'a> {
    /// Number of vCPUs.
    pub(crate) count: u8,
    /// CPUID that KVM supports.
    pub(crate) cpuid: &'a CpuId,
    /// Whether KVM emulates the APIC timer's TSC deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// Where exits go.
pub(crate) struct Buses {
    /// I/O ports.
    pub(crate) pio: PioBus,
    /// Memory-mapped I/O.
    pub(crate) mmio: MmioBus,
}

/// A vCPU that has not run yet, or is running on its thread.
pub(crate) struct Vcpu {
    id: u8,
    fd: VcpuFd,
    /// Where it leaves its state when it pauses, in a VM that is to be saved.
    saver: Option<Saver>,
}

impl Vcpu {
    /// Makes vCPU `id`. Without [`Self::enter_kernel`] it waits for another vCPU's INIT and SIPI.
    pub(crate) fn new(vm: &VmFd, id: u8, template: &Template<'_>) -> Result<Self, VcpuError> {
        let failed = |what| move |source: io::Error| VcpuError { id, what, source };
        let fd = vm.create_vcpu(id.into()).map_err(|e| failed("existence")(e.into()))?;
        let entries = cpuid::entries(template.cpuid, id, template.count, template.tsc_deadline);
        let cpuid = CpuId::from_entries(&entries).map_err(|e| failed("CPUID")(io::Error::other(format!("{e:?}"))))?;
        fd.set_cpuid2(&cpuid).map_err(|e| failed("CPUID")(e.into()))?;
        msr::set(&fd).map_err(failed("MSRs"))?;
        connect_lapic(&fd).map_err(failed("local APIC"))?;
        Ok(Self { id, fd, saver: None })
    }

    /// Has it leave its state in the slot whenever it pauses. `msrs` are those that KVM saves.
    pub(crate) fn save_to(&mut self, slot: Slot, msrs: Arc<[u32]>) {
        self.saver = Some(Saver { slot, msrs });
    }

    /// Puts it into a saved state, instead of [`Self::enter_kernel`].
    pub(crate) fn restore(&self, state: &VcpuState) -> Result<(), VcpuStateError> {
        state.restore(&self.fd)
    }

    /// Has it begin at `entry` as PVH wants it: flat 32-bit protected mode, paging off, EBX at the start information.
    pub(crate) fn enter_kernel(&self, entry: u64) -> Result<(), VcpuError> {
        let failed = |source| VcpuError { id: self.id, what: "registers", source };
        let mut sregs = self.fd.get_sregs().map_err(|e| failed(e.into()))?;
        sregs.cs = segment(0x8, 0xB, 1);
        let data = segment(0x10, 0x3, 1);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xB, present: 1, ..Default::default() };
        sregs.cr0 = 1; // PE
        sregs.cr4 = 0;
        sregs.efer = 0;
        self.fd.set_sregs(&sregs).map_err(|e| failed(e.into()))?;
        // Bit 1 of RFLAGS is always set.
        let regs = kvm_regs { rflags: 2, rip: entry, rbx: layout::START_INFO, ..Default::default() };
        self.fd.set_regs(&regs).map_err(|e| failed(e.into()))
    }

    /// A handle with which others make it leave KVM_RUN.
    pub(crate) fn kicker(&self, run_size: usize) -> io::Result<kick::RunPage> {
        kick::RunPage::map(&self.fd, run_size)
    }

    /// Saves the state, if it is wanted. What the last exit left half done KVM completes at the next entry, which is to end at once
    /// (kvm/api.rst, "KVM_RUN").
    fn leave_state(&mut self) {
        let Some(saver) = &self.saver else { return };
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        *lock(&saver.slot) = Some(VcpuState::save(&self.fd, &saver.msrs));
    }

    /// Runs until the VM ends; pauses where the gate says so.
    pub(crate) fn run(mut self, buses: &Buses, gate: &Arc<Gate>) -> ExitReason {
        loop {
            if gate.closed() {
                self.leave_state();
                self.fd.set_kvm_immediate_exit(0);
                gate.wait();
                // The guest's watchdogs learn that it did not run (KVM_KVMCLOCK_CTRL); a guest without kvmclock has none to tell.
                let _ = self.fd.kvmclock_ctrl();
            }
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    if let Some(reason) = buses.pio.write(port, data) {
                        return reason;
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => buses.pio.read(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
                // A triple fault.
                Ok(VcpuExit::Shutdown) => return ExitReason::Reset,
                Ok(VcpuExit::Intr) => self.fd.set_kvm_immediate_exit(0),
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
                    tracing::error!(vcpu = self.id, exit, "KVM could not go on at {rip:#x}");
                    return ExitReason::Failed;
                }
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN => self.fd.set_kvm_immediate_exit(0),
                    _ => {
                        tracing::error!(vcpu = self.id, %error, "KVM_RUN failed");
                        return ExitReason::Failed;
                    }
                },
            }
        }
    }
}

/// A flat 4 GiB segment of the given type (Intel SDM volume 3, 3.4.5).
fn segment(selector: u16, type_: u8, db: u8) -> kvm_segment {
    kvm_segment { base: 0, limit: u32::MAX, selector, type_, present: 1, db, s: 1, g: 1, ..Default::default() }
}

/// Local interrupt pins as firmware leaves them: LINT0 takes the PIC's interrupts, LINT1 is NMI (Intel SDM volume 3, 12.5.1).
fn connect_lapic(vcpu: &VcpuFd) -> io::Result<()> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXT_INT: i8 = 7;
    const NMI: i8 = 4;
    let mut lapic = vcpu.get_lapic()?;
    // Bits 10:8 are the delivery mode, bit 16 masks.
    for (register, mode) in [(LINT0, EXT_INT), (LINT1, NMI)] {
        lapic.regs[register + 1] = mode;
        lapic.regs[register + 2] = 0;
    }
    Ok(vcpu.set_lapic(&lapic)?)
}
