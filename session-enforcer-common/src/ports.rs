//! Port filters: whether a connection's ports allow any rule to match it. The kernel programs check them first, since
//! most packets belong to connections that no rule matches.

use core::ptr;

use crate::{MatchEntry, PortRange, RULE_EXEMPT, Table};

const WORD_BITS: usize = u64::BITS as usize;

const WORDS: usize = (u16::MAX as usize + 1) / WORD_BITS;

/// A set of ports as a bit map.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct PortSet([u64; WORDS]);

impl PortSet {
    /// The word of the port's bit, shifted so that the bit is the lowest. The higher bits are arbitrary.
    ///
    /// # Safety
    ///
    /// The set must be readable. It may change during the call.
    #[inline(always)]
    unsafe fn lowest_bit(set: *const Self, port: u16) -> u64 {
        let (word, bit) = (usize::from(port) / WORD_BITS, usize::from(port) % WORD_BITS);
        // SAFETY: the caller guarantees a readable set, and a port is never beyond its last word.
        unsafe { ptr::read_volatile(set.cast::<u64>().add(word)) >> bit }
    }

    fn add(&mut self, ports: PortRange) {
        let (first, last) = (usize::from(ports.first), usize::from(ports.last));
        if first > last {
            return;
        }
        // The masks for the first and the last word.
        let from = u64::MAX << (first % WORD_BITS);
        let to = u64::MAX >> (WORD_BITS - 1 - last % WORD_BITS);
        let (first, last) = (first / WORD_BITS, last / WORD_BITS);
        for (index, word) in (first..).zip(&mut self.0[first..=last]) {
            let lower = if index == first { from } else { u64::MAX };
            let upper = if index == last { to } else { u64::MAX };
            *word |= lower & upper;
        }
    }
}

/// A filter of connections by their two ports. It may accept a connection that no entry of the match table applies to,
/// since it has no addresses and owners. It never rejects a connection that an entry applies to.
///
/// Each entry is in the set in which it takes fewer ports: a rule for a server in the local set, a rule for a client in
/// the remote set.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PortFilter {
    local: PortSet,
    remote: PortSet,
}

const _: () = {
    assert!(size_of::<PortFilter>() == 16_384 && align_of::<PortFilter>() == 8);
    assert!(core::mem::offset_of!(PortFilter, remote) == 8192);
};

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for PortFilter {}

/// All filters of the kernel programs.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PortFilters {
    /// The filter of each match table, by the table's index.
    pub of_tables: [PortFilter; Table::COUNT as usize],
    /// Accepts the packets of every connection that has a session, also under an earlier policy. During a policy change
    /// it accepts every connection.
    pub of_packets: PortFilter,
}

const _: () = {
    assert!(size_of::<PortFilters>() == 49_152);
    assert!(core::mem::offset_of!(PortFilters, of_packets) == 32_768);
};

// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for PortFilters {}

impl PortFilters {
    /// Accepts nothing.
    pub const NONE: Self = Self {
        of_tables: [PortFilter::NONE; Table::COUNT as usize],
        of_packets: PortFilter::NONE,
    };
}

impl PortFilter {
    /// Accepts no connection.
    const NONE: Self = Self {
        local: PortSet([0; WORDS]),
        remote: PortSet([0; WORDS]),
    };

    /// Accepts every connection.
    pub const ALL: Self = Self {
        local: PortSet([u64::MAX; WORDS]),
        ..Self::NONE
    };

    /// Accepts only local port 0, which no established connection has. A closing socket gives its port back before its
    /// RST leaves, and that RST may be the only sign of the session's end.
    const CLOSING: Self = {
        let mut filter = Self::NONE;
        filter.local.0[0] = 1;
        filter
    };

    /// The filter of a match table with these entries.
    ///
    /// Exempting entries are skipped. If no other entry can match a connection, it is not tracked, whoever its owner
    /// is.
    pub fn of<'a>(entries: impl IntoIterator<Item = &'a MatchEntry>) -> Self {
        let mut filter = Self::CLOSING;
        for entry in entries {
            if entry.rule == RULE_EXEMPT {
                continue;
            }
            if entry.local_ports.count() <= entry.remote_ports.count() {
                filter.local.add(entry.local_ports);
            } else {
                filter.remote.add(entry.remote_ports);
            }
        }
        filter
    }

    /// Also accepts this local port, with any remote port.
    pub fn add_local(&mut self, port: u16) {
        self.local.add(PortRange {
            first: port,
            last: port,
        });
    }

    /// Whether an entry may apply to a connection with these ports, in host byte order.
    #[inline(always)]
    pub fn may_match(&self, local_port: u16, remote_port: u16) -> bool {
        // SAFETY: a reference is readable.
        unsafe { Self::ask(self, local_port, remote_port) }
    }

    /// [`may_match`](Self::may_match) for a filter that may change during the call. Branch-free: this is nearly the
    /// whole cost of a packet of an untracked connection.
    ///
    /// # Safety
    ///
    /// The filter must be readable.
    #[inline(always)]
    pub unsafe fn ask(filter: *const Self, local_port: u16, remote_port: u16) -> bool {
        // SAFETY: the caller guarantees a readable filter.
        let bits = unsafe {
            PortSet::lowest_bit(&raw const (*filter).local, local_port)
                | PortSet::lowest_bit(&raw const (*filter).remote, remote_port)
        };
        bits & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{Address, Ancestors, Direction, Facts, matches};

    const fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    fn entry(local_ports: PortRange, remote_ports: PortRange) -> MatchEntry {
        MatchEntry {
            local_ports,
            remote_ports,
            ..MatchEntry::any(0)
        }
    }

    /// The ports that the filter accepts.
    fn ports(filter: &PortFilter, answers: impl Fn(&PortFilter, u16) -> bool) -> Vec<u16> {
        (0..=u16::MAX)
            .filter(|port| answers(filter, *port))
            .collect()
    }

    fn local_ports(filter: &PortFilter) -> Vec<u16> {
        ports(filter, |filter, port| filter.may_match(port, 1))
    }

    fn remote_ports(filter: &PortFilter) -> Vec<u16> {
        ports(filter, |filter, port| filter.may_match(1, port))
    }

    #[test]
    fn without_a_rule_only_the_port_of_a_closing_socket_is_left() {
        let filter = PortFilter::of(&[]);
        assert_eq!(local_ports(&filter), [0]);
        assert_eq!(remote_ports(&filter), []);
    }

    #[test]
    fn ranges_are_taken_exactly_within_a_word_and_over_several() {
        for (first, last) in [
            (1, 1),
            (5, 62),
            (63, 64),
            (64, 127),
            (60, 300),
            (5432, 5432),
            (65_535, 65_535),
            (1, 65_534),
        ] {
            let wanted: Vec<u16> = (first..=last).collect();
            let filter = PortFilter::of(&[entry(range(first, last), PortRange::ANY)]);
            let local = local_ports(&filter);
            assert_eq!(local[0], 0);
            assert_eq!(local[1..], wanted);
            let filter = PortFilter::of(&[entry(PortRange::ANY, range(first, last))]);
            // Tested with a local port that is in no set.
            assert_eq!(remote_ports(&filter), wanted);
        }
    }

    #[test]
    fn an_empty_range_matches_nothing() {
        for empty in [range(1, 0), range(65_535, 0), range(64, 63)] {
            for entry in [
                entry(empty, PortRange::ANY),
                entry(PortRange::ANY, empty),
                entry(empty, empty),
            ] {
                assert!(PortFilter::of(&[entry]) == PortFilter::of(&[]));
            }
        }
    }

    #[test]
    fn an_entry_is_in_the_set_in_which_it_takes_fewer_ports() {
        let filter = PortFilter::of(&[
            entry(range(1024, u16::MAX), range(5432, 5432)),
            entry(range(80, 80), range(1024, u16::MAX)),
        ]);
        assert_eq!(local_ports(&filter), [0, 80]);
        assert_eq!(remote_ports(&filter), [5432]);
    }

    #[test]
    fn one_entry_for_all_ports_makes_it_say_yes_always() {
        let filter = PortFilter::of(&[
            entry(range(22, 22), PortRange::ANY),
            entry(PortRange::ANY, PortRange::ANY),
        ]);
        assert!(filter.local == PortFilter::ALL.local);
        assert_eq!(local_ports(&PortFilter::ALL).len(), 65_536);
    }

    #[test]
    fn entries_that_exempt_do_not_count() {
        let exempt = MatchEntry {
            rule: RULE_EXEMPT,
            ..entry(range(22, 22), PortRange::ANY)
        };
        let filter = PortFilter::of(&[exempt, entry(range(80, 80), PortRange::ANY)]);
        assert_eq!(local_ports(&filter), [0, 80]);
    }

    #[test]
    fn a_port_can_be_added() {
        let mut filter = PortFilter::of(&[]);
        filter.add_local(40_000);
        assert_eq!(local_ports(&filter), [0, 40_000]);
    }

    fn any_range() -> impl Strategy<Value = PortRange> {
        // Few ports, so that ranges overlap; some ranges are empty.
        let near = (60u16..70, 60u16..70).prop_map(|(first, last)| range(first, last));
        let any = (any::<u16>(), any::<u16>()).prop_map(|(first, last)| range(first, last));
        prop_oneof![near, any, Just(PortRange::ANY)]
    }

    fn any_entry() -> impl Strategy<Value = MatchEntry> {
        let rule = prop_oneof![0u16..4, Just(RULE_EXEMPT)];
        (any_range(), any_range(), rule, 0u8..4, 0u32..2).prop_map(
            |(local_ports, remote_ports, rule, directions, uid)| MatchEntry {
                local_ports,
                remote_ports,
                rule,
                directions,
                uid,
                asks_user: 1,
                ..MatchEntry::any(0)
            },
        )
    }

    fn any_port() -> impl Strategy<Value = u16> {
        prop_oneof![60u16..70, any::<u16>()]
    }

    proptest! {
        #[test]
        fn ports_that_an_entry_can_match_are_never_denied(
            entries in prop::collection::vec(any_entry(), 0..8),
            local_port in any_port(),
            remote_port in any_port(),
            uid in 0u32..2,
            known in 0u8..4,
        ) {
            let facts = Facts {
                direction: Direction::Inbound,
                local: Address::from_ipv4(0),
                remote: Address::from_ipv4(0),
                local_port,
                remote_port,
                uid,
                known,
            };
            let filter = PortFilter::of(&entries);
            let applies = |entry: &&MatchEntry| {
                entry.rule != RULE_EXEMPT && matches(&facts, &Ancestors::UNKNOWN, entry)
            };
            if let Some(entry) = entries.iter().find(applies) {
                prop_assert!(filter.may_match(local_port, remote_port), "{entry:?}");
            }
        }

        #[test]
        fn it_says_yes_for_nothing_but_the_ports_of_an_entry(
            entries in prop::collection::vec(any_entry(), 0..8),
            local_port in any_port().prop_filter("not that of a closing socket", |port| *port != 0),
            remote_port in any_port(),
        ) {
            let takes = |entry: &MatchEntry| {
                let (local, remote) = (entry.local_ports, entry.remote_ports);
                let by_local = local.count() <= remote.count();
                entry.rule != RULE_EXEMPT
                    && if by_local { local.contains(local_port) } else { remote.contains(remote_port) }
            };
            let filter = PortFilter::of(&entries);
            prop_assert_eq!(filter.may_match(local_port, remote_port), entries.iter().any(takes));
        }
    }
}
