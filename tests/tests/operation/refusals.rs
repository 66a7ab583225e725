//! Errors at the start: one line that says what is wrong, where, and what to do; the documented
//! exit status; nothing attached.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill},
        stat::{Mode, umask},
    },
    unistd::Pid,
};
use serde_json::Value;
use session_enforcer_tests::{
    Finished, Lab, Launch, Pair, daemon_command, die_with_parent, eventually, idle_rule, patience,
    run_to_end,
};

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
    assert!(stderr.matches("(os error ").count() <= 1, "{stderr}");
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
fn a_metrics_address_that_cannot_be_bound_is_an_error_before_anything_is_attached() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let refuse = |listen: &str| {
        let args = ["--metrics-listen", listen];
        lab.launch().config(RULE).args(&args).refused()
    };
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("a-file");
    fs::write(&file, "")?;
    let listen = format!("unix:{}", file.display());
    let said = complaint(&lab, &refuse(&listen)?, 1);
    assert!(
        said.contains("metrics.listen") && said.contains(&listen),
        "{said}"
    );
    // An address of TEST-NET-1 (RFC 5737). A warning says that others can reach it.
    let refused = refuse("192.0.2.1:9847")?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert_eq!(lab.cgroup.attached_programs()?, 0);
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
    let said = complaint(&lab, &refused, 78);
    assert!(said.contains("/nonexistent/audit.json"), "{said}");
    Ok(())
}

#[test]
fn a_new_file_with_an_audit_that_cannot_be_opened_leaves_the_last_good_one_in_force() -> Result<()>
{
    let lab = Lab::new(AGENT)?;
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let (file, good) = (at("config.toml"), at("good.toml"));
    let (cgroup, socket) = (lab.cgroup.path().display(), at("control.sock"));
    let config = |audit: &Path| {
        format!(
            "[daemon]\ncgroup = \"{cgroup}\"\npin_dir = \"\"\n[metrics]\nlisten = \"\"\n[control]\n\
             socket = \"{}\"\n[audit]\npath = \"{}\"\n{RULE}",
            socket.display(),
            audit.display()
        )
    };
    fs::write(&good, config(&at("audit.json")))?;
    fs::write(&file, config(Path::new("/nonexistent/audit.json")))?;
    let mut command = daemon_command()?;
    command.arg("run").arg("--config").arg(&file);
    command.arg("--last-good").arg(&good).stdout(Stdio::null());
    let mut daemon = die_with_parent(&mut command).spawn()?;
    let status = eventually("the daemon serves", patience(), || {
        let mut status = daemon_command()?;
        status.args(["status", "--json", "--socket"]).arg(&socket);
        let status = run_to_end(status, patience())?;
        Ok((status.code == 0).then_some(status.stdout))
    });
    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM)?;
    daemon.wait()?;
    let status: Value = serde_json::from_str(&status?)?;
    let in_force = &status["config"];
    assert_eq!(in_force["file"], *good.to_string_lossy(), "{status:#}");
    assert_eq!(in_force["last_reload_successful"], false);
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

/// Gives the command a new network namespace. Its loopback interface is down, so no connection can be made.
fn without_loopback(command: &mut Command) {
    // SAFETY: the closure makes only a system call between fork and exec.
    unsafe { command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?)) };
}

#[test]
fn a_trial_of_sock_destroy_that_cannot_be_made_is_a_warning() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let rule = idle_rule(Duration::from_secs(1));
    let launch = lab.launch().config(&rule).prepared(without_loopback);
    let mut daemon = launch.start_unready()?;
    ensure!(
        daemon.log().contains("SOCK_DESTROY: not tested: "),
        "{}",
        daemon.log()
    );
    let pair = Pair::open(&lab.outside, &listener)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, Duration::from_secs(1));
    daemon.stop()
}

fn with_few_descriptors<const COUNT: u64>(command: &mut Command) {
    // SAFETY: setrlimit(2) is safe between fork and exec.
    unsafe { command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, COUNT, COUNT)?)) };
}

#[test]
fn too_few_descriptors_are_named_as_the_cause() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let launch = || lab.launch().config(RULE);
    for few in [
        launch().prepared(with_few_descriptors::<40>),
        launch().prepared(with_few_descriptors::<50>),
        launch().prepared(with_few_descriptors::<60>),
    ] {
        let said = complaint(&lab, &few.refused()?, 1);
        assert!(said.contains("Too many open files"), "{said}");
        assert!(said.contains("LimitNOFILE="), "{said}");
    }
    Ok(())
}

fn without_own_rights(command: &mut Command) {
    // SAFETY: umask(2) is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            umask(Mode::all());
            Ok(())
        })
    };
}

#[test]
fn a_umask_without_own_rights_keeps_no_later_daemon_from_the_pins() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let launch = lab.launch().config(RULE).pinned(&lab.pins);
    drop(launch.prepared(without_own_rights).start()?);
    for directory in lab
        .pins
        .sets()?
        .iter()
        .map(PathBuf::as_path)
        .chain([lab.pins.path()])
    {
        assert_eq!(fs::metadata(directory)?.mode() & 0o777, 0o700);
    }
    lab.pinned_daemon(RULE)?;
    Ok(())
}
