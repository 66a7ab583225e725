//! The session record, the value of the session map.

use crate::Owner;

/// An IPv6 address as four words in network byte order, as the kernel keeps it. An IPv4 address
/// is written as its IPv4-mapped form, so that one comparison serves both families.
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

    /// From the sixteen bytes of an address on the wire.
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The sixteen bytes of the address as on the wire.
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

/// Who opened a connection, as seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// Accepted here.
    Inbound = 1,
    /// Dialled from here.
    Outbound = 2,
}

impl Direction {
    /// The direction whose number lies in a record, or nothing where the record is damaged.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Inbound),
            2 => Some(Self::Outbound),
            _ => None,
        }
    }
}

/// Bits of [`Session::flags`].
pub mod flags {
    /// The kernel does not report the end of this session through `sock_ops`. So it is with
    /// connections that are older than the daemon: the callback flag can only be set from within a
    /// callback, and an established socket has none to come.
    pub const END_UNREPORTED: u8 = 1;
    /// The gate has refused payload of this session and the daemon has been told
    /// ([`EventKind::Expired`](crate::EventKind::Expired)), so that a flood of late packets is no
    /// flood of events. Gone with the next payload that passes.
    pub const EXPIRY_REPORTED: u8 = 2;
    /// The session is a subflow of an MPTCP connection: a TCP connection that no application holds.
    /// What the application holds is the MPTCP socket, which outlives its subflows.
    pub const MPTCP_SUBFLOW: u8 = 4;
}

/// One TCP session, from establishment to close. The kernel writes it on the packet path; the
/// daemon only reads it, except that it inserts the sessions that it adopts.
///
/// Times are nanoseconds of the coarse `CLOCK_MONOTONIC`, which lags behind the precise one: see
/// [`Policy::lag_ns`](crate::Policy::lag_ns).
/// The fields that every packet touches come first, next to the key in the kernel's hash element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Session {
    /// When new payload that counts (see [`Policy::min_payload`](crate::Policy::min_payload)) last
    /// arrived; the time of establishment where none has.
    pub last_received_ns: u64,
    /// When new payload that counts was last sent; the time of establishment where none has been.
    pub last_sent_ns: u64,
    /// When this host last answered: sent payload after it had received some. The time of
    /// establishment where it never has.
    pub answered_ns: u64,
    /// Payload bytes received since establishment, each counted once.
    pub bytes_received: u64,
    /// Payload bytes sent since establishment, each counted once.
    pub bytes_sent: u64,
    /// Until when the gate need not look at the session; see
    /// [`Policy::open_until_ns`](crate::Policy::open_until_ns). 0 where it has not looked under the
    /// policy of this generation.
    pub open_until_ns: u64,
    /// When the connection was established.
    pub established_ns: u64,
    /// The kernel's cookie of the network namespace (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// This host's address.
    pub local: Address,
    /// The peer's address.
    pub remote: Address,
    /// This host's port, in host byte order.
    pub local_port: u16,
    /// The peer's port, in host byte order.
    pub remote_port: u16,
    /// Interface that the socket is bound to, or 0. The kernel's look-up for `SOCK_DESTROY` needs
    /// it for sockets bound to a device and for link-local addresses.
    pub ifindex: u32,
    /// Generation of the match table that chose the rule.
    pub generation: u32,
    /// Index of the rule that decides.
    pub rule: u16,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// See [`flags`].
    pub flags: u8,
    /// [`jitter_seed`] of its socket: places its lifetime within the jitter.
    pub jitter_seed: u32,
    /// 1 while the last payload was received and not sent, on an inbound session: this host owes
    /// the answer. 0 otherwise. A field of its own, because time stamps of one tick do not tell
    /// which packet was first.
    pub owes_answer: u8,
    /// Always zero.
    pub reserved: [u8; 3],
    /// Whose it is.
    pub owner: Owner,
}

/// A number that looks random and is the same for a socket whenever it is asked, by the kernel's
/// programs and by a daemon that adopts the socket: the mixing function of `SplitMix64` on the cookie.
#[inline]
pub const fn jitter_seed(cookie: u64) -> u32 {
    let mut z = cookie.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 32) as u32
}

impl Session {
    /// When new payload that counts last passed in either direction.
    #[inline]
    pub const fn last_activity_ns(&self) -> u64 {
        if self.last_received_ns > self.last_sent_ns {
            self.last_received_ns
        } else {
            self.last_sent_ns
        }
    }

    /// Whether this host owes the answer to what it received.
    #[inline]
    pub const fn owes_answer(&self) -> bool {
        self.owes_answer != 0
    }

    /// Whether the kernel will not report the end of this session; see [`flags`].
    pub const fn end_is_unreported(&self) -> bool {
        self.flags & flags::END_UNREPORTED != 0
    }

    /// Whether this is a subflow of an MPTCP connection; see [`flags`].
    pub const fn is_mptcp_subflow(&self) -> bool {
        self.flags & flags::MPTCP_SUBFLOW != 0
    }
}

const _: () = {
    assert!(size_of::<Session>() == 152 && align_of::<Session>() == 8);
    assert!(core::mem::offset_of!(Session, bytes_sent) == 32);
    assert!(core::mem::offset_of!(Session, local) == 64);
    assert!(core::mem::offset_of!(Session, ifindex) == 100);
    assert!(core::mem::offset_of!(Session, flags) == 111);
    assert!(core::mem::offset_of!(Session, owes_answer) == 116);
    assert!(core::mem::offset_of!(Session, owner) == 120);
};

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Session {}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// The kernel counts cookies up, on some kernels in steps.
    #[test]
    fn the_seeds_of_cookies_that_follow_each_other_are_spread_evenly() {
        for step in [1, 2, 4_096] {
            let mut sixteenths = [0; 16];
            for n in 0..16_000 {
                sixteenths[(jitter_seed(7 + n * step) >> 28) as usize] += 1;
            }
            // 1,000 each; five standard deviations are 155.
            assert!(sixteenths.iter().all(|n| (845..=1_155).contains(n)));
        }
    }

    #[test]
    fn a_damaged_direction_is_not_a_direction() {
        assert_eq!(Direction::from_number(1), Some(Direction::Inbound));
        assert_eq!(Direction::from_number(2), Some(Direction::Outbound));
        assert_eq!(Direction::from_number(0), None);
        assert_eq!(Direction::from_number(3), None);
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;
    use crate::Owner;

    /// A session with these times, and nothing else of interest.
    pub(crate) fn session(established_ns: u64, received_ns: u64, sent_ns: u64) -> Session {
        Session {
            last_received_ns: received_ns,
            last_sent_ns: sent_ns,
            answered_ns: established_ns,
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
            jitter_seed: 0,
            owes_answer: 0,
            reserved: [0; 3],
            owner: Owner::UNKNOWN,
        }
    }
}
