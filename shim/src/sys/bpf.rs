//! bpf(2), as far as [`crate::forward`] needs it: one map with one socket, one program, one link.
//!
//! Each attribute is the part of `union bpf_attr` (include/uapi/linux/bpf.h) that its command reads;
//! the kernel takes what lies beyond the given size for zero.

use std::io::Result;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::check;

// enum bpf_cmd.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
/// BPF_MAP_TYPE_SOCKMAP.
const SOCKMAP: u32 = 15;
/// BPF_PROG_TYPE_SK_LOOKUP.
const SK_LOOKUP_PROGRAM: u32 = 30;
/// BPF_SK_LOOKUP of enum bpf_attach_type.
const SK_LOOKUP: u32 = 36;
/// Helpers that our program calls are for programs under a licence like this.
const LICENCE: &[u8] = b"GPL\0";

/// One instruction as the kernel takes it (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source in the high.
    pub registers: u8,
    /// Of a jump, in instructions behind this one; of a load or store, in bytes.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Makes a map that holds one socket.
///
/// # Errors
/// EPERM, or a kernel without such maps.
pub fn socket_map() -> Result<OwnedFd> {
    let attribute = MapCreate {
        kind: SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
    };
    // SAFETY: the command reads the attribute, which holds no pointers, and answers a descriptor.
    unsafe { descriptor(MAP_CREATE, &attribute) }
}

/// Puts a listening socket into a map of [`socket_map`].
///
/// # Errors
/// It is no socket that such a map takes.
pub fn put_socket(map: &OwnedFd, socket: impl AsFd) -> Result<()> {
    let (key, value) = (0_u32, u64::from(number(&socket.as_fd())));
    let attribute = MapUpdate {
        map: number(map),
        _padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes that the map was made with and outlive the call.
    unsafe { bpf(MAP_UPDATE_ELEM, &attribute) }.map(|_| ())
}

/// Loads a program that chooses the socket of an incoming connection.
///
/// # Errors
/// EPERM, EINVAL from a kernel before 5.9, or EACCES: the verifier does not like it.
pub fn load_socket_lookup(program: &[Instruction]) -> Result<OwnedFd> {
    let attribute = ProgLoad {
        kind: SK_LOOKUP_PROGRAM,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr() as u64,
        licence: LICENCE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"sepal_forward\0\0\0",
        interface: 0,
        expected_attach_type: SK_LOOKUP,
    };
    // SAFETY: the pointers are to as many instructions as are told and to a NUL-terminated string;
    // both outlive the call. The answer is a descriptor.
    unsafe { descriptor(PROG_LOAD, &attribute) }
}

/// Attaches a program of [`load_socket_lookup`] to a network namespace, until the link is closed.
///
/// # Errors
/// EPERM, or a kernel before 5.9.
pub fn attach_socket_lookup(program: &OwnedFd, netns: impl AsFd) -> Result<OwnedFd> {
    let attribute = LinkCreate {
        program: number(program),
        target: number(&netns.as_fd()),
        attach_type: SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the command reads the attribute, which holds no pointers, and answers a descriptor.
    unsafe { descriptor(LINK_CREATE, &attribute) }
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// # Safety
/// The attribute is the one of the command, its pointers are good, and the command makes a
/// descriptor.
unsafe fn descriptor<T>(command: libc::c_int, attribute: &T) -> Result<OwnedFd> {
    // SAFETY: as our caller says; the descriptor is new and ours alone.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attribute)? as RawFd)) }
}

/// # Safety
/// The attribute is the one of the command, and its pointers are good.
unsafe fn bpf<T>(command: libc::c_int, attribute: &T) -> Result<libc::c_long> {
    let attribute = &raw const *attribute;
    // SAFETY: as our caller says; the size goes with the attribute.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, attribute, size_of::<T>()) })
}
