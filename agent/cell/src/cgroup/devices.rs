//! The device filter of a cgroup: OCI rules as an eBPF program (cgroup-v2.rst, "Device controller").
//!
//! Each access bit is decided by the last rule that speaks of it; what no rule speaks of is denied. The program walks the rules from
//! the last to the first with the bits still undecided in a register.

use std::{
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use nix::errno::Errno;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::files;
use crate::CgroupError;

/// The most rules of a spec.
const MAX_RULES: usize = 512;

// Access and type bits of `struct bpf_cgroup_dev_ctx` (linux/bpf.h).
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const BLOCK: i32 = 1;
const CHAR: i32 = 2;

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// What every container may do, whatever the spec says: make any node (not open it), the memory devices, its terminals. As runc's.
const ALWAYS: [Rule; 10] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), MKNOD | READ | WRITE),
    allow(CHAR, Some(1), Some(5), MKNOD | READ | WRITE),
    allow(CHAR, Some(1), Some(7), MKNOD | READ | WRITE),
    allow(CHAR, Some(1), Some(8), MKNOD | READ | WRITE),
    allow(CHAR, Some(1), Some(9), MKNOD | READ | WRITE),
    allow(CHAR, Some(5), Some(0), MKNOD | READ | WRITE),
    allow(CHAR, Some(5), Some(2), MKNOD | READ | WRITE),
    allow(CHAR, Some(136), None, MKNOD | READ | WRITE),
];

pub(super) fn restrict(directory: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), CgroupError> {
    if rules.len() > MAX_RULES {
        return Err(CgroupError::Invalid(format!("more than {MAX_RULES} device rules")));
    }
    let mut all = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    all.extend(ALWAYS);
    let cgroup = File::open(directory).map_err(files::error("open", directory))?;
    let program = load(&assemble(&all)).map_err(|e| CgroupError::Devices("load", e.into()))?;
    attach(&program, cgroup.as_raw_fd()).map_err(|e| CgroupError::Devices("attach", e.into()))
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule, CgroupError> {
    let kind = match rule.typ() {
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        Some(LinuxDeviceType::A) | None => None,
        Some(LinuxDeviceType::P) => return Err(CgroupError::Invalid("a device rule for a FIFO".into())),
    };
    // -1 is any, as in the kernel's own v1 format "*".
    let number = |n: Option<i64>| match n {
        None | Some(-1) => Ok(None),
        Some(n) => i32::try_from(n)
            .ok()
            .filter(|&n| n >= 0)
            .map(Some)
            .ok_or_else(|| CgroupError::Invalid(format!("device number {n}"))),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err(CgroupError::Invalid(format!("device access '{letter}'"))),
        };
    }
    Ok(Rule { allow: rule.allow(), kind, major: number(rule.major())?, minor: number(rule.minor())?, access })
}

/// `struct bpf_insn` (linux/bpf.h): the registers share a byte, the destination in its low half.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Operations (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const MOVE_REGISTER: u8 = 0xbc; // 32 bit
const MOVE: u8 = 0xb4; // 32 bit
const AND: u8 = 0x54; // 32 bit
const SHIFT_RIGHT: u8 = 0x74; // 32 bit
const JUMP_IF_NOT: u8 = 0x56; // 32 bit, dst != immediate
const JUMP_IF: u8 = 0x16; // 32 bit, dst == immediate
const EXIT: u8 = 0x95;

// Registers: 0 the verdict, 1 the context and then scratch.
const VERDICT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 1;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [op(MOVE, VERDICT, 0, 0, i32::from(allow)), op(EXIT, 0, 0, 0, 0)]
}

fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        op(LOAD_WORD, WANTED, CONTEXT, 0, 0),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
        op(MOVE_REGISTER, KIND, WANTED, 0, 0),
        op(AND, KIND, 0, 0, 0xffff),
        op(SHIFT_RIGHT, WANTED, 0, 0, 16),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
    }
    program.extend(verdict(false));
    program
}

/// One rule: goes on behind its end if it doesn't decide.
fn block(rule: &Rule) -> Vec<Instruction> {
    let conditions: Vec<_> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(r, v)| Some((r, v?)))
        .collect();
    let body = if rule.allow {
        vec![op(AND, WANTED, 0, 0, !rule.access), op(JUMP_IF_NOT, WANTED, 0, 2, 0)]
    } else {
        vec![
            op(MOVE_REGISTER, SCRATCH, WANTED, 0, 0),
            op(AND, SCRATCH, 0, 0, rule.access),
            op(JUMP_IF, SCRATCH, 0, 2, 0),
        ]
    };
    let length = conditions.len() + body.len() + 2;
    let mut block = Vec::with_capacity(length);
    for (index, (register, value)) in conditions.iter().enumerate() {
        // At most 8 instructions: fits.
        let behind = (length - index - 1) as i16;
        block.push(op(JUMP_IF_NOT, *register, 0, behind, *value));
    }
    block.extend(body);
    block.extend(verdict(rule.allow));
    block
}

/// The head of `union bpf_attr` for BPF_PROG_LOAD (linux/bpf.h).
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The head of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// A container that makes containers may add filters of its own below; all of them must agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

fn load(program: &[Instruction]) -> nix::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: `attr` has the layout that the command reads for the size given; its pointers are of live data.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    let raw = Errno::result(done)?;
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec by itself).
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

fn attach(program: &OwnedFd, cgroup: RawFd) -> nix::Result<()> {
    let attr = AttachAttr {
        target_fd: cgroup as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attr` has the layout that the command reads for the size given.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>()) };
    Errno::result(done).map(drop)
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
