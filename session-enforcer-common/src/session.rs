//! The session record, the value of the session table.

use core::net::{IpAddr, Ipv6Addr};

use crate::{Owner, expiry::later};

/// An IPv6 address as four words in network byte order, as in the kernel. An IPv4 address is stored in IPv4-mapped
/// form, so one comparison serves both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Address(pub [u32; 4]);

impl Address {
    const MAPPED_MARK: u32 = 0x0000_ffff_u32.to_be();

    /// The IPv4-mapped form of an IPv4 address given in network byte order.
    #[inline]
    pub const fn from_ipv4(network_order: u32) -> Self {
        Self([0, 0, Self::MAPPED_MARK, network_order])
    }

    /// Converts the sixteen bytes of an address in wire order.
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The sixteen bytes of the address in wire order.
    pub const fn octets(self) -> [u8; 16] {
        let (a, b) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        let (c, d) = (self.0[2].to_ne_bytes(), self.0[3].to_ne_bytes());
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Whether this is an IPv4 address in its IPv4-mapped form.
    pub const fn is_ipv4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::MAPPED_MARK
    }
}

/// An IPv4 address takes its IPv4-mapped form.
impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Self::from_octets(match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        })
    }
}

/// An IPv4-mapped address becomes an IPv4 address.
impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.octets()).to_canonical()
    }
}

/// Which side opened a connection, as seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// Accepted here.
    Inbound = 1,
    /// Dialled from here.
    Outbound = 2,
}

impl Direction {
    /// The number of a connection that another socket of this host dialled (`TCP_REPAIR`). The present socket has sent
    /// no SYN, so its sequence numbers include none.
    pub const DIALLED_BEFORE: u8 = 3;

    /// The direction with this number; `None` for an invalid number in a record.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Inbound),
            2 | Self::DIALLED_BEFORE => Some(Self::Outbound),
            _ => None,
        }
    }
}

/// Bits of [`Session::flags`].
pub mod flags {
    /// The kernel does not report the end of this session through `sock_ops`. This applies to adopted connections: the
    /// callback flag can only be set in a callback, and an established socket gets no further one. It also applies if
    /// the kernel refused the callback flag.
    pub const END_UNREPORTED: u8 = 1;
    /// The gate has dropped payload of this session and the daemon has the event
    /// ([`EventKind::Expired`](crate::EventKind::Expired)); further drops send no event. The next payload that passes
    /// clears the flag.
    pub const EXPIRY_REPORTED: u8 = 2;
    /// The session is a subflow of an MPTCP connection. The application holds the MPTCP socket, which outlives its
    /// subflows, and not the subflow's socket.
    pub const MPTCP_SUBFLOW: u8 = 4;
    /// A FIN of the peer has reached the hook, but the socket may not have accepted it. Not set if the FIN came before
    /// the session was tracked or behind headers that the parser does not walk.
    pub const PEER_HAS_ENDED: u8 = 8;
    /// The headers of the last sent packet could not be parsed. The socket's counters show how much it sent when the
    /// next packet leaves.
    pub const SENT_UNREAD: u8 = 16;
    /// The daemon has the event that this session may have ended ([`EventKind::MayEnd`](crate::EventKind::MayEnd)), and
    /// has not looked yet. Further packets that may end it send no event: a peer can send any number of them.
    pub const END_REPORTED: u8 = 32;
    /// This host has sent its FIN, so it owes no answer any more. Not set if the FIN was sent before the session was tracked,
    /// behind headers that the parser does not walk, or past the deadline.
    pub const HAS_ENDED: u8 = 64;
    /// The flags that packets set and that a record keeps.
    pub const OF_PACKETS: u8 = PEER_HAS_ENDED | HAS_ENDED;
}

/// The record of a TCP session, from establishment to close. The packet path writes it. The daemon reads it, inserts
/// the records of adopted sessions, and updates those whose owner it resolves.
///
/// Times are nanoseconds of `CLOCK_BOOTTIME`, read in the hook. Those of an adopted session are accurate to a few ticks
/// and never earlier than the event. The fields that every packet accesses come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Session {
    /// When new payload that counts (see [`Limits::min_payload`](crate::Limits::min_payload)) was last received; the
    /// time of establishment if there was none.
    pub last_received_ns: u64,
    /// When new payload that counts was last sent; the time of establishment if there was none.
    pub last_sent_ns: u64,
    /// When this host last answered, that is, sent payload after it had received some; the time of establishment if it
    /// has received none. 0 while it owes an answer: on an inbound session, while the last payload was received and not
    /// sent. A separate value, since two stamps of one tick do not show which packet came first.
    pub answered_ns: u64,
    /// Payload bytes that the socket has received since establishment, without retransmissions.
    pub bytes_received: u64,
    /// Payload bytes sent since establishment, without retransmissions. Includes the payload of a packet that is still
    /// in the hook.
    pub bytes_sent: u64,
    /// The receive candidate: when possibly new payload last reached the hook. It becomes the stamp when the socket has
    /// received payload, that is, when [`bytes_received`](Self::bytes_received) advances. 0 if there is none.
    pub received_candidate_ns: u64,
    /// The send candidate: when new payload that counts last left. It becomes the stamp when the socket has sent it,
    /// that is, when its `snd_nxt` has reached [`sent_candidate_end`](Self::sent_candidate_end).
    pub sent_candidate_ns: u64,
    /// Until when the gate stays open without a new check; see [`Limits::open_until_ns`](crate::Limits::open_until_ns).
    /// 0 if it has not been checked under the policy of this generation. [`SHUT`](Self::SHUT) if the daemon has decided
    /// to reset the session.
    pub open_until_ns: u64,
    /// Generation of the match table that chose the rule.
    pub generation: u32,
    /// Index of the session's rule.
    pub rule: u16,
    /// [`Direction`] as a number, or [`Direction::DIALLED_BEFORE`].
    pub direction: u8,
    /// See [`flags`].
    pub flags: u8,
    /// When the connection was established.
    pub established_ns: u64,
    /// Cookie of the network namespace (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// This host's address.
    pub local: Address,
    /// The peer's address.
    pub remote: Address,
    /// This host's port, in host byte order.
    pub local_port: u16,
    /// The peer's port, in host byte order.
    pub remote_port: u16,
    /// Interface that the socket is bound to, or 0. The kernel's lookup for `SOCK_DESTROY` needs it for sockets bound
    /// to a device and for link-local addresses.
    pub ifindex: u32,
    /// The owner of the socket.
    pub owner: Owner,
    /// The socket's count of segments with payload (including retransmissions, modulo 2^32) when its last packet left.
    pub data_segments_sent: u32,
    /// Sequence number after the payload that left at [`sent_candidate_ns`](Self::sent_candidate_ns).
    pub sent_candidate_end: u32,
    /// When the first FIN passed, of either side; [`NOT_HALF_CLOSED`](Self::NOT_HALF_CLOSED) until then. The kernel
    /// does not keep this time: for a session that was adopted half-closed it is the time of adoption.
    pub half_closed_ns: u64,
    /// The lower half of [`bytes_sent`](Self::bytes_sent) when payload that counts was last received. Bytes sent beyond
    /// it belong to the answer.
    pub sent_before_answer: u32,
    /// 1 if the payload that left at [`sent_candidate_ns`](Self::sent_candidate_ns) completes an answer, else 0.
    pub sent_candidate_completes_answer: u32,
}

/// The fields of a [`Session`] from its generation to its flags, as one word. They determine the rule by which the
/// session is judged, and are changed in one atomic step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice(pub u64);

impl Choice {
    /// Marks a session that has ended and whose slot is about to be freed. No policy has this generation.
    pub const ENDED: Self = Self(u32::MAX as u64);

    /// The choice in a session's record.
    pub const fn of(session: &Session) -> Self {
        let (direction, flags) = (session.direction as u64, session.flags as u64);
        Self(
            session.generation as u64 | (session.rule as u64) << 32 | direction << 48 | flags << 56,
        )
    }

    /// Generation of the match table that chose the rule.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        self.0 as u32
    }

    /// Index of the rule.
    #[inline(always)]
    pub const fn rule(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// This choice with another rule and generation.
    #[inline(always)]
    #[must_use]
    pub const fn by(self, rule: u16, generation: u32) -> Self {
        Self(self.0 >> 48 << 48 | (rule as u64) << 32 | generation as u64)
    }

    /// This choice with the direction of `before`, and those of its [`flags`] that are in `kept`.
    #[inline(always)]
    #[must_use]
    pub const fn keeping(self, before: Self, kept: u8) -> Self {
        let kept = (kept as u64) << 56 | 0xff << 48;
        Self(self.0 | before.0 & kept)
    }
}

/// The shortest limit that a rule can have.
pub const SHORTEST_LIMIT_NS: u64 = 1_000_000_000;

/// The fields of a [`Session`] that packets change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// See [`Session::last_received_ns`].
    pub last_received_ns: u64,
    /// See [`Session::last_sent_ns`].
    pub last_sent_ns: u64,
    /// See [`Session::answered_ns`].
    pub answered_ns: u64,
    /// See [`Session::bytes_received`].
    pub bytes_received: u64,
    /// See [`Session::bytes_sent`].
    pub bytes_sent: u64,
    /// See [`Session::received_candidate_ns`].
    pub received_candidate_ns: u64,
    /// See [`Session::sent_candidate_ns`].
    pub sent_candidate_ns: u64,
    /// See [`Session::sent_candidate_end`].
    pub sent_candidate_end: u32,
    /// See [`Session::sent_candidate_completes_answer`].
    pub sent_candidate_completes_answer: u32,
    /// See [`Session::sent_before_answer`].
    pub sent_before_answer: u32,
    /// See [`Session::data_segments_sent`].
    pub data_segments_sent: u32,
    /// See [`Session::half_closed_ns`].
    pub half_closed_ns: u64,
    /// The [`Session::flags`] that packets set: [`flags::OF_PACKETS`].
    pub flags: u8,
}

impl Session {
    /// The [`open_until_ns`](Self::open_until_ns) of a shut gate. The daemon sets it before it reads the record by
    /// which it decides to reset the session. A program that has stamped a packet checks it afterwards and drops the
    /// packet. So each packet is either stamped in that record or does not pass; see `docs/design/exact-deadlines.md`.
    /// Programs change it only at the daemon's request. The value is no valid time for an open gate: it is the first
    /// nanosecond after the boot.
    pub const SHUT: u64 = 1;

    /// The [`half_closed_ns`](Self::half_closed_ns) of a session without a FIN.
    pub const NOT_HALF_CLOSED: u64 = u64::MAX;

    /// Whether the daemon has shut the gate; see [`SHUT`](Self::SHUT).
    pub const fn is_shut(&self) -> bool {
        self.open_until_ns == Self::SHUT
    }

    /// When new payload that counts last passed in either direction.
    #[inline]
    pub const fn last_activity_ns(&self) -> u64 {
        later(self.last_received_ns, self.last_sent_ns)
    }

    /// The fields of the record that packets change.
    #[inline]
    pub const fn traffic(&self) -> Traffic {
        Traffic {
            last_received_ns: self.last_received_ns,
            last_sent_ns: self.last_sent_ns,
            answered_ns: self.answered_ns,
            bytes_received: self.bytes_received,
            bytes_sent: self.bytes_sent,
            received_candidate_ns: self.received_candidate_ns,
            sent_candidate_ns: self.sent_candidate_ns,
            sent_candidate_end: self.sent_candidate_end,
            sent_candidate_completes_answer: self.sent_candidate_completes_answer,
            sent_before_answer: self.sent_before_answer,
            data_segments_sent: self.data_segments_sent,
            half_closed_ns: self.half_closed_ns,
            flags: self.flags & flags::OF_PACKETS,
        }
    }

    /// Merges the activity of another record of the same session. No value goes back: the later of two stamps is kept.
    /// The record with the later activity determines whether an answer is owed; with equal times this record does. After
    /// its FIN this host owes none.
    #[inline]
    pub fn merge_activity(&mut self, other: &Traffic) {
        self.flags |= other.flags & flags::OF_PACKETS;
        let other_ns = other.last_received_ns.max(other.last_sent_ns);
        let owes_answer = if other_ns > self.last_activity_ns() {
            other.answered_ns == 0
        } else {
            self.owes_answer()
        };
        self.answered_ns = if owes_answer && self.flags & flags::HAS_ENDED == 0 {
            0
        } else {
            self.answered_ns.max(other.answered_ns)
        };
        if other.last_received_ns > self.last_received_ns {
            self.last_received_ns = other.last_received_ns;
            self.sent_before_answer = other.sent_before_answer;
        }
        self.last_sent_ns = self.last_sent_ns.max(other.last_sent_ns);
        self.bytes_received = self.bytes_received.max(other.bytes_received);
        self.bytes_sent = self.bytes_sent.max(other.bytes_sent);
        self.received_candidate_ns = self.received_candidate_ns.max(other.received_candidate_ns);
        if other.sent_candidate_ns > self.sent_candidate_ns {
            (self.sent_candidate_ns, self.sent_candidate_end) =
                (other.sent_candidate_ns, other.sent_candidate_end);
            self.sent_candidate_completes_answer = other.sent_candidate_completes_answer;
        }
        // The counter wraps around.
        let further = other
            .data_segments_sent
            .wrapping_sub(self.data_segments_sent);
        if further < 1 << 31 {
            self.data_segments_sent = other.data_segments_sent;
        }
        self.half_closed_ns = self.half_closed_ns.min(other.half_closed_ns);
    }

    /// Whether this host owes an answer.
    #[inline]
    pub const fn owes_answer(&self) -> bool {
        self.answered_ns == 0
    }

    /// Notes that this host has sent its FIN at `now_ns`, which must not be 0. The wait for an answer that is owed ends
    /// with it.
    #[inline(always)]
    pub const fn note_ended(&mut self, now_ns: u64) {
        if self.owes_answer() {
            self.answered_ns = now_ns;
        }
        self.flags |= flags::HAS_ENDED;
    }

    /// Whether there is a receive candidate that no later packet has confirmed.
    #[inline(always)]
    pub const fn awaits_received(&self) -> bool {
        self.received_candidate_ns > self.last_received_ns
    }

    /// Whether there is a send candidate that no later packet has confirmed.
    #[inline(always)]
    pub const fn awaits_sent(&self) -> bool {
        self.sent_candidate_ns > self.last_sent_ns
    }

    /// Whether the socket may have had activity that is not in the record.
    pub const fn has_candidate(&self) -> bool {
        self.awaits_received() || self.awaits_sent()
    }

    /// The record as if all candidates were confirmed. The received payload counts as the later one, since an answer
    /// never precedes its request.
    #[must_use]
    pub const fn with_candidate(mut self) -> Self {
        if self.awaits_sent() {
            self.stamp_sent(
                self.sent_candidate_ns,
                self.sent_candidate_completes_answer == 1,
            );
        }
        if self.awaits_received() {
            self.stamp_received(self.received_candidate_ns);
        }
        self
    }

    /// The earliest stamp that the session can get from `now_ns` on. A confirmed candidate gets the time at which it
    /// passed, which is not older than the shortest limit.
    #[inline(always)]
    pub const fn next_stamp_ns(&self, now_ns: u64) -> u64 {
        let mut next_ns = now_ns;
        if self.awaits_received() && is_recent(self.received_candidate_ns, next_ns, now_ns) {
            next_ns = self.received_candidate_ns;
        }
        if self.awaits_sent() && is_recent(self.sent_candidate_ns, next_ns, now_ns) {
            next_ns = self.sent_candidate_ns;
        }
        next_ns
    }

    /// Stamps payload that counts as received at `now_ns`, which must not be 0.
    #[inline(always)]
    pub const fn stamp_received(&mut self, now_ns: u64) {
        // A program that was preempted after it read the clock must not set the stamp back.
        if now_ns > self.last_received_ns {
            self.last_received_ns = now_ns;
        }
        // After its FIN this host cannot answer.
        if self.direction == Direction::Inbound as u8 && self.flags & flags::HAS_ENDED == 0 {
            self.answered_ns = 0;
        }
        self.sent_before_answer = self.bytes_sent as u32;
    }

    /// Whether the packet that brings the total to `bytes_sent` completes an answer: this host has then sent at least
    /// `least` bytes since it last received payload.
    #[inline(always)]
    pub const fn is_answered_by(&self, bytes_sent: u64, least: u32) -> bool {
        (bytes_sent as u32).wrapping_sub(self.sent_before_answer) >= least
    }

    /// Stamps payload that counts as sent at `now_ns`, which must not be 0.
    #[inline(always)]
    pub const fn stamp_sent(&mut self, now_ns: u64, is_answer: bool) {
        if now_ns > self.last_sent_ns {
            self.last_sent_ns = now_ns;
        }
        if is_answer && self.owes_answer() {
            self.answered_ns = now_ns;
        }
    }

    /// The session's share of its rule's jitter, in 65,536ths. It is a hash of both ends of the connection, so it stays
    /// the same for the session's life, and is evenly spread over many connections, which differ at least in one port.
    /// Without the key nobody can choose an end with a particular share.
    #[inline]
    pub const fn jitter_share(&self, key: u64) -> u16 {
        // Word by word without an array, because the stack of the kernel programs is small.
        let ports = (self.remote_port as u64) << 16 ^ self.local_port as u64;
        let hash = mix(mix(key ^ self.netns_cookie) ^ ports);
        let hash = mix(hash ^ pair(self.remote.0[0], self.remote.0[1]));
        let hash = mix(hash ^ pair(self.remote.0[2], self.remote.0[3]));
        let hash = mix(hash ^ pair(self.local.0[0], self.local.0[1]));
        let hash = mix(hash ^ pair(self.local.0[2], self.local.0[3]));
        (hash >> 48) as u16
    }

    /// Whether the kernel does not report the end of this session; see [`flags`].
    pub const fn end_is_unreported(&self) -> bool {
        self.flags & flags::END_UNREPORTED != 0
    }

    /// Whether this is a subflow of an MPTCP connection; see [`flags`].
    pub const fn is_mptcp_subflow(&self) -> bool {
        self.flags & flags::MPTCP_SUBFLOW != 0
    }
}

#[inline(always)]
const fn is_recent(time_ns: u64, before_ns: u64, now_ns: u64) -> bool {
    time_ns < before_ns && now_ns - time_ns < SHORTEST_LIMIT_NS
}

const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

/// One round of `SplitMix64`.
const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

const _: () = {
    assert!(size_of::<Session>() == 168 && align_of::<Session>() == 8);
    assert!(core::mem::offset_of!(Session, bytes_sent) == 32);
    assert!(cfg!(target_endian = "little"), "see Choice");
    assert!(core::mem::offset_of!(Session, generation) == 64);
    assert!(core::mem::offset_of!(Session, rule) == 68);
    assert!(core::mem::offset_of!(Session, direction) == 70);
    assert!(core::mem::offset_of!(Session, flags) == 71);
    assert!(core::mem::offset_of!(Session, local) == 88);
    assert!(core::mem::offset_of!(Session, ifindex) == 124);
    assert!(core::mem::offset_of!(Session, owner) == 128);
    assert!(core::mem::offset_of!(Session, data_segments_sent) == 144);
    assert!(core::mem::offset_of!(Session, half_closed_ns) == 152);
};

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Session {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_that_of_its_family_there_and_back() {
        for text in ["192.0.2.7", "0.0.0.0", "2001:db8::7", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            let address = Address::from(ip);
            assert_eq!(address.is_ipv4(), ip.is_ipv4(), "{text}");
            assert_eq!(IpAddr::from(address), ip);
        }
    }

    #[test]
    fn an_ipv4_address_is_its_mapped_form() {
        let v4 = Address::from_ipv4(u32::from_ne_bytes([10, 0, 0, 7]));
        assert!(v4.is_ipv4());
        assert_eq!(
            v4.octets(),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 7]
        );
        assert_eq!(Address::from_octets(v4.octets()), v4);
        assert!(!Address::from_octets([0; 16]).is_ipv4());
    }

    #[test]
    fn a_choice_is_the_word_that_lies_in_the_record() {
        let session = Session {
            generation: 0x0102_0304,
            rule: 0x0506,
            direction: Direction::Outbound as u8,
            flags: flags::MPTCP_SUBFLOW,
            ..tests_support::session(0, 0, 0)
        };
        let choice = Choice::of(&session);
        // SAFETY: the fields from here on are eight bytes of integers.
        let word = unsafe { (&raw const session.generation).cast::<u64>().read() };
        assert_eq!(choice.0, word);
        assert_eq!((choice.generation(), choice.rule()), (0x0102_0304, 0x0506));
        let changed = Session {
            generation: 9,
            rule: 7,
            ..session
        };
        assert_eq!(choice.by(7, 9), Choice::of(&changed));
        let whole = Choice(0).by(7, 9).keeping(choice, u8::MAX);
        assert_eq!(whole, Choice::of(&changed));
        let told = Session {
            flags: flags::END_UNREPORTED,
            ..changed
        };
        assert_eq!(
            Choice::of(&told).keeping(choice, flags::PEER_HAS_ENDED),
            Choice::of(&told)
        );
        assert_eq!(Choice::ENDED.generation(), u32::MAX);
    }

    const KEY: u64 = 0x0f1e_2d3c_4b5a_6978;

    #[test]
    fn with_another_key_the_shares_are_others() {
        let mut session = tests_support::session(0, 0, 0);
        let mut same = 0;
        for port in 0..=u16::MAX {
            session.remote_port = port;
            same += u32::from(session.jitter_share(KEY) == session.jitter_share(KEY + 1));
        }
        assert!(same < 10, "{same}");
    }

    #[test]
    fn the_shares_of_a_storm_are_evenly_spread() {
        let mut session = tests_support::session(0, 0, 0);
        let mut counts = [0u32; 16];
        for port in 0..=u16::MAX {
            session.remote_port = port;
            counts[usize::from(session.jitter_share(KEY) >> 12)] += 1;
        }
        assert!(counts.iter().all(|n| n.abs_diff(4_096) < 300), "{counts:?}");
        // Also spread evenly by address, with one port.
        let mut counts = [0u32; 16];
        for host in 0..=u16::MAX {
            session.remote = Address::from_ipv4((0x0a00_0000 | u32::from(host)).to_be());
            counts[usize::from(session.jitter_share(KEY) >> 12)] += 1;
        }
        assert!(counts.iter().all(|n| n.abs_diff(4_096) < 300), "{counts:?}");
    }

    #[test]
    fn only_the_flags_of_both_ends_are_traffic() {
        let mut session = tests_support::session(1, 1, 1);
        session.flags = !flags::OF_PACKETS;
        assert_eq!(session.traffic().flags, 0);
        session.flags = u8::MAX;
        assert_eq!(session.traffic().flags, flags::OF_PACKETS);
    }

    #[test]
    fn after_its_fin_this_host_owes_no_answer() {
        let mut session = tests_support::session(1, 4, 3);
        session.stamp_received(6);
        assert!(session.owes_answer());
        session.note_ended(7);
        assert!(!session.owes_answer());
        assert_eq!(session.answered_ns, 7);
        session.stamp_received(8);
        assert!(!session.owes_answer());
        // An answer that was given keeps its time.
        let mut session = tests_support::session(1, 4, 3);
        session.answered_ns = 5;
        session.note_ended(7);
        assert_eq!(session.answered_ns, 5);
    }

    #[test]
    fn each_flag_says_one_thing() {
        let of = |flags| {
            let session = Session {
                flags,
                ..tests_support::session(1, 1, 1)
            };
            (session.end_is_unreported(), session.is_mptcp_subflow())
        };
        assert_eq!(of(flags::END_UNREPORTED), (true, false));
        assert_eq!(of(flags::MPTCP_SUBFLOW), (false, true));
        assert_eq!(of(u8::MAX), (true, true));
        assert_eq!(
            of(!(flags::END_UNREPORTED | flags::MPTCP_SUBFLOW)),
            (false, false)
        );
    }

    #[test]
    fn a_gate_that_is_open_until_some_time_is_not_shut() {
        let open_until = |open_until_ns| Session {
            open_until_ns,
            ..tests_support::session(1, 1, 1)
        };
        assert!(open_until(Session::SHUT).is_shut());
        for time in [0, 2, 1_000_000_000, u64::MAX] {
            assert!(!open_until(time).is_shut());
        }
    }

    /// A later version that takes over the sessions must not move their deadlines.
    #[test]
    fn the_share_of_a_connection_is_for_ever() {
        let session = Session {
            netns_cookie: 0x0123_4567_89ab_cdef,
            local: Address([0x1111_1111, 0x2222_2222, 0x4444_4444, 0x8888_8888]),
            remote: Address([0xfedc_ba98, 0x7654_3210, 0x0f0f_0f0f, 0x1357_9bdf]),
            local_port: 0xbeef,
            remote_port: 0xcafe,
            ..tests_support::session(0, 0, 0)
        };
        assert_eq!(session.jitter_share(KEY), 34_614);
        let ipv4 = Session {
            local: Address::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 5]),
            remote: Address::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 7]),
            local_port: 5_432,
            remote_port: 51_234,
            ..tests_support::session(0, 0, 0)
        };
        assert_eq!(ipv4.jitter_share(KEY), 54_379);
    }

    #[test]
    fn traffic_does_not_change_the_share() {
        let mut session = tests_support::session(1, 1, 1);
        let share = session.jitter_share(KEY);
        session.stamp_received(5);
        session.stamp_sent(6, true);
        assert_eq!(session.jitter_share(KEY), share);
    }

    #[test]
    fn only_an_inbound_session_owes_and_the_first_payload_after_it_is_the_answer() {
        let mut session = tests_support::session(1, 1, 1);
        session.stamp_sent(2, true);
        assert_eq!(session.answered_ns, 1);
        session.stamp_received(3);
        assert!(session.owes_answer());
        session.stamp_sent(4, true);
        session.stamp_sent(5, true);
        assert_eq!((session.answered_ns, session.last_sent_ns), (4, 5));
        session.direction = Direction::Outbound as u8;
        session.stamp_received(6);
        assert!(!session.owes_answer());
    }

    #[test]
    fn payload_that_is_waited_for_counts_with_the_time_at_which_it_passed() {
        let mut session = tests_support::session(1, 2, 2);
        assert!(!session.has_candidate());
        assert_eq!(session.with_candidate(), session);
        (session.received_candidate_ns, session.sent_candidate_ns) = (5, 4);
        assert!(session.awaits_received() && session.awaits_sent());
        let settled = session.with_candidate();
        assert_eq!((settled.last_received_ns, settled.last_sent_ns), (5, 4));
        assert!(settled.owes_answer() && !settled.has_candidate());
        session.received_candidate_ns = 0;
        assert!(session.has_candidate() && !session.with_candidate().owes_answer());
    }

    #[test]
    fn no_stamp_is_earlier_than_what_is_waited_for() {
        let now_ns = 5 * SHORTEST_LIMIT_NS;
        let next = |received_candidate_ns, sent_candidate_ns| {
            let session = Session {
                received_candidate_ns,
                sent_candidate_ns,
                ..tests_support::session(1, 2, 2)
            };
            session.next_stamp_ns(now_ns)
        };
        assert_eq!(next(0, 0), now_ns);
        assert_eq!(next(now_ns - 3, now_ns - 2), now_ns - 3);
        assert_eq!(next(now_ns - 3, now_ns - 4), now_ns - 4);
        assert_eq!(next(now_ns + 1, 0), now_ns);
        // A candidate that old is never confirmed.
        assert_eq!(next(now_ns - SHORTEST_LIMIT_NS, 0), now_ns);
    }

    #[test]
    fn less_than_an_answer_leaves_the_debt() {
        let mut session = tests_support::session(1, 1, 1);
        session.bytes_sent = u64::from(u32::MAX);
        session.stamp_received(2);
        let sent = session.bytes_sent + 99;
        assert!(session.is_answered_by(sent, 99) && !session.is_answered_by(sent, 100));
        (
            session.sent_candidate_ns,
            session.sent_candidate_completes_answer,
        ) = (3, 0);
        let settled = session.with_candidate();
        assert_eq!((settled.owes_answer(), settled.last_sent_ns), (true, 3));
        session.stamp_sent(3, false);
        assert_eq!((session.owes_answer(), session.last_sent_ns), (true, 3));
        // The parts of an answer are added up, from the last request on.
        session.bytes_sent = sent;
        assert!(session.is_answered_by(sent + 1, 100));
        session.stamp_received(4);
        assert!(!session.is_answered_by(sent + 1, 100));
    }

    #[test]
    fn merged_records_owe_by_the_later_activity_and_no_value_goes_back() {
        let mut read = tests_support::session(1, 4, 3);
        (read.bytes_received, read.bytes_sent) = (40, 30);
        read.answered_ns = 3;
        let mut owes = read;
        owes.stamp_received(6);
        owes.bytes_received = 60;
        owes.half_closed_ns = 6;
        owes.flags |= flags::PEER_HAS_ENDED;
        let mut answered = owes;
        answered.stamp_sent(7, true);
        answered.bytes_sent = 70;
        (owes.data_segments_sent, answered.data_segments_sent) = (u32::MAX, 1);
        read.data_segments_sent = u32::MAX - 1;
        (
            read.received_candidate_ns,
            owes.received_candidate_ns,
            answered.received_candidate_ns,
        ) = (1, 6, 6);
        (answered.sent_candidate_ns, answered.sent_candidate_end) = (7, 9);
        for records in [[read, owes], [owes, answered], [read, answered]] {
            let [before, after] = records;
            for [mut joined, other] in [[before, after], [after, before]] {
                joined.merge_activity(&other.traffic());
                assert_eq!(joined, after);
            }
        }
        // After this host's FIN no answer is owed, whichever record has it.
        let mut ended = read;
        ended.note_ended(5);
        for [mut joined, other] in [[ended, owes], [owes, ended]] {
            joined.merge_activity(&other.traffic());
            assert_eq!((joined.owes_answer(), joined.last_received_ns), (false, 6));
        }
        // Other fields are not merged.
        let mut joined = read;
        joined.merge_activity(&Traffic {
            flags: u8::MAX,
            ..read.traffic()
        });
        assert_eq!(joined.flags, read.flags | flags::OF_PACKETS);
        // With equal times this record's value is kept.
        let told = Session {
            answered_ns: 6,
            ..owes
        };
        let mut joined = told;
        joined.merge_activity(&Traffic {
            sent_before_answer: 9,
            sent_candidate_end: 9,
            sent_candidate_completes_answer: 0,
            ..owes.traffic()
        });
        assert_eq!(joined, told);
    }

    #[test]
    fn a_count_of_segments_is_later_if_it_is_less_than_half_a_round_ahead() {
        let counted = |data_segments_sent| Session {
            data_segments_sent,
            ..tests_support::session(1, 1, 1)
        };
        for before in [0, 7, u32::MAX] {
            for (ahead, taken) in [(0, 0), ((1 << 31) - 1, (1 << 31) - 1), (1 << 31, 0)] {
                let mut joined = counted(before);
                joined.merge_activity(&counted(before.wrapping_add(ahead)).traffic());
                assert_eq!(joined.data_segments_sent, before.wrapping_add(taken));
            }
        }
    }

    #[test]
    fn a_damaged_direction_is_not_a_direction() {
        assert_eq!(Direction::from_number(1), Some(Direction::Inbound));
        assert_eq!(Direction::from_number(2), Some(Direction::Outbound));
        assert_eq!(Direction::from_number(0), None);
        assert_eq!(Direction::from_number(3), Some(Direction::Outbound));
        assert_eq!(Direction::from_number(4), None);
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;
    use crate::Owner;

    /// A session with these times.
    pub(crate) fn session(established_ns: u64, received_ns: u64, sent_ns: u64) -> Session {
        Session {
            last_received_ns: received_ns,
            last_sent_ns: sent_ns,
            answered_ns: established_ns.max(1),
            bytes_received: 0,
            bytes_sent: 0,
            open_until_ns: 0,
            established_ns,
            netns_cookie: 1,
            local: Address::default(),
            remote: Address::default(),
            local_port: 0,
            remote_port: 0,
            ifindex: 0,
            generation: 0,
            rule: 0,
            direction: Direction::Inbound as u8,
            flags: 0,
            owner: Owner::UNKNOWN,
            received_candidate_ns: 0,
            sent_candidate_ns: 0,
            data_segments_sent: 0,
            half_closed_ns: Session::NOT_HALF_CLOSED,
            sent_candidate_end: 0,
            sent_before_answer: 0,
            sent_candidate_completes_answer: 1,
        }
    }
}
