//! The kernel side of session-enforcer: five eBPF programs, four attached to a cgroup and one run by the daemon.
//!
//! - `note_owner` (cgroup `sock_create`) records the user and cgroup of the process that creates a TCP socket.
//! - `track_lifecycle` (`sock_ops`) matches a connection when it is established, inserts its session into the session
//!   table, and removes the session when the connection closes.
//! - `track_ingress` and `track_egress` (`cgroup_skb`) stamp the session for each packet with new payload, and drop
//!   payload that passes after the session's deadline.
//! - `table_ops` (raw tracepoint, not attached) executes the daemon's requests to the session table.
//!
//! The programs fail open: an error is counted in `ERRORS` and the packet passes. The gate drops a packet only if the
//! session's limits are known and its deadline is past.
#![no_std]
#![no_main]
#![expect(
    internal_features,
    reason = "the target has no other way to atomic operations"
)]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand over the context by value"
)]

mod activity;
mod capacity;
mod count;
mod event_ring;
mod gate;
mod lifecycle;
mod maps;
mod policy_tables;
mod port_check;
mod repaired;
mod skb;
mod slots;
mod socket_owner;
mod table_ops;
mod words;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock, raw_tracepoint, sock_ops},
    programs::{RawTracePointContext, SkBuffContext, SockContext, SockOpsContext},
};
use session_enforcer_common::PacketDirection;

use crate::gate::Verdict;

/// The return value that passes a packet or allows a socket. It does not override the return values of other `sock_ops`
/// programs on the same cgroup.
const PASS: i32 = 1;

/// The return value that drops a packet. On egress TCP treats the drop as a failed transmission and does not advance
/// `snd_nxt`.
const DROP: i32 = 0;

#[cgroup_sock(sock_create)]
fn note_owner(ctx: SockContext) -> i32 {
    socket_owner::note(&ctx);
    PASS
}

#[sock_ops]
fn track_lifecycle(ctx: SockOpsContext) -> u32 {
    lifecycle::track(&ctx);
    PASS as u32
}

#[cgroup_skb(ingress)]
fn track_ingress(ctx: SkBuffContext) -> i32 {
    reply(activity::track(&ctx, PacketDirection::Ingress))
}

#[cgroup_skb(egress)]
fn track_egress(ctx: SkBuffContext) -> i32 {
    reply(activity::track(&ctx, PacketDirection::Egress))
}

#[raw_tracepoint]
fn table_ops(ctx: RawTracePointContext) -> i32 {
    table_ops::run(ctx.arg(0));
    0
}

#[inline(always)]
fn reply(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => PASS,
        Verdict::Drop => DROP,
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel offers some helpers only to programs with a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
