//! `check`, `doctor`, `--help` and `--version`, which change nothing.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use anyhow::Result;
use serde_json::Value;
use session_enforcer_tests::{
    Finished, Lab, daemon_command, keep_capabilities, patience, run_to_end,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn run(args: &[&str]) -> Result<Finished> {
    let mut command = daemon_command()?;
    command.args(args);
    run_to_end(command, patience())
}

#[test]
fn check_prints_the_rules_as_understood() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    let config = "[[rule]]\nname = \"db\"\nlocal_ports = [5432, \"6000-6010\"]\n\
                  idle_timeout = \"90s\"\nmax_lifetime = \"12h\"\n";
    fs::write(&path, config)?;
    let checked = run(&["check", "--config", &path.to_string_lossy()])?;
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    for part in ["db", "5432", "6000-6010", "1m30s", "12h"] {
        assert!(
            checked.stdout.contains(part),
            "{part} is not in {}",
            checked.stdout
        );
    }
    Ok(())
}

#[test]
fn check_refuses_a_configuration_that_run_refuses() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    fs::write(&path, "[[rule]]\nname = \"db\"\nidle_timeout = 5\n")?;
    let checked = run(&["check", "--config", &path.to_string_lossy()])?;
    assert_eq!((checked.code, checked.stdout.as_str()), (78, ""));
    assert!(
        checked.stderr.contains("config.toml:3:"),
        "{}",
        checked.stderr
    );
    assert!(
        checked.stderr.contains("idle_timeout"),
        "{}",
        checked.stderr
    );
    Ok(())
}

#[test]
fn check_warns_of_a_socket_s_path_at_which_another_kind_of_file_is() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    let place = directory.path().join("file");
    fs::write(&place, "")?;
    let place = place.to_string_lossy();
    let rule = "[[rule]]\nname = \"db\"\nidle_timeout = \"5s\"\n";
    for table in [
        format!("[control]\nsocket = \"{place}\"\n"),
        format!("[metrics]\nlisten = \"unix:{place}\"\n"),
    ] {
        fs::write(&path, table + rule)?;
        let checked = run(&["check", "--config", &path.to_string_lossy()])?;
        assert!(
            checked.stdout.contains("run refuses this on this host")
                && checked.stdout.contains("is no socket"),
            "{checked:?}"
        );
    }
    Ok(())
}

/// Rules keep their numbers in the daemon, whatever their order.
#[test]
fn status_names_the_rules_in_the_order_of_the_file() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let rules = |names: &[&str]| {
        let rule = |name: &&str| format!("[[rule]]\nname = \"{name}\"\nidle_timeout = \"1h\"\n");
        names.iter().map(rule).collect::<String>()
    };
    let daemon = lab.daemon(&rules(&["c", "b", "a"]))?;
    daemon.reload(&rules(&["a", "c"]))?;
    let (_, status) = daemon.ask("GET", "/v1/status", "")?;
    let status: Value = serde_json::from_str(&status)?;
    let named = status["rules"].as_array().into_iter().flatten();
    let names: Vec<_> = named.filter_map(|rule| rule["name"].as_str()).collect();
    assert_eq!(names, ["a", "c", "b"]);
    Ok(())
}

#[test]
fn check_reports_each_error_in_a_line() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    let path_text = path.to_string_lossy();
    fs::write(
        &path,
        "[daemon]\nmode = \"dry\"\n[[rule]]\nname = \"db\"\nidle_timeout = 5\nusrs = []\n",
    )?;
    let checked = run(&["check", "--config", &path_text])?;
    assert_eq!((checked.code, checked.stdout.as_str()), (78, ""));
    let lines: Vec<_> = checked.stderr.lines().collect();
    let keys = [
        "2:8: daemon.mode",
        "5:16: rule \"db\": idle_timeout",
        "6:1: rule \"db\": usrs",
    ];
    assert_eq!(lines.len(), keys.len(), "{}", checked.stderr);
    for (line, key) in lines.iter().zip(keys) {
        let start = format!("session-enforcer: {path_text}:{key}: ");
        assert!(line.starts_with(&start), "{line}");
    }
    let checked = run(&["check", "--json", "--config", &path_text])?;
    assert_eq!(checked.code, 78);
    let report: Value = serde_json::from_str(&checked.stdout)?;
    assert_eq!(report["valid"], false);
    assert_eq!(report["errors"][1]["line"], 5);
    assert_eq!(report["errors"][1]["key"], "rule \"db\": idle_timeout");
    assert_eq!(report["errors"].as_array().map(Vec::len), Some(3));
    for none in ["warnings", "refused_on_this_host"] {
        assert_eq!(report[none].as_array().map(Vec::len), Some(0), "{none}");
    }
    Ok(())
}

#[test]
fn check_warns_of_settings_that_run_refuses_on_this_host() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let here = format!("cgroup = \"{}\"", lab.cgroup.path().display());
    let none = "session-enforcer-none";
    // Each case has one wrong key among cgroup, pin directory, metrics address, audit and users.
    let (pins, users) = ("pin_dir = \"\"", "users = []");
    let (metrics, audit) = ("listen = \"\"", "path = \"-\"");
    // The daemon opens the audit without the capability that lets root write here.
    let read_only = tempfile::tempdir()?;
    fs::set_permissions(read_only.path(), fs::Permissions::from_mode(0o555))?;
    for (keys, code, says) in [
        (
            [
                &here,
                pins,
                metrics,
                audit,
                &format!("users = [\"{none}\"]"),
            ],
            78,
            "there is no user",
        ),
        (
            [
                &here,
                pins,
                metrics,
                &format!("path = \"/{none}/a\""),
                users,
            ],
            78,
            "there is no directory",
        ),
        (
            [
                &here,
                pins,
                metrics,
                &format!("path = \"{}/a\"", read_only.path().display()),
                users,
            ],
            78,
            "Permission denied",
        ),
        (
            [
                &here,
                &format!("pin_dir = \"/tmp/{none}\""),
                metrics,
                audit,
                users,
            ],
            78,
            "not on bpffs",
        ),
        (
            [
                &format!("cgroup = \"/{none}\""),
                pins,
                metrics,
                audit,
                users,
            ],
            78,
            "No such file",
        ),
        (
            [&here, pins, "listen = \"192.0.2.1:1\"", audit, users],
            1,
            "metrics.listen: 192.0.2.1:1",
        ),
    ] {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("config.toml");
        let [cgroup, pins, metrics, audit, users] = keys;
        let config = format!(
            "[daemon]\n{cgroup}\n{pins}\n[metrics]\n{metrics}\n[audit]\n{audit}\n[[rule]]\n\
             name = \"a\"\nidle_timeout = \"1m\"\n{users}\n"
        );
        fs::write(&path, &config)?;
        let path = path.to_string_lossy();
        let checked = run(&["check", "--config", &path])?;
        assert_eq!(checked.code, 0, "{}", checked.stderr);
        let warning = checked.stdout.lines().find(|line| line.contains(says));
        let why =
            warning.and_then(|line| line.strip_prefix("warning: run refuses this on this host: "));
        let Some(why) = why else {
            panic!("{}", checked.stdout)
        };
        let refused = run(&["run", "--config", &path])?;
        assert_eq!(refused.code, code, "{}", refused.stderr);
        let start: String = why.split(';').take(1).collect();
        assert!(refused.stderr.contains(&start), "{why}\n{}", refused.stderr);
        let checked = run(&["check", "--json", "--config", &path])?;
        let report: Value = serde_json::from_str(&checked.stdout)?;
        assert_eq!(report["valid"], true);
        assert_eq!(report["refused_on_this_host"][0], why);
        assert_eq!(report["rule"][0]["idle_timeout"], "1m");
    }
    Ok(())
}

#[test]
fn doctor_finds_no_problem_on_this_host_and_attaches_nothing() -> Result<()> {
    // On a host that can run the privileged tests, the daemon can run.
    let lab = Lab::new(AGENT)?;
    let text = run(&["doctor"])?;
    assert_eq!(text.code, 0, "{}{}", text.stdout, text.stderr);
    let json = run(&["doctor", "--json"])?;
    let report: Value = serde_json::from_str(&json.stdout)?;
    assert_eq!((json.code, &report["ok"]), (0, &Value::Bool(true)));
    let checks = report["checks"].as_array().map_or(0, Vec::len);
    assert!(
        checks > 3 && text.stdout.lines().count() >= checks,
        "{report:#}"
    );
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    Ok(())
}

#[test]
fn doctor_names_missing_capabilities() -> Result<()> {
    for args in [&["doctor", "--json"][..], &["doctor"]] {
        let mut command = daemon_command()?;
        keep_capabilities(command.args(args), &[]);
        let found = run_to_end(command, patience())?;
        assert_eq!(found.code, 77, "{}", found.stderr);
        assert!(found.stdout.contains("CAP_NET_ADMIN"), "{}", found.stdout);
        if let Ok(report) = serde_json::from_str::<Value>(&found.stdout) {
            assert_eq!(report["ok"], false);
        }
    }
    Ok(())
}

/// The kernel stamps packets by the host's clock.
#[test]
fn in_a_time_namespace_with_another_clock_the_daemon_does_not_start() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let run = format!(
        "run --port 1 --idle-timeout 1h --cgroup {}",
        lab.cgroup.path().display()
    );
    for words in ["doctor", &run] {
        let mut command = Command::new("unshare");
        command.args(["--time", "--boottime", "100000", "--fork"]);
        command.arg(daemon_command()?.get_program());
        command.args(words.split(' '));
        let refused = run_to_end(command, patience())?;
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert_eq!(refused.code, 69, "{said}");
        assert!(said.contains("time namespace"), "{said}");
    }
    Ok(())
}

#[test]
fn help_and_version_exit_with_0() -> Result<()> {
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let printed = run(args)?;
        assert_eq!((printed.code, printed.stderr.as_str()), (0, ""), "{args:?}");
        assert!(printed.stdout.contains("session-enforcer"), "{args:?}");
    }
    Ok(())
}
