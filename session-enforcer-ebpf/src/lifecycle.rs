//! Establishment and close of connections (`sock_ops`).

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT,
        BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT2, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_skc_to_mptcp_sock},
    programs::SockOpsContext,
};
use aya_log_ebpf::{debug, warn};
use session_enforcer_common::{
    Address, Direction, ErrorKind, EventKind, RULE_EXEMPT, Session, flags,
};

use crate::{
    activity,
    activity::now_ns,
    capacity::Refusal,
    count, event_ring,
    maps::{FIRST_GENERATION, HAS_MPTCP, ONLY_NETNS},
    policy_tables::{Decision, decide},
    port_check, repaired, slots, socket_owner, words,
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

#[inline(always)]
pub(crate) fn track(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB | BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => opened(ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(ctx),
        _ => {}
    }
}

#[inline(always)]
fn opened(ctx: &SockOpsContext) {
    let cookie = cookie(ctx);
    if established(ctx, cookie) == Err(Refusal::Present) {
        // A socket that was disconnected with AF_UNSPEC and connected again keeps its cookie. The end of its first
        // connection was not reported, so it is counted now.
        end(cookie, false);
        let _counted = established(ctx, cookie);
    }
}

/// The peer's FIN moves a socket into `CLOSE_WAIT` or `CLOSING`, the ACK of this host's FIN into `FIN_WAIT2`. `FIN_WAIT1`
/// begins with the close(2), and the FIN may wait behind unsent payload: it is noted when it leaves.
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    match ctx.arg(1) {
        BPF_TCP_CLOSE => end(cookie(ctx), is_silent(ctx)),
        BPF_TCP_CLOSE_WAIT | BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING => half_closed(cookie(ctx)),
        _ => {}
    }
}

/// Records the time of the first FIN, if none was recorded before.
#[inline(never)]
fn half_closed(cookie: u64) {
    let record = slots::search(cookie).and_then(slots::record);
    if let Some(session) = record {
        // SAFETY: the map lookup returned the pointer, which is valid while the program runs.
        activity::note_half_closed(unsafe { &mut *session });
    }
}

/// A separate function, as `closed` is, because the stack frames of all functions together are limited to 512 bytes.
#[inline(never)]
fn established(ctx: &SockOpsContext, cookie: u64) -> Result<(), Refusal> {
    if !port_check::may_be_matched(ctx) {
        socket_owner::forget(ctx);
        return Ok(());
    }
    // SAFETY: the context of a program of this type.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let only = ONLY_NETNS.load();
    if only != 0 && only != netns_cookie {
        socket_owner::forget(ctx);
        return Ok(());
    }
    let now = now_ns();
    // Only one record is built, and the facts are derived from it, to save stack. It is zeroed word by word: for an
    // assignment the compiler would call a function that writes bytes.
    let mut record = MaybeUninit::<Session>::uninit();
    // SAFETY: the record is writable, and all zeros is a valid record: it has only integers.
    let session = unsafe {
        words::clear::<u64, _>(record.as_mut_ptr());
        record.assume_init_mut()
    };
    session.last_received_ns = now;
    session.last_sent_ns = now;
    session.answered_ns = now;
    session.established_ns = now;
    session.half_closed_ns = Session::NOT_HALF_CLOSED;
    session.direction = direction(ctx);
    session.flags = mptcp_flag(ctx);
    session.netns_cookie = netns_cookie;
    session.local_port = ctx.local_port() as u16;
    session.remote_port = port_check::remote_port(ctx.remote_port());
    session.ifindex = bound_interface(ctx);
    if !note_addresses(ctx, session) {
        return Ok(());
    }
    if is_restored(ctx, session) {
        repaired::inherit(session);
    }
    socket_owner::take(ctx, &mut session.owner);
    let Some(decision) = decide(session) else {
        return Ok(());
    };
    match decision {
        // Generation 0, which no policy has: the daemon decides as soon as it reads the event.
        Decision {
            needs_owner: true, ..
        } => {}
        Decision {
            rule: RULE_EXEMPT, ..
        } => return Ok(()),
        Decision {
            rule, generation, ..
        } => (session.rule, session.generation) = (rule, generation),
    }
    // The close callback is requested before the insertion. Otherwise a session could be in the table without anything
    // reporting its end.
    let reported = ctx
        .set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32)
        .is_ok();
    if !reported {
        session.flags |= flags::END_UNREPORTED;
        count::error(ErrorKind::CallbackRefused);
        warn!(
            ctx,
            "the close callback was refused; the end of a session will not be seen"
        );
    }
    insert(ctx, cookie, session)
}

#[inline(always)]
fn insert(ctx: &SockOpsContext, cookie: u64, session: &Session) -> Result<(), Refusal> {
    let inserted = slots::insert(cookie, session);
    match inserted {
        Ok(()) => {
            // An undecided session has no rule to count it under.
            if session.generation != 0 {
                count::rule(session.rule, |c| c.opened += 1);
            }
            event_ring::notify(EventKind::Opened, cookie, session);
        }
        Err(Refusal::Present) => {}
        Err(Refusal::Full) => {
            count::error(ErrorKind::MapFull);
            debug!(ctx, "a session could not be inserted: the table is full");
        }
        Err(Refusal::RuleFull) => count::error(ErrorKind::RuleFull),
    }
    inserted
}

/// Removes the session of a socket that closes. `tcp_set_state()` calls back before the state changes, also for orphans
/// and aborts.
#[inline(never)]
fn end(cookie: u64, is_silent: bool) {
    let Some(session) = slots::search(cookie).and_then(slots::record) else {
        return;
    };
    // SAFETY: the map lookup returned the pointer, which is valid while the program runs. The event is built before the
    // record is freed.
    let session = unsafe { &*session };
    if is_silent {
        repaired::remember(session);
    }
    let mut event = event_ring::event(EventKind::Closed, cookie, session);
    if session.generation < FIRST_GENERATION.load() {
        event.rule = rule_anew(session);
    }
    let cleared = slots::clear_all(cookie);
    if cleared == slots::NONE_CLEARED {
        return;
    }
    // The daemon may have changed the rule between the read of the record and the removal; the rule at the removal
    // counts.
    let generation = (cleared >> 16) as u32;
    if generation >= FIRST_GENERATION.load() {
        event.rule = cleared as u16;
    }
    event.generation = generation as u16;
    // An undecided session was not counted as opened.
    if generation != 0 {
        count::rule(event.rule, |c| c.closed += 1);
    }
    event_ring::send(event);
}

/// The rule in this daemon's policy for a session that another daemon's programs matched.
#[inline(never)]
fn rule_anew(session: &Session) -> u16 {
    match decide(session) {
        Some(Decision {
            rule,
            needs_owner: false,
            ..
        }) => rule,
        _ => RULE_EXEMPT,
    }
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context of a program of this type.
    unsafe { bpf_get_socket_cookie(ctx.ops.cast()) }
}

/// Records both addresses. Returns whether the address family is IPv4 or IPv6.
///
/// Each word is accessed separately and volatile. The compiler would merge four context reads into a wider access,
/// which the verifier refuses, and a temporary array would take more stack.
#[inline(always)]
fn note_addresses(ctx: &SockOpsContext, session: &mut Session) -> bool {
    let ops: *const bpf_sock_ops = ctx.ops;
    match ctx.family() {
        AF_INET => {
            (session.local, session.remote) = (Address::from_ipv4(0), Address::from_ipv4(0));
            let (local, remote) = (&raw mut session.local.0[3], &raw mut session.remote.0[3]);
            // SAFETY: both point into the session.
            unsafe {
                local.write_volatile(ctx.local_ip4());
                remote.write_volatile(ctx.remote_ip4());
            }
        }
        AF_INET6 => {
            // SAFETY: the context is valid, and both targets are fields of the session.
            unsafe {
                words::copy::<u32, _>(&raw const (*ops).local_ip6, &raw mut session.local.0);
                words::copy::<u32, _>(&raw const (*ops).remote_ip6, &raw mut session.remote.0);
            }
        }
        _ => return false,
    }
    true
}

/// Returns the MPTCP flag if the socket is a subflow, which is decided before establishment. If the peer does not
/// support MPTCP, an accepted socket is already plain TCP, and a dialled socket stays a subflow in fallback.
#[inline(always)]
fn mptcp_flag(ctx: &SockOpsContext) -> u8 {
    // A kernel without MPTCP has the helper but not its return type. The verifier refuses the call if it is reachable
    // ("invalid return type").
    if HAS_MPTCP.load() == 0 {
        return 0;
    }
    // SAFETY: the context is valid; the helper only gets a socket that is not null.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() || bpf_skc_to_mptcp_sock(sk.cast()).is_null() {
            return 0;
        }
    }
    flags::MPTCP_SUBFLOW
}

/// Which side dialled, as a [`Direction`]: the side that sent the SYN. The kernel counts the acknowledgement of the SYN
/// as one byte (`tcp_ack()` runs before the callback). The counter of an accepted socket begins after its SYN.
///
/// The kind of callback does not show the side. In a simultaneous open both ends get the passive callback, and a socket
/// that `TCP_REPAIR` restores gets the active one.
#[inline(always)]
fn direction(ctx: &SockOpsContext) -> u8 {
    const { assert!(Direction::Inbound as u8 + 1 == Direction::Outbound as u8) };
    // SAFETY: the context is valid.
    let acked = unsafe { (*ctx.ops).bytes_acked };
    // Computed with a carry: the verifier would follow both branches of a comparison to the end of the program.
    Direction::Inbound as u8 + ((acked | acked.wrapping_neg()) >> 63) as u8
}

/// Whether another socket established the connection and this one took it over: an active callback without a SYN of its
/// own.
#[inline(always)]
fn is_restored(ctx: &SockOpsContext, session: &Session) -> bool {
    ctx.op() == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && session.direction == Direction::Inbound as u8
}

/// Whether the socket closes without a FIN. A socket in repair mode sends nothing to its peer; a reset sends an RST,
/// which may be lost.
#[inline(always)]
fn is_silent(ctx: &SockOpsContext) -> bool {
    matches!(ctx.arg(0), BPF_TCP_ESTABLISHED | BPF_TCP_CLOSE_WAIT)
}

#[inline(always)]
fn bound_interface(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the context is valid; the socket is checked before it is read.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() { 0 } else { (*sk).bound_dev_if }
    }
}
