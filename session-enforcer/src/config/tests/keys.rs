//! Tests of unknown keys and values of the wrong type.

use session_enforcer_common::Activity;

use super::*;

#[test]
fn every_key_of_the_contract_is_read() {
    let text = r#"
[daemon]
cgroup = "/sys/fs/cgroup"
mode = "observe"
max_sessions = 1_000
on_full = "reset"
pin_dir = '/sys/fs/bpf/web'
network_namespaces = "own"
reconcile_interval = "5m"

[metrics]
listen = "[::1]:80"

[control]
socket = "/run/se.sock"
group = "netops"

[audit]
path = "/var/log/audit.json"
sync = true

[[rule]]
name = "postgres"
direction = "inbound"
local_ports = [5432, "6000-6010"]
remote_ports = []
local = ["10.0.0.0/8"]
remote = ["0.0.0.0/0", "::/0"]
cgroups = ["/system.slice/postgresql.service"]
users = ["postgres", 1000]
action = "observe"
idle_timeout = "15m"
max_lifetime = "12h"
lifetime_jitter = "10%"
activity = "received"
response_timeout = "1h"
half_closed_timeout = "1m"
min_payload = 16
min_answer = 1024
max_sessions = 500
"#;
    let config = Config::parse("x.toml", text).unwrap();
    let range = |first, last| PortRange { first, last };
    let users_line = text
        .lines()
        .position(|line| line.starts_with("users"))
        .unwrap() as u32
        + 1;
    let expected = Config {
        cgroup: Some("/sys/fs/cgroup".into()),
        mode: Mode::Observe,
        max_sessions: 1000,
        on_full: OnFull::Reset,
        pin_dir: Some("/sys/fs/bpf/web".into()),
        network_namespaces: NetworkNamespaces::Own,
        reconcile_interval: Duration::from_secs(300),
        metrics_listen: Some(MetricsListen::Tcp("[::1]:80".parse().unwrap())),
        control: Control {
            socket: ControlSocket::At("/run/se.sock".into()),
            group: Some("netops".to_owned()),
        },
        audit: AuditTarget::File("/var/log/audit.json".into()),
        audit_sync: true,
        rules: vec![Rule {
            name: "postgres".into(),
            direction: Some(Direction::Inbound),
            local_ports: vec![range(5432, 5432), range(6000, 6010)],
            remote_ports: vec![],
            local: vec!["10.0.0.0/8".parse().unwrap()],
            remote: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            cgroups: vec!["/system.slice/postgresql.service".into()],
            users: vec![User::Name("postgres".into()), User::Uid(1000)],
            action: Action::Observe,
            idle_timeout: Some(Duration::from_secs(900)),
            max_lifetime: Some(Duration::from_secs(43_200)),
            lifetime_jitter_percent: 10,
            activity: Activity::Received,
            response_timeout: Some(Duration::from_secs(3_600)),
            half_closed_timeout: Some(Duration::from_secs(60)),
            min_payload: 16,
            min_answer: 1024,
            max_sessions: 500,
            users_at: Some(Location {
                file: "x.toml".into(),
                position: Some(Position {
                    line: users_line,
                    column: 9,
                }),
                key: Some("rule \"postgres\": users".into()),
            }),
        }],
        warnings: vec![],
        stands_in_for: None,
        file: Some(SourceFile::new(Path::new("x.toml"), text)),
    };
    assert_eq!(config, expected);
}

#[test]
fn a_missing_key_has_its_default() {
    let text = "[[rule]]\nname = 'a'\nidle_timeout = '1s'\n";
    let config = Config::parse("x.toml", text).unwrap();
    let rule = Rule {
        idle_timeout: Some(Duration::from_secs(1)),
        ..Rule::named("a")
    };
    let expected = Config {
        cgroup: None,
        mode: Mode::Enforce,
        max_sessions: 262_144,
        on_full: OnFull::Leave,
        pin_dir: Some("/sys/fs/bpf/session-enforcer".into()),
        network_namespaces: NetworkNamespaces::All,
        reconcile_interval: Duration::from_secs(900),
        metrics_listen: Some(MetricsListen::Tcp("127.0.0.1:9847".parse().unwrap())),
        control: Control {
            socket: ControlSocket::Default,
            group: None,
        },
        audit: AuditTarget::Stdout,
        audit_sync: false,
        rules: vec![rule],
        warnings: vec![],
        stands_in_for: None,
        file: Some(SourceFile::new(Path::new("x.toml"), text)),
    };
    assert_eq!(config, expected);
    assert_eq!(config.rules[0].action, Action::Enforce);
}

#[test]
fn an_unknown_key_gets_a_suggestion() {
    all_refused(&[
        (
            "[deamon]\n",
            "x.toml:1:2: deamon: is not a known key; did you mean \"daemon\"?",
        ),
        (
            "[[rules]]\n",
            "x.toml:1:3: rules: is not a known key; did you mean \"rule\"?",
        ),
        (
            "[limits]\n",
            "x.toml:1:2: limits: is not a known key; allowed here: \"daemon\", \"metrics\", \
             \"control\", \"audit\", \"rule\"",
        ),
        (
            "[daemon]\nmod = 'observe'\n",
            "x.toml:2:1: daemon.mod: is not a known key; did you mean \"mode\"?",
        ),
        (
            "[metrics]\nport = 1\n",
            "x.toml:2:1: metrics.port: is not a known key; allowed here: \"listen\"",
        ),
        (
            "[audit]\nfile = ''\n",
            "x.toml:2:1: audit.file: is not a known key; allowed here: \"path\", \"sync\"",
        ),
        (
            "[[rule]]\nname = 'a'\nidle-timeout = '1s'\n",
            "x.toml:3:1: rule \"a\": idle-timeout: is not a known key; \
             did you mean \"idle_timeout\"?",
        ),
        (
            "[[rule]]\nnmae = 'a'\n",
            "x.toml:2:1: rule 1: nmae: is not a known key; did you mean \"name\"?",
        ),
        (
            "[[rule]]\nname = 'a'\nidle_timeout = '1s'\nports = [22]\n",
            "x.toml:4:1: rule \"a\": ports: is not a known key; allowed here: \"name\", \
             \"direction\", \"local_ports\", \"remote_ports\", \"local\", \"remote\", \
             \"cgroups\", \"users\", \"action\", \"idle_timeout\", \"max_lifetime\", \
             \"lifetime_jitter\", \"activity\", \"response_timeout\", \"half_closed_timeout\", \
             \"min_payload\", \"min_answer\", \"max_sessions\"",
        ),
        (
            "\"a\\nb\" = 1\n",
            "x.toml:1:1: a\\nb: is not a known key; allowed here: \"daemon\", \"metrics\", \"control\", \
             \"audit\", \"rule\"",
        ),
    ]);
}

#[test]
fn a_key_under_the_wrong_header_is_sent_to_the_right_one() {
    all_refused(&[
        (
            "mode = 'observe'\n",
            "x.toml:1:1: mode: is not a known key here; it belongs under [daemon]",
        ),
        (
            "[daemon]\nlisten = ''\n",
            "x.toml:2:1: daemon.listen: is not a known key here; it belongs under [metrics]",
        ),
        (
            "[daemon]\nidle_timeout = '1s'\n",
            "x.toml:2:1: daemon.idle_timeout: is not a known key here; it belongs under [[rule]]",
        ),
        (
            "[[rule]]\nname = 'a'\nmode = 'observe'\n",
            "x.toml:3:1: rule \"a\": mode: is not a known key here; it belongs under [daemon]",
        ),
        (
            "[daemon.metrics]\n",
            "x.toml:1:9: daemon.metrics: is not a known key here; it belongs under no header, at \
             the top of the file",
        ),
    ]);
}

#[test]
fn the_first_wrong_key_of_the_file_is_the_one_that_is_named() {
    let error = refused("[zebra]\n[apple]\n");
    assert!(error.starts_with("x.toml:1:2: zebra: "), "{error}");
}

#[test]
fn the_journal_takes_records_and_promises_no_disk() {
    let text =
        "[audit]\nsync = false\npath = 'journald'\n[[rule]]\nname = 'a'\nidle_timeout = '1m'\n";
    let config = Config::parse("x.toml", text).unwrap();
    assert_eq!(config.audit, AuditTarget::Journald);
    let message = "found true beside path = \"journald\", which itself decides when records are on the \
                   disk (SyncIntervalSec= in journald.conf); remove it, or name a file as path";
    for (text, at) in [
        ("[audit]\npath = 'journald'\nsync = true\n", "3:8"),
        ("[audit]\nsync = true\npath = 'journald'\n", "2:8"),
    ] {
        assert_eq!(refused(text), format!("x.toml:{at}: audit.sync: {message}"));
    }
}

#[test]
fn a_table_is_not_a_list_nor_a_value() {
    let table = "allowed: one table, under its header in single brackets";
    let rules = "allowed: each rule under a header of its own, [[rule]]";
    for (text, message) in [
        (
            "[[daemon]]\n",
            format!("x.toml:1:1: daemon: found a list; {table}"),
        ),
        (
            "metrics = ''\n",
            format!("x.toml:1:11: metrics: found \"\"; {table}"),
        ),
        (
            "audit = true\n",
            format!("x.toml:1:9: audit: found true; {table}"),
        ),
        (
            "control = 1\n",
            format!("x.toml:1:11: control: found the number 1; {table}"),
        ),
        (
            "[rule]\nname = 'a'\n",
            format!("x.toml:1:1: rule: found a table; {rules}"),
        ),
        (
            "rule = ['a']\n",
            format!("x.toml:1:9: rule: found \"a\"; {rules}"),
        ),
        (
            "rule = 1979-05-27\n",
            format!("x.toml:1:8: rule: found the date 1979-05-27; {rules}"),
        ),
    ] {
        assert_eq!(refused(text), message);
    }
}

#[test]
fn a_wrong_setting_of_the_daemon_is_pointed_at() {
    let cgroup = "allowed: the absolute path of a directory such as \"/sys/fs/cgroup\"";
    let mode = "allowed: \"enforce\" or \"observe\"";
    let number = "allowed: a number from 1 to 16777216";
    let namespaces = "allowed: \"all\" or \"own\"";
    let pin_dir = "allowed: the absolute path of a directory on bpffs such as \
                   \"/sys/fs/bpf/session-enforcer\", or \"\" for none";
    for (setting, key, found, allowed) in [
        ("cgroup = 5", "cgroup", "the number 5", cgroup),
        ("cgroup = ''", "cgroup", "\"\"", cgroup),
        ("cgroup = 'web'", "cgroup", "\"web\"", cgroup),
        ("cgroup = \"/a\\u0000b\"", "cgroup", "\"/a\\0b\"", cgroup),
        ("mode = 'enforced'", "mode", "\"enforced\"", mode),
        ("mode = true", "mode", "true", mode),
        ("max_sessions = 0", "max_sessions", "the number 0", number),
        ("max_sessions = -1", "max_sessions", "the number -1", number),
        (
            "max_sessions = 16777217",
            "max_sessions",
            "the number 16777217",
            number,
        ),
        (
            "max_sessions = 1e3",
            "max_sessions",
            "the number 1e3",
            number,
        ),
        ("max_sessions = '5'", "max_sessions", "\"5\"", number),
        (
            "max_sessions = 99999999999999999999999999999999999999999",
            "max_sessions",
            "the number 99999999999999999999999999999999999999999",
            number,
        ),
        ("pin_dir = 'bpf'", "pin_dir", "\"bpf\"", pin_dir),
        ("pin_dir = 5", "pin_dir", "the number 5", pin_dir),
        (
            "network_namespaces = 'Own'",
            "network_namespaces",
            "\"Own\"",
            namespaces,
        ),
        (
            "network_namespaces = []",
            "network_namespaces",
            "a list",
            namespaces,
        ),
    ] {
        let column = key.len() + 4;
        let expected = format!("x.toml:2:{column}: daemon.{key}: found {found}; {allowed}");
        assert_eq!(refused(&format!("[daemon]\n{setting}\n")), expected);
    }
}

#[test]
fn a_wrong_place_for_metrics_or_audit_is_pointed_at() {
    let listen = "allowed: an IP address and a port such as \"127.0.0.1:9847\", a Unix socket such as \
                  \"unix:/run/session-enforcer/metrics.sock\", or \"\" for none";
    let path = "allowed: \"-\" for standard output, \"journald\", or a file's absolute path such as \
                \"/var/log/sessions.json\"";
    for (text, message) in [
        (
            "[metrics]\nlisten = 9847",
            format!("metrics.listen: found the number 9847; {listen}"),
        ),
        (
            "[metrics]\nlisten = 'localhost:9847'",
            format!("metrics.listen: found \"localhost:9847\"; {listen}"),
        ),
        (
            "[metrics]\nlisten = '[::1]'",
            "metrics.listen: \"::1\" has no port; write \"[::1]:9847\"".to_owned(),
        ),
        (
            "[metrics]\nlisten = '::1:9847'",
            "metrics.listen: an IPv6 address needs brackets before its port; write \"[::1]:9847\""
                .to_owned(),
        ),
        (
            &format!("[metrics]\nlisten = 'unix:/{}'", "x".repeat(107)),
            "metrics.listen: the path has 108 bytes, and that of a Unix socket at most 107; choose a \
             shorter one"
                .to_owned(),
        ),
        (
            "[daemon]\nreconcile_interval = '500ms'",
            "daemon.reconcile_interval: \"500ms\" is shorter than 1s, the shortest limit; for 15m, the \
             default, leave it out"
                .to_owned(),
        ),
        (
            "[audit]\npath = ''",
            format!("audit.path: found \"\"; {path}"),
        ),
        (
            "[audit]\npath = 'a.json'",
            format!("audit.path: found \"a.json\"; {path}"),
        ),
        (
            "[audit]\npath = [1]",
            format!("audit.path: found a list; {path}"),
        ),
    ] {
        let error = refused(text);
        assert!(error.starts_with("x.toml:2:"), "{error}");
        assert!(error.ends_with(&message), "{error}\n{message}");
    }
}

#[test]
fn metrics_control_socket_and_audit_have_a_path_each() {
    let [metrics, control, audit] = [
        "[metrics]\nlisten = 'unix:/run/a.sock'\n",
        "[control]\nsocket = '/run/a.sock'\n",
        "[audit]\npath = '/run/a.sock'\n",
    ];
    for (first, second, expected) in [
        (metrics, control, "4:10: control.socket: metrics.listen"),
        (metrics, audit, "4:8: audit.path: metrics.listen"),
        (control, audit, "4:8: audit.path: control.socket"),
    ] {
        let error = refused(&format!("{first}{second}"));
        let expected = format!("x.toml:{expected} has the same path; choose another one");
        assert!(error.starts_with(&expected), "{error}");
    }
}

#[test]
fn metrics_may_be_served_on_a_unix_socket_and_another_address_than_loopback_is_doubtful() {
    let read = |listen: &str| {
        let text =
            format!("[metrics]\nlisten = '{listen}'\n[[rule]]\nname = 'a'\nidle_timeout = '1m'\n");
        let config = Config::parse("x.toml", &text).unwrap();
        let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
        (config.metrics_listen, warnings)
    };
    let (listen, warnings) = read("unix:/run/metrics.sock");
    assert_eq!(
        listen,
        Some(MetricsListen::Unix("/run/metrics.sock".into()))
    );
    assert_eq!(warnings, Vec::<String>::new());
    for quiet in ["127.0.0.2:1", "[::1]:1", "[::ffff:127.0.0.1]:1", ""] {
        assert_eq!(read(quiet).1, Vec::<String>::new(), "{quiet}");
    }
    for open in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
        let start =
            format!("x.toml:2:10: metrics.listen: whoever reaches {open} reads the metrics");
        let warnings = read(open).1;
        assert!(
            warnings.len() == 1 && warnings[0].starts_with(&start),
            "{warnings:?}"
        );
    }
    let relative =
        "[metrics]\nlisten = 'unix:metrics.sock'\n[[rule]]\nname = 'a'\nidle_timeout = '1m'\n";
    let error = Config::parse("x.toml", relative).unwrap_err().to_string();
    assert!(error.contains("a Unix socket such as"), "{error}");
}
