//! Matching: the facts of a connection, the entries of the match table, and the function that compares them.

use crate::{Address, Ancestors, Direction, Session};

/// Rule number of an exempting entry: its connections are not tracked.
pub const RULE_EXEMPT: u16 = u16::MAX;

/// The known facts of a connection at establishment, except its [`Ancestors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whether this host accepted or dialled the connection.
    pub direction: Direction,
    /// This host's address.
    pub local: Address,
    /// The peer's address.
    pub remote: Address,
    /// This host's port, in host byte order.
    pub local_port: u16,
    /// The peer's port, in host byte order.
    pub remote_port: u16,
    /// The owner's user id; valid if [`known`](Self::known) has [`UID`](Self::UID).
    pub uid: u32,
    /// Which owner facts are known: [`UID`](Self::UID), [`CGROUP`](Self::CGROUP) or both.
    pub known: u8,
}

impl Facts {
    /// Bit of [`known`](Self::known): the user is known.
    pub const UID: u8 = 1;
    /// Bit of [`known`](Self::known): the cgroup and its ancestors are known.
    pub const CGROUP: u8 = 2;

    /// The facts of a tracked session; the caller adds [`CGROUP`](Self::CGROUP). An invalid direction counts as
    /// inbound, so it cannot hide a session from a server's rules.
    #[inline(always)]
    pub const fn of(session: &Session) -> Self {
        Self {
            direction: match Direction::from_number(session.direction) {
                Some(direction) => direction,
                None => Direction::Inbound,
            },
            local: session.local,
            remote: session.remote,
            local_port: session.local_port,
            remote_port: session.remote_port,
            uid: session.owner.uid,
            known: if session.owner.is_known() {
                Self::UID
            } else {
                0
            },
        }
    }
}

/// A CIDR prefix. An IPv4 prefix of length n is the IPv4-mapped prefix of length 96 + n. The all-zero mask matches
/// every address of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Prefix {
    /// Network byte order; bits outside the mask are 0.
    pub address: Address,
    /// The bits that must be equal.
    pub mask: Address,
}

impl Prefix {
    /// The prefix that contains every address.
    pub const ANY: Self = Self {
        address: Address([0; 4]),
        mask: Address([0; 4]),
    };

    /// The first `length` bits (at most 128) of `address`.
    pub const fn new(address: Address, length: u8) -> Self {
        let ones = if length == 0 {
            0
        } else {
            u128::MAX << (128 - if length > 128 { 128 } else { length })
        };
        let mask = Address::from_octets(ones.to_be_bytes());
        let (a, m) = (address.0, mask.0);
        Self {
            address: Address([a[0] & m[0], a[1] & m[1], a[2] & m[2], a[3] & m[3]]),
            mask,
        }
    }

    /// Whether the prefix contains the address.
    #[inline(always)]
    pub const fn contains(&self, a: &Address) -> bool {
        let (p, m) = (&self.address.0, &self.mask.0);
        // One comparison instead of four branches: fewer states for the verifier.
        ((a.0[0] & m[0]) ^ p[0])
            | ((a.0[1] & m[1]) ^ p[1])
            | ((a.0[2] & m[2]) ^ p[2])
            | ((a.0[3] & m[3]) ^ p[3])
            == 0
    }
}

/// An inclusive port range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ANY: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// Whether the range contains the port.
    #[inline(always)]
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// Number of ports in the range.
    pub const fn count(&self) -> u32 {
        (self.last as u32 + 1).saturating_sub(self.first as u32)
    }
}

/// One entry of the match table: one combination of a rule's directions, prefixes, port ranges and owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MatchEntry {
    /// Prefix of this host's address.
    pub local: Prefix,
    /// Prefix of the peer's address.
    pub remote: Prefix,
    /// Id of the cgroup that is, or is an ancestor of, the socket's cgroup; 0 matches any cgroup.
    pub cgroup_id: u64,
    /// Ports on this host.
    pub local_ports: PortRange,
    /// Ports of the peer.
    pub remote_ports: PortRange,
    /// User id of the owner; used if [`asks_user`](Self::asks_user) is not 0.
    pub uid: u32,
    /// Index of the rule, or [`RULE_EXEMPT`].
    pub rule: u16,
    /// Matching [`Direction`]s, as the sum of their numbers.
    pub directions: u8,
    /// Matching address families: [`IPV4`](Self::IPV4), [`IPV6`](Self::IPV6) or both. The prefixes are not sufficient:
    /// `::/0` also contains every IPv4-mapped address.
    pub families: u8,
    /// Whether the user must match: 0 or 1.
    pub asks_user: u8,
    /// Always zero.
    pub reserved: [u8; 7],
}

impl MatchEntry {
    /// The `directions` of an entry that matches both directions.
    pub const BOTH_DIRECTIONS: u8 = Direction::Inbound as u8 | Direction::Outbound as u8;
    /// Bit of `families` for IPv4 addresses, which are stored in IPv4-mapped form.
    pub const IPV4: u8 = 1;
    /// Bit of `families` for all other addresses.
    pub const IPV6: u8 = 2;
    /// The `families` of an entry that matches both families.
    pub const BOTH_FAMILIES: u8 = Self::IPV4 | Self::IPV6;

    /// An entry of the rule that matches every connection.
    pub const fn any(rule: u16) -> Self {
        Self {
            local: Prefix::ANY,
            remote: Prefix::ANY,
            cgroup_id: 0,
            local_ports: PortRange::ANY,
            remote_ports: PortRange::ANY,
            uid: 0,
            rule,
            directions: Self::BOTH_DIRECTIONS,
            families: Self::BOTH_FAMILIES,
            asks_user: 0,
            reserved: [0; 7],
        }
    }

    /// Whether the entry depends on owner facts that are not known.
    #[inline(always)]
    pub const fn needs_owner(&self, facts: &Facts) -> bool {
        self.asks_user != 0 && facts.known & Facts::UID == 0
            || self.cgroup_id != 0 && facts.known & Facts::CGROUP == 0
    }
}

/// Head of one of the two match tables. One table is active; the other receives the next policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Generation of the policy. A daemon that takes over sessions continues the earlier daemon's count.
    pub generation: u32,
    /// Number of valid entries.
    pub entries: u32,
    /// Slots of the session table that are reserved for each rule.
    pub share: u32,
    /// Slots that are reserved for the shares of all other rules.
    pub reserve: u32,
}

impl Table {
    /// Number of match tables.
    pub const COUNT: u32 = 2;

    /// The [`share`](Self::share) and [`reserve`](Self::reserve) for a number of rules that track sessions. An eighth
    /// of the `slots` of the session table is divided among them.
    pub const fn shares(rules: u32, slots: u32) -> (u32, u32) {
        let Some(share) = (slots / 8).checked_div(rules) else {
            return (0, 0);
        };
        (share, share * (rules - 1))
    }
}

const _: () = {
    assert!(size_of::<Prefix>() == 32);
    assert!(size_of::<MatchEntry>() == 96 && align_of::<MatchEntry>() == 8);
    assert!(core::mem::offset_of!(MatchEntry, rule) == 84);
    assert!(size_of::<Table>() == 16);
};

// SAFETY: integers only, no padding (the sizes are asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for MatchEntry {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Table {}

/// Whether the entry applies to the connection. The first entry of a table that applies decides.
///
/// An entry that depends on unknown owner facts ([`MatchEntry::needs_owner`]) counts as applying, so that no connection
/// escapes a rule because its owner is not known yet.
#[inline(always)]
pub fn matches(facts: &Facts, ancestors: &Ancestors, entry: &MatchEntry) -> bool {
    entry.directions & facts.direction as u8 != 0
        && entry.families & family(facts) != 0
        && entry.local_ports.contains(facts.local_port)
        && entry.remote_ports.contains(facts.remote_port)
        && entry.local.contains(&facts.local)
        && entry.remote.contains(&facts.remote)
        && (entry.asks_user == 0 || facts.known & Facts::UID == 0 || facts.uid == entry.uid)
        && (entry.cgroup_id == 0
            || facts.known & Facts::CGROUP == 0
            || ancestors.contains(entry.cgroup_id))
}

/// The first entry that applies, with unknown owner facts counted as matching. An exempting entry only applies if its
/// owner facts are known.
pub fn first_possible<'a>(
    entries: &'a [MatchEntry],
    facts: &Facts,
    ancestors: &Ancestors,
) -> Option<&'a MatchEntry> {
    let is_no_favour = |entry: &MatchEntry| entry.rule != RULE_EXEMPT || !entry.needs_owner(facts);
    let applies = |entry: &&MatchEntry| matches(facts, ancestors, entry) && is_no_favour(entry);
    entries.iter().find(applies)
}

/// The address family of a connection; both addresses have the same one.
#[inline(always)]
fn family(facts: &Facts) -> u8 {
    if facts.remote.is_ipv4() {
        MatchEntry::IPV4
    } else {
        MatchEntry::IPV6
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn v4(text: &str) -> Address {
        let a: Ipv4Addr = text.parse().unwrap();
        Address::from_octets(a.to_ipv6_mapped().octets())
    }

    fn v6(text: &str) -> Address {
        Address::from_octets(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    fn facts() -> Facts {
        Facts {
            direction: Direction::Inbound,
            local: v4("10.0.0.5"),
            remote: v4("192.0.2.7"),
            local_port: 5432,
            remote_port: 50000,
            uid: 1000,
            known: Facts::UID | Facts::CGROUP,
        }
    }

    fn matches(facts: &Facts, entry: &MatchEntry) -> bool {
        super::matches(facts, &Ancestors::of(&[3, 5, 7]), entry)
    }

    fn entry() -> MatchEntry {
        MatchEntry::any(0)
    }

    #[test]
    fn an_eighth_of_the_slots_is_divided_among_the_rules() {
        assert_eq!(Table::shares(0, 1_000), (0, 0));
        // One rule has the whole table.
        assert_eq!(Table::shares(1, 1_000), (125, 0));
        assert_eq!(Table::shares(3, 160), (6, 12));
        // Too few slots for shares.
        assert_eq!(Table::shares(3, 16), (0, 0));
        for rules in 1..=crate::MAX_RULES {
            let (share, reserve) = Table::shares(rules, 262_144);
            assert!(reserve + share <= 262_144 / 8 && (rules == 1) == (reserve == 0));
        }
    }

    #[test]
    fn each_condition_decides_alone() {
        let f = facts();
        assert!(matches(&f, &entry()));
        let range = |first, last| PortRange { first, last };
        let hits = [
            MatchEntry {
                directions: 1,
                ..entry()
            },
            MatchEntry {
                local_ports: range(5432, 5432),
                ..entry()
            },
            MatchEntry {
                remote_ports: range(49000, 50000),
                ..entry()
            },
            MatchEntry {
                local: Prefix::new(v4("10.0.0.0"), 96 + 8),
                ..entry()
            },
            MatchEntry {
                remote: Prefix::new(v4("192.0.2.7"), 128),
                ..entry()
            },
            of_user(1000),
            of_cgroup(3),
            of_cgroup(7),
        ];
        let misses = [
            of_user(0),
            of_cgroup(4),
            MatchEntry {
                directions: 2,
                ..entry()
            },
            MatchEntry {
                local_ports: range(5433, 6000),
                ..entry()
            },
            MatchEntry {
                remote_ports: range(0, 49999),
                ..entry()
            },
            MatchEntry {
                local: Prefix::new(v4("11.0.0.0"), 96 + 8),
                ..entry()
            },
            MatchEntry {
                remote: Prefix::new(v4("192.0.2.6"), 128),
                ..entry()
            },
            MatchEntry {
                remote: Prefix::new(v6("2001:db8::"), 32),
                ..entry()
            },
        ];
        assert!(hits.iter().all(|e| matches(&f, e)));
        assert!(!misses.iter().any(|e| matches(&f, e)));
    }

    fn of_user(uid: u32) -> MatchEntry {
        MatchEntry {
            uid,
            asks_user: 1,
            ..entry()
        }
    }

    fn of_cgroup(cgroup_id: u64) -> MatchEntry {
        MatchEntry {
            cgroup_id,
            ..entry()
        }
    }

    #[test]
    fn an_unknown_owner_leaves_an_entry_undecided_and_does_not_exclude_it() {
        for (known, user_open, cgroup_open) in [
            (0, true, true),
            (Facts::UID, false, true),
            (Facts::CGROUP, true, false),
            (Facts::UID | Facts::CGROUP, false, false),
        ] {
            let f = Facts { known, ..facts() };
            assert!(!entry().needs_owner(&f) && matches(&f, &entry()));
            assert_eq!(of_user(5).needs_owner(&f), user_open);
            assert_eq!(matches(&f, &of_user(5)), user_open);
            assert_eq!(of_cgroup(4).needs_owner(&f), cgroup_open);
            assert_eq!(matches(&f, &of_cgroup(4)), cgroup_open);
        }
    }

    #[test]
    fn the_first_entry_that_may_apply_is_chosen_and_nobody_unknown_is_exempt() {
        let exempt = MatchEntry {
            rule: RULE_EXEMPT,
            ..of_user(1000)
        };
        let entries = [
            exempt,
            MatchEntry {
                rule: 1,
                ..of_user(5)
            },
            MatchEntry::any(2),
        ];
        let chosen = |entries: &[MatchEntry], known, uid| {
            let f = Facts {
                uid,
                known,
                ..facts()
            };
            first_possible(entries, &f, &Ancestors::UNKNOWN).map(|entry| entry.rule)
        };
        assert_eq!(chosen(&entries, 0, 1000), Some(1));
        assert_eq!(chosen(&entries, Facts::UID, 1000), Some(RULE_EXEMPT));
        assert_eq!(chosen(&entries, Facts::UID, 5), Some(1));
        assert_eq!(chosen(&entries, Facts::UID, 6), Some(2));
        assert_eq!(chosen(&entries[..2], Facts::UID, 6), None);
        // An exemption that asks for no owner holds for all.
        let all = MatchEntry {
            rule: RULE_EXEMPT,
            ..entry()
        };
        assert_eq!(chosen(&[all], 0, 0), Some(RULE_EXEMPT));
    }

    #[test]
    fn a_family_is_told_apart_also_where_the_prefix_covers_both() {
        let ipv6 = Facts {
            local: v6("2001:db8::1"),
            remote: v6("2001:db8::2"),
            ..facts()
        };
        let only = |families| MatchEntry {
            families,
            ..entry()
        };
        assert!(matches(&facts(), &only(MatchEntry::IPV4)));
        assert!(!matches(&facts(), &only(MatchEntry::IPV6)));
        assert!(!matches(&ipv6, &only(MatchEntry::IPV4)));
        assert!(matches(&ipv6, &only(MatchEntry::IPV6)));
    }

    #[test]
    fn every_ipv4_address_and_no_other_is_in_the_prefix_of_all_ipv4() {
        let all_v4 = Prefix::new(v4("0.0.0.0"), 96);
        assert!(all_v4.contains(&v4("255.255.255.255")));
        assert!(!all_v4.contains(&v6("::1")));
        assert!(Prefix::ANY.contains(&v6("::1")) && Prefix::ANY.contains(&v4("1.2.3.4")));
    }

    #[test]
    fn each_bit_of_an_address_counts_within_the_prefix_and_none_behind_it() {
        let base = 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210_u128;
        let address = |bits: u128| Address::from_octets(bits.to_be_bytes());
        for (base, length) in [0, base, u128::MAX]
            .iter()
            .flat_map(|b| (0..=128).map(move |n| (*b, n)))
        {
            let prefix = Prefix::new(address(base), length);
            for bit in 0..128 {
                let other = address(base ^ 1 << (127 - bit));
                assert_eq!(prefix.contains(&other), bit >= length, "{length} {bit}");
            }
            // Equal differences in two words must not cancel out.
            for words in [0b11, 0b101, 0b1001, 0b110, 0b1010, 0b1100, 0b1111_u128] {
                let difference: u128 = (0..4).map(|word| (words >> word & 1) << (32 * word)).sum();
                let first = difference.leading_zeros() as u8;
                let other = address(base ^ difference);
                assert_eq!(
                    prefix.contains(&other),
                    first >= length,
                    "{length} {words:b}"
                );
            }
        }
    }

    #[test]
    fn a_range_counts_both_of_its_ends() {
        let count = |first, last| PortRange { first, last }.count();
        assert_eq!(PortRange::ANY.count(), 65_536);
        assert_eq!((count(0, 0), count(7, 7), count(7, 9)), (1, 1, 3));
        assert_eq!((count(1, 0), count(9, 7)), (0, 0));
    }

    proptest! {
        #[test]
        fn a_prefix_contains_what_shares_its_first_bits(a: u128, b: u128, length in 0u8..=128) {
            let prefix = Prefix::new(Address::from_octets(a.to_be_bytes()), length);
            let shared = (a ^ b).leading_zeros() >= u32::from(length);
            prop_assert_eq!(prefix.contains(&Address::from_octets(b.to_be_bytes())), shared);
        }
    }
}
