//! Programs on the same cgroup, as other tools attach them.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use session_enforcer_common::PacketDirection;

use crate::{cgroup::Cgroup, pins::bpf};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_PROG_TYPE_SOCK_OPS: u32 = 13;
const BPF_CGROUP_INET_INGRESS: u32 = 0;
const BPF_CGROUP_INET_EGRESS: u32 = 1;
const BPF_CGROUP_SOCK_OPS: u32 = 3;

/// A `struct bpf_insn` as a number: operation, registers, offset, constant.
const fn instruction(code: u8, registers: u8, offset: i16, constant: i32) -> u64 {
    code as u64
        | (registers as u64) << 8
        | (offset as u16 as u64) << 16
        | (constant as u32 as u64) << 32
}

/// Calls `bpf_sock_ops_cb_flags_set(ctx, 0)` (helper 59) when a connection is established.
const OVERWRITE_FLAGS: [u64; 10] = [
    // r6 = ctx; r1 = ctx->op
    instruction(0xbf, 0x16, 0, 0),
    instruction(0x61, 0x61, 0, 0),
    // BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
    instruction(0x15, 0x01, 2, 4),
    instruction(0x15, 0x01, 1, 5),
    instruction(0x05, 0, 3, 0),
    instruction(0xbf, 0x61, 0, 0),
    instruction(0xb7, 0x02, 0, 0),
    instruction(0x85, 0, 0, 59),
    // return 1
    instruction(0xb7, 0x00, 0, 1),
    instruction(0x95, 0, 0, 0),
];

/// The start of `union bpf_attr` for `BPF_PROG_LOAD` (`linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
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

/// A program that is attached while this value lives.
#[derive(Debug)]
pub struct OtherProgram {
    _link: OwnedFd,
}

/// Attaches a `sock_ops` program after the existing ones. It clears the callback flags of each established
/// connection, which undoes earlier requests for callbacks.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn overwrite_callback_flags(cgroup: &Cgroup) -> Result<OtherProgram> {
    let mut load = ProgLoad {
        prog_type: BPF_PROG_TYPE_SOCK_OPS,
        insn_cnt: OVERWRITE_FLAGS.len() as u32,
        insns: OVERWRITE_FLAGS.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: BPF_CGROUP_SOCK_OPS,
        ..ProgLoad::default()
    };
    attach_behind(cgroup, &mut load)
}

/// Attaches a program after the existing ones that drops every incoming or outgoing packet.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn drop_packets(cgroup: &Cgroup, way: PacketDirection) -> Result<OtherProgram> {
    drop_packets_longer_than(cgroup, way, -1)
}

/// The same for packets that are longer than this number of bytes, including the network header.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn drop_packets_longer_than(
    cgroup: &Cgroup,
    way: PacketDirection,
    bytes: i32,
) -> Result<OtherProgram> {
    // r2 = skb->len; r0 = 1; if (s32)r2 <= bytes return r0; return 0
    let instructions = [
        instruction(0x61, 0x12, 0, 0),
        instruction(0xb7, 0x00, 0, 1),
        instruction(0xd6, 0x02, 1, bytes),
        instruction(0xb7, 0x00, 0, 0),
        instruction(0x95, 0, 0, 0),
    ];
    let mut load = ProgLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_SKB,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: match way {
            PacketDirection::Ingress => BPF_CGROUP_INET_INGRESS,
            PacketDirection::Egress => BPF_CGROUP_INET_EGRESS,
        },
        ..ProgLoad::default()
    };
    attach_behind(cgroup, &mut load)
}

fn attach_behind(cgroup: &Cgroup, load: &mut ProgLoad) -> Result<OtherProgram> {
    let program = descriptor(bpf(BPF_PROG_LOAD, load)).context("loading a program")?;
    let directory = File::open(cgroup.path())?;
    let [program_fd, target_fd] =
        [program.as_raw_fd(), directory.as_raw_fd()].map(i32::cast_unsigned);
    let mut create = [program_fd, target_fd, load.expected_attach_type, 0];
    let link = descriptor(bpf(BPF_LINK_CREATE, &mut create)).context("attaching a program")?;
    Ok(OtherProgram { _link: link })
}

/// The programs that an attached program permits beside and below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    /// None, as bpftool attaches it.
    Nothing,
    /// A cgroup below may replace it (`BPF_F_ALLOW_OVERRIDE`).
    Override,
    /// Others may be attached in addition (`BPF_F_ALLOW_MULTI`).
    Multi,
}

/// A program named `other` that lets each incoming packet pass. It is attached without a link, as other tools
/// do. Dropping it detaches it.
#[derive(Debug)]
pub struct PlainProgram {
    /// The program's ID.
    pub id: u32,
    program: OwnedFd,
    directory: File,
}

/// Attaches such a program to the cgroup.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn attach_other(cgroup: &Cgroup, allow: Allow) -> Result<PlainProgram> {
    // return 1
    let instructions = [instruction(0xb7, 0x00, 0, 1), instruction(0x95, 0, 0, 0)];
    let mut load = ProgLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_SKB,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        prog_name: *b"other\0\0\0\0\0\0\0\0\0\0\0",
        expected_attach_type: BPF_CGROUP_INET_INGRESS,
        ..ProgLoad::default()
    };
    let program = descriptor(bpf(BPF_PROG_LOAD, &mut load)).context("loading a program")?;
    let directory = File::open(cgroup.path())?;
    let mut attach = attach_attributes(&directory, &program);
    attach[3] = allow as u32;
    bpf(BPF_PROG_ATTACH, &mut attach).context("attaching a program")?;
    let [id] = cgroup.program_ids()?[..] else {
        anyhow::bail!("the cgroup has other programs too");
    };
    Ok(PlainProgram {
        id,
        program,
        directory,
    })
}

/// Cgroup, program, attach type, flags.
fn attach_attributes(directory: &File, program: &OwnedFd) -> [u32; 4] {
    let [program, target] = [program.as_raw_fd(), directory.as_raw_fd()].map(i32::cast_unsigned);
    [target, program, BPF_CGROUP_INET_INGRESS, 0]
}

impl Drop for PlainProgram {
    fn drop(&mut self) {
        let mut attributes = attach_attributes(&self.directory, &self.program);
        if let Err(error) = bpf(BPF_PROG_DETACH, &mut attributes) {
            eprintln!("the program {} stays attached: {error}", self.id);
        }
    }
}

/// Detaches the links with these IDs by force, as an administrator can.
///
/// # Errors
///
/// Fails if a link does not exist or the kernel refuses.
pub fn detach_by_force(ids: &[u32]) -> Result<()> {
    for id in ids {
        let mut by_id = [*id, 0, 0, 0];
        let link = descriptor(bpf(BPF_LINK_GET_FD_BY_ID, &mut by_id)).context("finding a link")?;
        let mut number = link.as_raw_fd().cast_unsigned();
        bpf(BPF_LINK_DETACH, &mut number).context("detaching a link")?;
    }
    Ok(())
}

fn descriptor(made: Result<libc::c_long, Errno>) -> Result<OwnedFd> {
    let number = i32::try_from(made?)?;
    // SAFETY: the kernel has just opened this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
