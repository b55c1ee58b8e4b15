//! A virtual machine with a page of code: in 64-bit mode, ring 3, it counts bits, exchanges 16 bytes and makes a system call, which
//! must arrive in ring 0 and tells by an I/O port what it saw. KVMs that only look like KVM fail here.

use std::error::Error;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Longest run; it takes microseconds.
const LIMIT: Duration = Duration::from_secs(10);

/// Most exits of a run that goes well, and some.
const MOST_EXITS: usize = 16;

/// Bytes of guest memory, from address 0.
const MEMORY: usize = 0x1_0000;

// Where things are in it.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const TSS: u64 = 0x4000;
const STACK_TOP: u64 = 0x7000;
const USER_CODE: u64 = 0x8000;
const KERNEL_CODE: u64 = 0x9000;
const OPERAND: u64 = 0xa000;

/// In ring 3.
const USER: &[u8] = &[
    0xf3, 0x44, 0x0f, 0xb8, 0xc1, // popcnt r8d, ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]
    0x41, 0x0f, 0x94, 0xc1, // setz r9b
    0x0f, 0x05, // syscall
    0xf4, // hlt: a fault in ring 3
];

/// Where the system call arrives.
const KERNEL: &[u8] = &[
    0x8c, 0xc8, // mov eax, cs
    0xe6, PORT, // out PORT, al
    0x44, 0x88, 0xc0, // mov al, r8b
    0xe6, PORT, // out PORT, al
    0x44, 0x88, 0xc8, // mov al, r9b
    0xe6, PORT, // out PORT, al
    0xf4, // hlt
];

/// The port that the guest speaks by.
const PORT: u8 = 0x10;

/// The kernel's code segment, which SYSCALL loads.
const KERNEL_CS: u64 = 0x08;

/// What the guest says if all is well: its code segment (ring 0), the bits of 0xff, and that the exchange took place.
const GOOD: [u8; 3] = [KERNEL_CS as u8, 8, 1];

/// How the run went.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// As on hardware.
    Good,
    /// Otherwise: how.
    Bad(String),
}

/// Why there was no run.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuestError {
    /// A request of KVM.
    #[error("KVM refuses to {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The guest's memory.
    #[error("cannot make the guest's memory")]
    Memory(#[source] Box<dyn Error + Send + Sync>),
    /// The vCPU's thread.
    #[error("cannot start the vCPU's thread")]
    Thread(#[source] std::io::Error),
}

/// Makes the machine and runs it.
pub(super) fn run(kvm: Kvm) -> Result<Outcome, GuestError> {
    let memory = fill().map_err(GuestError::Memory)?;
    let vm = kvm.create_vm().map_err(|e| GuestError::Kvm("make a virtual machine", e))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0)).map_err(|e| GuestError::Memory(e.into()))? as u64,
    };
    // SAFETY: the region is the whole of `memory`, which is dropped only after the VM, at the end of the vCPU's thread.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| GuestError::Kvm("take memory", e))?;
    let vcpu = prepare(&kvm, &vm)?;

    // On a thread, so that a KVM that never comes back is found out too; the process ends without it then.
    let (done, outcome) = mpsc::channel();
    let work = move || {
        let _ = done.send(follow(vcpu));
        drop(vm);
        drop(memory);
    };
    std::thread::Builder::new().name("vcpu".into()).spawn(work).map_err(GuestError::Thread)?;
    Ok(outcome
        .recv_timeout(LIMIT)
        .unwrap_or_else(|_| Outcome::Bad(format!("the guest did not come to its end within {} s", LIMIT.as_secs()))))
}

/// The guest's memory: page tables that map the first 2 MiB for ring 3 (Intel SDM volume 3, 4.5), and code.
fn fill() -> Result<GuestMemoryMmap, Box<dyn Error + Send + Sync>> {
    const PRESENT_WRITABLE_USER: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    memory.write_obj(PDPT | PRESENT_WRITABLE_USER, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE_USER, GuestAddress(PDPT))?;
    memory.write_obj(LARGE | PRESENT_WRITABLE_USER, GuestAddress(PD))?;
    memory.write_slice(USER, GuestAddress(USER_CODE))?;
    memory.write_slice(KERNEL, GuestAddress(KERNEL_CODE))?;
    Ok(memory)
}

/// A vCPU in 64-bit mode, ring 3, before the first instruction of `USER`.
fn prepare(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, GuestError> {
    // Control registers (Intel SDM volume 3, 2.5) and MSRs (AMD64 APM volume 2, 3.1.7 and 6.1).
    const CR0_PE_MP_ET_NE_WP_PG: u64 = 0x8001_0033;
    const CR4_PAE_OSFXSR: u64 = 0x220;
    const EFER_SCE_LME_LMA: u64 = 0x501;
    const MSR_STAR: u32 = 0xc000_0081;
    const MSR_LSTAR: u32 = 0xc000_0082;
    const MSR_SFMASK: u32 = 0xc000_0084;

    let vcpu = vm.create_vcpu(0).map_err(|e| GuestError::Kvm("make a vCPU", e))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| GuestError::Kvm("tell its CPUID", e))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| GuestError::Kvm("set CPUID", e))?;

    let mut sregs = vcpu.get_sregs().map_err(|e| GuestError::Kvm("tell a vCPU's registers", e))?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, dpl: 3, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x23, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 0x1b, type_: 0x3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { base: TSS, limit: 0x67, selector: 0x28, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE_OSFXSR;
    sregs.efer = EFER_SCE_LME_LMA;
    // Without a table of interrupts, every fault ends the machine.
    sregs.idt.limit = 0;
    vcpu.set_sregs(&sregs).map_err(|e| GuestError::Kvm("set a vCPU's system registers", e))?;

    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [msr(MSR_STAR, KERNEL_CS << 32 | 0x13 << 48), msr(MSR_LSTAR, KERNEL_CODE), msr(MSR_SFMASK, 0x200)];
    let msrs = Msrs::from_entries(&entries).map_err(|e| GuestError::Memory(format!("{e:?}").into()))?;
    let set = vcpu.set_msrs(&msrs).map_err(|e| GuestError::Kvm("set a vCPU's MSRs", e))?;
    if set != entries.len() {
        return Err(GuestError::Memory(format!("MSR {:#x} can't be set", entries[set].index).into()));
    }
    let regs = kvm_regs { rip: USER_CODE, rsp: STACK_TOP, rflags: 2, rcx: 0xff, rsi: OPERAND, ..Default::default() };
    vcpu.set_regs(&regs).map_err(|e| GuestError::Kvm("set a vCPU's registers", e))?;
    Ok(vcpu)
}

/// Runs to the end and judges what the guest said.
fn follow(mut vcpu: VcpuFd) -> Outcome {
    let mut said = Vec::new();
    for _ in 0..MOST_EXITS {
        let end = match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) if port == u16::from(PORT) => {
                said.extend_from_slice(data);
                continue;
            }
            Ok(VcpuExit::Hlt) => return judge(&said),
            Ok(VcpuExit::Shutdown) => "a fault (triple fault)".to_owned(),
            Ok(VcpuExit::InternalError) => "an internal error of KVM".to_owned(),
            Ok(exit) => format!("{exit:?}"),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => format!("KVM_RUN: {error}"),
        };
        let place = vcpu.get_regs().map_or_else(|_| "an unknown place".to_owned(), |regs| place(regs.rip));
        return Outcome::Bad(format!("the guest ended with {end} at {place}"));
    }
    Outcome::Bad(format!("the guest left {MOST_EXITS} times without an end"))
}

/// What the guest was about to do.
fn place(rip: u64) -> String {
    let name = match rip {
        USER_CODE => "popcnt",
        0x8005 => "cmpxchg16b",
        0x800e => "syscall in ring 3",
        0x8010 => "the instruction behind a syscall, which did not leave ring 3",
        KERNEL_CODE..=0x9fff => "a system call's kernel side, which is not in ring 0",
        _ => return format!("address {rip:#x}"),
    };
    name.to_owned()
}

fn judge(said: &[u8]) -> Outcome {
    match said {
        good if good == GOOD => Outcome::Good,
        [cs, ..] if cs & 3 != 0 => Outcome::Bad(format!("a system call arrives in ring {} instead of 0", cs & 3)),
        [_, bits, exchanged] => {
            Outcome::Bad(format!("wrong results: popcnt of 0xff is {bits}, cmpxchg16b's ZF is {exchanged}"))
        }
        other => Outcome::Bad(format!("the guest said {other:x?} instead of {GOOD:x?}")),
    }
}

/// An error and its sources in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_what_the_guest_said() {
        assert_eq!(judge(&GOOD), Outcome::Good);
        assert!(matches!(judge(&[0x23, 8, 1]), Outcome::Bad(how) if how.contains("ring 3")));
        assert!(matches!(judge(&[8, 7, 1]), Outcome::Bad(how) if how.contains("popcnt")));
        assert!(matches!(judge(&[]), Outcome::Bad(_)));
    }

    #[test]
    fn the_places_are_those_of_the_code() {
        assert_eq!(&USER[5..7], [0xf0, 0x48]);
        assert_eq!(&USER[0xe..0x10], [0x0f, 0x05]);
        assert_eq!(place(0x8010 - 2), "syscall in ring 3");
        fill().unwrap();
    }
}
