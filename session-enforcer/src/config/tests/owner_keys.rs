//! Tests of the owner conditions `cgroups` and `users`.

use super::*;

#[test]
fn paths_are_those_of_proc_and_users_are_names_or_numbers() {
    let rule = rule(
        "cgroups = ['/system.slice/ssh.service/', '/']\nusers = ['postgres', 1000, '0', \
         'first.last@corp']\nidle_timeout = '1s'",
    );
    assert_eq!(rule.cgroups, ["/system.slice/ssh.service", "/"]);
    let name = |name: &str| User::Name(name.to_owned());
    let users = [
        name("postgres"),
        User::Uid(1000),
        User::Uid(0),
        name("first.last@corp"),
    ];
    assert_eq!(rule.users, users);
}

#[test]
fn an_invalid_cgroup_or_user_is_refused() {
    let allowed = "allowed: a cgroup's path from the root of the hierarchy, as in \
                   /proc/PID/cgroup, such as \"/system.slice/postgresql.service\"";
    for path in [
        "",
        "system.slice",
        "/a//b",
        "/a/../b",
        "/./a",
        "/sys/fs/cgroup/system.slice",
    ] {
        let text = format!("[[rule]]\nname = 'a'\nidle_timeout = '1s'\ncgroups = ['{path}']\n");
        let expected = format!("x.toml:4:12: rule \"a\": cgroups: found {path:?}; {allowed}");
        assert_eq!(refused(&text), expected);
    }
    let allowed = "allowed: the name of a user such as \"postgres\", or a uid";
    for (user, found) in [
        ("''", "\"\""),
        ("'a:b'", "\"a:b\""),
        ("'a b'", "\"a b\""),
        ("-1", "the number -1"),
        ("4294967295", "the number 4294967295"),
        ("'4294967295'", "\"4294967295\""),
        ("1.5", "the number 1.5"),
    ] {
        let text = format!("[[rule]]\nname = 'a'\nidle_timeout = '1s'\nusers = [{user}]\n");
        let expected = format!("x.toml:4:10: rule \"a\": users: found {found}; {allowed}");
        assert_eq!(refused(&text), expected);
    }
    let deep = "/a".repeat(17);
    let text = format!("[[rule]]\nname = 'a'\nidle_timeout = '1s'\ncgroups = ['{deep}']\n");
    assert_eq!(
        refused(&text),
        "x.toml:4:12: rule \"a\": cgroups: has 17 levels, and rules can name at most 16; name a cgroup above \
         it"
    );
}

#[test]
fn a_name_that_systemd_has_escaped_is_written_in_single_quotes() {
    let escaped = r"/system.slice/system-openvpn\x2dserver.slice";
    for written in [format!("'{escaped}'"), format!("{escaped:?}")] {
        let rule = rule(&format!("cgroups = [{written}]\nidle_timeout = '1s'"));
        assert_eq!(rule.cgroups, [escaped]);
    }
    let said = "TOML replaces \\x within double quotes, and names of systemd contain it: write the path in single \
                quotes";
    let text = format!("[[rule]]\nname = 'a'\nidle_timeout = '1s'\ncgroups = [\"{escaped}\"]\n");
    assert_eq!(
        refused(&text),
        format!("x.toml:4:12: rule \"a\": cgroups: {said}")
    );
    let text = format!("[daemon]\ncgroup = \"/sys/fs/cgroup{escaped}\"\n");
    assert_eq!(
        refused(&text),
        format!("x.toml:2:10: daemon.cgroup: {said}")
    );
}

#[test]
fn a_cgroup_lies_below_itself_and_what_is_above_it() {
    for (cgroup, above, below) in [
        ("/a/b", "/", true),
        ("/a/b", "/a", true),
        ("/a/b", "/a/b", true),
        ("/a/b", "/a/b/c", false),
        ("/ab", "/a", false),
        ("/", "/a", false),
        ("/", "/*", false),
        ("/a", "/*", true),
        ("/a/b", "/*", true),
        ("/a/b-1.scope", "/a/b-*.scope", true),
        ("/a/b-1.scope/c", "/a/b-*.scope", true),
        ("/a/x/b-1.scope", "/a/b-*.scope", false),
        ("/a/x/b", "/a/*b", false),
        ("/a", "/a/*", false),
        ("/a/b*", "/a/*", true),
        ("/a/*", "/a/b*", false),
        ("/a/*b", "/a/b*", false),
    ] {
        assert_eq!(is_below(cgroup, above), below, "{cgroup} {above}");
    }
}

#[test]
fn a_star_stands_for_any_characters_of_one_name() {
    for (name, pattern, fitting) in [
        ("abc", "abc", true),
        ("abc", "*", true),
        ("abc", "abc*", true),
        ("abc", "*abc", true),
        ("abc", "a*c", true),
        ("abc", "a*b*c", true),
        ("abbc", "a*b*c", true),
        ("ab", "a*b*b", false),
        ("aba", "ab*ba", false),
        ("abcab", "*ab", true),
        ("abcabc", "*ab", false),
        ("a.b.c", "a.*.*", true),
        ("a.b", "a.*.*", false),
        ("", "a", false),
    ] {
        assert_eq!(fits(name, pattern), fitting, "{name} {pattern}");
    }
}

#[test]
fn each_cgroup_that_fits_a_pattern_takes_what_the_pattern_is_said_to_cost() {
    let text = "[[rule]]\nname = 'a'\nidle_timeout = '1s'\nlocal_ports = [1, 3]\ncgroups = ['/a/*', '/b']\n\
                [[rule]]\nname = 'b'\nidle_timeout = '1s'\nusers = [1, 2, 3]\ncgroups = ['/a/*']\n";
    let config = Config::parse("x.toml", text).unwrap();
    let count = |paths: &[&str]| {
        let owned = |(id, path): (u64, &&str)| ((*path).to_owned(), vec![id]);
        let owners = Owners {
            cgroups: (1..).zip(paths).map(owned).collect(),
            ..Owners::default()
        };
        config.match_entries(&owners).len()
    };
    let (costs, free) = config.pattern_room();
    assert_eq!(costs, [("/a/*".to_owned(), 5)]);
    assert_eq!(free, 4096 - 4 - 3);
    assert_eq!(count(&["/b", "/a", "/a/x/y"]), 2);
    assert_eq!(count(&["/b", "/a/x"]), 2 + 5);
    assert_eq!(count(&["/b", "/a/x", "/a/y"]), 2 + 5 + 5);
}
