//! The calls of bpf(2) that aya does not make: pins of any kind of object, links whose program
//! is replaced while they stay attached, what others have attached, and runs of a program that allocate
//! nothing.

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

/// What a pinned object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Map,
    Link,
    Other,
}

/// What a map was made with: the start of `struct bpf_map_info`.
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

/// What a link is attached to: the start of `struct bpf_link_info`, of a link to a cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkInfo {
    link_type: u32,
    id: u32,
    pub(super) program_id: u32,
    padding: u32,
    /// The cgroup's identity, the inode number of its directory; 0 where it has gone.
    pub(super) cgroup_id: u64,
    /// `enum bpf_attach_type`.
    pub(super) attach_type: u32,
    more_padding: u32,
}

/// What is attached to a cgroup itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AttachedPrograms {
    /// The flags with which all of them were attached (`BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`).
    pub(super) flags: u32,
    /// Their identities, as bpftool shows them.
    pub(super) ids: Vec<u32>,
}

/// The start of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    /// Type, identity, tag, lengths of the code.
    numbers: [u32; 6],
    /// Addresses of the code, time of loading.
    more: [u64; 3],
    /// User, number of maps.
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

/// The start of those of a run, as far as a raw tracepoint takes them.
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

/// Those of link creation and link update have the same shape.
#[repr(C)]
struct LinkAttributes([u32; 4]);

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes at most the given length of a value of that size, and
    // what that points to, which the callers below keep alive.
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
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn number(fd: &impl AsFd) -> u32 {
    // A descriptor that is open is not negative.
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Gives an object a name on bpffs, which must be free.
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

/// What an object is. The kernel answers a question about a map for any object, so the kind comes
/// first.
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

/// What a map was made with.
pub(super) fn map_info(map: &OwnedFd) -> io::Result<MapInfo> {
    info(map)
}

/// What a link is attached to.
pub(super) fn link_info(link: &OwnedFd) -> io::Result<LinkInfo> {
    info(link)
}

/// The programs of one type that are attached to a cgroup itself; of more than [`MAX_ATTACHED`], so many.
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

/// Programs of one type that the kernel lets one cgroup have (`BPF_CGROUP_MAX_PROGS` of
/// `linux/bpf-cgroup.h`).
const MAX_ATTACHED: usize = 64;

/// The name of a program, which is empty where it was given none.
pub(super) fn program_name(id: u32) -> io::Result<String> {
    let mut attributes = [id, 0, 0];
    let program = descriptor(bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes)?)?;
    let name = info::<ProgramInfo>(&program)?.name;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// Attaches a program to a cgroup, beside those that are attached already, as long as the link
/// lives.
pub(super) fn create_link(
    program: &impl AsFd,
    cgroup: &impl AsFd,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkAttributes([number(program), number(cgroup), attach_type, 0]);
    descriptor(bpf(BPF_LINK_CREATE, &mut attributes)?)
}

/// Puts a program in the place of the one that a link attaches, in one step: each event meets the
/// one or the other. ENOLINK where the cgroup has gone.
pub(super) fn update_link(link: &OwnedFd, program: &impl AsFd) -> io::Result<()> {
    let mut attributes = LinkAttributes([number(link), number(program), 0, 0]);
    bpf(BPF_LINK_UPDATE, &mut attributes)?;
    Ok(())
}

/// Detaches a link at once, whoever else holds it.
pub(super) fn detach_link(link: &OwnedFd) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut number(link))?;
    Ok(())
}

/// Runs a program of the type of raw tracepoints once, on this processor, and waits until it has ended.
pub(super) fn run_raw_tracepoint(program: &impl AsFd, argument: u64) -> io::Result<()> {
    // The kernel asks for as many as the program may read.
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

/// Gives each of two files the other's name, in one step. nix has this call for glibc only.
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
