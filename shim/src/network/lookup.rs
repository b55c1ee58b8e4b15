//! One socket for every TCP connection to the network namespace itself: a BPF program at the kernel's choice of a listener
//! (Documentation/bpf/prog_sk_lookup.rst; Linux 5.9) gives it all of them, whatever address and port they are for. No module, no packet
//! filter, no connection tracking; and the kernel takes the program away with the last descriptor of its link, however the shim ends.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// The program at work, until this is dropped.
#[derive(Debug)]
pub(super) struct Lookup {
    _link: OwnedFd,
}

/// Commands of bpf(2).
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;

/// BPF_MAP_TYPE_SOCKMAP, BPF_PROG_TYPE_SK_LOOKUP and BPF_SK_LOOKUP of linux/bpf.h.
const SOCKMAP: u32 = 15;
const SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Attributes of MAP_CREATE.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// Attributes of MAP_UPDATE_ELEM.
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Attributes of PROG_LOAD up to the expected attach type.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// Attributes of LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Gives the listener every new TCP connection to an address of the namespace. The listener must be the namespace's own.
pub(super) fn attach(netns: &OwnedFd, listener: &TcpListener) -> io::Result<Lookup> {
    let map =
        bpf(MAP_CREATE, &MapCreate { map_type: SOCKMAP, key_size: 4, value_size: 4, max_entries: 1, map_flags: 0 })?;
    let (key, value) = (0u32, number(listener));
    let place = MapUpdate { map_fd: number(&map), padding: 0, key: address(&key), value: address(&value), flags: 0 };
    bpf_call(MAP_UPDATE_ELEM, &place)?;
    let instructions = program(map.as_raw_fd());
    let load = ProgLoad {
        prog_type: SK_LOOKUP,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: address(&instructions),
        license: address(c"Apache-2.0".to_bytes_with_nul()),
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"husk_forward\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: ATTACH_SK_LOOKUP,
    };
    let program = bpf(PROG_LOAD, &load)?;
    let link =
        LinkCreate { prog_fd: number(&program), target_fd: number(netns), attach_type: ATTACH_SK_LOOKUP, flags: 0 };
    Ok(Lookup { _link: bpf(LINK_CREATE, &link)? })
}

/// One instruction (Documentation/bpf/standardization/instruction-set.rst).
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

/// The program: for TCP, the socket at place 0 of the map; for all else, and without a socket, what the kernel itself would choose.
fn program(map: i32) -> [Instruction; 19] {
    const MOVE: u8 = 0xbf;
    const MOVE_NUMBER: u8 = 0xb7;
    const LOAD_WORD: u8 = 0x61;
    const STORE_NUMBER: u8 = 0x62;
    const ADD_NUMBER: u8 = 0x07;
    const LOAD_MAP: u8 = 0x18; // with source 1, BPF_PSEUDO_MAP_FD
    const JUMP_IF_OTHER: u8 = 0x55;
    const JUMP_IF_NUMBER: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    /// Offset of `protocol` in struct bpf_sk_lookup.
    const PROTOCOL: i16 = 12;
    /// Helpers of linux/bpf.h.
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const SK_PASS: i32 = 1;
    [
        instruction(MOVE, 6, 1, 0, 0),
        instruction(LOAD_WORD, 2, 6, PROTOCOL, 0),
        instruction(JUMP_IF_OTHER, 2, 0, 14, libc::IPPROTO_TCP),
        instruction(STORE_NUMBER, 10, 0, -4, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD_NUMBER, 2, 0, 0, -4),
        instruction(LOAD_MAP, 1, 1, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(JUMP_IF_NUMBER, 0, 0, 7, 0),
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(MOVE_NUMBER, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        instruction(MOVE_NUMBER, 0, 0, 0, SK_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// A descriptor's number, as bpf(2) has it.
fn number(descriptor: &impl AsFd) -> u32 {
    descriptor.as_fd().as_raw_fd().unsigned_abs()
}

fn address<T: ?Sized>(of: &T) -> u64 {
    std::ptr::from_ref(of).cast::<u8>() as u64
}

/// A command that gives a descriptor.
fn bpf<T>(command: i32, attributes: &T) -> io::Result<OwnedFd> {
    let number = bpf_call(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn bpf_call<T>(command: i32, attributes: &T) -> io::Result<i32> {
    let size = std::mem::size_of::<T>();
    // SAFETY: the kernel reads `size` bytes of the attributes, and what the addresses in them name, which the caller holds until the
    // call is over; it keeps no pointer.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size) };
    i32::try_from(result).ok().filter(|number| *number >= 0).ok_or_else(io::Error::last_os_error)
}
