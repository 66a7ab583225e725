//! Tests of warnings about rules that never decide.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::config::shadowed_rules::{self, rules_within};

use super::match_entries::{any_rule, connection, rule_matches};
use super::*;

/// The warnings about rules with these conditions, named a, b, c.
fn warnings(conditions: &[&str]) -> Vec<Warning> {
    let mut text = String::new();
    for (name, conditions) in ('a'..).zip(conditions) {
        text += &format!("[[rule]]\nname = '{name}'\nidle_timeout = '1s'\n{conditions}\n");
    }
    Config::parse("x.toml", &text).unwrap().warnings
}

fn printed(conditions: &[&str]) -> Vec<String> {
    let warnings = warnings(conditions);
    warnings.iter().map(ToString::to_string).collect()
}

fn shadowed_by(conditions: &[&str]) -> Vec<Vec<String>> {
    let by = |warning: Warning| match warning.doubt {
        Doubt::Hidden { by } => by,
        other => panic!("{other}"),
    };
    warnings(conditions).into_iter().map(by).collect()
}

#[test]
fn a_shadowed_rule_is_named_with_its_place_and_those_that_hide_it() {
    assert_eq!(
        printed(&[
            "local_ports = ['1-100']",
            "local_ports = [22]\nremote = ['10.0.0.0/8']"
        ]),
        [
            "x.toml:5:1: rule \"b\": never decides, because the earlier rule \"a\" matches every \
             connection that it would; move it up or remove it"
        ]
    );
    assert_eq!(
        printed(&["direction = 'inbound'", "direction = 'outbound'", ""]),
        [
            "x.toml:9:1: rule \"c\": never decides, because the earlier rules \"a\", \"b\" match \
             every connection that it would; move it up or remove it"
        ]
    );
}

#[test]
fn rules_can_hide_another_together_in_every_dimension() {
    for conditions in [
        [
            "local_ports = ['1-10']",
            "local_ports = ['5-20']",
            "local_ports = ['2-19']",
        ],
        [
            "local_ports = ['5-20']",
            "local_ports = ['1-4']",
            "local_ports = ['2-19']",
        ],
        [
            "remote_ports = [1]",
            "remote_ports = [2]",
            "remote_ports = ['1-2']",
        ],
        [
            "remote = ['10.0.0.0/9']",
            "remote = ['10.128.0.0/9']",
            "remote = ['10.0.0.0/8']",
        ],
        [
            "local = ['0.0.0.0/0']",
            "remote = ['::/0']",
            "local_ports = [22]",
        ],
        [
            "local = ['::/1']",
            "local = ['8000::/1']",
            "local = ['::/0']",
        ],
        ["users = [1]", "users = ['x']", "users = ['x', 1]"],
        [
            "cgroups = ['/a/b']",
            "cgroups = ['/c']",
            "cgroups = ['/c', '/a/b/d']",
        ],
        [
            "cgroups = ['/a/b*']",
            "cgroups = ['/c']",
            "cgroups = ['/c', '/a/b-*', '/a/bc', '/a/b/d']",
        ],
    ] {
        assert_eq!(shadowed_by(&conditions), [["a", "b"]], "{conditions:?}");
    }
}

#[test]
fn one_rule_that_hides_alone_is_named_alone() {
    let conditions = [
        "local_ports = ['1-10']",
        "local_ports = ['1-99']",
        "local_ports = ['2-19']",
    ];
    assert_eq!(shadowed_by(&conditions), [["b"]]);
}

#[test]
fn a_rule_with_anything_left_is_not_shadowed() {
    for conditions in [
        [
            "local_ports = ['1-10']",
            "local_ports = ['12-20']",
            "local_ports = ['2-19']",
        ],
        [
            "direction = 'inbound'",
            "remote_ports = [1]",
            "direction = 'any'",
        ],
        [
            "remote = ['0.0.0.0/0']",
            "remote = ['2000::/3']",
            "remote = ['::/0']",
        ],
        [
            "remote = ['::/0']",
            "remote = ['10.0.0.0/8']",
            "remote = ['0.0.0.0/0']",
        ],
        ["local = ['10.0.0.1']", "remote = ['10.0.0.1']", ""],
        [
            "local_ports = [1]",
            "remote_ports = [1]",
            "local_ports = ['1-2']\nremote_ports = [1, 2]",
        ],
        ["users = [1]", "users = ['x']", ""],
        // Sockets in `/a` itself and in its other children remain.
        [
            "cgroups = ['/a/b']",
            "cgroups = ['/a/c']",
            "cgroups = ['/a']",
        ],
        ["cgroups = ['/a']", "users = [1]", "cgroups = ['/ab']"],
        [
            "cgroups = ['/a/*b']",
            "cgroups = ['/a/bc']",
            "cgroups = ['/a/b*']",
        ],
        ["cgroups = ['/a/*/c']", "users = [1]", "cgroups = ['/a/b']"],
    ] {
        assert_eq!(shadowed_by(&conditions), [[""; 0]; 0], "{conditions:?}");
    }
}

#[test]
fn a_rule_twice_is_shadowed_and_hides() {
    assert_eq!(shadowed_by(&["local_ports = [1]"; 3]), [["a"], ["a"]]);
}

#[test]
fn the_search_is_bounded_and_then_says_nothing() {
    let rules = vec![Rule::named("a"); 3];
    let found = |comparisons| rules_within(&rules, comparisons);
    assert_eq!(found(1_000), [(1, vec![0]), (2, vec![0])]);
    assert_eq!(found(8), [(1, vec![0])]);
    assert_eq!(found(0), []);
}

proptest! {
    #[test]
    fn a_rule_that_is_called_shadowed_never_decides(
        rules in vec(any_rule(), 2..8),
        connections in vec(connection(), 200),
    ) {
        for (index, by) in shadowed_rules::rules(&rules) {
            prop_assert!(by.iter().all(|earlier| *earlier < index));
            for connection in &connections {
                let shadowed = rule_matches(&rules[index], connection);
                let earlier = by.iter().any(|i| rule_matches(&rules[*i], connection));
                prop_assert!(!shadowed || earlier, "{:?} is decided by {}", connection, index);
            }
        }
    }

    #[test]
    fn a_rule_that_repeats_an_earlier_one_is_shadowed(rules in vec(any_rule(), 1..6)) {
        let last = rules.len();
        let rules: Vec<Rule> = rules.iter().cloned().chain([rules[0].clone()]).collect();
        let shadowed = shadowed_rules::rules(&rules);
        let matches_something = entries::check_families(&rules[0]).is_ok();
        prop_assert_eq!(shadowed.iter().any(|(index, _)| *index == last), matches_something);
    }
}

/// The rules (named a, b, c, with these cgroups) that get a warning if this cgroup is watched.
fn beside(watched: &str, cgroups: &[&str]) -> Vec<String> {
    let mut text = format!("[daemon]\ncgroup = '{watched}'\n");
    for (name, cgroups) in ('a'..).zip(cgroups) {
        text += &format!("[[rule]]\nname = '{name}'\nidle_timeout = '1s'\ncgroups = [{cgroups}]\n");
    }
    let warnings = Config::parse("x.toml", &text).unwrap().warnings;
    warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_rule_of_cgroups_beside_the_watched_one_never_decides() {
    let rules = [
        "'/user.slice', '/system', '/user*/a'",
        "'/system.slice/a', '/*/b'",
        "'/b', '/system.slice'",
        "'/'",
    ];
    for watched in [
        "/sys/fs/cgroup/system.slice",
        "/sys/fs/cgroup/unified/system.slice/",
    ] {
        let expected = format!(
            "x.toml:3:1: rule \"a\": never decides, because its cgroups are neither below \
             daemon.cgroup, {watched}, nor above it; name others, or remove it"
        );
        assert_eq!(beside(watched, &rules), [expected]);
    }
    assert_eq!(
        beside("/sys/fs/cgroup/system.slice/a/b", &rules[1..]).len(),
        0
    );
    // With these paths everything is watched, or the mount point is unknown.
    for watched in [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
        "/mnt/system.slice",
    ] {
        assert_eq!(beside(watched, &rules).len(), 0, "{watched}");
    }
}
