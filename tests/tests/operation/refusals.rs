//! Errors at the start: one line that says what is wrong, where, and what to do; the documented
//! exit status; nothing attached.

use std::{net::TcpListener, path::Path, process::Command};

use anyhow::Result;
use session_enforcer_tests::{Finished, Lab, Launch, daemon_command, patience, run_to_end};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1m\"\n";

// linux/capability.h.
const NET_ADMIN: u8 = 12;
const SYS_PTRACE: u8 = 19;
const SYS_ADMIN: u8 = 21;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

/// Asserts that the command failed with this status and wrote one line. Returns that line.
#[track_caller]
fn complaint(lab: &Lab, refused: &Finished, code: i32) -> String {
    let Finished {
        code: found,
        stdout,
        stderr,
    } = refused;
    assert_eq!((*found, stdout.as_str()), (code, ""), "{stderr}");
    let attached = lab.cgroup.attached_programs().unwrap_or(u32::MAX);
    assert_eq!(attached, 0);
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(lines[0].starts_with("session-enforcer: "), "{stderr}");
    lines[0].to_owned()
}

#[test]
fn a_wrong_configuration_is_refused_with_file_line_and_key() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    for (text, line, key) in [
        (
            "[[rule]]\nname = \"a\"\nidle_timout = \"1m\"\n",
            3,
            "idle_timout",
        ),
        (
            "[daemon]\nmode = \"dry\"\n[[rule]]\nname = \"a\"\nidle_timeout = \"1m\"\n",
            2,
            "mode",
        ),
        (
            "[[rule]]\nname = \"a\"\nidle_timeout = \"10ms\"\n",
            3,
            "idle_timeout",
        ),
        (
            "[[rule]]\nname = \"a\"\nlocal_ports = [70000]\nidle_timeout = \"1m\"\n",
            3,
            "local_ports",
        ),
        (
            "[[rule]]\nname = \"a\"\nremote = [\"10.0.0.0/33\"]\nidle_timeout = \"1m\"\n",
            3,
            "remote",
        ),
        ("\n[[rule]]\nname = \"a\"\n", 2, "idle_timeout"),
        (
            "[[rule]]\nname = \"A b\"\nidle_timeout = \"1m\"\n",
            2,
            "name",
        ),
        (
            "[[rule]]\nname = \"a\"\nusers = [\"a b\"]\nidle_timeout = \"1m\"\n",
            3,
            "users",
        ),
        (
            "[control]\nsocket = \"run/x\"\n[[rule]]\nname = \"a\"\nidle_timeout = \"1m\"\n",
            2,
            "socket",
        ),
        ("[[rule]]\nname = \"a\nidle_timeout = \"1m\"\n", 2, ""),
    ] {
        let said = complaint(&lab, &lab.launch().config(text).refused()?, 78);
        assert!(
            said.contains(&format!("config.toml:{line}:")),
            "{said}\n{text}"
        );
        assert!(said.contains(key), "{said}\n{text}");
    }
    let twice = format!("{RULE}{RULE}");
    let said = complaint(&lab, &lab.launch().config(&twice).refused()?, 78);
    assert!(
        said.contains("config.toml:5:") && said.contains("name"),
        "{said}"
    );
    Ok(())
}

#[test]
fn an_unknown_key_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let text = format!("{RULE}[control]\nsockets = \"/run/x\"\n");
    let said = complaint(&lab, &lab.launch().config(&text).refused()?, 78);
    assert!(
        said.contains("config.toml:5:") && said.contains("did you mean \"socket\""),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_missing_configuration_file_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let args = ["--config", "/nonexistent/session-enforcer.toml"];
    let said = complaint(&lab, &lab.launch().args(&args).refused()?, 78);
    assert!(
        said.contains("/nonexistent/session-enforcer.toml"),
        "{said}"
    );
    Ok(())
}

#[test]
fn wrong_usage_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let wrong: [&[&str]; 4] = [
        &["--port", "5432"],
        &["--idle-timeout", "5m"],
        &["--port", "http", "--idle-timeout", "5m"],
        &["--prot", "5432", "--idle-timeout", "5m"],
    ];
    for args in wrong {
        complaint(&lab, &lab.launch().args(args).refused()?, 2);
    }
    Ok(())
}

#[test]
fn a_missing_capability_is_named() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let own = format!("[daemon]\nnetwork_namespaces = \"own\"\n{RULE}");
    let cases: [(&[u8], &str, &str); 6] = [
        (&[], RULE, "CAP_BPF"),
        (&[NET_ADMIN, PERFMON], &own, "CAP_BPF"),
        (&[BPF, PERFMON], &own, "CAP_NET_ADMIN"),
        (&[BPF, NET_ADMIN], &own, "CAP_PERFMON"),
        (&[BPF, NET_ADMIN, PERFMON], RULE, "CAP_SYS_ADMIN"),
        (
            &[BPF, NET_ADMIN, PERFMON, SYS_ADMIN],
            RULE,
            "CAP_SYS_PTRACE",
        ),
    ];
    for (kept, config, missing) in cases {
        let refused = lab.launch().config(config).capabilities(kept).refused()?;
        let said = complaint(&lab, &refused, 77);
        assert!(said.contains(missing), "{said}");
    }
    Ok(())
}

#[test]
fn the_documented_capabilities_suffice() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let own = format!("[daemon]\nnetwork_namespaces = \"own\"\n{RULE}");
    let all: &[u8] = &[BPF, NET_ADMIN, PERFMON, SYS_ADMIN, SYS_PTRACE];
    lab.launch()
        .config(RULE)
        .capabilities(all)
        .start()?
        .stop()?;
    lab.launch()
        .config(&own)
        .capabilities(&all[..3])
        .start()?
        .stop()
}

#[test]
fn a_metrics_port_in_use_is_an_error_before_anything_is_attached() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let refused = lab
        .launch()
        .config(RULE)
        .args(&["--metrics-listen", &address])
        .refused()?;
    let said = complaint(&lab, &refused, 1);
    assert!(
        said.contains("metrics.listen") && said.contains(&address),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_directory_that_is_no_cgroup_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let elsewhere = tempfile::tempdir()?;
    for path in [elsewhere.path(), Path::new("/nonexistent")] {
        let said = complaint(&lab, &Launch::on(path).config(RULE).refused()?, 78);
        assert!(
            said.contains("cgroup") && said.contains(&*path.to_string_lossy()),
            "{said}"
        );
    }
    Ok(())
}

#[test]
fn an_audit_file_that_cannot_be_opened_is_an_error_before_anything_is_attached() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let args = ["--audit", "/nonexistent/audit.json"];
    let refused = lab.launch().config(RULE).args(&args).refused()?;
    let said = complaint(&lab, &refused, refused.code);
    assert_ne!(refused.code, 0);
    assert!(said.contains("/nonexistent/audit.json"), "{said}");
    Ok(())
}

/// The arguments of a start without a configuration file, with the lab's cgroup.
fn quick_form(lab: &Lab) -> Vec<String> {
    let cgroup = lab.cgroup.path().display().to_string();
    [
        "run",
        "--cgroup",
        &cgroup,
        "--pin-dir",
        "",
        "--port",
        "1",
        "--idle-timeout",
        "1h",
    ]
    .map(str::to_owned)
    .into()
}

#[test]
fn a_failed_trial_of_sock_destroy_is_an_error() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // A new network namespace, in which the loopback interface is down, so the test reset of
    // `SOCK_DESTROY` fails.
    let mut command = Command::new("unshare");
    command.arg("--net").arg(daemon_command()?.get_program());
    command.args(quick_form(&lab));
    let said = complaint(&lab, &run_to_end(command, patience())?, 69);
    assert!(said.contains("SOCK_DESTROY: "), "{said}");
    Ok(())
}

#[test]
fn without_cgroup_v2_the_error_says_to_mount_it() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // A mount namespace without cgroup2. The script starts the daemon only if none is mounted:
    // without `--cgroup` the daemon would watch the root cgroup.
    let script = "umount --lazy \"$1\" && ! grep -q ' - cgroup2 ' /proc/self/mountinfo \
                  && exec \"$2\" run --observe --pin-dir '' --port 1 --idle-timeout 1h";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command.arg(lab.cgroup.path().parent().unwrap_or(Path::new("/")));
    command.arg(daemon_command()?.get_program());
    let said = complaint(&lab, &run_to_end(command, patience())?, 69);
    assert!(said.contains("no cgroup2 file system is mounted"), "{said}");
    Ok(())
}
