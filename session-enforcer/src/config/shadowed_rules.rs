//! Finds rules that never decide because earlier rules match all of their connections.
//!
//! A connection is a point in a space of eight dimensions: direction, family, two addresses, two ports, user,
//! cgroup. A rule is a set of boxes in this space. Subtracting the boxes of earlier rules leaves the
//! connections that the rule decides. The rule is reported only if nothing remains.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::entries::{Side, ports, product, sides};
use super::owners::{is_below, outermost, uids};
use super::{Owners, Rule};

/// The first and the last value of an interval.
type Interval = (u128, u128);

/// Direction, family, local address, remote address, local port, remote port, user, cgroup.
type Box8 = [Interval; 8];

/// The search stops after this number of box comparisons, which takes a fraction of a second. Only thousands
/// of overlapping entries reach it. Then no warning is given.
const MAX_RULE_COMPARISONS: usize = 10_000_000;

/// The indexes of the shadowed rules, each with the indexes of the earlier rules that shadow it.
pub(super) fn rules(rules: &[Rule]) -> Vec<(usize, Vec<usize>)> {
    rules_within(rules, MAX_RULE_COMPARISONS)
}

/// The same, as far as this number of comparisons permits.
pub(super) fn rules_within(rules: &[Rule], mut comparisons: usize) -> Vec<(usize, Vec<usize>)> {
    let mut earlier: Vec<(usize, Box8)> = Vec::new();
    let mut shadowed = Vec::new();
    let named = Named::in_rules(rules);
    for (index, rule) in rules.iter().enumerate() {
        let boxes = boxes(rule, &named);
        if let Some(by) = hiders(&boxes, &earlier, &mut comparisons) {
            shadowed.push((index, by));
        }
        earlier.extend(boxes.into_iter().map(|b| (index, b)));
    }
    shadowed
}

/// The rules whose boxes cover all of these. If one rule alone covers them, only that one.
fn hiders(
    boxes: &[Box8],
    earlier: &[(usize, Box8)],
    comparisons: &mut usize,
) -> Option<Vec<usize>> {
    let together = cover(boxes, earlier, comparisons)?;
    for index in &together {
        let alone: Vec<_> = earlier
            .iter()
            .copied()
            .filter(|(i, _)| i == index)
            .collect();
        if cover(boxes, &alone, comparisons).is_some() {
            return Some(vec![*index]);
        }
    }
    Some(together.into_iter().collect())
}

/// The rules that together cover all of the boxes. `None` if a part remains, or if the comparisons are used
/// up.
fn cover(
    boxes: &[Box8],
    earlier: &[(usize, Box8)],
    comparisons: &mut usize,
) -> Option<BTreeSet<usize>> {
    let mut left = boxes.to_vec();
    let mut used = BTreeSet::new();
    for (index, hole) in earlier {
        *comparisons = comparisons.checked_sub(left.len())?;
        if !left.iter().any(|piece| overlap(piece, hole)) {
            continue;
        }
        used.insert(*index);
        left = left
            .iter()
            .flat_map(|piece| subtract(piece, hole))
            .collect();
        if left.is_empty() {
            return Some(used);
        }
    }
    None
}

fn overlap(a: &Box8, b: &Box8) -> bool {
    a.iter().zip(b).all(|(a, b)| a.0 <= b.1 && b.0 <= a.1)
}

/// The parts of the box outside the hole: along each dimension one below and one above it.
fn subtract(whole: &Box8, hole: &Box8) -> Vec<Box8> {
    if !overlap(whole, hole) {
        return vec![*whole];
    }
    let mut rest = *whole;
    let mut left = Vec::new();
    for dimension in 0..rest.len() {
        let (first, last) = hole[dimension];
        if rest[dimension].0 < first {
            let mut below = rest;
            below[dimension].1 = first - 1;
            left.push(below);
            rest[dimension].0 = first;
        }
        if rest[dimension].1 > last {
            let mut above = rest;
            above[dimension].0 = last + 1;
            left.push(above);
            rest[dimension].1 = last;
        }
    }
    left
}

/// The owners in the rules. Two different names may mean the same user, which is unknown here. They count as
/// different, which can suppress a warning but never causes a wrong one.
struct Named {
    owners: Owners,
    /// In depth-first order, so that the cgroups below a cgroup follow it.
    cgroups: Vec<String>,
}

impl Named {
    fn in_rules(rules: &[Rule]) -> Self {
        let owners = Owners::numbered(rules);
        let mut cgroups: Vec<String> = owners.cgroups.keys().cloned().collect();
        // Compare level by level, so that a path directly precedes those below it.
        cgroups.sort_by(|a, b| a.split('/').cmp(b.split('/')));
        Self { owners, cgroups }
    }

    fn uids(&self, rule: &Rule) -> Vec<Interval> {
        let interval = |uid: Option<u32>| match uid {
            Some(uid) => (u128::from(uid), u128::from(uid)),
            None => (0, u128::from(u32::MAX)),
        };
        uids(rule, &self.owners).into_iter().map(interval).collect()
    }

    /// The positions of the named cgroups that the rule covers. A named cgroup's position also stands for the
    /// unnamed cgroups below it. Position 0 stands for all others.
    fn cgroups(&self, rule: &Rule) -> Vec<Interval> {
        let Some(paths) = outermost(&rule.cgroups) else {
            return vec![(0, u128::MAX)];
        };
        let is_below = |other: &String| paths.iter().any(|path| is_below(other, path));
        let mut intervals: Vec<Interval> = Vec::new();
        for (place, _) in (1..)
            .zip(&self.cgroups)
            .filter(|(_, other)| is_below(other))
        {
            match intervals.last_mut() {
                Some((_, last)) if *last + 1 == place => *last = place,
                _ => intervals.push((place, place)),
            }
        }
        intervals
    }
}

fn boxes(rule: &Rule, named: &Named) -> Vec<Box8> {
    let direction = match rule.direction {
        Some(direction) => (direction as u128, direction as u128),
        None => (1, 2),
    };
    let interval = |range: session_enforcer_common::PortRange| {
        (u128::from(range.first), u128::from(range.last))
    };
    let intervals = |ranges| -> Vec<Interval> { ports(ranges).into_iter().map(interval).collect() };
    let ranges = product(intervals(&rule.local_ports), intervals(&rule.remote_ports));
    let owners = product(named.uids(rule), named.cgroups(rule));
    let ranges = product(ranges.collect(), owners.collect());
    let (local, remote) = (addresses(&rule.local), addresses(&rule.remote));
    // The endpoints of a connection have the same family.
    let pairs = product(local, remote).filter(|((a, _), (b, _))| a == b);
    pairs
        .flat_map(|((family, local), (_, remote))| {
            let family = (family as u128, family as u128);
            let whole = move |((l, r), (user, cgroup))| {
                [direction, family, local, remote, l, r, user, cgroup]
            };
            ranges.clone().map(whole)
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// The intervals of the addresses. No interval spans both families.
fn addresses(nets: &[IpNet]) -> Vec<(Family, Interval)> {
    sides(nets).into_iter().flat_map(side_intervals).collect()
}

fn side_intervals(side: Side) -> Vec<(Family, Interval)> {
    match side {
        Side::Any => vec![
            (Family::V4, (0, u128::from(u32::MAX))),
            (Family::V6, (0, u128::MAX)),
        ],
        Side::V4(net) => {
            let bits = |address: std::net::Ipv4Addr| u128::from(address.to_bits());
            vec![(Family::V4, (bits(net.network()), bits(net.broadcast())))]
        }
        Side::V6(net) => {
            let interval = (net.network().to_bits(), net.broadcast().to_bits());
            vec![(Family::V6, interval)]
        }
    }
}
