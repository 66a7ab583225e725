//! Programs on the same cgroup, as other tools attach them.

use std::{fs::File, os::fd::OwnedFd};

use anyhow::{Context as _, Result};
use session_enforcer_common::PacketDirection;

use crate::{
    bpf_calls::{Instruction, bpf, link_program, load_program, number, open},
    cgroup::Cgroup,
};

const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_PROG_TYPE_CGROUP_SOCK: u32 = 9;
const BPF_PROG_TYPE_SOCK_OPS: u32 = 13;
const BPF_CGROUP_INET_INGRESS: u32 = 0;
const BPF_CGROUP_INET_EGRESS: u32 = 1;
const BPF_CGROUP_INET_SOCK_CREATE: u32 = 2;
const BPF_CGROUP_SOCK_OPS: u32 = 3;

const fn instruction(code: u8, registers: u8, offset: i16, constant: i32) -> Instruction {
    let [a, b] = offset.to_ne_bytes();
    let [c, d, e, f] = constant.to_ne_bytes();
    [code, registers, a, b, c, d, e, f]
}

/// Calls `bpf_sock_ops_cb_flags_set(ctx, 0)` (helper 59) when a connection is established.
const OVERWRITE_FLAGS: [Instruction; 10] = [
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
    attach_behind(
        cgroup,
        (BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS),
        &OVERWRITE_FLAGS,
    )
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
    let attach_type = match way {
        PacketDirection::Ingress => BPF_CGROUP_INET_INGRESS,
        PacketDirection::Egress => BPF_CGROUP_INET_EGRESS,
    };
    attach_behind(
        cgroup,
        (BPF_PROG_TYPE_CGROUP_SKB, attach_type),
        &instructions,
    )
}

fn attach_behind(
    cgroup: &Cgroup,
    (program_type, attach_type): (u32, u32),
    instructions: &[Instruction],
) -> Result<OtherProgram> {
    let program = load_program(program_type, attach_type, "", instructions);
    let program = program.context("loading a program")?;
    let directory = File::open(cgroup.path())?;
    let link = link_program(&program, &directory, attach_type).context("attaching a program")?;
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

/// What a [`PlainProgram`] lets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// Each incoming packet.
    Packets,
    /// Each new socket.
    Sockets,
}

/// A program named `other` that lets everything pass. It is attached without a link, as other tools do. Dropping
/// it detaches it.
#[derive(Debug)]
pub struct PlainProgram {
    /// The program's ID.
    pub id: u32,
    program: OwnedFd,
    attach_type: u32,
    directory: File,
}

/// Attaches such a program to the cgroup.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn attach_other(cgroup: &Cgroup, passing: Passing, allow: Allow) -> Result<PlainProgram> {
    // return 1
    let instructions = [instruction(0xb7, 0x00, 0, 1), instruction(0x95, 0, 0, 0)];
    let (program_type, attach_type) = match passing {
        Passing::Packets => (BPF_PROG_TYPE_CGROUP_SKB, BPF_CGROUP_INET_INGRESS),
        Passing::Sockets => (BPF_PROG_TYPE_CGROUP_SOCK, BPF_CGROUP_INET_SOCK_CREATE),
    };
    let program = load_program(program_type, attach_type, "other", &instructions);
    let program = program.context("loading a program")?;
    let directory = File::open(cgroup.path())?;
    let before = cgroup.program_ids()?;
    let mut attach = attach_attributes(&directory, &program, attach_type);
    attach[3] = allow as u32;
    bpf(BPF_PROG_ATTACH, &mut attach).context("attaching a program")?;
    let ids = cgroup.program_ids()?;
    let id = ids.into_iter().find(|id| !before.contains(id));
    Ok(PlainProgram {
        id: id.context("the program is not attached")?,
        program,
        attach_type,
        directory,
    })
}

/// Cgroup, program, attach type, flags.
fn attach_attributes(directory: &File, program: &OwnedFd, attach_type: u32) -> [u32; 4] {
    let (target, program) = (number(directory), number(program));
    [target, program, attach_type, 0]
}

impl Drop for PlainProgram {
    fn drop(&mut self) {
        let mut attributes = attach_attributes(&self.directory, &self.program, self.attach_type);
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
        let link = open(BPF_LINK_GET_FD_BY_ID, &mut by_id).context("finding a link")?;
        bpf(BPF_LINK_DETACH, &mut number(&link)).context("detaching a link")?;
    }
    Ok(())
}
