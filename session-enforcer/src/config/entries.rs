//! Converts rules to the flat match table that the kernel walks. Every combination of a rule's prefixes, port
//! ranges and owners is one entry.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv6Net};
use session_enforcer_common::{
    Address, MAX_MATCH_ENTRIES, MatchEntry, PortRange, Prefix, RULE_EXEMPT,
};

use super::error::EntryCount;
use super::owners::{cgroup_ids, is_pattern, uids};
use super::{Action, Owners, Problem, Rule};

/// A prefix of one endpoint's address.
///
/// The match table stores an IPv4 address in its IPv4-mapped form, so the bits of `::/0` cover it. In a rule,
/// `::/0` means only IPv6 addresses, as everywhere else. So "any address" is a separate variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Every address of both families.
    Any,
    /// IPv4 addresses.
    V4(ipnet::Ipv4Net),
    /// IPv6 addresses that are not IPv4-mapped.
    V6(Ipv6Net),
}

impl Side {
    fn prefix(self) -> Prefix {
        match self {
            Self::Any => Prefix::ANY,
            Self::V4(net) => {
                let address = net.addr().to_ipv6_mapped().octets();
                Prefix::new(Address::from_octets(address), 96 + net.prefix_len())
            }
            Self::V6(net) => {
                let address = Address::from_octets(net.addr().octets());
                Prefix::new(address, net.prefix_len())
            }
        }
    }

    fn families(self) -> u8 {
        match self {
            Self::Any => MatchEntry::BOTH_FAMILIES,
            Self::V4(_) => MatchEntry::IPV4,
            Self::V6(_) => MatchEntry::IPV6,
        }
    }
}

/// The prefixes without those that another one contains, and with adjacent ones merged.
pub(super) fn sides(nets: &[IpNet]) -> Vec<Side> {
    let merged = IpNet::aggregate(&nets.to_vec());
    let everything = merged.len() == 2 && merged.iter().all(|net| net.prefix_len() == 0);
    if merged.is_empty() || everything {
        return vec![Side::Any];
    }
    let side = |net| match net {
        IpNet::V4(net) => Side::V4(net),
        IpNet::V6(net) => Side::V6(net),
    };
    merged.into_iter().map(side).collect()
}

/// The ranges in order, with overlapping and adjacent ones merged.
pub(super) fn ports(ranges: &[PortRange]) -> Vec<PortRange> {
    if ranges.is_empty() {
        return vec![PortRange::ANY];
    }
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.first);
    let mut joined: Vec<PortRange> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => {
                last.last = last.last.max(range.last);
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// The entries of one rule as a lazy iterator, because a rule may produce far more than the table can hold.
pub(super) fn of_rule(
    rule: &Rule,
    index: u16,
    owners: &Owners,
) -> impl Iterator<Item = MatchEntry> + use<> {
    let exempt = rule.action == Action::Exempt;
    let number = if exempt { RULE_EXEMPT } else { index };
    let both = MatchEntry::BOTH_DIRECTIONS;
    let directions = rule.direction.map_or(both, |direction| direction as u8);
    let (local, remote) = (sides(&rule.local), sides(&rule.remote));
    let (local_ports, remote_ports) = (ports(&rule.local_ports), ports(&rule.remote_ports));
    let ranges = product(local_ports, remote_ports);
    let owners = product(uids(rule, owners), cgroup_ids(rule, owners));
    // Both endpoints of a connection have the same family, so an IPv4 and an IPv6 prefix never match
    // together.
    product(local, remote)
        .map(|(local, remote)| (local, remote, local.families() & remote.families()))
        .filter(|(_, _, families)| *families != 0)
        .flat_map(move |sides| ranges.clone().map(move |ports| (sides, ports)))
        .flat_map(move |rest| owners.clone().map(move |owner| (rest, owner)))
        .map(
            move |(((local, remote, families), ports), (uid, cgroup_id))| MatchEntry {
                local: local.prefix(),
                remote: remote.prefix(),
                cgroup_id,
                local_ports: ports.0,
                remote_ports: ports.1,
                uid: uid.unwrap_or_default(),
                rule: number,
                directions,
                families,
                asks_user: u8::from(uid.is_some()),
                reserved: [0; 7],
            },
        )
}

/// The Cartesian product of two lists.
pub(super) fn product<A: Copy, B: Copy>(
    first: Vec<A>,
    second: Vec<B>,
) -> impl Iterator<Item = (A, B)> + Clone {
    let each = move |a| second.clone().into_iter().map(move |b| (a, b));
    first.into_iter().flat_map(each)
}

/// Refuses a rule whose endpoints have different families.
pub(super) fn check_families(rule: &Rule) -> Result<(), Problem> {
    let pairs = product(sides(&rule.local), sides(&rule.remote));
    let mut agreeing = pairs.filter(|(local, remote)| local.families() & remote.families() != 0);
    match agreeing.next() {
        Some(_) => Ok(()),
        None => Err(Problem::MixedFamilies),
    }
}

/// Refuses rules that produce more entries than the table holds, with the index of the rule that exceeds it.
pub(super) fn check_count(rules: &[Rule]) -> Result<(), (usize, Problem)> {
    let most = MAX_MATCH_ENTRIES as usize;
    let owners = Owners::numbered(rules);
    let mut before = 0;
    for (index, rule) in rules.iter().enumerate() {
        let count = of_rule(rule, 0, &owners).take(most + 1).count();
        if before + count > most {
            let rule = EntryCount(count);
            return Err((index, Problem::ManyEntries { before, rule }));
        }
        before += count;
    }
    Ok(())
}

/// For each cgroup pattern, the number of entries per matching cgroup; and the number of free entries.
pub(super) fn pattern_room(rules: &[Rule]) -> (Vec<(String, usize)>, usize) {
    let owners = Owners::numbered(rules);
    let mut costs = BTreeMap::new();
    let mut free = MAX_MATCH_ENTRIES as usize;
    for rule in rules {
        let count = of_rule(rule, 0, &owners).count();
        free = free.saturating_sub(count);
        let each = count / cgroup_ids(rule, &owners).len().max(1);
        for pattern in rule.cgroups.iter().filter(|path| is_pattern(path)) {
            *costs.entry(pattern.clone()).or_default() += each;
        }
    }
    (costs.into_iter().collect(), free)
}
