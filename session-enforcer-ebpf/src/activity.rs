//! Stamps a session when new payload passes and drops payload that is too late (`cgroup_skb`).
//!
//! The programs run for every packet of every socket below the cgroup. If no rule can match the packet's ports, the
//! packet costs two bit tests and no helper call. Otherwise an untracked packet costs the socket cookie and the scan of
//! two buckets.

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
    count, event_ring,
    gate::{self, Verdict},
    policy_tables, port_check,
    skb::{self, Segment},
    slots, words,
};

/// The largest receive window that TCP can offer (RFC 7323 section 2.3). Payload beyond it is outside the window: the
/// stack drops it, and it is not activity.
const MAX_WINDOW: u32 = 1 << 30;

/// Upper bound of the header bytes of a packet without payload. If a queue between TCP and the hook (such as a
/// netfilter queue) delays packets, a packet without payload may pass after TCP has counted the payload of another
/// packet.
const MOST_HEADERS: u32 = 1024;

/// The limits and the time by which payload is judged.
#[derive(Clone, Copy)]
struct Measure {
    /// The limits of the session; `None` if the session has no known limits.
    limits: Option<&'static Limits>,
    /// When the packet reached the hook.
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
    fn is_past_deadline(&self, session: &mut Session) -> bool {
        match self.limits {
            Some(limits) => gate::is_shut(session, limits, self.now_ns),
            None => false,
        }
    }

    /// Whether the daemon has shut the gate, that is, may have read the record before this packet's stamp.
    #[inline(always)]
    fn was_shut_meanwhile(&self, session: &Session) -> bool {
        // Orders the stamp before the read of the gate, and before the stack's update of its counters, by which a
        // packet on another processor confirms the stamp.
        words::order();
        match self.limits {
            Some(limits) => gate::is_shut_meanwhile(session, limits),
            None => false,
        }
    }

    /// Whether `new` bytes of payload count as activity under the session's rule.
    #[inline(always)]
    fn counts(&self, new: u32) -> bool {
        self.limits
            .is_none_or(|limits| new >= u32::from(limits.min_payload))
    }

    /// Whether the packet that brings the total to `bytes_sent` completes this host's answer.
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
    // SAFETY: the map lookup returned the pointer, which is valid while the program runs. A close on another CPU may
    // free the record, and a new session may take it before the writes below. The new session then gets a stamp of the
    // current time, which is correct for it. It may get wrong byte counts, flags or, just after a policy change, a
    // wrong rule.
    let session = unsafe { &mut *session };
    // `bpf_tcp_sock` only checks the protocol number and would accept a raw socket of IPPROTO_TCP. The session lookup
    // must therefore come first: raw sockets never have a session.
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
        if measure.is_past_deadline(session) {
            return gate::drop_packet(session, cookie, way);
        }
        match way {
            PacketDirection::Ingress => note_received_candidate(session, tcp, &segment, &measure),
            PacketDirection::Egress => note_sent_candidate(session, tcp, &segment, &measure),
        }
        if measure.was_shut_meanwhile(session) {
            return gate::drop_packet(session, cookie, way);
        }
    }
    if way == PacketDirection::Egress {
        let state = state(ctx);
        if segment.fin || state == BPF_TCP_FIN_WAIT2 {
            note_ended(session);
        } else if is_closed_there(state) {
            // Needed if the socket's state changes are not reported.
            note_half_closed(session);
        }
    } else if segment.fin && segment.end().wrapping_sub(tcp.rcv_nxt) <= MAX_WINDOW {
        session.flags |= flags::PEER_HAS_ENDED;
    }
    let report = session.flags & (flags::END_UNREPORTED | flags::END_REPORTED);
    if segment.ends && report == flags::END_UNREPORTED {
        session.flags |= flags::END_REPORTED;
        event_ring::notify(EventKind::MayEnd, cookie, session);
    }
    Verdict::Pass
}

/// Handles a packet whose headers could not be parsed. After the deadline it is dropped if it may carry payload.
///
/// An ingress packet may always carry payload, because the peer chooses the headers. An egress packet has more headers
/// than the parser walks, or is encrypted (`IPsec` encrypts before the hook). It may be the RST that ends the session,
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
    let mut is_late = measure.is_past_deadline(session);
    if way == PacketDirection::Egress {
        let sent = payload_sent(ctx, session, tcp);
        session.bytes_sent = session.bytes_sent.max(sent);
    }
    if !is_late {
        match way {
            PacketDirection::Ingress => session.received_candidate_ns = measure.now_ns,
            PacketDirection::Egress if may_carry => {
                session.flags |= flags::SENT_UNREAD;
                store_sent_candidate(session, tcp.snd_nxt.wrapping_add(1), true, measure.now_ns);
            }
            PacketDirection::Egress => {}
        }
        is_late = measure.was_shut_meanwhile(session);
    }
    if is_late && (may_carry || ctx.len() > MOST_HEADERS) {
        return gate::drop_packet(session, cookie, way);
    }
    Verdict::Pass
}

/// Whether TCP has started to send payload since the last packet of the session. `__tcp_transmit_skb` counts a segment
/// with payload before the packet leaves.
#[inline(always)]
fn has_begun_to_send(session: &mut Session, tcp: &bpf_tcp_sock) -> bool {
    let before = session.data_segments_sent;
    session.data_segments_sent = tcp.data_segs_out;
    before != tcp.data_segs_out
}

#[inline(always)]
fn tcp_sock(ctx: &SkBuffContext) -> Option<&bpf_tcp_sock> {
    // SAFETY: the context of a program of this type; the socket is not null, and the helper's result is checked.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        bpf_tcp_sock_helper(sk).as_ref()
    }
}

/// Confirms the candidates: counts what the socket has received and sent since its last packet, with the time at which
/// the candidate passed.
///
/// Sent payload is confirmed first. A packet leaves while its socket is locked, so payload received before it was
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
        session.stamp_sent(
            session.sent_candidate_ns,
            session.sent_candidate_completes_answer == 1,
        );
    }
    let received = payload_received(ctx, session, tcp);
    if received > session.bytes_received {
        confirm_received(session, received);
    }
}

/// Whether the socket has sent the candidate.
///
/// On loopback, the ACK of the payload may arrive before the stack has advanced `snd_nxt`. Such an ACK equals the
/// candidate's end exactly, which a peer cannot guess.
#[inline(always)]
fn has_sent(
    session: &Session,
    tcp: &bpf_tcp_sock,
    way: PacketDirection,
    segment: Option<&Segment>,
) -> bool {
    // Orders the read of `sent_candidate_ns` before the read of `sent_candidate_end`: see `store_sent_candidate`.
    words::order();
    if way == PacketDirection::Ingress && session.flags & flags::SENT_UNREAD != 0 {
        return false;
    }
    let is_acknowledged = segment.is_some_and(|segment| segment.ack == session.sent_candidate_end);
    tcp.snd_nxt.wrapping_sub(session.sent_candidate_end) <= MAX_WINDOW
        || way == PacketDirection::Ingress && is_acknowledged
}

/// Counts payload that the socket has received. If the amount is below the rule's `min_payload`, the candidate is
/// discarded. Payload without a candidate (such as payload in the packet that completed the handshake) is stamped with
/// the current time, unless the deadline is past.
///
/// `bytes_received` is written after the stamp: a reader between the two writes still sees a pending candidate.
#[inline(never)]
fn confirm_received(session: &mut Session, received: u64) {
    // Orders the read of the socket's counter before the read of the candidate.
    words::order();
    let new = received - session.bytes_received;
    let limits = policy_tables::of(session);
    if limits.is_some_and(|limits| new < u64::from(limits.min_payload)) {
        session.received_candidate_ns = 0;
    } else if session.awaits_received() {
        session.stamp_received(session.received_candidate_ns);
    } else {
        let measure = Measure {
            limits,
            now_ns: now_ns(),
        };
        if !measure.is_past_deadline(session) {
            session.stamp_received(measure.now_ns);
        }
    }
    words::order();
    // SAFETY: derived from a reference. Volatile keeps the write after the stamp.
    unsafe { (&raw mut session.bytes_received).write_volatile(received) };
}

/// Notes a candidate if the payload ends after the socket's `rcv_nxt`. This excludes retransmissions, duplicates and
/// keepalives with one old byte. The socket's counter later confirms or refutes the candidate.
#[inline(always)]
fn note_received_candidate(
    session: &mut Session,
    tcp: &bpf_tcp_sock,
    segment: &Segment,
    measure: &Measure,
) {
    let ahead = segment.end().wrapping_sub(tcp.rcv_nxt);
    if ahead != 0 && ahead <= MAX_WINDOW {
        session.received_candidate_ns = measure.now_ns;
    }
}

/// Payload bytes that the socket has received. The kernel counts the peer's FIN as one byte, because a FIN takes a
/// sequence number.
///
/// Payload that arrives while a process holds the socket lock waits in the socket's backlog and is not counted yet. It
/// is counted when the socket answers, at the latest with its ACK.
#[inline(always)]
fn payload_received(ctx: &SkBuffContext, session: &Session, tcp: &bpf_tcp_sock) -> u64 {
    // The state shows whether the FIN was received, except if this host sent its FIN first: then the ACK of the peer's
    // FIN leaves before the state changes (`tcp_fin`).
    let fin = match state(ctx) {
        BPF_TCP_CLOSE_WAIT | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => true,
        BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 => session.flags & flags::PEER_HAS_ENDED != 0,
        _ => false,
    };
    tcp.bytes_received.saturating_sub(u64::from(fin))
}

/// Payload bytes that the socket has sent. The sequence numbers include this host's FIN. While a FIN waits behind
/// unsent payload, the result is one byte too low.
#[inline(always)]
fn payload_sent(ctx: &SkBuffContext, session: &Session, tcp: &bpf_tcp_sock) -> u64 {
    let fin = matches!(
        state(ctx),
        BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK
    );
    sent_until(session, tcp, tcp.snd_nxt).saturating_sub(u64::from(fin))
}

/// Whether the peer's FIN was received.
#[inline(always)]
fn is_closed_there(state: u32) -> bool {
    matches!(
        state,
        BPF_TCP_CLOSE_WAIT | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK
    )
}

/// Notes that this host has sent its FIN. Past the deadline it does not count: it would revive a session that owes an
/// answer.
#[inline(never)]
fn note_ended(session: &mut Session) {
    if session.flags & flags::HAS_ENDED != 0 {
        return;
    }
    note_half_closed(session);
    let measure = Measure::of(session);
    if !measure.is_past_deadline(session) {
        session.note_ended(measure.now_ns);
    }
}

/// Records the time of the first FIN, if none was recorded before.
#[inline(always)]
pub(crate) fn note_half_closed(session: &mut Session) {
    if session.half_closed_ns == Session::NOT_HALF_CLOSED {
        session.half_closed_ns = now_ns();
    }
}

/// The state of the packet's socket; 0 (no valid state) if there is no socket.
#[inline(always)]
fn state(ctx: &SkBuffContext) -> u32 {
    // SAFETY: the context of a program of this type; the socket is checked before it is read.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() { 0 } else { (*sk).state }
    }
}

/// Notes a candidate if the payload ends after the socket's `snd_nxt`. The stack advances `snd_nxt` after the packet
/// has passed this hook, and does not advance it if the packet is dropped.
#[inline(always)]
fn note_sent_candidate(
    session: &mut Session,
    tcp: &bpf_tcp_sock,
    segment: &Segment,
    measure: &Measure,
) {
    let ahead = segment.end().wrapping_sub(tcp.snd_nxt);
    if ahead == 0 || ahead > MAX_WINDOW {
        return;
    }
    let total = sent_until(session, tcp, segment.end());
    if measure.counts(ahead.min(segment.payload)) {
        let is_answer = measure.is_answer(session, total);
        store_sent_candidate(session, segment.end(), is_answer, measure.now_ns);
    }
    session.bytes_sent = total;
    if session.flags & flags::SENT_UNREAD != 0 {
        session.flags &= !flags::SENT_UNREAD;
    }
}

/// Records when payload left. The end (`sent_candidate_end`) is written before the time: a packet on another processor that saw
/// the new time with the old end would count the payload as sent.
#[inline(always)]
fn store_sent_candidate(session: &mut Session, until: u32, is_answer: bool, now_ns: u64) {
    // SAFETY: derived from a reference. Volatile keeps the order of the writes.
    unsafe {
        (&raw mut session.sent_candidate_completes_answer).write_volatile(u32::from(is_answer));
        (&raw mut session.sent_candidate_end).write_volatile(until);
        words::order();
        (&raw mut session.sent_candidate_ns).write_volatile(now_ns);
    }
}

/// Payload bytes sent before sequence number `end`. On the dialling side the socket's counter of acknowledged bytes
/// includes the SYN.
#[inline(always)]
fn sent_until(session: &Session, tcp: &bpf_tcp_sock, end: u32) -> u64 {
    let syn = u64::from(session.direction == Direction::Outbound as u8);
    let unacknowledged = u64::from(end.wrapping_sub(tcp.snd_una));
    (tcp.bytes_acked + unacknowledged).saturating_sub(syn)
}

/// `CLOCK_BOOTTIME`, which continues during suspend; the precise clock. The coarse clock takes a third of the time, but
/// lags by as much as a tick is late: in a virtual machine without processor time it ended sessions before their
/// deadline.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no argument, no precondition.
    unsafe { bpf_ktime_get_boot_ns() }
}
