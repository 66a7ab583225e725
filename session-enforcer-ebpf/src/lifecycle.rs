//! Establishment and close (`sock_ops`).

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT,
        BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_skc_to_mptcp_sock},
    programs::SockOpsContext,
};
use aya_log_ebpf::{debug, warn};
use session_enforcer_common::{
    Address, Direction, ErrorKind, Event, EventKind, RULE_EXEMPT, Session, flags,
};

use crate::{
    activity,
    activity::now_ns,
    count,
    maps::{EVENTS, FIRST_GENERATION, HAS_MPTCP, ONLY_NETNS},
    policy_tables::{Decision, decide},
    port_check, repaired,
    slots::{self, Refusal},
    socket_owner, words,
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
        // A socket that was disconnected with AF_UNSPEC and connected again keeps its cookie, and the
        // end of the connection before was not reported. It is counted now.
        end(cookie, false);
        let _counted = established(ctx, cookie);
    }
}

/// A socket is half-closed from the first of these two states on, and then goes through others
/// (`net/ipv4/tcp_states.h`).
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    match ctx.arg(1) {
        BPF_TCP_CLOSE => end(cookie(ctx), is_silent(ctx)),
        BPF_TCP_CLOSE_WAIT | BPF_TCP_FIN_WAIT1 => half_closed(cookie(ctx)),
        _ => {}
    }
}

/// Notes the first FIN, at the moment in which the stack sends or takes it.
#[inline(never)]
fn half_closed(cookie: u64) {
    let record = slots::scan(cookie).and_then(slots::Scanned::record);
    if let Some(session) = record {
        // SAFETY: a pointer that the map gave, valid while the program runs.
        activity::note_half_closed(unsafe { &mut *session });
    }
}

/// A function of its own, as is the close: the stack of all frames together is small.
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
    // Built here and nowhere else, and the facts made of it: the stack of all frames together is small.
    // Zeros first, in words: the compiler would call a function that writes bytes.
    let mut record = MaybeUninit::<Session>::uninit();
    // SAFETY: the record is writable, and one of zeros is valid: integers only.
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
        // No policy has generation 0: the daemon decides as soon as it reads of the session.
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
    // The close is asked for first: a session in the map whose end nobody reports would be stale.
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
            // One that is not decided about has no rule to be counted for.
            if session.generation != 0 {
                count::rule(session.rule, |c| c.opened += 1);
            }
            notify(EventKind::Opened, cookie, session);
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

/// `tcp_set_state()` calls back before the state changes, for orphans and aborts too.
#[inline(always)]
fn end(cookie: u64, is_silent: bool) {
    // The second time for one that the daemon amends meanwhile, which lies elsewhere then: a look can miss
    // it.
    if !closed(cookie, is_silent) {
        closed(cookie, is_silent);
    }
}

/// Whether the session was found, and taken out where it was found.
#[inline(never)]
fn closed(cookie: u64, is_silent: bool) -> bool {
    let Some(scanned) = slots::scan(cookie) else {
        return false;
    };
    let Some(session) = scanned.record() else {
        return false;
    };
    // SAFETY: a pointer that the map gave, valid while the program runs. All that is told is read
    // before the record is free.
    let session = unsafe { &*session };
    if is_silent {
        repaired::remember(session);
    }
    let mut event = event(EventKind::Closed, cookie, session);
    if session.generation < FIRST_GENERATION.load() {
        event.rule = rule_anew(session);
    }
    let cleared = slots::clear_all(scanned, cookie);
    if cleared == slots::NONE_CLEARED {
        return false;
    }
    // What was read may be of before an amendment, and what was freed of after it.
    let generation = (cleared >> 16) as u32;
    if generation >= FIRST_GENERATION.load() {
        event.rule = cleared as u16;
    }
    event.generation = generation as u16;
    // One that was never decided about was not counted as opened.
    if generation != 0 {
        count::rule(event.rule, |c| c.closed += 1);
    }
    send(event);
    true
}

/// The rule of a session that another daemon's programs matched, as this daemon counts it.
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

/// Tells the daemon of a session; whether it will hear.
#[inline(always)]
pub(crate) fn notify(kind: EventKind, cookie: u64, session: &Session) -> bool {
    send(event(kind, cookie, session))
}

#[inline(always)]
fn event(kind: EventKind, cookie: u64, session: &Session) -> Event {
    Event {
        cookie,
        netns_cookie: session.netns_cookie,
        established_ns: session.established_ns,
        cgroup_id: session.owner.cgroup_id,
        kind: kind as u32,
        rule: session.rule,
        generation: session.generation as u16,
    }
}

/// The ring buffer wakes the daemon only where it has read everything before.
#[inline(always)]
fn send(event: Event) -> bool {
    let told = EVENTS.output(event, 0).is_ok();
    if !told {
        count::error(ErrorKind::EventLost);
    }
    told
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context of a program of this type.
    unsafe { bpf_get_socket_cookie(ctx.ops.cast()) }
}

/// Notes this host's address and the peer's; whether the family is one of TCP.
///
/// Each word is read and written alone and volatile: the verifier refuses a wider access to the context,
/// which the compiler would make of four, and all words together would take another part of the stack.
#[inline(always)]
fn note_addresses(ctx: &SockOpsContext, session: &mut Session) -> bool {
    let ops: *const bpf_sock_ops = ctx.ops;
    match ctx.family() {
        AF_INET => {
            (session.local, session.remote) = (Address::from_ipv4(0), Address::from_ipv4(0));
            let (local, remote) = (&raw mut session.local.0[3], &raw mut session.remote.0[3]);
            // SAFETY: words of the session.
            unsafe {
                local.write_volatile(ctx.local_ip4());
                remote.write_volatile(ctx.remote_ip4());
            }
        }
        AF_INET6 => {
            // SAFETY: the context is valid, and both places are the session's.
            unsafe {
                words::copy::<u32, _>(&raw const (*ops).local_ip6, &raw mut session.local.0);
                words::copy::<u32, _>(&raw const (*ops).remote_ip6, &raw mut session.remote.0);
            }
        }
        _ => return false,
    }
    true
}

/// A socket is a subflow from its first packet on, if it ever is one: where the peer does not speak
/// MPTCP, an accepted socket is plain TCP by now, and a dialled one stays a subflow that has fallen
/// back.
#[inline(always)]
fn mptcp_flag(ctx: &SockOpsContext) -> u8 {
    // A kernel without MPTCP has the helper and lacks its type: the verifier refuses the call where
    // it can be reached ("invalid return type").
    if HAS_MPTCP.load() == 0 {
        return 0;
    }
    // SAFETY: the context is valid; the helper is only given a socket that is there.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() || bpf_skc_to_mptcp_sock(sk.cast()).is_null() {
            return 0;
        }
    }
    flags::MPTCP_SUBFLOW
}

/// Who dialled, as a [`Direction`]: whoever has sent a SYN. The kernel counts its acknowledgement as a byte (`tcp_ack()`
/// comes before the callback), and an accepted socket begins after its SYN.
///
/// The kind of the callback does not tell. Where both ends dial at once both are called passive, and a socket that is
/// restored by `TCP_REPAIR` is called active.
#[inline(always)]
fn direction(ctx: &SockOpsContext) -> u8 {
    const { assert!(Direction::Inbound as u8 + 1 == Direction::Outbound as u8) };
    // SAFETY: the context is valid.
    let acked = unsafe { (*ctx.ops).bytes_acked };
    // By a carry: the verifier would follow each branch of a comparison to the end.
    Direction::Inbound as u8 + ((acked | acked.wrapping_neg()) >> 63) as u8
}

/// Whether the connection was made by another socket, whose it was: this one has sent no SYN.
#[inline(always)]
fn is_restored(ctx: &SockOpsContext, session: &Session) -> bool {
    ctx.op() == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && session.direction == Direction::Inbound as u8
}

/// Whether a socket that closes has told its peer nothing that the peer has to have. One in repair mode has not; one that
/// is reset has, as far as the RST arrives.
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
