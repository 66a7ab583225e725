//! Adoption: which existing connections become sessions, and with which times. Pure: computes session records from the
//! sockets that `sock_diag` lists.

use std::{cmp::Ordering, collections::HashMap};

use session_enforcer_common::{
    Address, Ancestors, Direction, Expiry, Facts, Limits, MatchEntry, Owner, RULE_EXEMPT, Session,
    expiry, first_possible, flags,
};

use crate::{
    host::cgroup::Scope,
    reaper::diag::{Info, Socket, state},
};

/// Selects the sockets to adopt.
#[derive(Debug)]
pub struct Adopter<'a> {
    /// The match table, which is also active in the kernel.
    pub entries: &'a [MatchEntry],
    /// The limits by rule id.
    pub limits_of_rules: &'a [Limits],
    /// Generation of both.
    pub generation: u32,
    /// By how much an event may be later than its age says: [`crate::host::clock::coarse_lag_ns`].
    pub lag_ns: u64,
    /// The cgroups that the attachment covers.
    pub scope: &'a Scope,
    /// The ancestors of each cgroup that a listed socket may have.
    pub ancestors: &'a HashMap<u64, Ancestors>,
}

impl Adopter<'_> {
    /// Whether a rule may track the socket. It is tested in both directions, because the direction is only known with
    /// INFO.
    pub fn wants(&self, socket: &Socket, listeners: &Listeners) -> bool {
        [Direction::Inbound, Direction::Outbound]
            .iter()
            .any(|direction| self.chosen(socket, listeners, *direction).is_some())
    }

    /// The facts, owner and rule id of a session; `None` if no rule tracks it.
    fn chosen(
        &self,
        socket: &Socket,
        listeners: &Listeners,
        direction: Direction,
    ) -> Option<(Facts, Owner, u16)> {
        let is_session = state::SESSIONS & state::bit(socket.state) != 0 && !socket.is_mini;
        if !is_session || !self.scope.contains(socket.cgroup_id) {
            return None;
        }
        let owner = owner(socket, direction, listeners);
        let (mut facts, ancestors) = (facts(socket, direction, &owner), self.ancestors);
        let ancestors = ancestors.get(&owner.cgroup_id);
        facts.known |= ancestors.map_or(0, |_| Facts::CGROUP);
        let ancestors = ancestors.unwrap_or(&Ancestors::UNKNOWN);
        let entry = first_possible(self.entries, &facts, ancestors)?;
        (entry.rule != RULE_EXEMPT).then_some((facts, owner, entry.rule))
    }

    /// The session of a socket as it was at `now_ns`; `None` if no rule tracks it.
    pub fn session(
        &self,
        socket: &Socket,
        listeners: &Listeners,
        netns_cookie: u64,
        now_ns: u64,
    ) -> Option<Session> {
        let info = socket.info?;
        let direction = direction(socket, &info, listeners);
        let (facts, owner, rule) = self.chosen(socket, listeners, direction)?;
        let limits = self.limits_of_rules.get(usize::from(rule));
        let (received, sent) = activity(&info, now_ns, self.lag_ns);
        // The kernel does not keep the time of establishment. Both ages start at the establishment, so the older one is
        // a lower bound of the connection's age.
        let established_ns = received.min(sent);
        let mut flags = flags::END_UNREPORTED;
        if socket.mptcp_token.is_some() {
            flags |= flags::MPTCP_SUBFLOW;
        }
        let mut session = Session {
            last_received_ns: received,
            last_sent_ns: sent,
            answered_ns: established_ns,
            bytes_received: payload_received(socket, &info),
            bytes_sent: payload_sent(socket, &info, facts.direction as u8),
            open_until_ns: 0,
            established_ns,
            netns_cookie,
            local: facts.local,
            remote: facts.remote,
            local_port: facts.local_port,
            remote_port: facts.remote_port,
            ifindex: socket.target.ifindex,
            generation: self.generation,
            rule,
            direction: facts.direction as u8,
            flags,
            owner,
            data_segments_sent: info.data_segments_sent,
            half_closed_ns: half_closed_ns(socket, &info, now_ns),
            sent_before_answer: 0,
            sent_candidate_completes_answer: 0,
            received_candidate_ns: 0,
            sent_candidate_ns: 0,
            sent_candidate_end: 0,
        };
        if session.bytes_received > 0 {
            session.stamp_received(received);
            if is_answered(&session, session.bytes_sent, &info, limits) {
                session.stamp_sent(sent, true);
            }
        }
        if has_ended(socket, &info) {
            session.note_ended(now_ns);
        }
        Some(session)
    }
}

/// The owner of a socket, as the programs would have recorded it: for an accepted socket that of its listener. The
/// process is not known.
pub fn owner(socket: &Socket, direction: Direction, listeners: &Listeners) -> Owner {
    // Whoever listens on the port of a socket that was dialled has not made it.
    let accepting = listeners.accepting(socket);
    let maker = accepting.filter(|_| direction == Direction::Inbound);
    // The listener that accepted it may be gone and replaced by another one.
    let maker = maker.filter(|maker| maker.cgroup_id == socket.cgroup_id);
    let maker = maker.unwrap_or(socket);
    match maker.cgroup_id {
        Some(cgroup_id) => Owner {
            cgroup_id,
            uid: maker.uid,
            ..Owner::UNKNOWN
        },
        None => Owner::UNKNOWN,
    }
}

/// Which side dialled. A SYN takes a sequence number, so the side that sent one has one more number acknowledged than
/// payload bytes sent. A socket that `TCP_REPAIR` restored has sent none.
///
/// While payload is in flight, or if some was dropped before it left, the numbers may be inconclusive. A socket with a
/// listener on its port then counts as inbound.
fn direction(socket: &Socket, info: &Info, listeners: &Listeners) -> Direction {
    let numbers = if info.is_all_acknowledged {
        let fin = u64::from(socket.state == state::FIN_WAIT2);
        info.numbers_acknowledged.saturating_sub(fin)
    } else {
        info.numbers_sent.saturating_sub(fin_sent(socket, info))
    };
    match numbers.checked_sub(info.bytes_tried) {
        Some(0) => Direction::Inbound,
        Some(1) => Direction::Outbound,
        _ if listeners.accepting(socket).is_some() => Direction::Inbound,
        _ => Direction::Outbound,
    }
}

/// A socket that its process keeps locked: it is in use at this moment. Its counters cannot be read, so the direction
/// comes from its listener.
pub fn in_use(listed: &Socket) -> Socket {
    let info = Info {
        last_data_sent_ms: 0,
        last_data_received_ms: 0,
        bytes_received: 0,
        bytes_tried: u64::MAX,
        numbers_sent: 0,
        numbers_acknowledged: 0,
        is_all_acknowledged: false,
        is_all_sent: false,
        data_segments_sent: 0,
    };
    Socket {
        info: Some(info),
        ..*listed
    }
}

fn facts(socket: &Socket, direction: Direction, owner: &Owner) -> Facts {
    let target = &socket.target;
    Facts {
        direction,
        local: target.local,
        remote: target.remote,
        local_port: target.local_port,
        remote_port: target.remote_port,
        uid: owner.uid,
        known: if owner.is_known() { Facts::UID } else { 0 },
    }
}

/// Whether this host has answered a request that a session owes an answer to. It has sent at most `sent` bytes of the
/// answer. The kernel shows neither how many of them came after the request, nor the order of events with equal ages. If
/// that decides, the alternative with the longer life is assumed.
fn is_answered(owing: &Session, sent: u64, info: &Info, limits: Option<&Limits>) -> bool {
    let least = least_answer(limits);
    if sent < u64::from(least) {
        return false;
    }
    match info.last_data_received_ms.cmp(&info.last_data_sent_ms) {
        Ordering::Less => false,
        Ordering::Greater if least <= 1 => true,
        _ => limits.is_none_or(|limits| {
            let answered = Session {
                answered_ns: owing.last_sent_ns,
                ..*owing
            };
            deadline_ns(&answered, limits) >= deadline_ns(owing, limits)
        }),
    }
}

/// The minimum size of an answer.
fn least_answer(limits: Option<&Limits>) -> u32 {
    limits.map_or(1, |limits| limits.min_answer)
}

/// The deadline of a session on which nothing more passes.
fn deadline_ns(session: &Session, limits: &Limits) -> u64 {
    match expiry(session, limits, u64::MAX) {
        Expiry::Expired { deadline_ns, .. } => deadline_ns,
        Expiry::Alive { .. } => u64::MAX,
    }
}

/// The value of [`Session::half_closed_ns`]: the latest possible time.
fn half_closed_ns(socket: &Socket, info: &Info, now_ns: u64) -> u64 {
    if has_ended(socket, info) || state::is_closed_there(socket.state) {
        now_ns
    } else {
        Session::NOT_HALF_CLOSED
    }
}

/// Payload bytes received. The kernel counts the peer's FIN as one byte.
fn payload_received(socket: &Socket, info: &Info) -> u64 {
    let ended = state::is_closed_there(socket.state);
    info.bytes_received.saturating_sub(u64::from(ended))
}

/// Payload bytes sent, counted like in the packet path: those that have left. Segments that are dropped before they
/// leave (by the gate, for example) are retransmitted and advance no sequence number.
fn payload_sent(socket: &Socket, info: &Info, direction: u8) -> u64 {
    let syn = u64::from(direction == Direction::Outbound as u8);
    let fin = fin_sent(socket, info);
    // The kernel does not read these values at the same moment, so the sequence numbers may be too high; the number of
    // bytes tried is an upper bound.
    info.bytes_tried
        .min(info.numbers_sent.saturating_sub(syn + fin))
}

/// The sequence number of this host's FIN, if the FIN has left.
fn fin_sent(socket: &Socket, info: &Info) -> u64 {
    u64::from(has_ended(socket, info))
}

/// Whether this host's FIN has left. It may wait behind unsent payload.
fn has_ended(socket: &Socket, info: &Info) -> bool {
    state::is_closed_here(socket.state) && info.is_all_sent
}

/// When payload was last received and sent, computed from ages that were read before `now_ns`. The kernel counts ages
/// in ticks, so an event may be up to `lag_ns` later than its age says. The later time is used, so no session ends
/// early. It is not 0, which is no time in a record.
fn activity(info: &Info, now_ns: u64, lag_ns: u64) -> (u64, u64) {
    let before = |age_ms: u32| {
        let age_ns = u64::from(age_ms) * 1_000_000;
        now_ns.saturating_sub(age_ns.saturating_sub(lag_ns)).max(1)
    };
    (
        before(info.last_data_received_ms),
        before(info.last_data_sent_ms),
    )
}

/// Applies a socket's counters to the candidates of a session. A candidate that the socket does not confirm is
/// discarded.
pub fn confirmed(session: &Session, socket: &Socket, limits: Option<&Limits>) -> Session {
    let Some(info) = socket.info else {
        return *session;
    };
    let mut now = *session;
    let received = payload_received(socket, &info);
    let sent = payload_sent(socket, &info, session.direction);
    let new = received.saturating_sub(session.bytes_received);
    let counts = limits.is_none_or(|limits| new >= u64::from(limits.min_payload));
    let has_received = new > 0 && counts;
    // Payload whose headers were readable is in `bytes_sent` already.
    let is_counted = session.flags & flags::SENT_UNREAD == 0;
    let has_sent = sent > session.bytes_sent || is_counted && sent == session.bytes_sent;
    (now.bytes_received, now.bytes_sent) = (session.bytes_received + new, sent);
    if !has_received {
        now.received_candidate_ns = 0;
    }
    if !has_sent {
        now.sent_candidate_ns = 0;
    }
    now.with_candidate()
}

/// Updates a session from its socket after a time in which packets were not stamped. The byte counts show whether
/// payload passed, the ages show when. The size of each packet is unknown, so all payload counts.
pub fn caught_up(
    session: &Session,
    socket: &Socket,
    limits: Option<&Limits>,
    now_ns: u64,
    lag_ns: u64,
) -> Session {
    let Some(info) = socket.info else {
        return *session;
    };
    let mut now = *session;
    let half_closed_ns = half_closed_ns(socket, &info, now_ns);
    now.half_closed_ns = session.half_closed_ns.min(half_closed_ns);
    let (received_ns, sent_ns) = activity(&info, now_ns, lag_ns);
    // For a packet that the programs have seen, their time is more accurate than the age.
    let is_seen = session.received_candidate_ns <= received_ns
        && received_ns - session.received_candidate_ns <= 2 * lag_ns;
    let received_ns = if is_seen {
        session.received_candidate_ns
    } else {
        received_ns
    };
    let received = payload_received(socket, &info);
    let sent = payload_sent(socket, &info, session.direction);
    if session.awaits_sent() && sent == session.bytes_sent {
        now.stamp_sent(
            session.sent_candidate_ns,
            session.sent_candidate_completes_answer == 1,
        );
    }
    let [has_received, has_sent] = [received > session.bytes_received, sent > session.bytes_sent];
    if has_sent {
        now.bytes_sent = sent;
        now.data_segments_sent = info.data_segments_sent;
        now.last_sent_ns = sent_ns.max(now.last_sent_ns);
    }
    if has_received {
        now.bytes_received = received;
        now.stamp_received(received_ns);
    }
    let is_answer = if has_received {
        // No byte that was sent before the last look belongs to the answer.
        is_answered(&now, sent.saturating_sub(session.bytes_sent), &info, limits)
    } else {
        now.is_answered_by(sent, least_answer(limits))
    };
    if has_sent {
        now.stamp_sent(now.last_sent_ns, is_answer);
    }
    if has_ended(socket, &info) && now.flags & flags::HAS_ENDED == 0 {
        now.note_ended(now_ns);
    }
    now
}

/// The listeners of a namespace. An accepted socket has the owner of its listener.
#[derive(Debug, Default)]
pub struct Listeners {
    by_port: HashMap<u16, Vec<Socket>>,
}

impl Listeners {
    /// The listeners among the sockets of a namespace.
    pub fn among(sockets: &[Socket]) -> Self {
        let mut by_port: HashMap<u16, Vec<Socket>> = HashMap::new();
        for socket in sockets.iter().filter(|s| s.state == state::LISTEN) {
            by_port
                .entry(socket.target.local_port)
                .or_default()
                .push(*socket);
        }
        Self { by_port }
    }

    /// The listener that accepted a connection. An accepted socket has the cgroup of its listener, so listeners of that
    /// cgroup are preferred. Among them the order is that of the kernel: the exact address, then all IPv4 addresses,
    /// then both families.
    fn accepting(&self, socket: &Socket) -> Option<&Socket> {
        let address = socket.target.local;
        let all_ipv4 = address.is_ipv4().then_some(Address::from_ipv4(0));
        let wanted = [Some(address), all_ipv4, Some(Address([0; 4]))];
        let listening = self.by_port.get(&socket.target.local_port)?;
        let takes = |listener: &&Socket| !(address.is_ipv4() && listener.is_v6_only);
        let ranked = listening.iter().filter(takes).filter_map(|listener| {
            let bound = Some(listener.target.local);
            let rank = wanted.iter().position(|wanted| *wanted == bound)?;
            Some((listener.cgroup_id != socket.cgroup_id, rank, listener))
        });
        let first = ranked.min_by_key(|(elsewhere, rank, _)| (*elsewhere, *rank))?;
        Some(first.2)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use session_enforcer_common::{Activity, PortRange};

    use super::*;
    use crate::reaper::diag::{Queued, SocketId};

    const MS: u64 = 1_000_000;

    fn v4(octets: [u8; 4]) -> Address {
        Address::from_ipv4(u32::from_ne_bytes(octets))
    }

    fn socket(state: u8, local_port: u16, remote_port: u16) -> Socket {
        Socket {
            state,
            is_mini: false,
            target: SocketId {
                local: if state == state::LISTEN {
                    v4([0; 4])
                } else {
                    v4([10, 0, 0, 5])
                },
                remote: v4([10, 0, 0, 7]),
                local_port,
                remote_port,
                ifindex: 0,
                cookie: 42,
            },
            uid: 113,
            inode: 99,
            queued: Queued::default(),
            cgroup_id: Some(7),
            info: Some(Info {
                last_data_sent_ms: 3_000,
                last_data_received_ms: 5_000,
                bytes_received: 10,
                bytes_tried: 20,
                numbers_acknowledged: 20,
                is_all_acknowledged: true,
                numbers_sent: 20,
                is_all_sent: true,
                data_segments_sent: 1,
            }),
            is_v6_only: false,
            mptcp_token: None,
        }
    }

    fn entry(rule: u16, port: u16, directions: u8) -> MatchEntry {
        MatchEntry {
            local_ports: PortRange {
                first: port,
                last: port,
            },
            directions,
            ..MatchEntry::any(rule)
        }
    }

    fn adopt(entries: &[MatchEntry], scope: &Scope, sockets: &[Socket]) -> Vec<(u64, Session)> {
        let adopter = Adopter {
            entries,
            limits_of_rules: &[],
            generation: 1,
            lag_ns: 0,
            scope,
            ancestors: &HashMap::from([(7, Ancestors::of(&[2, 7]))]),
        };
        let listeners = Listeners::among(sockets);
        let adopted = |socket: &Socket| {
            let session = adopter.session(socket, &listeners, 3, 10_000 * MS)?;
            Some((socket.target.cookie, session))
        };
        sockets.iter().filter_map(adopted).collect()
    }

    #[test]
    fn an_accepted_connection_is_its_listener_s_and_another_its_own() {
        let mut listener = socket(state::LISTEN, 5432, 0);
        (listener.uid, listener.cgroup_id) = (0, Some(8));
        let mut accepted = socket(state::ESTABLISHED, 5432, 1);
        accepted.cgroup_id = Some(8);
        let sockets = [listener, accepted, socket(state::ESTABLISHED, 50_000, 5432)];
        let any = [MatchEntry::any(0)];
        let owners: Vec<(u64, u32)> = adopt(&any, &Scope::All, &sockets)
            .iter()
            .map(|(_, session)| (session.owner.cgroup_id, session.owner.uid))
            .collect();
        assert_eq!(owners, [(8, 0), (7, 113)]);
    }

    #[test]
    fn a_listener_of_the_socket_s_cgroup_and_family_is_preferred_among_those_of_its_port() {
        let listener = |cgroup_id, local, uid| {
            let mut listener = socket(state::LISTEN, 5432, 0);
            listener.target.local = local;
            Socket {
                cgroup_id: Some(cgroup_id),
                uid,
                ..listener
            }
        };
        let (both_families, all_ipv4) = (Address([0; 4]), v4([0; 4]));
        let accepted = socket(state::ESTABLISHED, 5432, 1);
        let mut ipv6 = accepted;
        ipv6.target.local = Address([1; 4]);
        let owner_of =
            |socket: &Socket, listeners: &Listeners| owner(socket, Direction::Inbound, listeners);
        let uid_of = |socket: &Socket, listeners: &[Socket]| {
            owner_of(socket, &Listeners::among(listeners)).uid
        };
        let families = [listener(7, both_families, 6), listener(7, all_ipv4, 4)];
        assert_eq!(uid_of(&accepted, &families), 4);
        assert_eq!(uid_of(&ipv6, &families), 6);
        assert_eq!(uid_of(&accepted, &families[..1]), 6);
        // A listener on 0.0.0.0 does not accept IPv6.
        assert_eq!(uid_of(&ipv6, &families[1..]), 113);
        let cgroups = [listener(8, v4([10, 0, 0, 5]), 8), listener(7, all_ipv4, 4)];
        assert_eq!(uid_of(&accepted, &cgroups), 4);
        // The accepting listener is gone, so the user of the socket itself is used.
        let stranger = owner_of(&accepted, &Listeners::among(&cgroups[..1]));
        assert_eq!((stranger.uid, stranger.cgroup_id), (113, 7));
        let mut ipv6_only = listener(7, both_families, 6);
        ipv6_only.is_v6_only = true;
        assert_eq!(uid_of(&accepted, &[ipv6_only]), 113);
        assert_eq!(uid_of(&ipv6, &[ipv6_only]), 6);
        // Another user may listen on the port of a connection that was dialled.
        let beside = Listeners::among(&families);
        assert_eq!(owner(&accepted, Direction::Outbound, &beside).uid, 113);
    }

    #[test]
    fn the_socket_s_numbers_tell_who_dialled_whoever_listens() {
        let listeners = Listeners::among(&[socket(state::LISTEN, 5432, 0)]);
        let alone = Listeners::default();
        let told = |state, change: fn(&mut Info)| {
            let mut socket = socket(state, 5432, 1);
            let mut info = socket.info.unwrap();
            change(&mut info);
            socket.info = Some(info);
            [&listeners, &alone].map(|listeners| direction(&socket, &info, listeners))
        };
        let (accepted, dialled) = ([Direction::Inbound; 2], [Direction::Outbound; 2]);
        let unknown = [Direction::Inbound, Direction::Outbound];
        let with_syn = |info: &mut Info| info.numbers_acknowledged += 1;
        assert_eq!(told(state::ESTABLISHED, |_| {}), accepted);
        assert_eq!(told(state::ESTABLISHED, with_syn), dialled);
        // In FIN_WAIT2 this host's FIN was acknowledged.
        assert_eq!(told(state::FIN_WAIT2, with_syn), accepted);
        let with_both = |info: &mut Info| info.numbers_acknowledged += 2;
        assert_eq!(told(state::FIN_WAIT2, with_both), dialled);
        // With payload in flight, the numbers of what has left are used, including the FIN.
        let waits = |info: &mut Info| info.is_all_acknowledged = false;
        assert_eq!(told(state::ESTABLISHED, waits), accepted);
        let waits = |info: &mut Info| {
            (info.is_all_acknowledged, info.numbers_sent) = (false, 22);
        };
        assert_eq!(told(state::LAST_ACK, waits), dialled);
        assert_eq!(told(state::ESTABLISHED, waits), unknown);
        // Some payload was dropped before it left.
        assert_eq!(
            told(state::ESTABLISHED, |info| info.bytes_tried += 9),
            unknown
        );
    }

    #[test]
    fn a_locked_socket_has_no_counts_and_its_listener_tells_the_direction() {
        let listener = socket(state::LISTEN, 5432, 0);
        let locked = in_use(&socket(state::ESTABLISHED, 5432, 1));
        for (sockets, direction, bits) in [
            (vec![listener, locked], Direction::Inbound, 1),
            (vec![locked], Direction::Outbound, 2),
        ] {
            let adopted = adopt(&[entry(0, 5432, bits)], &Scope::All, &sockets);
            let (_, session) = adopted[0];
            assert_eq!(session.direction, direction as u8);
            assert_eq!((session.bytes_received, session.bytes_sent), (0, 0));
        }
    }

    #[test]
    fn a_rule_of_a_cgroup_or_a_user_takes_only_their_connections() {
        let sockets = [socket(state::ESTABLISHED, 50_000, 5432)];
        let any = MatchEntry::any(0);
        let of_cgroup = |cgroup_id| MatchEntry { cgroup_id, ..any };
        let of_user = |uid| MatchEntry {
            uid,
            asks_user: 1,
            ..any
        };
        for (entry, matched) in [
            (of_cgroup(7), 1),
            (of_cgroup(2), 1),
            (of_cgroup(8), 0),
            (of_user(113), 1),
            (of_user(0), 0),
        ] {
            assert_eq!(adopt(&[entry], &Scope::All, &sockets).len(), matched);
        }
    }

    #[test]
    fn a_connection_keeps_its_true_age() {
        let sockets = [
            socket(state::LISTEN, 5432, 0),
            socket(state::ESTABLISHED, 5432, 50_000),
        ];
        let adopted = adopt(&[entry(2, 5432, 1)], &Scope::All, &sockets);
        let (cookie, session) = adopted[0];
        assert_eq!((adopted.len(), cookie, session.rule), (1, 42, 2));
        assert_eq!(session.last_received_ns, 5_000 * MS);
        assert_eq!(session.last_sent_ns, 7_000 * MS);
        assert_eq!(session.established_ns, 5_000 * MS);
        assert_eq!((session.bytes_received, session.bytes_sent), (10, 20));
        assert_eq!(session.direction, Direction::Inbound as u8);
        assert!(session.end_is_unreported());
    }

    #[test]
    fn an_outbound_connection_matches_no_inbound_rule() {
        let mut dialled = socket(state::ESTABLISHED, 5432, 50_000);
        let info = dialled.info.as_mut().unwrap();
        (info.numbers_acknowledged, info.numbers_sent) = (21, 21);
        let sockets = [socket(state::LISTEN, 5432, 0), dialled];
        assert_eq!(adopt(&[entry(0, 5432, 1)], &Scope::All, &sockets), []);
        assert_eq!(adopt(&[entry(0, 5432, 2)], &Scope::All, &sockets).len(), 1);
    }

    #[test]
    fn sockets_without_a_session_or_out_of_scope_are_left_alone() {
        let entries = [entry(0, 5432, 3)];
        let mini = Socket {
            is_mini: true,
            ..socket(state::FIN_WAIT2, 5432, 1)
        };
        let untold = Socket {
            info: None,
            ..socket(state::ESTABLISHED, 5432, 1)
        };
        let over = socket(state::TIME_WAIT, 5432, 1);
        let listener = socket(state::LISTEN, 5432, 0);
        assert_eq!(
            adopt(&entries, &Scope::All, &[mini, untold, over, listener]),
            []
        );
        let elsewhere = Scope::Only(HashSet::from([8]));
        assert_eq!(
            adopt(&entries, &elsewhere, &[socket(state::ESTABLISHED, 5432, 1)]),
            []
        );
    }

    #[test]
    fn the_first_entry_decides_also_where_it_exempts() {
        let sockets = [socket(state::CLOSE_WAIT, 5432, 1)];
        let exempt = [entry(RULE_EXEMPT, 5432, 3), entry(0, 5432, 3)];
        assert_eq!(adopt(&exempt, &Scope::All, &sockets), []);
        let two = [entry(4, 5432, 3), entry(0, 5432, 3)];
        assert_eq!(adopt(&two, &Scope::All, &sockets)[0].1.rule, 4);
    }

    /// A session that is adopted from a socket under these limits.
    fn adopted_under(limits: Limits, socket: &Socket) -> Session {
        let adopter = Adopter {
            entries: &[MatchEntry::any(0)],
            limits_of_rules: &[limits],
            generation: 1,
            lag_ns: 0,
            scope: &Scope::All,
            ancestors: &HashMap::new(),
        };
        let session = adopter.session(socket, &Listeners::default(), 3, 10_000 * MS);
        session.unwrap()
    }

    fn limits(idle_timeout_ns: u64, response_timeout_ns: u64, min_answer: u32) -> Limits {
        Limits {
            idle_timeout_ns,
            response_timeout_ns,
            min_answer,
            ..Limits::default()
        }
    }

    /// Whether an adopted session owes an answer, by these ages. Its socket has sent 20 bytes.
    fn owes(received_ms: u32, sent_ms: u32, limits: Limits) -> bool {
        let mut socket = socket(state::ESTABLISHED, 5432, 1);
        let info = socket.info.as_mut().unwrap();
        (info.last_data_received_ms, info.last_data_sent_ms) = (received_ms, sent_ms);
        adopted_under(limits, &socket).owes_answer()
    }

    #[test]
    fn if_the_kernel_does_not_tell_who_owes_an_answer_the_session_lives_longer() {
        assert!(owes(5, 6, limits(9, 1, 1)) && !owes(6, 5, limits(1, 9, 1)));
        assert!(owes(5, 5, limits(1, 9, 1)) && !owes(5, 5, limits(9, 1, 1)));
        assert!(!owes(5, 5, limits(0, 9, 1)));
        // What was sent later may be too little for an answer.
        let ms = |idle_ms, response_ms| limits(idle_ms * MS, response_ms * MS, 20);
        assert!(owes(60, 50, ms(20, 21)) && !owes(60, 50, ms(20, 20)));
        // It does not restart the response clock then.
        let received = |idle_ms, response_ms| Limits {
            activity: Activity::Received as u8,
            ..ms(idle_ms, response_ms)
        };
        assert!(owes(60, 50, received(20, 31)) && !owes(60, 50, received(20, 30)));
        // After a FIN another limit takes the place of the idle timeout.
        let closing = socket(state::CLOSE_WAIT, 5432, 1);
        let closes = |half_closed_timeout_ns| Limits {
            half_closed_timeout_ns,
            ..ms(4_000, 5_000)
        };
        assert!(adopted_under(closes(0), &closing).owes_answer());
        assert!(!adopted_under(closes(6_000 * MS), &closing).owes_answer());
    }

    #[test]
    fn no_answer_is_complete_before_the_minimum_was_sent_at_all() {
        assert!(owes(6, 5, limits(9, 1, 21)) && !owes(6, 5, limits(9, 1, 20)));
    }

    #[test]
    fn an_adopted_session_that_has_received_no_payload_owes_no_answer() {
        let mut socket = socket(state::CLOSE_WAIT, 5432, 1);
        let info = socket.info.as_mut().unwrap();
        // The FIN is counted as a byte.
        (info.bytes_received, info.last_data_received_ms) = (1, 0);
        let session = adopted_under(limits(1, 9, 1), &socket);
        assert_eq!(session.answered_ns, session.established_ns);
    }

    #[test]
    fn the_peer_s_fin_is_no_payload() {
        let sockets = [socket(state::CLOSE_WAIT, 5432, 1)];
        let adopted = adopt(&[entry(0, 5432, 3)], &Scope::All, &sockets);
        assert_eq!(adopted[0].1.bytes_received, 9);
    }

    /// An adopted session, and the same session caught up with a later state of its socket.
    fn later(change: impl FnOnce(&mut Info)) -> (Session, Session) {
        let socket = socket(state::ESTABLISHED, 5432, 1);
        let before = adopted_under(limits(9, 1, 1), &socket);
        let now = later_than(&before, limits(9, 1, 1), change);
        (before, now)
    }

    fn later_than(before: &Session, limits: Limits, change: impl FnOnce(&mut Info)) -> Session {
        let mut later = socket(state::ESTABLISHED, 5432, 1);
        let mut info = later.info.unwrap();
        (info.last_data_received_ms, info.last_data_sent_ms) = (500, 400);
        change(&mut info);
        later.info = Some(info);
        caught_up(before, &later, Some(&limits), 20_000 * MS, 0)
    }

    fn send(info: &mut Info, bytes: u32) {
        info.bytes_tried += u64::from(bytes);
        info.numbers_sent += u64::from(bytes);
    }

    #[test]
    fn a_socket_without_new_payload_leaves_its_session_as_it_was() {
        // A retransmission changes only the age of the last send.
        let (before, now) = later(|_| {});
        assert_eq!(now, before);
    }

    #[test]
    fn payload_that_was_dropped_before_it_left_was_not_sent() {
        let (before, now) = later(|info| {
            info.bytes_tried += 30;
            info.is_all_sent = false;
        });
        assert_eq!(now, before);
    }

    #[test]
    fn neither_the_syn_nor_a_fin_that_was_sent_is_payload() {
        let sent = |state, direction: Direction, change: fn(&mut Info)| {
            let socket = socket(state, 5432, 1);
            let mut info = socket.info.unwrap();
            info.bytes_tried += 9;
            change(&mut info);
            payload_sent(&socket, &info, direction as u8)
        };
        let waits = |info: &mut Info| info.is_all_sent = false;
        for (state, fin) in [
            (state::ESTABLISHED, 0),
            (state::CLOSE_WAIT, 0),
            (state::FIN_WAIT1, 1),
            (state::FIN_WAIT2, 1),
            (state::CLOSING, 1),
            (state::LAST_ACK, 1),
        ] {
            assert_eq!(sent(state, Direction::Inbound, |_| {}), 20 - fin);
            assert_eq!(sent(state, Direction::Outbound, |_| {}), 19 - fin);
        }
        assert_eq!(sent(state::LAST_ACK, Direction::Inbound, waits), 20);
        // The sequence numbers were read later than the byte count.
        let later = |info: &mut Info| info.numbers_sent += 100;
        assert_eq!(sent(state::ESTABLISHED, Direction::Inbound, later), 29);
    }

    #[test]
    fn payload_received_meanwhile_is_counted_and_owes_an_answer() {
        let (before, now) = later(|info| info.bytes_received += 1);
        let expected = Session {
            last_received_ns: 19_500 * MS,
            bytes_received: before.bytes_received + 1,
            sent_before_answer: 20,
            answered_ns: 0,
            ..before
        };
        assert_eq!(now, expected);
    }

    #[test]
    fn payload_sent_meanwhile_is_counted_and_is_the_answer_that_was_owed() {
        let (before, now) = later(|info| send(info, 1));
        let sent = |before: Session| Session {
            last_sent_ns: 19_600 * MS,
            bytes_sent: before.bytes_sent + 1,
            ..before
        };
        assert_eq!(now, sent(before));
        let owing = Session {
            answered_ns: 0,
            ..before
        };
        let answered = Session {
            answered_ns: 19_600 * MS,
            ..sent(owing)
        };
        let now = later_than(&owing, limits(9, 1, 1), |info| send(info, 1));
        assert_eq!(now, answered);
        // If payload passed both ways, the ages show which was last.
        let both = |info: &mut Info| {
            send(info, 1);
            info.bytes_received += 1;
        };
        assert!(!later(both).1.owes_answer());
        let (_, now) = later(|info| {
            both(info);
            info.last_data_received_ms = 300;
        });
        assert!(now.owes_answer());
    }

    #[test]
    fn less_than_the_minimum_sent_meanwhile_is_no_answer() {
        let owing = Session {
            answered_ns: 0,
            sent_before_answer: 15,
            ..later(|_| {}).0
        };
        let owes = |min_answer, received, sent| {
            let now = later_than(&owing, limits(9, 1, min_answer), |info| {
                send(info, sent);
                info.bytes_received += received;
            });
            assert_eq!(now.last_sent_ns, 19_600 * MS);
            now.owes_answer()
        };
        // With what was sent before.
        assert!(owes(10, 0, 4) && !owes(10, 0, 5));
        // What was sent before a request is no part of its answer.
        assert!(owes(10, 1, 9) && !owes(10, 1, 10));
    }

    /// A session with candidates, before and after the confirmation by its socket.
    fn asked(change: impl FnOnce(&mut Session, &mut Info), min_payload: u16) -> [Session; 2] {
        let mut of = socket(state::ESTABLISHED, 5432, 1);
        let mut session = adopt(&[entry(0, 5432, 3)], &Scope::All, &[of])[0].1;
        let mut info = of.info.unwrap();
        (session.received_candidate_ns, session.sent_candidate_ns) = (9_000 * MS, 8_000 * MS);
        change(&mut session, &mut info);
        of.info = Some(info);
        let limits = Limits {
            min_payload,
            ..Limits::default()
        };
        [session, confirmed(&session, &of, Some(&limits))]
    }

    #[test]
    fn only_payload_that_the_socket_has_received_counts_at_its_candidate_s_time() {
        let taken = |bytes: u64, min_payload| {
            let [before, now] = asked(|_, info| info.bytes_received += bytes, min_payload);
            assert_eq!(now.bytes_received, before.bytes_received + bytes);
            let stamp = now.last_received_ns;
            assert!([before.last_received_ns, 9_000 * MS].contains(&stamp));
            stamp > before.last_received_ns
        };
        assert!(taken(3, 1) && taken(3, 3));
        assert!(!taken(0, 1) && !taken(3, 4));
    }

    #[test]
    fn only_payload_that_the_socket_has_sent_counts_at_its_candidate_s_time() {
        let sent = |change: fn(&mut Session, &mut Info)| {
            let [before, now] = asked(change, 1);
            let stamp = now.last_sent_ns;
            assert!([before.last_sent_ns, 8_000 * MS].contains(&stamp));
            (stamp > before.last_sent_ns, now.bytes_sent)
        };
        assert_eq!(sent(|_, _| {}), (true, 20));
        // The candidate was dropped before it left.
        assert_eq!(sent(|session, _| session.bytes_sent = 25), (false, 20));
        // The size of the candidate is unknown.
        let unread = |session: &mut Session, _: &mut Info| session.flags |= flags::SENT_UNREAD;
        assert_eq!(sent(unread), (false, 20));
        let unread = |session: &mut Session, _: &mut Info| {
            session.flags |= flags::SENT_UNREAD;
            session.bytes_sent -= 7;
        };
        assert_eq!(sent(unread), (true, 20));
    }

    #[test]
    fn a_stamp_never_goes_back() {
        let (before, now) = later(|info| {
            send(info, 1);
            info.last_data_sent_ms = 19_000;
        });
        assert_eq!(now.last_sent_ns, before.last_sent_ns);
    }

    #[test]
    fn an_age_is_taken_as_so_much_shorter_as_it_may_be_too_long_and_not_as_the_future() {
        let info = Info {
            last_data_received_ms: 5_000,
            last_data_sent_ms: 7,
            ..socket(state::ESTABLISHED, 5432, 1).info.unwrap()
        };
        let now = 10_000 * MS;
        assert_eq!(activity(&info, now, 8 * MS), (5_008 * MS, now));
        assert_eq!(activity(&info, now, 0), (5_000 * MS, 9_993 * MS));
        // An age before the boot.
        assert_eq!(activity(&info, MS, 0).0, 1);
    }

    #[test]
    fn an_adopted_session_is_established_with_the_older_of_its_activities() {
        let socket = socket(state::ESTABLISHED, 5432, 1);
        let adopter = Adopter {
            entries: &[entry(0, 5432, 3)],
            limits_of_rules: &[],
            generation: 1,
            lag_ns: 8 * MS,
            scope: &Scope::All,
            ancestors: &HashMap::new(),
        };
        let session = adopter.session(&socket, &Listeners::default(), 3, 10_000 * MS);
        let session = session.unwrap();
        assert_eq!(session.last_received_ns, 5_008 * MS);
        assert_eq!(session.last_sent_ns, 7_008 * MS);
        assert_eq!(session.established_ns, 5_008 * MS);
    }

    #[test]
    fn bytes_and_not_ages_tell_activity_between_two_looks() {
        let at = |info: Info| Socket {
            info: Some(info),
            ..socket(state::ESTABLISHED, 5432, 1)
        };
        let session = |info: Info| adopt(&[entry(0, 5432, 3)], &Scope::All, &[at(info)])[0].1;
        let info = socket(state::ESTABLISHED, 5432, 1).info.unwrap();
        let first = session(info);
        let told = |info: Info| caught_up(&first, &at(info), None, 10_000 * MS, 0);
        let aged = Info {
            last_data_sent_ms: info.last_data_sent_ms + 4,
            ..info
        };
        assert_eq!(told(aged), first);
        let now = Info {
            last_data_sent_ms: 0,
            last_data_received_ms: 0,
            ..info
        };
        for more in [
            Info {
                bytes_received: info.bytes_received + 1,
                ..now
            },
            Info {
                bytes_tried: info.bytes_tried + 1,
                numbers_sent: info.numbers_sent + 1,
                numbers_acknowledged: info.numbers_acknowledged + 1,
                ..now
            },
        ] {
            let told = told(more);
            // The time of establishment does not change.
            assert_eq!(told.established_ns, first.established_ns);
            assert!(told.established_ns < session(more).established_ns);
            assert_eq!(told.last_activity_ns(), session(more).last_activity_ns());
            assert_eq!(
                (told.bytes_received, told.bytes_sent),
                (session(more).bytes_received, session(more).bytes_sent)
            );
        }
    }
}
