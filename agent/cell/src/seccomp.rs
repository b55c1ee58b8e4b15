//! The spec's seccomp profile, compiled by libseccomp and installed by ourselves.
//!
//! Compiling wants memory and descriptors, installing must be the last thing before exec: so these are two steps.

use std::{
    fs::File,
    io::{Read, Seek},
};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use std::str::FromStr;

use crate::{
    fault::{Doing, Fault, Step},
    sys,
};

/// The most rules (names times argument sets) of a profile; the usual one has 400.
const MAX_RULES: usize = 16384;
/// BPF_MAXINSNS, the kernel's own limit of a filter.
const MAX_INSTRUCTIONS: usize = 4096;

/// A compiled profile.
pub(crate) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

/// Compiles a profile.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Step<Filter> {
    if profile.listener_path().is_some() {
        return Err(Fault::new("seccomp: a notification listener is not supported"));
    }
    let context = rules(profile)?;
    let memory = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).doing(|| "seccomp: make a memfd")?;
    context.export_bpf(&memory).map_err(|e| Fault::new(format!("seccomp: compile the profile: {e}")))?;
    let mut file = File::from(memory);
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).doing(|| "seccomp: read the compiled profile")?;
    // struct sock_filter (linux/filter.h): u16 code, u8 jt, u8 jf, u32 k.
    let program: Vec<_> = bytes
        .chunks_exact(8)
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect();
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Fault::new(format!("seccomp: the profile compiles to {} instructions", program.len())));
    }
    Ok(Filter { program, flags: flags(profile) })
}

impl Filter {
    /// Installs it, for good. Needs CAP_SYS_ADMIN or no_new_privs.
    pub(crate) fn install(&mut self) -> Step<()> {
        sys::install_filter(&mut self.program, self.flags).doing(|| "seccomp: install the filter")
    }
}

fn rules(profile: &LinuxSeccomp) -> Step<ScmpFilterContext> {
    let fault = |e: libseccomp::error::SeccompError| Fault::new(format!("seccomp: {e}"));
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(fault)?;
    for arch in profile.architectures().iter().flatten() {
        let arch = architecture(*arch)?;
        if !context.is_arch_present(arch).map_err(fault)? {
            context.add_arch(arch).map_err(fault)?;
        }
    }
    let mut count = 0;
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // libseccomp refuses a rule that says what is the default.
        if action == default {
            continue;
        }
        let sets = argument_sets(rule.args().as_deref().unwrap_or_default())?;
        for name in rule.names() {
            // A profile names calls of newer kernels and other architectures: those can't be made here.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            for arguments in &sets {
                count += 1;
                if count > MAX_RULES {
                    return Err(Fault::new("seccomp: more than 16384 rules"));
                }
                context
                    .add_rule_conditional(action, call, arguments)
                    .map_err(|e| Fault::new(format!("seccomp: rule for {name}: {e}")))?;
            }
        }
    }
    Ok(context)
}

/// The conditions of a rule all hold together, unless two are about the same argument: then any of them does (as in runc).
fn argument_sets(arguments: &[LinuxSeccompArg]) -> Step<Vec<Vec<ScmpArgCompare>>> {
    let mut seen = [false; 6];
    let mut repeated = false;
    let mut compared = Vec::new();
    for argument in arguments {
        let index = argument.index();
        let seen = seen.get_mut(index).ok_or_else(|| Fault::new(format!("seccomp: argument {index} of 0 to 5")))?;
        repeated |= std::mem::replace(seen, true);
        compared.push(compare(argument));
    }
    Ok(if repeated { compared.into_iter().map(|one| vec![one]).collect() } else { vec![compared] })
}

fn compare(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let (value, second) = (argument.value(), argument.value_two().unwrap_or(0));
    let (operator, datum) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // `value` is the mask, `valueTwo` what the masked argument must be.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    ScmpArgCompare::new(argument.index() as u32, operator, datum)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Step<ScmpAction> {
    // errnoRet defaults to EPERM (runtime-spec, config-linux.md, seccomp). The kernel takes 16 bits.
    let number =
        u16::try_from(errno.unwrap_or(libc::EPERM as u32)).map_err(|_| Fault::new("seccomp: errnoRet too large"))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(number)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(number),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(Fault::new("seccomp: SCMP_ACT_NOTIFY is not supported")),
    })
}

fn architecture(arch: Arch) -> Step<ScmpArch> {
    // The spec's names are libseccomp's.
    let name = serde_json::to_value(arch).map_err(|e| Fault::new(e.to_string()))?;
    let name = name.as_str().unwrap_or_default();
    ScmpArch::from_str(name).map_err(|_| Fault::new(format!("seccomp: unknown architecture {name}")))
}

fn flags(profile: &LinuxSeccomp) -> libc::c_ulong {
    // WAIT_KILLABLE_RECV is about notifications, which we refuse.
    profile.flags().iter().flatten().fold(0, |all, flag| {
        all | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn compiles_what_containerd_sends() {
        let filter = compile(&profile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
                "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "syscalls":[{"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                  {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"op":"SCMP_CMP_MASKED_EQ"}]},
                  {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
                  {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#,
        ))
        .unwrap();
        assert!(filter.program.len() > 10);
    }

    #[test]
    fn refuses_what_it_can_not_do() {
        for json in [
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}"#,
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":70000}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_TRAP","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        ] {
            assert!(compile(&profile(json)).is_err(), "{json}");
        }
    }
}
