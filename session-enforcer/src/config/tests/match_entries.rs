//! Compares the match table with a direct evaluation of the rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use session_enforcer_common::{Address, Ancestors, Facts, RULE_EXEMPT, matches};

use super::*;

/// A connection in readable form.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    pub(super) direction: Direction,
    pub(super) local: (IpAddr, u16),
    pub(super) remote: (IpAddr, u16),
    pub(super) user: &'static str,
    pub(super) cgroup: &'static str,
}

/// The users of the test world. The first has only a number.
const USERS: [(&str, u32); 4] = [("1000", 1000), ("root", 0), ("a", 113), ("b", 114)];

/// The cgroups of the test world.
const CGROUPS: [&str; 6] = ["/", "/s", "/s/a", "/s/a/x", "/s/ab", "/t"];

/// Patterns that match some of the cgroups.
const PATTERNS: [&str; 5] = ["/*", "/s/*", "/s/a*", "/*/a", "/*/*b"];

pub(super) fn owners() -> Owners {
    let users = USERS[1..].iter();
    let ids = |cgroup: &&str| (!cgroup.is_empty()).then(|| vec![id(cgroup)]);
    Owners {
        cgroups: CGROUPS
            .iter()
            .filter_map(|path| Some(((*path).to_owned(), ids(path)?)))
            .collect(),
        users: users
            .map(|(name, uid)| ((*name).to_owned(), *uid))
            .collect(),
    }
}

fn id(cgroup: &str) -> u64 {
    100 + CGROUPS.iter().position(|path| *path == cgroup).unwrap() as u64
}

impl Connection {
    fn facts(&self) -> Facts {
        Facts {
            direction: self.direction,
            local: Address::from(self.local.0),
            remote: Address::from(self.remote.0),
            local_port: self.local.1,
            remote_port: self.remote.1,
            uid: USERS.iter().find(|user| user.0 == self.user).unwrap().1,
            known: Facts::UID | Facts::CGROUP,
        }
    }

    fn ancestors(&self) -> Ancestors {
        let above = CGROUPS[1..]
            .iter()
            .filter(|above| is_below(self.cgroup, above));
        Ancestors::of(&above.map(|above| id(above)).collect::<Vec<_>>())
    }
}

/// Evaluates the rule literally as documented.
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
        && (rule.users.is_empty() || rule.users.iter().any(|u| u.to_string() == connection.user))
        && (rule.cgroups.is_empty()
            || rule
                .cgroups
                .iter()
                .any(|above| is_below(connection.cgroup, above)))
}

/// The number of the first matching rule.
fn decided_by_rules(config: &Config, connection: &Connection) -> Option<u16> {
    let index = config
        .rules
        .iter()
        .position(|rule| rule_matches(rule, connection))?;
    let exempt = config.rules[index].action == Action::Exempt;
    Some(if exempt { RULE_EXEMPT } else { index as u16 })
}

/// The number of the first matching entry, found like the kernel does.
fn decided_by_entries(entries: &[MatchEntry], connection: &Connection) -> Option<u16> {
    let (facts, ancestors) = (connection.facts(), connection.ancestors());
    entries
        .iter()
        .find(|entry| matches(&facts, &ancestors, entry))
        .map(|entry| entry.rule)
}

/// Addresses close to each other and to the edges, so that prefixes often contain them.
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
    let users = vec(select(USERS.to_vec()), 0..3).prop_map(|users| {
        let users = users.iter().map(|user| parse_user(user.0).unwrap());
        users.collect()
    });
    let named = [&CGROUPS[..], &PATTERNS[..]].concat();
    let cgroups = vec(select(named).prop_map(str::to_owned), 0..3);
    let ends = (ports(), ports(), nets(), nets());
    (direction, ends, users, cgroups, action).prop_map(
        |(direction, (local_ports, remote_ports, local, remote), users, cgroups, action)| Rule {
            direction,
            local_ports,
            remote_ports,
            local,
            remote,
            cgroups,
            users,
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
    let owner = (select(USERS.to_vec()), select(CGROUPS.to_vec()));
    (direction, prop_oneof![v4, v6], ports(), ports(), owner).prop_map(
        |(direction, (local, remote), local_port, remote_port, (user, cgroup))| Connection {
            direction,
            local: (local, local_port),
            remote: (remote, remote_port),
            user: user.0,
            cgroup,
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
        let entries = config.match_entries(&owners());
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
    assert_eq!(config.match_entries(&Owners::default()), [entry]);
}

#[test]
fn an_owner_who_is_not_there_matches_nothing_and_others_of_the_rule_do() {
    let rule = Rule {
        users: vec![User::Name("gone".to_owned()), User::Uid(7)],
        ..Rule::named("a")
    };
    let entries = Config::with_rules(vec![rule]).match_entries(&Owners::default());
    let uids: Vec<(u8, u32)> = entries.iter().map(|e| (e.asks_user, e.uid)).collect();
    assert_eq!(uids, [(1, 7)]);
    let rule = Rule {
        cgroups: vec!["/gone".to_owned()],
        ..Rule::named("a")
    };
    let entries = Config::with_rules(vec![rule]).match_entries(&Owners::default());
    assert_eq!(entries, []);
}

#[test]
fn a_cgroup_that_was_made_again_has_an_entry_for_each_time() {
    let rule = Rule {
        cgroups: vec!["/a".to_owned(), "/a/b".to_owned()],
        ..Rule::named("a")
    };
    let ids = [("/a", vec![5, 9]), ("/a/b", vec![6])];
    let owners = Owners {
        cgroups: ids.map(|(path, ids)| (path.to_owned(), ids)).into(),
        ..Owners::default()
    };
    let entries = Config::with_rules(vec![rule]).match_entries(&owners);
    let ids: Vec<u64> = entries.iter().map(|entry| entry.cgroup_id).collect();
    assert_eq!(ids, [5, 9]);
}

/// The number of entries of a rule with these conditions.
fn count(conditions: &str) -> usize {
    let rule = rule(&format!("{conditions}\nidle_timeout = '1s'"));
    let config = Config::with_rules(vec![rule]);
    config.match_entries(&Owners::numbered(&config.rules)).len()
}

#[test]
fn adjacent_ranges_are_joined_and_cost_no_entry() {
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
    assert_eq!(count("cgroups = ['/a', '/a/b', '/a/c/d']"), 1);
    assert_eq!(count("cgroups = ['/a', '/']\nusers = [7, 7]"), 1);
    assert_eq!(count("cgroups = ['/a', '/ab']\nusers = [7, 'x']"), 4);
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
    let entries = Config::with_rules(rules).match_entries(&Owners::default());
    let numbers: Vec<u16> = entries.iter().map(|entry| entry.rule).collect();
    assert_eq!(numbers, [0, RULE_EXEMPT, 2]);
}
