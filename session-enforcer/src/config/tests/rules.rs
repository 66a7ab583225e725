//! Tests of invalid rules and of invalid combinations of rules.

use std::fmt::Write as _;

use session_enforcer_common::{MAX_MATCH_ENTRIES, MAX_RULES};

use super::*;

#[test]
fn a_file_without_a_rule_enforces_nothing() {
    let none = "there is none, so nothing would be enforced; add a rule, headed by [[rule]]";
    for (text, place) in [
        ("", "x.toml: rule: "),
        ("[daemon]\nmode = 'observe'\n", "x.toml: rule: "),
        ("rule = []\n", "x.toml:1:8: rule: "),
    ] {
        assert_eq!(refused(text), format!("{place}{none}"));
    }
}

#[test]
fn a_rule_has_a_name_of_its_own() {
    let long = "a".repeat(65);
    let cut = "a".repeat(60);
    let allowed = "allowed: 1 to 64 characters of a-z, 0-9, _ and -";
    for (text, message) in [
        (
            "[[rule]]\nidle_timeout = '1s'\n",
            "x.toml:1:1: rule 1: name: is missing; every rule has a name of its own".to_owned(),
        ),
        (
            "[[rule]]\nname = 'a'\nidle_timeout = '1s'\n[[rule]]\n",
            "x.toml:4:1: rule 2: name: is missing; every rule has a name of its own".to_owned(),
        ),
        (
            "[[rule]]\nname = 'a'\nidle_timeout = '1s'\n[[rule]]\nname = 'a'\n",
            "x.toml:5:8: rule 2: name: \"a\" is the name of the rule in line 2; every rule has a \
             name of its own"
                .to_owned(),
        ),
        (
            "[[rule]]\nname = 'Web'\n",
            format!("x.toml:2:8: rule 1: name: found \"Web\"; {allowed}"),
        ),
        (
            "[[rule]]\nname = ''\n",
            format!("x.toml:2:8: rule 1: name: found \"\"; {allowed}"),
        ),
        (
            "[[rule]]\nname = 1\n",
            format!("x.toml:2:8: rule 1: name: found the number 1; {allowed}"),
        ),
        (
            &format!("[[rule]]\nname = '{long}'\n"),
            format!("x.toml:2:8: rule 1: name: found \"{cut}\"...; {allowed}"),
        ),
    ] {
        assert_eq!(refused(text), message);
    }
    let longest = format!(
        "[[rule]]\nname = '{}'\nidle_timeout = '1s'\n",
        "a".repeat(64)
    );
    Config::parse("x.toml", &longest).unwrap();
}

#[test]
fn a_wrong_condition_is_pointed_at() {
    let port = "allowed: a port from 1 to 65535, or a range of ports such as \"6000-6010\"";
    let prefix = "allowed: an address or a prefix such as \"10.0.0.0/8\" or \"2001:db8::/32\"";
    let ports = "allowed: a list such as [5432, \"6000-6010\"]";
    let prefixes = "allowed: a list such as [\"10.0.0.0/8\", \"2001:db8::/32\"]";
    for (condition, column, problem) in [
        (
            "direction = 'in'",
            13,
            "found \"in\"; allowed: \"inbound\", \"outbound\" or \"any\"",
        ),
        (
            "direction = 1",
            13,
            "found the number 1; allowed: \"inbound\", \"outbound\" or \"any\"",
        ),
        (
            "action = 'kill'",
            10,
            "found \"kill\"; allowed: \"enforce\", \"observe\" or \"exempt\"",
        ),
        (
            "local_ports = 22",
            15,
            &format!("found the number 22; {ports}"),
        ),
        ("remote_ports = '22'", 16, &format!("found \"22\"; {ports}")),
        (
            "local_ports = [22, 0]",
            20,
            &format!("found the number 0; {port}"),
        ),
        (
            "local_ports = [65536]",
            16,
            &format!("found the number 65536; {port}"),
        ),
        (
            "local_ports = [-1]",
            16,
            &format!("found the number -1; {port}"),
        ),
        (
            "local_ports = [22.5]",
            16,
            &format!("found the number 22.5; {port}"),
        ),
        (
            "local_ports = ['ssh']",
            16,
            &format!("found \"ssh\"; {port}"),
        ),
        (
            "local_ports = ['0-5']",
            16,
            &format!("found \"0-5\"; {port}"),
        ),
        (
            "local_ports = ['1-65536']",
            16,
            &format!("found \"1-65536\"; {port}"),
        ),
        (
            "local_ports = ['1-2-3']",
            16,
            &format!("found \"1-2-3\"; {port}"),
        ),
        (
            "local_ports = ['1 - 2']",
            16,
            &format!("found \"1 - 2\"; {port}"),
        ),
        ("local_ports = ['-5']", 16, &format!("found \"-5\"; {port}")),
        ("local_ports = ['+5']", 16, &format!("found \"+5\"; {port}")),
        ("local_ports = [[22]]", 16, &format!("found a list; {port}")),
        (
            "remote_ports = ['10-5']",
            17,
            "the range \"10-5\" runs backwards; write \"5-10\"",
        ),
        (
            "local = '10.0.0.0/8'",
            9,
            &format!("found \"10.0.0.0/8\"; {prefixes}"),
        ),
        (
            "local = ['10.0.0.0/33']",
            10,
            &format!("found \"10.0.0.0/33\"; {prefix}"),
        ),
        ("local = ['10/8']", 10, &format!("found \"10/8\"; {prefix}")),
        (
            "local = ['db.example.org']",
            10,
            &format!("found \"db.example.org\"; {prefix}"),
        ),
        (
            "remote = ['fe80::1%eth0']",
            11,
            &format!("found \"fe80::1%eth0\"; {prefix}"),
        ),
        ("remote = ['']", 11, &format!("found \"\"; {prefix}")),
        (
            "remote = [10]",
            11,
            &format!("found the number 10; {prefix}"),
        ),
        (
            "remote = ['10.0.0.1/8']",
            11,
            "\"10.0.0.1/8\" has bits set after its prefix; write \"10.0.0.0/8\", or \"10.0.0.1\" \
             alone",
        ),
        (
            "remote = ['::ffff:10.0.0.1/104']",
            11,
            "\"::ffff:10.0.0.1/104\" has bits set after its prefix; write \
             \"::ffff:10.0.0.0/104\", or \"::ffff:10.0.0.1\" alone",
        ),
    ] {
        let key = condition.split(' ').next().unwrap();
        let text = format!("[[rule]]\nname = 'a'\nidle_timeout = '1s'\n{condition}\n");
        let expected = format!("x.toml:4:{column}: rule \"a\": {key}: {problem}");
        assert_eq!(refused(&text), expected);
    }
}

#[test]
fn a_wrong_limit_is_pointed_at() {
    let time = "allowed: a time such as \"90s\", \"15m\", \"12h\" or \"1h30m\"";
    let no_unit = |n| format!("{n} has no unit; write \"{n}s\" for seconds, or m, h or d after it");
    let short = "is shorter than 1s, the shortest limit; for no limit, leave it out";
    let long = "is longer than 36500d, the longest limit; for no limit, leave it out";
    for (value, problem) in [
        ("900", no_unit(900)),
        ("0", format!("0 {short}")),
        ("'900'", no_unit(900)),
        ("-5", format!("found the number -5; {time}")),
        ("1.5", format!("found the number 1.5; {time}")),
        ("07:32:00", format!("found the date 07:32:00; {time}")),
        ("''", format!("found \"\"; {time}")),
        ("'soon'", format!("found \"soon\"; {time}")),
        ("'m'", format!("found \"m\"; {time}")),
        ("'15M'", format!("found \"15M\"; {time}")),
        ("'15 m'", format!("found \"15 m\"; {time}")),
        ("' 15m'", format!("found \" 15m\"; {time}")),
        ("'-15m'", format!("found \"-15m\"; {time}")),
        ("'1.5h'", format!("found \"1.5h\"; {time}")),
        ("'30m1h'", format!("found \"30m1h\"; {time}")),
        ("'1h1h'", format!("found \"1h1h\"; {time}")),
        ("'1h30'", format!("found \"1h30\"; {time}")),
        ("'0s'", format!("\"0s\" {short}")),
        ("'999ms'", format!("\"999ms\" {short}")),
        ("'36500d1ms'", format!("\"36500d1ms\" {long}")),
        (
            "'99999999999999999999d'",
            format!("\"99999999999999999999d\" {long}"),
        ),
        (
            "'18446744073709551615d'",
            format!("\"18446744073709551615d\" {long}"),
        ),
    ] {
        for (key, column) in [("idle_timeout", 16), ("max_lifetime", 16)] {
            let text = format!("[[rule]]\nname = 'a'\n{key} = {value}\n");
            let expected = format!("x.toml:3:{column}: rule \"a\": {key}: {problem}");
            assert_eq!(refused(&text), expected);
        }
    }
}

#[test]
fn a_rule_has_limits_or_is_exempt() {
    let none = "x.toml:1:1: rule \"a\": has no limit; add idle_timeout, max_lifetime, \
                response_timeout or half_closed_timeout, or action = \"exempt\"";
    let both = "is a limit, and an exempt rule has none; remove it, or action = \"exempt\"";
    all_refused(&[
        ("[[rule]]\nname = 'a'\n", none),
        ("[[rule]]\nname = 'a'\naction = 'enforce'\n", none),
        ("[[rule]]\nname = 'a'\naction = 'observe'\n", none),
        (
            "[[rule]]\nname = 'a'\nidle_timeout = '1s'\naction = 'exempt'\n",
            &format!("x.toml:3:16: rule \"a\": idle_timeout: {both}"),
        ),
        (
            "[[rule]]\nname = 'a'\naction = 'exempt'\nmax_lifetime = '1s'\n",
            &format!("x.toml:4:16: rule \"a\": max_lifetime: {both}"),
        ),
    ]);
    assert_eq!(
        rule("action = 'exempt'").limits(),
        Limits {
            min_payload: 1,
            min_answer: 1,
            ..Limits::default()
        }
    );
}

#[test]
fn ends_of_different_families_never_meet() {
    let expected = "x.toml:1:1: rule \"a\": can never match: a connection has IPv4 addresses at \
                    both ends or IPv6 addresses at both, and local and remote here have none of \
                    the same kind; make them agree";
    for conditions in [
        "local = ['10.0.0.0/8']\nremote = ['::/0']",
        "local = ['fe80::/10', '::1']\nremote = ['0.0.0.0/0', '::ffff:10.0.0.0/104']",
    ] {
        let text = format!("[[rule]]\nname = 'a'\naction = 'exempt'\n{conditions}\n");
        assert_eq!(refused(&text), expected);
    }
}

/// This number of rules, each with its own port.
fn many_rules(count: u32) -> String {
    let mut text = String::new();
    for n in 1..=count {
        writeln!(
            text,
            "[[rule]]\nname = 'r{n}'\nlocal_ports = [{n}]\nidle_timeout = '1s'"
        )
        .unwrap();
    }
    text
}

#[test]
fn the_number_of_rules_is_bounded() {
    let config = Config::parse("x.toml", &many_rules(MAX_RULES)).unwrap();
    assert_eq!(config.rules.len(), 1024);
    assert_eq!(config.warnings, []);
    assert_eq!(
        refused(&many_rules(MAX_RULES + 1)),
        "x.toml:4097:1: rule: there are 1025; at most 1024 are allowed"
    );
}

/// A rule with this number of local and remote ports, none of them adjacent.
fn with_ports(name: &str, local: u16, remote: u16) -> String {
    let list = |count| {
        let ports: Vec<String> = (1..=count).map(|n: u16| (2 * n).to_string()).collect();
        ports.join(", ")
    };
    format!(
        "[[rule]]\nname = '{name}'\nlocal_ports = [{}]\nremote_ports = [{}]\nidle_timeout = '1s'\n",
        list(local),
        list(remote)
    )
}

#[test]
fn the_number_of_match_entries_is_bounded() {
    let full = with_ports("a", 64, 64);
    let config = Config::parse("x.toml", &full).unwrap();
    assert_eq!(
        config.match_entries(&Owners::default()).len(),
        MAX_MATCH_ENTRIES as usize
    );
    let error = refused(&format!("{full}{}", with_ports("b", 1, 1)));
    assert_eq!(
        error,
        "x.toml:6:1: rule \"b\": the rules up to this one come to more than 4096 combinations of \
         prefixes, port ranges and owners, the most allowed (this one: 1, those before it: 4096); \
         use wider prefixes and ranges"
    );
    let error = refused(&with_ports("a", 4000, 4000));
    assert!(
        error.contains("(this one: more than 4096, those before it: 0)"),
        "{error}"
    );
    assert_eq!(
        refused(&with_ports("a", 4097, 1)),
        "x.toml:3:15: rule \"a\": local_ports: has 4097 elements; at most 4096 are allowed"
    );
}

#[test]
fn the_quick_form_is_checked_too() {
    let port = |n| PortRange { first: n, last: n };
    let second = Some(Duration::from_secs(1));
    let problem = Config::from_quick(vec![port(1)], None, None).unwrap_err();
    assert!(matches!(problem, Problem::NoLimit));
    let many = (1..=4097).map(|n| port(2 * n)).collect();
    let problem = Config::from_quick(many, second, None).unwrap_err();
    assert!(matches!(problem, Problem::ManyEntries { .. }));
    let config = Config::from_quick(vec![port(1)], None, second).unwrap();
    assert_eq!(config.rules[0].limits().max_lifetime_ns, 1_000_000_000);
}

#[test]
fn limits_reach_the_kernel_in_nanoseconds() {
    let limits = rule(
        "idle_timeout = '1500ms'\nmax_lifetime = '36500d'\nlifetime_jitter = '25%'\n\
         response_timeout = '2s'\nhalf_closed_timeout = '3s'\nactivity = 'sent'\nmin_payload = 1400\nmin_answer = 1048576",
    )
    .limits();
    let expected = Limits {
        idle_timeout_ns: 1_500_000_000,
        max_lifetime_ns: 36_500 * 86_400 * 1_000_000_000,
        lifetime_jitter_ns: 36_500 * 86_400 * 250_000_000,
        response_timeout_ns: 2_000_000_000,
        half_closed_timeout_ns: 3_000_000_000,
        generation: 0,
        min_payload: 1400,
        min_answer: 1 << 20,
        max_sessions: 0,
        activity: 2,
        gate: 0,
        jitter_key: 0,
    };
    assert_eq!(limits, expected);
}

#[test]
fn a_key_that_would_have_no_effect_or_too_much_is_pointed_at() {
    let jitter = "allowed: a share such as \"10%\", from \"0%\" to \"90%\"";
    let bytes = "allowed: a number of bytes from 1 to 1400";
    let idle = "idle_timeout = '5s'";
    let lifetime = "max_lifetime = '5s'";
    for (limit, key, problem) in [
        (
            lifetime,
            "activity = 'any'",
            "has no effect without idle_timeout or half_closed_timeout; add it, or remove this"
                .to_owned(),
        ),
        (
            lifetime,
            "min_payload = 2",
            "has no effect without idle_timeout, response_timeout or half_closed_timeout; add it, \
             or remove this"
                .to_owned(),
        ),
        (
            idle,
            "lifetime_jitter = '10%'",
            "has no effect without max_lifetime; add it, or remove this".to_owned(),
        ),
        (
            idle,
            "activity = 'both'",
            "found \"both\"; allowed: \"any\", \"received\" or \"sent\"".to_owned(),
        ),
        (
            idle,
            "min_answer = 2",
            "has no effect without response_timeout; add it, or remove this".to_owned(),
        ),
        (
            "response_timeout = '5s'",
            "max_sessions = 16777217",
            "found the number 16777217; allowed: a number from 1 to 16777216, or 0 for no limit"
                .to_owned(),
        ),
        (
            "response_timeout = '5s'",
            "min_answer = 1048577",
            "found the number 1048577; allowed: a number of bytes from 1 to 1048576".to_owned(),
        ),
        (
            idle,
            "min_payload = 0",
            format!("found the number 0; {bytes}"),
        ),
        (
            idle,
            "min_payload = 1401",
            format!("found the number 1401; {bytes}"),
        ),
        (
            lifetime,
            "lifetime_jitter = '10'",
            format!("found \"10\"; {jitter}"),
        ),
        (
            lifetime,
            "lifetime_jitter = '91%'",
            format!("found \"91%\"; {jitter}"),
        ),
        (
            lifetime,
            "lifetime_jitter = '+5%'",
            format!("found \"+5%\"; {jitter}"),
        ),
        (
            lifetime,
            "lifetime_jitter = 10",
            format!("found the number 10; {jitter}"),
        ),
        (
            lifetime,
            "lifetime_jitter = '81%'",
            "could shorten max_lifetime to less than 1s, the shortest limit; use a smaller share"
                .to_owned(),
        ),
    ] {
        let name = key.split(' ').next().unwrap();
        let text = format!("[[rule]]\nname = 'a'\n{limit}\n{key}\n");
        let error = refused(&text);
        assert!(error.starts_with("x.toml:4:"), "{error}");
        assert!(
            error.ends_with(&format!("rule \"a\": {name}: {problem}")),
            "{error}"
        );
    }
    let outbound = "[[rule]]\nname = 'a'\ndirection = 'outbound'\nresponse_timeout = '5s'\n";
    assert!(refused(outbound).contains("response_timeout: is for inbound connections"));
}

#[test]
fn observe_mode_changes_only_what_would_be_enforced() {
    let text = "[daemon]\nmode = 'observe'\n\
                [[rule]]\nname = 'a'\nlocal_ports = [1]\nidle_timeout = '1s'\n\
                [[rule]]\nname = 'b'\nlocal_ports = [2]\nidle_timeout = '1s'\naction = 'observe'\n\
                [[rule]]\nname = 'c'\naction = 'exempt'\n";
    let config = Config::parse("x.toml", text).unwrap();
    let actions: Vec<_> = config
        .rules
        .iter()
        .map(|rule| config.effective_action(rule))
        .collect();
    assert_eq!(actions, [Action::Observe, Action::Observe, Action::Exempt]);
}
