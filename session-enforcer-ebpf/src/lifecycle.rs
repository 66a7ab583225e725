//! Establishment and close (`sock_ops`).

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_skc_to_mptcp_sock},
    programs::SockOpsContext,
};
use aya_log_ebpf::{debug, warn};
use session_enforcer_common::{
    Address, Direction, ErrorKind, Event, EventKind, Facts, RULE_EXEMPT, Session, flags,
};

use crate::{
    activity::now_ns,
    counters,
    maps::{EVENTS, FIRST_GENERATION, HAS_MPTCP, ONLY_NETNS},
    owner,
    policy::{Decision, decide},
    ports,
    table::{self, Refusal},
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

#[inline(always)]
pub(crate) fn track(ctx: &SockOpsContext) {
    let direction = match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => Direction::Inbound,
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => Direction::Outbound,
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => return closed(cookie(ctx)),
        _ => return,
    };
    let cookie = cookie(ctx);
    if established(ctx, cookie, direction) == Err(Refusal::Present) {
        // A socket that was disconnected with AF_UNSPEC and connected again keeps its cookie, and the
        // end of the connection before was not reported. It is counted now.
        closed(cookie);
        let _counted = established(ctx, cookie, direction);
    }
}

/// A function of its own, as is the close: the stack of all frames together is small.
#[inline(never)]
fn established(ctx: &SockOpsContext, cookie: u64, direction: Direction) -> Result<(), Refusal> {
    if !ports::may_be_matched(ctx) {
        owner::forget(ctx);
        return Ok(());
    }
    // SAFETY: the context of a program of this type.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let only = ONLY_NETNS.load();
    if only != 0 && only != netns_cookie {
        return Ok(());
    }
    // Built in place, and the facts made of it: the stack of all programs' frames together is small.
    let Some(mut session) = unmatched(ctx, direction, netns_cookie) else {
        return Ok(());
    };
    let Some(decision) = decide(&Facts::of(&session), session.owner.cgroup_id) else {
        return Ok(());
    };
    match decision {
        // No policy has generation 0: the daemon decides as soon as it reads of the session.
        Decision { is_open: true, .. } => {}
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
        counters::error(ErrorKind::CallbackRefused);
        warn!(
            ctx,
            "the close callback was refused; the end of a session will not be seen"
        );
    }
    session.ifindex = bound_interface(ctx);
    insert(ctx, cookie, &session)
}

/// The session of a connection that is being established, before a rule is found for it. `None` for
/// other families than those of TCP.
#[inline(always)]
fn unmatched(ctx: &SockOpsContext, direction: Direction, netns_cookie: u64) -> Option<Session> {
    let (local, remote) = addresses(ctx)?;
    let now = now_ns();
    Some(Session {
        last_received_ns: now,
        last_sent_ns: now,
        answered_ns: now,
        bytes_received: 0,
        bytes_sent: 0,
        open_until_ns: 0,
        established_ns: now,
        netns_cookie,
        local,
        remote,
        local_port: ctx.local_port() as u16,
        remote_port: ports::remote_port(ctx.remote_port()),
        ifindex: 0,
        generation: 0,
        rule: 0,
        direction: direction as u8,
        flags: mptcp_flag(ctx),
        owner: owner::take(ctx),
    })
}

#[inline(always)]
fn insert(ctx: &SockOpsContext, cookie: u64, session: &Session) -> Result<(), Refusal> {
    let inserted = table::insert(cookie, session);
    match inserted {
        Ok(()) => {
            // One that is not decided about has no rule to be counted for.
            if session.generation != 0 {
                counters::rule(session.rule, |c| c.opened += 1);
            }
            notify(EventKind::Opened, cookie, session);
        }
        Err(Refusal::Present) => {}
        Err(Refusal::Full) => {
            counters::error(ErrorKind::MapFull);
            debug!(ctx, "a session could not be inserted: the table is full");
        }
    }
    inserted
}

/// `tcp_set_state()` calls back before the state changes, for orphans and aborts too.
#[inline(never)]
fn closed(cookie: u64) {
    let Some(session) = table::find_apart(cookie) else {
        return;
    };
    // SAFETY: a pointer that the map gave, valid while the program runs. All that is told is read
    // before the record is free.
    let session = unsafe { &*session };
    let event = event(EventKind::Closed, cookie, session);
    let generation = session.generation;
    let rule = if generation < FIRST_GENERATION.load() {
        rule_anew(session)
    } else {
        session.rule
    };
    if table::remove(cookie) {
        // One that was never decided about was not counted as opened.
        if generation != 0 {
            counters::rule(rule, |c| c.closed += 1);
        }
        send(event);
    }
}

/// The rule of a session that another daemon's programs matched, as this daemon counts it.
#[inline(never)]
fn rule_anew(session: &Session) -> u16 {
    match decide(&Facts::of(session), session.owner.cgroup_id) {
        Some(Decision {
            rule,
            is_open: false,
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
        counters::error(ErrorKind::EventLost);
    }
    told
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context of a program of this type.
    unsafe { bpf_get_socket_cookie(ctx.ops.cast()) }
}

/// This host's address and the peer's.
#[inline(always)]
fn addresses(ctx: &SockOpsContext) -> Option<(Address, Address)> {
    Some(match ctx.family() {
        AF_INET => (
            Address::from_ipv4(ctx.local_ip4()),
            Address::from_ipv4(ctx.remote_ip4()),
        ),
        AF_INET6 => {
            let ops: *const bpf_sock_ops = ctx.ops;
            // SAFETY: the context is valid. Each word is read alone and volatile: the verifier
            // refuses a wider access to this context, which the compiler would make of four.
            unsafe {
                (
                    Address(read_words(ptr::addr_of!((*ops).local_ip6))),
                    Address(read_words(ptr::addr_of!((*ops).remote_ip6))),
                )
            }
        }
        _ => return None,
    })
}

/// # Safety
///
/// `words` must point to four readable words of the context.
#[inline(always)]
unsafe fn read_words(words: *const [u32; 4]) -> [u32; 4] {
    let word = words.cast::<u32>();
    // SAFETY: the caller's promise.
    unsafe {
        [
            ptr::read_volatile(word),
            ptr::read_volatile(word.add(1)),
            ptr::read_volatile(word.add(2)),
            ptr::read_volatile(word.add(3)),
        ]
    }
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

#[inline(always)]
fn bound_interface(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the context is valid; the socket is checked before it is read.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() { 0 } else { (*sk).bound_dev_if }
    }
}
