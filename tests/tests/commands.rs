//! The commands that look and change nothing: `check` and `doctor`.

use std::fs;

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
fn check_refuses_what_run_would_refuse() -> Result<()> {
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
fn doctor_finds_nothing_wrong_here_and_attaches_nothing() -> Result<()> {
    // Where the privileged tests run, the daemon runs.
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
fn doctor_names_what_is_missing_and_what_to_do() -> Result<()> {
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

#[test]
fn help_and_version_are_no_errors() -> Result<()> {
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let printed = run(args)?;
        assert_eq!((printed.code, printed.stderr.as_str()), (0, ""), "{args:?}");
        assert!(printed.stdout.contains("session-enforcer"), "{args:?}");
    }
    Ok(())
}
