//! All errors of a file are found at once, and no others.

use super::*;

/// The locations of the errors of a text.
fn all_wrong(text: &str) -> Vec<String> {
    let errors = Config::parse_all("x.toml", text).unwrap_err();
    let line = |error: &ConfigError| error.location.to_string();
    errors.iter().map(line).collect()
}

#[test]
fn each_table_and_each_rule_is_read_to_its_end() {
    let text = "\
[daemon]
cgroup = 'relative'
mode = 'dry'
max_sesions = 1
max_sessions = 0
[metrics]
listen = 'here'
lisen = ''
[audit]
path = 'there'
[other]
[[rule]]
name = 'a'
local_ports = [0, 1, '9-8']
local = ['10.0.0.0/33']
users = ['a b']
idle_timeout = '5'
max_lifetime = 'soon'
lifetime_jitter = '99%'
[[rule]]
name = 'a'
idle_timeout = '1m'
[[rule]]
idle_timeout = '1m'
activity = 'no'
";
    assert_eq!(
        all_wrong(text),
        [
            "x.toml:2:10: daemon.cgroup",
            "x.toml:3:8: daemon.mode",
            "x.toml:4:1: daemon.max_sesions",
            "x.toml:5:16: daemon.max_sessions",
            "x.toml:7:10: metrics.listen",
            "x.toml:8:1: metrics.lisen",
            "x.toml:10:8: audit.path",
            "x.toml:11:2: other",
            "x.toml:14:16: rule \"a\": local_ports",
            "x.toml:14:22: rule \"a\": local_ports",
            "x.toml:15:10: rule \"a\": local",
            "x.toml:16:10: rule \"a\": users",
            "x.toml:17:16: rule \"a\": idle_timeout",
            "x.toml:18:16: rule \"a\": max_lifetime",
            "x.toml:19:19: rule \"a\": lifetime_jitter",
            "x.toml:21:8: rule 2: name",
            "x.toml:23:1: rule 3: name",
            "x.toml:25:12: rule 3: activity",
        ]
    );
}

#[test]
fn one_mistake_is_said_once() {
    for (text, place) in [
        // The limit is present, although invalid.
        (
            "name = 'a'\nidle_timeout = 1\nactivity = 'sent'\nmin_payload = 2\n",
            "3:16",
        ),
        (
            "name = 'a'\nmax_lifetime = 1\nlifetime_jitter = '9%'\n",
            "3:16",
        ),
        // The misspelt key may be the limit, and the misspelt action may be "exempt".
        ("name = 'a'\nidle_timout = '1m'\n", "3:1"),
        ("name = 'a'\naction = 'exemt'\n", "3:10"),
        // The invalid address may be of the other family.
        (
            "name = 'a'\nlocal = ['10.0.0.1', 'x']\nremote = ['::1']\nidle_timeout = '1m'\n",
            "3:22",
        ),
        ("name = 'A'\nidle_timeout = '1m'\n", "2:8"),
    ] {
        let wrong = all_wrong(&format!("[[rule]]\n{text}"));
        assert_eq!(wrong.len(), 1, "{wrong:?} in:\n{text}");
        assert!(
            wrong[0].starts_with(&format!("x.toml:{place}: ")),
            "{wrong:?}"
        );
    }
}

#[test]
fn a_rule_without_a_limit_is_wrong_whatever_else_is() {
    let text = "[[rule]]\nname = 'a'\nlocal_ports = [0]\nremote = ['10.0.0.1/8']\n";
    let wrong = all_wrong(text);
    assert_eq!(
        wrong,
        [
            "x.toml:1:1: rule \"a\"",
            "x.toml:3:16: rule \"a\": local_ports",
            "x.toml:4:11: rule \"a\": remote",
        ]
    );
}

#[test]
fn each_mistake_of_syntax_is_said_and_nothing_of_what_is_left() {
    let text = "[[rule]]\nname = a\nidle_timeout = 1m\nusrs = []\n";
    assert_eq!(all_wrong(text), ["x.toml:2:8", "x.toml:3:16"]);
}

#[test]
fn the_first_in_the_text_comes_first_and_each_has_a_line() {
    let text =
        "[[rule]]\nname = 'a'\nidle_timeout = 1\n[metrics]\nlisten = 1\n[daemon]\nmode = 1\n";
    let errors = Config::parse_all("x.toml", text).unwrap_err();
    let text = errors.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("x.toml:3:16: "), "{text}");
    assert!(lines[2].starts_with("x.toml:7:8: "), "{text}");
    assert_eq!(errors.into_first().to_string(), lines[0]);
}
