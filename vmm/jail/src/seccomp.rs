//! Seccomp filters (seccomp(2)), one a kind of thread: a table of allowed system calls each, with the reason beside it. Everything
//! else kills the process.

mod fs;
#[cfg(test)]
mod tests;
mod vmm;

use std::collections::BTreeMap;
use std::error::Error;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// The kinds of threads; each has a list of system calls of its own.
///
/// A new thread inherits its maker's filter, and then both hold. So a process's first thread installs its own after it has started
/// the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// husk-vmm: runs a vCPU.
    Vcpu,
    /// husk-vmm: the event loop with all devices. The first thread: installed when the vCPUs' and the control thread have been started.
    Devices,
    /// husk-vmm: serves the control API. May start disks' threads: it has all that they have.
    Control,
    /// husk-vmm: serves a disk's queue.
    Disk,
    /// husk-fs: accepts and speaks vhost-user. The first thread; may start the queues' threads afterwards: it has all that they have.
    FsMain,
    /// husk-fs: serves a request queue.
    FsQueue,
}

/// Why a filter could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot install the seccomp filter of a {kind:?} thread")]
pub struct SeccompError {
    /// Whose filter.
    pub kind: ThreadKind,
    /// Why.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
}

/// A line of a table: a system call, when it is allowed, and what for.
struct Allowed {
    call: libc::c_long,
    when: When,
    /// Read by people.
    _why: &'static str,
}

/// When a system call is allowed.
enum When {
    Always,
    /// The argument (counted from 0; its lower 32 bits) is one of these.
    Is(u8, &'static [u64]),
    /// The argument has none of these bits.
    Without(u8, u64),
}

/// A call that is always allowed.
const fn any(call: libc::c_long, why: &'static str) -> Allowed {
    Allowed { call, when: When::Always, _why: why }
}

/// A call that is allowed with these values of an argument.
const fn only(call: libc::c_long, argument: u8, values: &'static [u64], why: &'static str) -> Allowed {
    Allowed { call, when: When::Is(argument, values), _why: why }
}

/// A call that is allowed without these bits in an argument.
const fn without(call: libc::c_long, argument: u8, bits: u64, why: &'static str) -> Allowed {
    Allowed { call, when: When::Without(argument, bits), _why: why }
}

/// No new memory that can be executed (PROT_EXEC).
const EXEC: u64 = libc::PROT_EXEC as u64;

/// What every thread needs: memory, locks, signals, log, end.
const COMMON: &[Allowed] = &[
    any(libc::SYS_futex, "locks"),
    any(libc::SYS_sched_yield, "locks"),
    any(libc::SYS_brk, "malloc"),
    without(libc::SYS_mmap, 2, EXEC, "malloc, a thread's signal stack; never executable"),
    without(libc::SYS_mprotect, 2, EXEC, "malloc's arenas, guard pages; never executable"),
    any(libc::SYS_munmap, "malloc, a thread's end"),
    any(libc::SYS_mremap, "realloc"),
    any(libc::SYS_madvise, "free, a thread's end"),
    any(libc::SYS_read, "files and events"),
    any(libc::SYS_write, "files, events, the log"),
    any(libc::SYS_writev, "the log"),
    any(libc::SYS_close, "descriptors"),
    any(libc::SYS_clock_gettime, "time, where the vDSO can't tell it"),
    any(libc::SYS_clock_nanosleep, "timed waits of the library"),
    any(libc::SYS_getrandom, "hash maps' seeds, entropy for the guest"),
    any(libc::SYS_gettid, "the standard library, abort"),
    any(libc::SYS_getpid, "abort, locks' owners"),
    any(libc::SYS_rt_sigaction, "abort"),
    any(libc::SYS_rt_sigprocmask, "threads' start and end, abort"),
    any(libc::SYS_rt_sigreturn, "the end of a signal's handler"),
    any(libc::SYS_sigaltstack, "threads' start and end"),
    any(libc::SYS_tgkill, "kick a vCPU, abort; nobody outside can be signalled"),
    any(libc::SYS_restart_syscall, "after a stop"),
    any(libc::SYS_rseq, "a thread's start"),
    any(libc::SYS_set_robust_list, "a thread's start"),
    any(libc::SYS_sched_getaffinity, "the standard library, a thread's start"),
    only(
        libc::SYS_prctl,
        0,
        &[libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64, libc::PR_SET_NO_NEW_PRIVS as u64],
        "names of threads and of memory; before a further filter",
    ),
    any(libc::SYS_seccomp, "a thread's own, further filter"),
    any(libc::SYS_exit, "a thread's end"),
    any(libc::SYS_exit_group, "the process's end"),
];

/// Starting threads: the first thread's, and the runtime's in the control thread.
const THREADS: &[Allowed] = &[
    // clone3(2)'s flags are in memory, where a filter can't see them; namespaces need privileges that are gone.
    any(libc::SYS_clone3, "start threads"),
    any(libc::SYS_clone, "start threads, where clone3 is not there"),
];

/// Installs the filter in the calling thread, for good. Where a debug build runs with HUSK_SECCOMP=log, what is not allowed is only
/// logged (by the kernel's audit).
pub fn install(kind: ThreadKind) -> Result<(), SeccompError> {
    let program = compile(kind, other_calls()).map_err(|cause| SeccompError { kind, cause: cause.into() })?;
    seccompiler::apply_filter(&program).map_err(|cause| SeccompError { kind, cause: cause.into() })
}

/// What happens to calls that no table has.
fn other_calls() -> SeccompAction {
    if cfg!(debug_assertions) && std::env::var_os("HUSK_SECCOMP").is_some_and(|value| value == "log") {
        return SeccompAction::Log;
    }
    SeccompAction::KillProcess
}

fn tables(kind: ThreadKind) -> Vec<&'static [Allowed]> {
    match kind {
        ThreadKind::Vcpu => vec![COMMON, vmm::VCPU],
        ThreadKind::Devices => vec![COMMON, vmm::EVENTS, vmm::DEVICES],
        ThreadKind::Control => vec![COMMON, THREADS, vmm::EVENTS, vmm::CONTROL, vmm::STORAGE],
        ThreadKind::Disk => vec![COMMON, vmm::DISK, vmm::STORAGE],
        ThreadKind::FsMain => vec![COMMON, THREADS, fs::VHOST_USER, fs::FILES],
        ThreadKind::FsQueue => vec![COMMON, fs::EVENTS, fs::FILES],
    }
}

fn compile(kind: ThreadKind, other: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut always = Vec::new();
    for allowed in tables(kind).into_iter().flatten() {
        let (argument, operators): (u8, Vec<(SeccompCmpOp, u64)>) = match allowed.when {
            When::Always => {
                always.push(allowed.call);
                continue;
            }
            When::Is(argument, values) => (argument, values.iter().map(|value| (SeccompCmpOp::Eq, *value)).collect()),
            When::Without(argument, bits) => (argument, vec![(SeccompCmpOp::MaskedEq(bits), 0)]),
        };
        for (operator, value) in operators {
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
            rules.entry(allowed.call).or_default().push(SeccompRule::new(vec![condition])?);
        }
    }
    // No condition at all is how the library says always.
    rules.extend(always.into_iter().map(|call| (call, Vec::new())));
    SeccompFilter::new(rules, other, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
