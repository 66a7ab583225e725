//! The kernel side of session-enforcer.
//!
//! Four programs, attached to a cgroup, and one that the daemon calls:
//!
//! * `note_owner` (cgroup `sock_create`) notes who makes a socket;
//! * `track_lifecycle` (`sock_ops`) matches a connection when it is established, puts it into the
//!   session map, and takes it out when it closes;
//! * `track_ingress` and `track_egress` (`cgroup_skb`) stamp the session of each packet that
//!   carries new payload, and drop payload of a session that is past its deadline;
//! * `table_ops` (raw tracepoint, attached to none) does to the session map what the daemon asks for.
//!
//! The programs fail open: whatever goes wrong is counted in `ERRORS` and the packet passes. An
//! enforcer that breaks the network is worse than one that reports what it could not track. The gate
//! drops where it knows the deadline to be past, and nowhere else.
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

/// The reply that lets a packet pass and a socket be made, and that leaves the replies of other
/// `sock_ops` programs on the same cgroup visible.
const PASS: i32 = 1;

/// The reply that drops a packet. On egress the stack takes it for a send that failed, and does not
/// move `snd_nxt`.
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

/// Some helpers are reserved by the kernel for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
