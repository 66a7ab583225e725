//! Calls of bpf(2) that aya does not provide: pins of any kind of object, replacement of a link's program, queries of
//! attached programs, and program runs without allocation.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::errno::Errno;

// `enum bpf_cmd` of `linux/bpf.h`.
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Kind of a pinned object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Map,
    Link,
    Other,
}

/// Properties of a map: the start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MapInfo {
    /// `enum bpf_map_type`.
    pub(super) map_type: u32,
    pub(super) id: u32,
    pub(super) key_bytes: u32,
    pub(super) value_bytes: u32,
    pub(super) capacity: u32,
    pub(super) flags: u32,
}

/// Properties of a cgroup link: the start of `struct bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkInfo {
    link_type: u32,
    id: u32,
    pub(super) program_id: u32,
    padding: u32,
    /// Cgroup id, the inode number of the cgroup's directory; 0 if the cgroup was removed.
    pub(super) cgroup_id: u64,
    /// `enum bpf_attach_type`.
    pub(super) attach_type: u32,
    more_padding: u32,
}

/// The programs attached directly to a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AttachedPrograms {
    /// The attach flags that all of them share (`BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`).
    pub(super) flags: u32,
    /// Program ids, as in bpftool.
    pub(super) ids: Vec<u32>,
}

/// The start of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    /// Type, id, tag, lengths of the code.
    numbers: [u32; 6],
    /// Addresses of the code, load time.
    more: [u64; 3],
    /// User id, number of maps.
    counts: [u32; 2],
    maps: u64,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

#[repr(C)]
struct PathAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    info_bytes: u32,
    info: u64,
}

/// The start of the attributes of `BPF_PROG_TEST_RUN`, up to the last field that raw tracepoints use.
#[repr(C)]
#[derive(Default)]
struct RunAttributes {
    program: u32,
    status: u32,
    data_bytes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_bytes: [u32; 2],
    context: [u64; 2],
    flags: u32,
    cpu: u32,
    batch: u32,
    padding: u32,
}

/// The attributes of link creation and link update have the same shape.
#[repr(C)]
struct LinkAttributes([u32; 4]);

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel accesses at most `size_of::<T>()` bytes of the attributes and the memory that they point to,
    // which the callers keep alive.
    let status = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status)
}

fn descriptor(number: libc::c_long) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the kernel has just created this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn number(fd: &impl AsFd) -> u32 {
    // An open descriptor is never negative.
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Pins an object on bpffs; the path must not exist.
pub(super) fn pin(object: &impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes = PathAttributes {
        path: path.as_ptr() as u64,
        fd: number(object),
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut attributes)?;
    Ok(())
}

/// Opens a pinned object.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = PathAttributes {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    descriptor(bpf(BPF_OBJ_GET, &mut attributes)?)
}

/// Determines the kind of an object. This must come before a query for map information, which the kernel answers for
/// any kind of object.
pub(super) fn kind(object: &OwnedFd) -> io::Result<Kind> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", object.as_raw_fd()))?;
    let has = |field| text.lines().any(|line| line.starts_with(field));
    Ok(if has("map_type:") {
        Kind::Map
    } else if has("link_type:") {
        Kind::Link
    } else {
        Kind::Other
    })
}

fn info<T: Default>(object: &OwnedFd) -> io::Result<T> {
    let mut found = T::default();
    let mut attributes = InfoAttributes {
        fd: number(object),
        info_bytes: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut found) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(found)
}

/// Reads the properties of a map.
pub(super) fn map_info(map: &OwnedFd) -> io::Result<MapInfo> {
    info(map)
}

/// Reads the properties of a link.
pub(super) fn link_info(link: &OwnedFd) -> io::Result<LinkInfo> {
    info(link)
}

/// The programs of an attach type that are attached directly to a cgroup, at most [`MAX_ATTACHED`].
pub(super) fn attached_programs(
    cgroup: &impl AsFd,
    attach_type: u32,
) -> io::Result<AttachedPrograms> {
    let mut ids = [0_u32; MAX_ATTACHED];
    let mut attributes = QueryAttributes {
        target: number(cgroup),
        attach_type,
        ids: ids.as_mut_ptr() as u64,
        count: MAX_ATTACHED as u32,
        ..QueryAttributes::default()
    };
    bpf(BPF_PROG_QUERY, &mut attributes)?;
    let count = MAX_ATTACHED.min(attributes.count as usize);
    Ok(AttachedPrograms {
        flags: attributes.attach_flags,
        ids: ids[..count].to_vec(),
    })
}

/// The kernel's maximum of programs per cgroup and attach type (`BPF_CGROUP_MAX_PROGS` of `linux/bpf-cgroup.h`).
const MAX_ATTACHED: usize = 64;

/// The name of a program; empty if it has none.
pub(super) fn program_name(id: u32) -> io::Result<String> {
    let mut attributes = [id, 0, 0];
    let program = descriptor(bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes)?)?;
    let name = info::<ProgramInfo>(&program)?.name;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// Attaches a program to a cgroup in addition to those already attached, for as long as the link exists.
pub(super) fn create_link(
    program: &impl AsFd,
    cgroup: &impl AsFd,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkAttributes([number(program), number(cgroup), attach_type, 0]);
    descriptor(bpf(BPF_LINK_CREATE, &mut attributes)?)
}

/// Atomically replaces the program of a link: each event runs either the old or the new program. Fails with ENOLINK if
/// the cgroup was removed.
pub(super) fn update_link(link: &OwnedFd, program: &impl AsFd) -> io::Result<()> {
    let mut attributes = LinkAttributes([number(link), number(program), 0, 0]);
    bpf(BPF_LINK_UPDATE, &mut attributes)?;
    Ok(())
}

/// Detaches a link immediately, even if others hold references to it.
pub(super) fn detach_link(link: &OwnedFd) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut number(link))?;
    Ok(())
}

/// Runs a raw tracepoint program once on this processor and waits until it has ended.
pub(super) fn run_raw_tracepoint(program: &impl AsFd, argument: u64) -> io::Result<()> {
    // The kernel requires as many arguments as a program may read.
    let arguments = [argument; 12];
    let mut attributes = RunAttributes {
        program: number(program),
        context_bytes: [size_of_val(&arguments) as u32, 0],
        context: [arguments.as_ptr() as u64, 0],
        ..RunAttributes::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes)?;
    Ok(())
}

/// Atomically exchanges two paths. nix provides this call only for glibc.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let [one, other] = [c_path(one)?, c_path(other)?];
    // SAFETY: both paths are C strings that live until the call returns.
    let status = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            one.as_ptr(),
            libc::AT_FDCWD,
            other.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    Errno::result(status)?;
    Ok(())
}
