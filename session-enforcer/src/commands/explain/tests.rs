use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::exit::ExitStatus;

const RULES: &str = r#"
[[rule]]
name = "replicas"
remote = ["10.0.0.6", "10.0.0.7"]
action = "exempt"
[[rule]]
name = "postgres"
direction = "inbound"
local_ports = [5432, "6000-6010"]
idle_timeout = "15m"
max_lifetime = "12h"
[[rule]]
name = "ssh"
direction = "inbound"
local_ports = [22]
remote = ["10.0.0.0/8"]
action = "observe"
idle_timeout = "15m"
"#;

fn ends(local: &str, remote: &str) -> Ends {
    Ends::new(local.parse().unwrap(), remote.parse().unwrap()).unwrap()
}

fn described(text: &str, ends: &Ends, direction: Option<Direction>) -> String {
    let circumstances = Circumstances {
        direction,
        ..Circumstances::default()
    };
    described_under(text, ends, &circumstances)
}

fn described_under(text: &str, ends: &Ends, circumstances: &Circumstances) -> String {
    let config = Config::parse("x.toml", text).unwrap();
    let mut out = Vec::new();
    describe(&config, ends, circumstances, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

const OWNERS: &str = r#"
[[rule]]
name = "replication"
direction = "inbound"
users = ["root", 7]
action = "exempt"
[[rule]]
name = "pods"
cgroups = ["/kubepods.slice", "/machine.slice"]
idle_timeout = "15m"
[[rule]]
name = "rest"
idle_timeout = "1h"
"#;

fn of(user: Option<&str>, cgroup: Option<&str>) -> Circumstances {
    Circumstances {
        direction: Some(Direction::Inbound),
        user: user.map(|user| crate::config::parse_user(user).unwrap()),
        cgroup: cgroup.map(|cgroup| crate::config::parse_cgroup(cgroup).unwrap()),
    }
}

#[test]
fn without_an_owner_the_rules_that_ask_for_one_are_open() {
    let ends = ends("10.0.0.5:22", "10.0.0.9:50000");
    let expected = "\
10.0.0.5:22 with 10.0.0.9:50000, accepted here:
  rule \"replication\": perhaps: connections accepted here, of user root or 7; they are exempt: not \
tracked, never reset
  rule \"pods\": perhaps: connections accepted here or dialled from here, of cgroup \
/kubepods.slice or /machine.slice; they are reset 15m after their last new payload
  rule \"rest\": yes: connections accepted here or dialled from here; they are reset 1h after their \
last new payload
  undecided: give --user and --cgroup; if the owner is none of those above: enforced by rule \"rest\"
";
    assert_eq!(described_under(OWNERS, &ends, &of(None, None)), expected);
}

#[test]
fn an_owner_decides() {
    let ends = ends("10.0.0.5:22", "10.0.0.9:50000");
    let expected = "\
10.0.0.5:22 with 10.0.0.9:50000, accepted here, of user 5, of cgroup \
/kubepods.slice/pod1/c:
  rule \"replication\": no: user 5 is not root or 7
  rule \"pods\": yes: connections accepted here or dialled from here, of cgroup \
/kubepods.slice or /machine.slice; they are reset 15m after their last new payload
  1 later rule is not compared
  decided: enforced by rule \"pods\"
";
    let pod = of(Some("5"), Some("/kubepods.slice/pod1/c"));
    assert_eq!(described_under(OWNERS, &ends, &pod), expected);
    let elsewhere = described_under(OWNERS, &ends, &of(Some("5"), Some("/kubepods.slice2")));
    let no = "  rule \"pods\": no: cgroup /kubepods.slice2 is not /kubepods.slice or \
              /machine.slice, nor below\n";
    assert!(elsewhere.contains(no), "{elsewhere}");
    assert!(elsewhere.ends_with("  decided: enforced by rule \"rest\"\n"));
    let half = described_under(OWNERS, &ends, &of(Some("5"), None));
    assert!(half.contains("  undecided: give --cgroup; if"));
}

#[test]
fn a_user_is_the_same_by_name_and_by_number() {
    let ends = ends("10.0.0.5:22", "10.0.0.9:50000");
    for user in ["root", "0", "7"] {
        let text = described_under(OWNERS, &ends, &of(Some(user), None));
        assert!(
            text.ends_with("  decided: exempt by rule \"replication\": not tracked, never reset\n"),
            "{text}"
        );
    }
    let text = described_under(OWNERS, &ends, &of(Some("nobody-of-this-name"), Some("/")));
    assert!(
        text.ends_with("  decided: enforced by rule \"rest\"\n"),
        "{text}"
    );
}

#[test]
fn the_deciding_rule_and_the_reasons_of_the_earlier_ones_are_said() {
    let ends = ends("10.0.0.5:5432", "[::ffff:10.0.0.9]:50000");
    let expected = "\
10.0.0.5:5432 with 10.0.0.9:50000, accepted here:
  rule \"replicas\": no: remote address 10.0.0.9 is not in 10.0.0.6 or 10.0.0.7
  rule \"postgres\": yes: connections accepted here, with local port 5432 or 6000-6010; they are \
reset 15m after their last new payload, and at the latest 12h after they were established
  1 later rule is not compared
  decided: enforced by rule \"postgres\"
";
    assert_eq!(described(RULES, &ends, Some(Direction::Inbound)), expected);
}

#[test]
fn directions_that_differ_are_explained_one_by_one() {
    let expected = "\
[2001:db8::5]:5432 with [2001:db8::9]:50000, accepted here:
  rule \"replicas\": no: remote address 2001:db8::9 is not in 10.0.0.6 or 10.0.0.7
  rule \"postgres\": yes: connections accepted here, with local port 5432 or 6000-6010; they are \
reset 15m after their last new payload, and at the latest 12h after they were established
  1 later rule is not compared
  decided: enforced by rule \"postgres\"

[2001:db8::5]:5432 with [2001:db8::9]:50000, dialled from here:
  rule \"replicas\": no: remote address 2001:db8::9 is not in 10.0.0.6 or 10.0.0.7
  rule \"postgres\": no: dialled from here, not accepted here
  rule \"ssh\": no: dialled from here, not accepted here; local port 5432 is not 22; remote \
address 2001:db8::9 is not in 10.0.0.0/8
  decided: not tracked, because no rule matches
";
    let ends = ends("[2001:db8::5]:5432", "[2001:db8::9]:50000");
    assert_eq!(described(RULES, &ends, None), expected);
}

#[test]
fn directions_that_do_not_differ_are_explained_together() {
    let expected = "\
10.0.0.5:40000 with 192.0.2.1:443, accepted here or dialled from here:
  rule \"replicas\": no: remote address 192.0.2.1 is not in 10.0.0.6 or 10.0.0.7
  rule \"postgres\": no: local port 40000 is not 5432 or 6000-6010
  rule \"ssh\": no: local port 40000 is not 22; remote address 192.0.2.1 is not in 10.0.0.0/8
  decided: not tracked, because no rule matches
";
    let nobody = ends("10.0.0.5:40000", "192.0.2.1:443");
    assert_eq!(described(RULES, &nobody, None), expected);
    let expected = "\
10.0.0.5:5432 with 10.0.0.7:50000, accepted here or dialled from here:
  rule \"replicas\": yes: connections accepted here or dialled from here, with remote address in \
10.0.0.6 or 10.0.0.7; they are exempt: not tracked, never reset
  2 later rules are not compared
  decided: exempt by rule \"replicas\": not tracked, never reset
";
    let replica = ends("10.0.0.5:5432", "10.0.0.7:50000");
    assert_eq!(described(RULES, &replica, None), expected);
}

#[test]
fn observing_rules_and_limits_of_the_scope_are_reported() {
    let ends = ends("10.0.0.5:22", "10.0.0.9:50000");
    let inbound = Some(Direction::Inbound);
    let text = described(RULES, &ends, inbound);
    let end = "\n  decided: observed by rule \"ssh\": recorded, not reset\n";
    assert!(text.ends_with(end), "{text}");
    let daemon = "[daemon]\nmode = 'observe'\ncgroup = '/c'\nnetwork_namespaces = 'own'\n";
    let all = "[[rule]]\nname = 'all'\nidle_timeout = '1h'\n";
    let expected = "\
10.0.0.5:22 with 10.0.0.9:50000, accepted here:
  rule \"all\": yes: connections accepted here or dialled from here; they are recorded, not reset, \
1h after their last new payload
  decided: observed by rule \"all\": recorded, not reset, because the daemon's mode is \"observe\"

Only sockets of cgroup /c and those below it are tracked.

Only sockets of the daemon's own network namespace are tracked.
";
    assert_eq!(
        described(&format!("{daemon}{all}"), &ends, inbound),
        expected
    );
}

#[test]
fn a_long_list_is_cut() {
    let ports: Vec<String> = (1..=20).map(|n| (2 * n).to_string()).collect();
    let list = ports.join(", ");
    let text = format!("[[rule]]\nname = 'a'\nlocal_ports = [{list}]\nidle_timeout = '1h'\n");
    let printed = described(&text, &ends("10.0.0.5:3", "10.0.0.9:50000"), None);
    let line = "rule \"a\": no: local port 3 is not 2, 4, 6, 8, 10, 12, 14, 16 or 12 others\n";
    assert!(printed.contains(line), "{printed}");
}

/// Each case: file, direction, local and remote endpoint, and the expected decision with its rule.
#[test]
fn the_examples_decide_as_the_cookbook_says() {
    let cases = [
        (
            "ssh-bastion in 10.20.0.1:22 10.20.0.10:1",
            "observed automation",
        ),
        (
            "ssh-bastion in 10.20.0.1:22 10.20.0.11:1",
            "observed logins",
        ),
        (
            "ssh-bastion out 10.20.0.1:1 10.30.0.1:22",
            "observed onward",
        ),
        (
            "postgresql-pooler in 10.0.0.5:5432 10.0.0.6:1",
            "exempt replicas",
        ),
        (
            "postgresql-pooler out 10.0.0.5:1 10.0.0.7:5432",
            "exempt replicas",
        ),
        (
            "postgresql-pooler in 10.0.0.5:5432 10.0.0.20:1",
            "observed pooler",
        ),
        (
            "postgresql-pooler in 10.0.0.5:5432 10.0.0.21:1",
            "observed direct",
        ),
        (
            "redis-pubsub in 10.0.0.30:6379 10.0.8.9:1",
            "exempt subscribers",
        ),
        ("redis-pubsub in 10.0.0.30:6380 10.0.9.9:1", "exempt pubsub"),
        (
            "redis-pubsub in 10.0.0.30:6379 10.0.9.9:1",
            "observed clients",
        ),
        ("redis-pubsub in 10.0.0.30:16379 10.0.9.9:1", "not tracked"),
        (
            "kubernetes-node in 10.0.0.3:10250 10.0.0.2:1",
            "exempt control-plane-in",
        ),
        (
            "kubernetes-node out 10.244.1.2:1 10.96.0.1:6443",
            "exempt control-plane-out",
        ),
        (
            "kubernetes-node in 10.244.1.2:5432 10.244.2.2:1",
            "observed pod-databases",
        ),
        (
            "kubernetes-node in 10.244.1.2:3306 10.244.2.2:1",
            "observed pod-mysql",
        ),
        (
            "kubernetes-node out 10.244.1.2:1 10.96.7.7:5432",
            "exempt cluster-internal",
        ),
        (
            "kubernetes-node out 10.244.1.2:1 192.0.2.1:443",
            "observed pod-egress",
        ),
        ("kubernetes-node in 10.0.0.3:22 192.0.2.1:1", "not tracked"),
        (
            "kubernetes-node out 10.0.0.3:1 192.0.2.1:443 /system.slice/kubelet.service",
            "exempt node-services",
        ),
        ("everything-inbound in [::1]:22 [::1]:1", "exempt loopback"),
        (
            "everything-inbound in 10.0.0.5:179 192.0.2.1:1",
            "exempt quiet-services",
        ),
        (
            "everything-inbound in 10.0.0.5:80 192.0.2.1:1",
            "observed inbound",
        ),
        (
            "everything-inbound out 10.0.0.5:1 192.0.2.1:80",
            "not tracked",
        ),
        (
            "pci-dss in 10.10.0.5:5432 10.10.1.9:1",
            "observed application",
        ),
        (
            "pci-dss in 10.10.0.5:5432 10.10.2.9:1",
            "observed databases",
        ),
        (
            "fedramp in 10.0.0.5:22 192.0.2.1:1",
            "observed privileged-ports",
        ),
        (
            "fedramp in 10.0.0.5:5432 10.9.0.1:1",
            "observed privileged-networks",
        ),
        (
            "fedramp in 10.0.0.5:5432 10.8.0.1:1",
            "observed users-database",
        ),
        ("nist-800-63b in 10.0.0.5:22 192.0.2.1:1", "observed aal3"),
        ("nist-800-63b in 10.0.0.5:5432 192.0.2.1:1", "observed aal2"),
    ];
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for (case, expected) in cases {
        let words: Vec<&str> = case.split(' ').collect();
        let direction = match words[1] {
            "in" => Direction::Inbound,
            _ => Direction::Outbound,
        };
        let mut out = Vec::new();
        let path = examples.join(words[0]).with_extension("toml");
        let cgroup = words.get(4).unwrap_or(&"/kubepods.slice/pod1/c");
        let circumstances = Circumstances {
            direction: Some(direction),
            ..of(None, Some(cgroup))
        };
        explain_file(&path, &ends(words[2], words[3]), &circumstances, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let decision = match expected.split_once(' ').unwrap() {
            ("not", _) => "not tracked, because".to_owned(),
            (word, rule) => format!("{word} by rule \"{rule}\""),
        };
        assert!(
            text.contains(&format!("\n  decided: {decision}")),
            "{case}: {text}"
        );
    }
}

#[test]
fn a_wrong_file_prints_nothing_and_is_an_error_of_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wrong.toml");
    std::fs::write(&path, "[[rule]]\n").unwrap();
    let ends = ends("10.0.0.5:22", "10.0.0.9:50000");
    let mut out = Vec::new();
    let error = explain_file(&path, &ends, &Circumstances::default(), &mut out).unwrap_err();
    assert!(out.is_empty());
    assert_eq!(ExitStatus::of(&error), ExitStatus::Configuration);
}

/// Prefixes and addresses of both families, many of which contain each other.
const PREFIXES: [&str; 10] = [
    "10.0.0.0/8",
    "10.0.0.1",
    "10.0.0.0/31",
    "128.0.0.0/1",
    "0.0.0.0/0",
    "::/0",
    "::/80",
    "::ffff:10.0.0.0/104",
    "2001:db8::/32",
    "2001:db8::1",
];
const ADDRESSES_V4: [&str; 5] = ["10.0.0.0", "10.0.0.1", "10.255.0.1", "192.0.2.1", "0.0.0.0"];
const ADDRESSES_V6: [&str; 5] = ["::", "::1", "2001:db8::", "2001:db8::1", "fd00::1"];

const USERS: [&str; 4] = ["root", "0", "7", "nobody-of-this-name"];
const CGROUPS: [&str; 5] = ["/", "/a", "/a/b", "/a/b/c", "/ab"];
/// Patterns of some of the cgroups.
const PATTERNS: [&str; 4] = ["/*", "/a*", "/*/b", "/a/*/*"];

/// The conditions of a rule, as lines of a file.
fn conditions() -> impl Strategy<Value = String> {
    let direction = option::of(select(vec!["'inbound'", "'outbound'", "'any'"]));
    let ports = || vec(select(vec!["1", "2", "'2-4'", "'3-65535'", "65535"]), 0..3);
    let prefixes = || vec(select(PREFIXES.to_vec()), 0..3);
    let action = select(vec!["enforce", "observe", "exempt"]);
    let users = vec(select(USERS.to_vec()), 0..3);
    let cgroups = vec(select([&CGROUPS[..], &PATTERNS[..]].concat()), 0..3);
    let ends = (ports(), ports(), prefixes(), prefixes());
    (direction, ends, users, cgroups, action).prop_map(
        |(direction, (local_ports, remote_ports, local, remote), users, cgroups, action)| {
            let direction = direction.unwrap_or("'any'");
            let limit = match action {
                "exempt" => "",
                _ => "idle_timeout = '15m'",
            };
            let (local_ports, remote_ports) = (local_ports.join(","), remote_ports.join(","));
            format!(
                "direction = {direction}\nlocal_ports = [{local_ports}]\n\
                 remote_ports = [{remote_ports}]\nlocal = {local:?}\nremote = {remote:?}\n\
                 users = {users:?}\ncgroups = {cgroups:?}\naction = '{action}'\n{limit}\n"
            )
        },
    )
}

fn config(rules: &[String]) -> Result<Config, crate::config::ConfigError> {
    let numbered = rules.iter().enumerate();
    let text: String = numbered
        .map(|(n, rule)| format!("[[rule]]\nname = 'r{n}'\n{rule}"))
        .collect();
    Config::parse("x.toml", &text)
}

/// Random rules, without those that are refused because their endpoints have different families.
fn configs() -> impl Strategy<Value = Config> {
    vec(conditions(), 1..6).prop_filter_map("no rule is left", |mut rules| {
        rules.retain(|rule| config(std::slice::from_ref(rule)).is_ok());
        config(&rules).ok()
    })
}

fn connections() -> impl Strategy<Value = Ends> {
    let pair =
        |addresses: [&'static str; 5]| (select(addresses.to_vec()), select(addresses.to_vec()));
    let port = || select(vec![1u16, 2, 3, 4, 5, 65535]);
    let addresses = prop_oneof![pair(ADDRESSES_V4), pair(ADDRESSES_V6)];
    (addresses, port(), port()).prop_map(|((local, remote), local_port, remote_port)| {
        let local = SocketAddr::new(local.parse().unwrap(), local_port);
        let remote = SocketAddr::new(remote.parse().unwrap(), remote_port);
        Ends::new(local, remote).unwrap()
    })
}

fn circumstances(
    direction: impl Strategy<Value = Option<Direction>>,
    owner: impl Strategy<Value = (Option<&'static str>, Option<&'static str>)>,
) -> impl Strategy<Value = Circumstances> {
    (direction, owner).prop_map(|(direction, (user, cgroup))| Circumstances {
        direction,
        ..of(user, cgroup)
    })
}

fn directions() -> impl Strategy<Value = Direction> {
    select(vec![Direction::Inbound, Direction::Outbound])
}

/// Whether an entry of the rule matches for certain, as the kernel decides.
fn kernel_matches(question: &Question<'_>, rule: Rule, direction: Direction) -> bool {
    let mut alone = question.config.clone();
    alone.rules = vec![rule];
    let facts = question.facts(direction);
    alone
        .match_entries(&question.owners)
        .iter()
        .any(|entry| matches(&facts, &question.ancestors(), entry) && !entry.needs_owner(&facts))
}

/// The rule without the conditions at these indexes of [`refusals`].
fn without(rule: &Rule, gone: impl Fn(usize) -> bool) -> Rule {
    let mut rule = rule.clone();
    if gone(0) {
        rule.direction = None;
    }
    if gone(1) {
        rule.local_ports.clear();
    }
    if gone(2) {
        rule.remote_ports.clear();
    }
    if gone(3) {
        rule.local.clear();
    }
    if gone(4) {
        rule.remote.clear();
    }
    if gone(5) {
        rule.users.clear();
    }
    if gone(6) {
        rule.cgroups.clear();
    }
    rule
}

/// The names of the rules that the text says do not match, and the name of the one that matches.
fn said(text: &str) -> (Vec<&str>, Option<&str>) {
    let name = |line: &'_ str, word: &str| line.find(word).map(|end| 8..end);
    let lines = || text.lines().filter(|line| line.starts_with("  rule \""));
    let of = |word: &'static str| lines().filter_map(move |line| line.get(name(line, word)?));
    (of("\": no: ").collect(), of("\": yes: ").next())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn each_reason_is_true_and_without_the_reasons_the_rule_matches(
        config in configs(),
        connections in vec(connections(), 20),
        circumstances in circumstances(
            directions().prop_map(Some),
            (select(USERS.to_vec()).prop_map(Some), select(CGROUPS.to_vec()).prop_map(Some)),
        ),
    ) {
        let direction = circumstances.direction.unwrap();
        for ends in &connections {
            let question = Question::new(&config, ends, &circumstances);
            let kernel_matches = |rule| kernel_matches(&question, rule, direction);
            for rule in &config.rules {
                let refusals = refusals(&question, rule, Some(direction));
                let refused = |n: usize| refusals[n].is_some();
                let any = refusals.iter().any(Option::is_some);
                prop_assert_eq!(kernel_matches(rule.clone()), !any, "{:?}", rule);
                prop_assert!(kernel_matches(without(rule, refused)));
                for n in (0..7).filter(|n| refused(*n)) {
                    let alone = without(rule, |other| other != n);
                    prop_assert!(!kernel_matches(alone), "{n} of {rule:?}");
                }
            }
        }
    }

    #[test]
    fn the_words_say_what_the_table_decides(
        config in configs(),
        connections in vec(connections(), 20),
        circumstances in circumstances(
            option::of(directions()),
            (option::of(select(USERS.to_vec())), option::of(select(CGROUPS.to_vec()))),
        ),
    ) {
        for ends in &connections {
            let mut out = Vec::new();
            describe(&config, ends, &circumstances, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            prop_assert!(!text.contains("no: \n"), "{text}");
            let both = vec![Direction::Inbound, Direction::Outbound];
            let directions = circumstances.direction.map_or(both, |direction| vec![direction]);
            let question = Question::new(&config, ends, &circumstances);
            // The text has one part for each direction, or one for both.
            let parts = text.split("\n\n").collect::<Vec<_>>().into_iter().cycle();
            for (direction, part) in directions.into_iter().zip(parts) {
                let first = config
                    .rules
                    .iter()
                    .position(|rule| kernel_matches(&question, rule.clone(), direction));
                let perhaps = part.contains("\": perhaps: ");
                prop_assert_eq!(part.contains("  undecided: "), perhaps, "{}", part);
                prop_assert_eq!(part.contains("  decided: "), !perhaps, "{}", part);
                if circumstances.user.is_some() && circumstances.cgroup.is_some() {
                    prop_assert!(!perhaps, "{}", part);
                }
                let exempt = first.is_some_and(|n| config.rules[n].action == Action::Exempt);
                prop_assert_eq!(part.contains(": exempt by "), exempt, "{}", part);
                prop_assert_eq!(part.contains(": not tracked, because no"), first.is_none());
                let names: Vec<&str> = config.rules.iter().map(|r| r.name.as_str()).collect();
                let open = |name: &str| part.contains(&format!("rule \"{name}\": perhaps: "));
                let earlier = &names[..first.unwrap_or(names.len())];
                let earlier = earlier.iter().copied().filter(|name| !open(name)).collect();
                prop_assert_eq!(said(part), (earlier, first.map(|n| names[n])), "{}", part);
            }
        }
    }
}
