//! Stamps a session when new payload passes, unless it comes too late (`cgroup_skb`).
//!
//! This runs for every packet of every socket below the cgroup: a packet whose ports no rule is about
//! costs the look at one bit for each of them, without a call into the kernel. Only where a rule may
//! be about it does a packet of no session cost a cookie and a look into two buckets of the table.

use aya_ebpf::{
    bindings::{
        BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2,
        BPF_TCP_LAST_ACK, bpf_tcp_sock,
    },
    helpers::{bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_tcp_sock as bpf_tcp_sock_helper},
    programs::SkBuffContext,
};
use session_enforcer_common::{
    Direction, ErrorKind, EventKind, Limits, PacketDirection, Session, flags,
};

use crate::{
    count,
    gate::{self, Verdict},
    lifecycle, policy_tables, port_check,
    skb::{self, Segment},
    slots, words,
};

/// The largest receive window that TCP can offer (RFC 7323 section 2.3). Payload further ahead is
/// not in the window: the stack will drop it, and it is no activity.
const MAX_WINDOW: u32 = 1 << 30;

/// Bytes that the headers of a packet without payload have at most. A packet that something held back between
/// TCP and the hook, as a queue of netfilter's, may pass after TCP has counted the payload of another one.
const MOST_HEADERS: u32 = 1024;

/// By what payload is judged.
#[derive(Clone, Copy)]
struct Measure {
    /// The limits of its session; none where nothing is known to limit it.
    limits: Option<&'static Limits>,
    /// When the packet is here.
    now_ns: u64,
}

impl Measure {
    #[inline(always)]
    fn of(session: &mut Session) -> Self {
        Self {
            limits: policy_tables::of(session),
            now_ns: now_ns(),
        }
    }

    #[inline(always)]
    fn comes_too_late(&self, session: &mut Session) -> bool {
        match self.limits {
            Some(limits) => gate::is_shut(session, limits, self.now_ns),
            None => false,
        }
    }

    /// Whether the daemon has decided to end the session by a record that may lack the stamp.
    #[inline(always)]
    fn came_too_late(&self, session: &Session) -> bool {
        // After the stamp comes the look at the gate; and what the stack does with the packet, by whose counters a
        // packet on another processor takes the stamp.
        words::order();
        match self.limits {
            Some(limits) => gate::is_shut_meanwhile(session, limits),
            None => false,
        }
    }

    /// Whether so much new payload counts for the session's rule.
    #[inline(always)]
    fn counts(&self, new: u32) -> bool {
        self.limits
            .is_none_or(|limits| new >= u32::from(limits.min_payload))
    }

    /// Whether this host has answered with the packet that makes it so many bytes sent.
    #[inline(always)]
    fn is_answer(&self, session: &Session, bytes_sent: u64) -> bool {
        self.limits
            .is_none_or(|limits| session.is_answered_by(bytes_sent, limits.min_answer))
    }
}

#[inline(always)]
pub(crate) fn track(ctx: &SkBuffContext, way: PacketDirection) -> Verdict {
    if !port_check::may_have_session(ctx) {
        return Verdict::Pass;
    }
    // SAFETY: the context of a program of this type.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    let Some(session) = slots::find(cookie) else {
        return Verdict::Pass;
    };
    // SAFETY: a pointer that the map gave, valid while the program runs. A close on another CPU may
    // free the record, and a new session may take it before the lines below write. The new session
    // then has a stamp of this very moment, which it would have anyway, and may have byte counts, flags
    // or, just after a change of the policy, a rule that are not its own.
    let session = unsafe { &mut *session };
    // The session comes first: `bpf_tcp_sock` only looks at the protocol number, and would take a
    // raw socket of IPPROTO_TCP for a TCP socket. Raw sockets never have a session.
    let Some(tcp) = tcp_sock(ctx) else {
        count::error(ErrorKind::NoTcpSocket);
        return Verdict::Pass;
    };
    let may_carry = way == PacketDirection::Ingress || has_begun_to_send(session, tcp);
    let segment = skb::parse(ctx);
    confirm(ctx, session, tcp, way, segment.as_ref());
    let Some(segment) = segment else {
        count::error(ErrorKind::HeaderUnreadable);
        return unreadable(ctx, session, cookie, tcp, way, may_carry);
    };
    if segment.payload > 0 {
        let measure = Measure::of(session);
        if measure.comes_too_late(session) {
            return gate::drop_packet(session, cookie, way);
        }
        match way {
            PacketDirection::Ingress => come(session, tcp, &segment, &measure),
            PacketDirection::Egress => go(session, tcp, &segment, &measure),
        }
        if measure.came_too_late(session) {
            return gate::drop_packet(session, cookie, way);
        }
    }
    if way == PacketDirection::Egress {
        // Of one whose state changes are not reported, or whose record the daemon was just amending.
        if is_half_closed(state(ctx)) {
            note_half_closed(session);
        }
    } else if segment.fin && segment.end().wrapping_sub(tcp.rcv_nxt) <= MAX_WINDOW {
        session.flags |= flags::PEER_HAS_ENDED;
    }
    if segment.ends && session.flags & flags::END_UNREPORTED != 0 {
        lifecycle::notify(EventKind::MayEnd, cookie, session);
    }
    Verdict::Pass
}

/// A packet whose headers could not be read. After the deadline it is dropped, unstamped, where it may carry
/// payload.
///
/// What comes in may always: the peer writes the headers. What goes out is encapsulated in more headers than
/// are walked, or encrypted (`IPsec` does so before the hook), and may be the very RST that ends the session,
/// which must pass.
#[inline(always)]
fn unreadable(
    ctx: &SkBuffContext,
    session: &mut Session,
    cookie: u64,
    tcp: &bpf_tcp_sock,
    way: PacketDirection,
    may_carry: bool,
) -> Verdict {
    let measure = Measure::of(session);
    let mut is_late = measure.comes_too_late(session);
    if way == PacketDirection::Egress {
        let sent = payload_sent(ctx, session, tcp);
        session.bytes_sent = session.bytes_sent.max(sent);
    }
    if !is_late {
        match way {
            PacketDirection::Ingress => session.came_ns = measure.now_ns,
            PacketDirection::Egress if may_carry => {
                session.flags |= flags::SENT_UNREAD;
                note_sent(session, tcp.snd_nxt.wrapping_add(1), true, measure.now_ns);
            }
            PacketDirection::Egress => {}
        }
        is_late = measure.came_too_late(session);
    }
    if is_late && (may_carry || ctx.len() > MOST_HEADERS) {
        return gate::drop_packet(session, cookie, way);
    }
    Verdict::Pass
}

/// Whether TCP has begun to send payload since its last packet passed: it counts a segment with payload before
/// the packet leaves (`__tcp_transmit_skb`).
#[inline(always)]
fn has_begun_to_send(session: &mut Session, tcp: &bpf_tcp_sock) -> bool {
    let before = session.data_segments_sent;
    session.data_segments_sent = tcp.data_segs_out;
    before != tcp.data_segs_out
}

#[inline(always)]
fn tcp_sock(ctx: &SkBuffContext) -> Option<&bpf_tcp_sock> {
    // SAFETY: the context of a program of this type; the helper is only given a socket that is
    // there, and its answer is checked.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        bpf_tcp_sock_helper(sk).as_ref()
    }
}

/// Counts what the socket has taken and sent since its last packet, each with the time at which that passed.
///
/// What was sent comes first: a packet leaves while its socket is locked, and what had been taken by then was
/// counted at that packet.
#[inline(always)]
fn confirm(
    ctx: &SkBuffContext,
    session: &mut Session,
    tcp: &bpf_tcp_sock,
    way: PacketDirection,
    segment: Option<&Segment>,
) {
    if session.awaits_sent() && has_sent(session, tcp, way, segment) {
        session.stamp_sent(session.went_ns, session.went_is_answer == 1);
    }
    let received = payload_received(ctx, session, tcp);
    if received > session.bytes_received {
        take(session, received);
    }
}

/// Whether the socket has sent what was seen to leave.
///
/// On one host the acknowledgement of payload may come before the stack has moved `snd_nxt` over it. It names the very
/// end; nobody guesses that.
#[inline(always)]
fn has_sent(
    session: &Session,
    tcp: &bpf_tcp_sock,
    way: PacketDirection,
    segment: Option<&Segment>,
) -> bool {
    // The time was read before the end that belongs to it is: see `note_sent`.
    words::order();
    if way == PacketDirection::Ingress && session.flags & flags::SENT_UNREAD != 0 {
        return false;
    }
    let is_acknowledged = segment.is_some_and(|segment| segment.ack == session.went_until);
    tcp.snd_nxt.wrapping_sub(session.went_until) <= MAX_WINDOW
        || way == PacketDirection::Ingress && is_acknowledged
}

/// Counts payload that the socket has taken. What does not count for the rule is no candidate any more. What the hook
/// has not seen, as payload with the packet that completed the handshake, counts from now, unless it is late by now.
///
/// The count is written last: who reads the record before is told that payload is waited for.
#[inline(never)]
fn take(session: &mut Session, received: u64) {
    // The socket's counter was read before the candidate is.
    words::order();
    let new = received - session.bytes_received;
    let limits = policy_tables::of(session);
    if limits.is_some_and(|limits| new < u64::from(limits.min_payload)) {
        session.came_ns = 0;
    } else if session.awaits_received() {
        session.stamp_received(session.came_ns);
    } else {
        let measure = Measure {
            limits,
            now_ns: now_ns(),
        };
        if !measure.comes_too_late(session) {
            session.stamp_received(measure.now_ns);
        }
    }
    words::order();
    // SAFETY: from a reference. Volatile: after the stamp.
    unsafe { (&raw mut session.bytes_received).write_volatile(received) };
}

/// Payload may be new where it ends after what the socket has received so far. That leaves out
/// retransmissions, duplicates, and keepalives that carry one old byte. The socket tells whether it has taken it.
#[inline(always)]
fn come(session: &mut Session, tcp: &bpf_tcp_sock, segment: &Segment, measure: &Measure) {
    let ahead = segment.end().wrapping_sub(tcp.rcv_nxt);
    if ahead != 0 && ahead <= MAX_WINDOW {
        session.came_ns = measure.now_ns;
    }
}

/// Payload bytes that the socket has received. It counts the peer's FIN as a byte, since that takes a
/// sequence number.
///
/// The session follows when the socket answers, at the latest with the ACK: what arrived while a process held
/// the socket waits in its backlog, uncounted.
#[inline(always)]
fn payload_received(ctx: &SkBuffContext, session: &Session, tcp: &bpf_tcp_sock) -> u64 {
    // The state tells whether the FIN has been received, but where this host has sent one before. Then
    // the ACK to the peer's leaves while the state is still that of before (`tcp_fin`).
    let fin = match state(ctx) {
        BPF_TCP_CLOSE_WAIT | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => true,
        BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 => session.flags & flags::PEER_HAS_ENDED != 0,
        _ => false,
    };
    tcp.bytes_received.saturating_sub(u64::from(fin))
}

/// Payload bytes that the socket has sent. Its numbers count its FIN, too. While that waits for
/// payload to be sent, this is one byte less than what was sent, and then it is right again.
#[inline(always)]
fn payload_sent(ctx: &SkBuffContext, session: &Session, tcp: &bpf_tcp_sock) -> u64 {
    let fin = matches!(
        state(ctx),
        BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK
    );
    sent_until(session, tcp, tcp.snd_nxt).saturating_sub(u64::from(fin))
}

/// Whether this host or the peer has sent its FIN.
#[inline(always)]
fn is_half_closed(state: u32) -> bool {
    matches!(
        state,
        BPF_TCP_FIN_WAIT1
            | BPF_TCP_FIN_WAIT2
            | BPF_TCP_CLOSE_WAIT
            | BPF_TCP_CLOSING
            | BPF_TCP_LAST_ACK
    )
}

/// Notes that the session is half-closed from now on, if it was not before.
#[inline(always)]
pub(crate) fn note_half_closed(session: &mut Session) {
    if session.half_closed_ns == Session::NOT_HALF_CLOSED {
        session.half_closed_ns = now_ns();
    }
}

/// The state of the packet's socket; 0, which is none, where there is no socket.
#[inline(always)]
fn state(ctx: &SkBuffContext) -> u32 {
    // SAFETY: the context of a program of this type; the socket is checked before it is read.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() { 0 } else { (*sk).state }
    }
}

/// Payload is new where it ends after what the socket has sent so far: the stack moves `snd_nxt` after the packet has
/// passed this hook, and leaves it where the packet was dropped on its way.
#[inline(always)]
fn go(session: &mut Session, tcp: &bpf_tcp_sock, segment: &Segment, measure: &Measure) {
    let ahead = segment.end().wrapping_sub(tcp.snd_nxt);
    if ahead == 0 || ahead > MAX_WINDOW {
        return;
    }
    let total = sent_until(session, tcp, segment.end());
    if measure.counts(ahead.min(segment.payload)) {
        let is_answer = measure.is_answer(session, total);
        note_sent(session, segment.end(), is_answer, measure.now_ns);
    }
    session.bytes_sent = total;
    if session.flags & flags::SENT_UNREAD != 0 {
        session.flags &= !flags::SENT_UNREAD;
    }
}

/// Notes when payload was seen to leave. The end is written first: a packet on another processor that sees the
/// time alone would take the payload for sent.
#[inline(always)]
fn note_sent(session: &mut Session, until: u32, is_answer: bool, now_ns: u64) {
    // SAFETY: from a reference. Volatile: in this order.
    unsafe {
        (&raw mut session.went_is_answer).write_volatile(u32::from(is_answer));
        (&raw mut session.went_until).write_volatile(until);
        words::order();
        (&raw mut session.went_ns).write_volatile(now_ns);
    }
}

/// Payload bytes sent before the sequence number `end`. The socket's counter of acknowledged bytes
/// begins with the SYN on the side that dialled.
#[inline(always)]
fn sent_until(session: &Session, tcp: &bpf_tcp_sock, end: u32) -> u64 {
    let syn = u64::from(session.direction == Direction::Outbound as u8);
    let unacknowledged = u64::from(end.wrapping_sub(tcp.snd_una));
    (tcp.bytes_acked + unacknowledged).saturating_sub(syn)
}

/// The clock that goes on while the host sleeps, `CLOCK_BOOTTIME`, and precise. The coarse one costs a third, and lags by as much as a tick comes late: in a
/// virtual machine whose processors were taken away, sessions ended before their time.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no argument, no precondition.
    unsafe { bpf_ktime_get_boot_ns() }
}
