//! Whose connections: `cgroups` and `users`.

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
fn what_is_no_cgroup_or_no_user_is_refused() {
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
        "x.toml:4:12: rule \"a\": cgroups: has 17 levels; at most 16 are looked at, name one above \
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
    let said = "has \\x within double quotes, where it stands for another character; names of systemd \
                have it as it is: write the path in single quotes";
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
    ] {
        assert_eq!(is_below(cgroup, above), below, "{cgroup} {above}");
    }
}
