//! The match table against a direct evaluation of the rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use session_enforcer_common::{Address, Facts, RULE_EXEMPT, matches};

use super::*;

/// A connection as people write it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    pub(super) direction: Direction,
    pub(super) local: (IpAddr, u16),
    pub(super) remote: (IpAddr, u16),
}

impl Connection {
    fn facts(&self) -> Facts {
        Facts {
            direction: self.direction,
            local: address(self.local.0),
            remote: address(self.remote.0),
            local_port: self.local.1,
            remote_port: self.remote.1,
        }
    }
}

fn address(ip: IpAddr) -> Address {
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    Address::from_octets(v6.octets())
}

/// What the documentation says, word by word.
pub(super) fn rule_matches(rule: &Rule, connection: &Connection) -> bool {
    let port = |ranges: &[PortRange], port: u16| {
        ranges.is_empty()
            || ranges
                .iter()
                .any(|range| (range.first..=range.last).contains(&port))
    };
    let prefix =
        |nets: &[IpNet], ip: IpAddr| nets.is_empty() || nets.iter().any(|net| net.contains(&ip));
    rule.direction
        .is_none_or(|direction| direction == connection.direction)
        && port(&rule.local_ports, connection.local.1)
        && port(&rule.remote_ports, connection.remote.1)
        && prefix(&rule.local, connection.local.0)
        && prefix(&rule.remote, connection.remote.0)
}

/// The number of the first rule that matches.
fn decided_by_rules(config: &Config, connection: &Connection) -> Option<u16> {
    let index = config
        .rules
        .iter()
        .position(|rule| rule_matches(rule, connection))?;
    let exempt = config.rules[index].action == Action::Exempt;
    Some(if exempt { RULE_EXEMPT } else { index as u16 })
}

/// The number of the first entry that matches, as the kernel finds it.
fn decided_by_entries(entries: &[MatchEntry], connection: &Connection) -> Option<u16> {
    let facts = connection.facts();
    entries
        .iter()
        .find(|entry| matches(&facts, entry))
        .map(|entry| entry.rule)
}

/// Addresses close to each other and to every edge, so that prefixes often contain them.
fn bits_v4() -> impl Strategy<Value = u32> {
    let edges = select(vec![
        0,
        1,
        0x0a00_0000,
        0x0a00_0001,
        0x0aff_ffff,
        0x7f00_0001,
        u32::MAX,
    ]);
    prop_oneof![3 => edges, 1 => any::<u32>()]
}

fn bits_v6() -> impl Strategy<Value = u128> {
    let edges = select(vec![
        0,
        1,
        0xfffe << 32 | 7,
        0x1_0000 << 32,
        0xffff << 112 | 0xffff << 32,
        0x2001_0db8 << 96,
        0x2001_0db8 << 96 | 1,
        1 << 127,
        u128::MAX,
    ]);
    let not_mapped = |bits: &u128| bits >> 32 != 0xffff;
    prop_oneof![3 => edges, 1 => any::<u128>()].prop_filter("IPv4-mapped", not_mapped)
}

pub(super) fn net() -> impl Strategy<Value = IpNet> {
    let v4 = (bits_v4(), 0..=32u8)
        .prop_map(|(bits, length)| IpNet::new(Ipv4Addr::from(bits).into(), length).unwrap());
    let near_mapped = prop_oneof![bits_v6(), Just(0xffff << 32)];
    let v6 = (near_mapped, prop_oneof![0..=128u8, 80..=95u8, Just(0)])
        .prop_map(|(bits, length)| IpNet::new(Ipv6Addr::from(bits).into(), length).unwrap());
    prop_oneof![v4, v6].prop_map(|net| parse_prefix(&net.trunc().to_string()).unwrap())
}

fn range() -> impl Strategy<Value = PortRange> {
    let port = || prop_oneof![1..=20u16, Just(65534u16), Just(65535u16)];
    (port(), port()).prop_map(|(a, b)| PortRange {
        first: a.min(b),
        last: a.max(b),
    })
}

pub(super) fn any_rule() -> impl Strategy<Value = Rule> {
    let direction = option::of(select(vec![Direction::Inbound, Direction::Outbound]));
    let ports = || vec(range(), 0..3);
    let nets = || vec(net(), 0..3);
    let action = select(vec![Action::Enforce, Action::Observe, Action::Exempt]);
    (direction, ports(), ports(), nets(), nets(), action).prop_map(
        |(direction, local_ports, remote_ports, local, remote, action)| Rule {
            direction,
            local_ports,
            remote_ports,
            local,
            remote,
            action,
            ..Rule::named("r")
        },
    )
}

pub(super) fn connection() -> impl Strategy<Value = Connection> {
    let direction = select(vec![Direction::Inbound, Direction::Outbound]);
    let v4 = (bits_v4(), bits_v4())
        .prop_map(|(a, b)| (Ipv4Addr::from(a).into(), Ipv4Addr::from(b).into()));
    let v6 = (bits_v6(), bits_v6())
        .prop_map(|(a, b)| (Ipv6Addr::from(a).into(), Ipv6Addr::from(b).into()));
    let ports = || prop_oneof![1..=22u16, Just(65534u16), Just(65535u16)];
    (direction, prop_oneof![v4, v6], ports(), ports()).prop_map(
        |(direction, (local, remote), local_port, remote_port)| Connection {
            direction,
            local: (local, local_port),
            remote: (remote, remote_port),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_first_entry_that_matches_is_of_the_first_rule_that_does(
        rules in vec(any_rule(), 1..6),
        connections in vec(connection(), 50),
    ) {
        let config = Config::with_rules(rules);
        let entries = config.match_entries();
        for connection in &connections {
            let expected = decided_by_rules(&config, connection);
            prop_assert_eq!(decided_by_entries(&entries, connection), expected, "{:?}", connection);
        }
    }
}

#[test]
fn a_rule_without_conditions_is_one_entry_for_everything() {
    let config = Config::with_rules(vec![Rule::named("a")]);
    let entry = MatchEntry::any(0);
    assert_eq!(config.match_entries(), [entry]);
}

/// Entries of a rule of these conditions.
fn count(conditions: &str) -> usize {
    let rule = rule(&format!("{conditions}\nidle_timeout = '1s'"));
    Config::with_rules(vec![rule]).match_entries().len()
}

#[test]
fn what_can_be_joined_costs_no_entry() {
    assert_eq!(count("remote = ['0.0.0.0/0', '::/0']"), 1);
    assert_eq!(
        count("remote = ['0.0.0.0/1', '128.0.0.0/1', '::/1', '8000::/1']"),
        1
    );
    assert_eq!(
        count("remote = ['10.0.0.0/8', '10.1.0.0/16', '11.0.0.0/8']"),
        1
    );
    assert_eq!(count("local_ports = [1, 2, '3-5', '4-9']"), 1);
    assert_eq!(count("local_ports = ['1-65535', 7]"), 1);
    assert_eq!(count("local_ports = [1, 3]\nremote_ports = [1, 3, 5]"), 6);
    assert_eq!(
        count("local = ['10.0.0.1', 'fd00::1']\nremote = ['10.0.0.0/8', 'fd00::/8']"),
        2
    );
}

#[test]
fn all_of_ipv6_is_one_entry() {
    assert_eq!(count("remote = ['::/0']"), 1);
    assert_eq!(count("local = ['::/0']\nremote = ['::/64']"), 1);
    assert_eq!(count("local = ['2001:db8::/32']\nremote = ['::/0']"), 1);
}

#[test]
fn exempt_rules_have_their_number_and_the_others_their_place() {
    let mut rules: Vec<Rule> = ["a", "b", "c"].map(Rule::named).into();
    rules[1].action = Action::Exempt;
    let entries = Config::with_rules(rules).match_entries();
    let numbers: Vec<u16> = entries.iter().map(|entry| entry.rule).collect();
    assert_eq!(numbers, [0, RULE_EXEMPT, 2]);
}
