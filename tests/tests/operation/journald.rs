//! The audit in the journal of a real systemd-journald.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use serde_json::Value;
use session_enforcer_tests::{
    Lab, Launch, Pair, daemon_command, patience, run_to_end,
    services::{Journal, enter_mounts},
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"ssh\"\nidle_timeout = \"1s\"\n";
const ARGS: [&str; 2] = ["--audit", "journald"];

const OWN: &str = "SYSLOG_IDENTIFIER=session-enforcer";
const OF_RULE: &str = "SESSION_ENFORCER_RULE=ssh";

fn launch<'a>(lab: &'a Lab, journal: &Journal) -> Launch<'a> {
    let launch = lab.launch().config(RULE).args(&ARGS);
    launch.mounts_of(journal.pid())
}

/// A field of an entry, as text.
fn field<'a>(entry: &'a Value, name: &str) -> Result<&'a str> {
    let value = entry[name].as_str();
    value.with_context(|| format!("no {name} in {entry:#}"))
}

#[test]
fn each_record_is_an_entry_that_journalctl_finds_and_explains() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let journal = Journal::start()?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut daemon = launch(&lab, &journal).start()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    let entry = journal.wait_for_entries(&[OF_RULE], 1)?.remove(0);
    let (source, destination) = (pair.client_address, pair.server_address);
    let message = format!("{source} -> {destination} was reset: idle_timeout of rule ssh");
    for (name, value) in [
        ("MESSAGE", message.as_str()),
        ("MESSAGE_ID", "017b46323ed34cb1954f2badf2abb0b6"),
        ("PRIORITY", "5"),
        ("SYSLOG_IDENTIFIER", "session-enforcer"),
        ("_PID", &daemon.pid().to_string()),
        ("SESSION_ENFORCER_EVENT_REASON", "idle_timeout"),
        ("SESSION_ENFORCER_RESULT", "reset"),
        ("SESSION_ENFORCER_LIMIT_SECONDS", "1.0"),
        ("SESSION_ENFORCER_SOURCE_PORT", &source.port().to_string()),
    ] {
        assert_eq!(field(&entry, name)?, value, "{name}");
    }
    let explained = journal.ask(&["--catalog", OF_RULE])?;
    let port = format!("to 127.0.0.1 port {} reached a limit", destination.port());
    for words in ["A connection reached its limit and was ended", &port] {
        ensure!(explained.contains(words), "{words:?} in {explained}");
    }
    daemon.wait_for_metric("session_enforcer_terminations_total", &[], 1.0)?;
    daemon.stop()?;
    let entries = journal.wait_for_entries(&[OWN], 4)?;
    let told: Vec<(&str, &str)> = entries
        .iter()
        .map(|entry| {
            let action = field(entry, "SESSION_ENFORCER_EVENT_ACTION")?;
            Ok((action, field(entry, "SESSION_ENFORCER_EVENT_SEQUENCE")?))
        })
        .collect::<Result<_>>()?;
    let expected = [
        ("enforcer-started", "1"),
        ("policy-loaded", "2"),
        ("session-terminated", "3"),
        ("enforcer-stopped", "4"),
    ];
    assert_eq!(told, expected);
    Ok(())
}

#[test]
fn records_are_counted_as_lost_while_journald_is_down() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut journal = Journal::start()?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = launch(&lab, &journal).start()?;
    journal.wait_for_entries(&[OWN], 2)?;
    journal.kill();
    let lost = Pair::open(&lab.outside, &listener)?;
    lost.ends()?[0].assert_reset(Errno::ECONNRESET, &lost.opened, LIMIT);
    daemon.wait_for_metric("session_enforcer_audit_records_lost_total", &[], 1.0)?;
    daemon.wait_for_degraded("audit", true)?;
    journal.begin()?;
    let taken = Pair::open(&lab.outside, &listener)?;
    taken.ends()?[0].assert_reset(Errno::ECONNRESET, &taken.opened, LIMIT);
    daemon.wait_for_degraded("audit", false)?;
    let entry = journal.wait_for_entries(&[OF_RULE], 1)?.remove(0);
    // The gap in the sequence numbers shows a reader of the journal that a record was lost.
    assert_eq!(field(&entry, "SESSION_ENFORCER_EVENT_SEQUENCE")?, "4");
    assert_eq!(
        daemon.metric("session_enforcer_audit_records_lost_total", &[])?,
        1.0
    );
    Ok(())
}

#[test]
fn a_stopped_journald_delays_no_reset_and_receives_every_record_later() -> Result<()> {
    // More entries than fit into the socket's buffer of 208 KiB while journald does not read.
    const COUNT: u16 = 300;
    let lab = Lab::new(AGENT)?;
    let journal = Journal::start()?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = launch(&lab, &journal).start()?;
    journal.wait_for_entries(&[OWN], 2)?;
    journal.freeze(true)?;
    let open = || Pair::open(&lab.outside, &listener);
    let pairs = (0..COUNT).map(|_| open()).collect::<Result<Vec<_>>>()?;
    let count = f64::from(COUNT);
    daemon.wait_for_metric("session_enforcer_terminations_total", &[], count)?;
    assert_eq!(journal.entries(&[OF_RULE])?.len(), 0);
    journal.freeze(false)?;
    let entries = journal.wait_for_entries(&[OF_RULE], pairs.len())?;
    for entry in &entries {
        assert_eq!(field(entry, "SESSION_ENFORCER_RESULT")?, "reset");
    }
    assert_eq!(
        daemon.metric("session_enforcer_audit_records_lost_total", &[])?,
        0.0
    );
    Ok(())
}

#[test]
fn a_host_without_journald_is_refused_before_anything_is_attached() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let journal = Journal::stopped()?;
    let refused = launch(&lab, &journal).refused()?;
    let complaint = "audit.path: journald: /run/systemd/journal/socket: No such file or directory (os error 2); \
                     start systemd-journald";
    assert_eq!(refused.code, 78, "{refused:?}");
    ensure!(refused.stderr.contains(complaint), "{refused:?}");
    assert_eq!(lab.cgroup.attached_programs()?, 0);

    // `audit.sync` is refused, because journald does not say when a record is on the disk.
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("config.toml");
    let run = |args: &[&str], text: &str| {
        std::fs::write(&file, text)?;
        let mut command = daemon_command()?;
        command.args(args).arg("--config").arg(&file);
        enter_mounts(&mut command, journal.pid())?;
        run_to_end(command, patience())
    };
    let synced = run(
        &["run", "--audit", "journald"],
        &format!("[audit]\nsync = true\n{RULE}"),
    )?;
    assert_eq!(synced.code, 78, "{synced:?}");
    ensure!(
        synced.stderr.contains("audit.sync: true beside"),
        "{synced:?}"
    );

    let checked = run(&["check"], &format!("[audit]\npath = \"journald\"\n{RULE}"))?;
    assert_eq!(checked.code, 0, "{checked:?}");
    for words in ["  audit               the journal (journald)\n", complaint] {
        ensure!(checked.stdout.contains(words), "{words:?} in {checked:?}");
    }
    Ok(())
}
