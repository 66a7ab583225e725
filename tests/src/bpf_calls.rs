//! The calls of bpf(2) that tests and benchmarks share.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::errno::Errno;

// `enum bpf_cmd` of `linux/bpf.h`.
const PROG_LOAD: libc::c_long = 5;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;

/// `BPF_CGROUP_MAX_PROGS` of `kernel/bpf/cgroup.c`.
const MAX_PROGRAMS: usize = 64;

/// The layout of `struct bpf_insn`.
pub type Instruction = [u8; 8];

/// The used part of `union bpf_attr` for `BPF_PROG_LOAD` (`linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    attach_type: u32,
}

const _: () = assert!(std::mem::offset_of!(ProgramLoad, attach_type) == 68);

/// `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct ProgramQuery {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    reserved: u32,
    program_attach_flags: u64,
}

/// Calls bpf(2) with attributes of the type that the command takes. The caller keeps the memory alive to which
/// they point.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn bpf<T>(command: libc::c_long, attributes: &mut T) -> Result<libc::c_long, Errno> {
    let attributes = std::ptr::from_mut(attributes);
    // SAFETY: the kernel accesses at most the given length, which is the size of the value, and the memory to
    // which the value points, which the caller keeps alive.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })
}

/// Calls bpf(2) with a command that opens a descriptor.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn open<T>(command: libc::c_long, attributes: &mut T) -> Result<OwnedFd, Errno> {
    let number = bpf(command, attributes)?;
    // SAFETY: the kernel has just opened this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number as libc::c_int) })
}

/// The number of a descriptor, for the attributes of a call.
pub fn number(fd: &impl AsFd) -> u32 {
    // An open descriptor is not negative.
    fd.as_fd().as_raw_fd().cast_unsigned()
}

/// Loads a program with this `enum bpf_prog_type`, `enum bpf_attach_type` and name of at most 15 bytes.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn load_program(
    program_type: u32,
    attach_type: u32,
    name: &str,
    instructions: &[Instruction],
) -> Result<OwnedFd, Errno> {
    let mut load = ProgramLoad {
        program_type,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        attach_type,
        ..ProgramLoad::default()
    };
    load.name[..name.len()].copy_from_slice(name.as_bytes());
    open(PROG_LOAD, &mut load)
}

/// Attaches a program to a cgroup after the existing ones. Dropping the link detaches it.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn link_program(program: &OwnedFd, cgroup: &File, attach_type: u32) -> Result<OwnedFd, Errno> {
    let mut attributes = [number(program), number(cgroup), attach_type, 0];
    open(LINK_CREATE, &mut attributes)
}

/// The IDs of the programs that are attached to a cgroup with this `enum bpf_attach_type`.
///
/// # Errors
///
/// Fails if the kernel does not report them.
pub fn attached_programs(cgroup: &File, attach_type: u32) -> Result<Vec<u32>, Errno> {
    let mut ids = [0; MAX_PROGRAMS];
    let mut query = ProgramQuery {
        target: number(cgroup),
        attach_type,
        program_ids: ids.as_mut_ptr().expose_provenance() as u64,
        program_count: MAX_PROGRAMS as u32,
        ..ProgramQuery::default()
    };
    bpf(PROG_QUERY, &mut query)?;
    Ok(ids[..query.program_count as usize].to_vec())
}
