//! How the daemon stops, and which signals it obeys.

use std::{
    fs, net::Ipv4Addr, os::unix::process::CommandExt as _, process::Command, time::Duration,
};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::signal::{SigSet, Signal, raise},
};
use session_enforcer_tests::{
    Lab, PROGRAMS, Pair, Record, eventually, idle_rule, patience, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

fn rule() -> String {
    idle_rule(limit())
}

#[test]
fn a_stopped_daemon_detaches_and_leaves_all_connections_alone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut daemon = lab.daemon(&rule())?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let reset = Pair::open(&lab.outside, &listener)?;
    reset.ends()?[0].assert_reset(Errno::ECONNRESET, &reset.opened, limit());
    daemon.wait_for_termination()?;
    let tracked = Pair::open(&lab.outside, &listener)?;
    daemon.stop()?;
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    let untracked = Pair::open(&lab.outside, &listener)?;
    untracked.opened.wait(2 * limit());
    tracked.round_trip()?;
    untracked.round_trip()?;
    let actions: Vec<_> = daemon
        .audit()?
        .iter()
        .map(|r| r.text("event.action").to_owned())
        .collect();
    assert_eq!(
        actions.first().map(String::as_str),
        Some("enforcer-started"),
        "{actions:?}"
    );
    assert_eq!(
        actions.last().map(String::as_str),
        Some("enforcer-stopped"),
        "{actions:?}"
    );
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn an_interrupt_from_the_terminal_stops_the_daemon() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut daemon = lab.daemon(&rule())?;
    daemon.signal(Signal::SIGINT)?;
    assert_eq!(daemon.wait()?.code(), Some(0));
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    Ok(())
}

#[test]
fn a_parent_that_blocks_signals_does_not_keep_the_daemon_from_stopping() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let blocked = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let mut daemon = lab.launch().config(&rule()).blocked(&blocked).start()?;
    daemon.stop()
}

/// Makes a SIGHUP pending for the command before its exec. Unhandled, it would end the process.
fn with_a_pending_hangup(command: &mut Command) {
    let hang_up = || {
        let mut hangup = SigSet::empty();
        hangup.add(Signal::SIGHUP);
        hangup.thread_block()?;
        raise(Signal::SIGHUP)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(hang_up) };
}

#[test]
fn a_hangup_before_the_daemon_is_ready_is_obeyed_later() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut daemon = lab
        .launch()
        .config(&rule())
        .prepared(with_a_pending_hangup)
        .start()?;
    daemon.wait_for_log("rule(s) in force")?;
    daemon.stop()
}

#[test]
fn a_daemon_that_is_killed_leaves_nothing_attached() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait()?;
    eventually("the programs are gone", patience(), || {
        Ok((lab.cgroup.attached_programs()? == 0).then_some(()))
    })?;
    pair.opened.wait(2 * limit());
    pair.round_trip()?;
    Ok(())
}

#[test]
fn a_restarted_daemon_adopts_the_sessions_of_the_first_one() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let rule = idle_rule(3 * limit());
    let mut first = lab.daemon(&rule)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    first.stop()?;
    let second = lab.daemon(&rule)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, 3 * limit());
    second
        .wait_for_termination()?
        .assert_reset("idle_timeout", &last, 3 * limit());
    Ok(())
}

#[test]
fn a_hangup_makes_the_daemon_reopen_its_audit_file_and_read_its_configuration() -> Result<()> {
    let actions = audit_after(Signal::SIGHUP)?;
    assert_eq!(actions, ["policy-loaded other", "session-terminated other"]);
    Ok(())
}

#[test]
fn sigusr1_makes_the_daemon_reopen_its_audit_file_and_nothing_else() -> Result<()> {
    let actions = audit_after(Signal::SIGUSR1)?;
    assert_eq!(actions, ["session-terminated idle"]);
    Ok(())
}

/// Renames the audit file, renames the rule in the configuration, and sends the signal. Returns the
/// actions in the new audit file after a session has ended.
fn audit_after(signal: Signal) -> Result<Vec<String>> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let before = Pair::open(&lab.outside, &listener)?;
    before.ends()?;
    daemon.wait_for_termination_of(&before)?;
    let renamed = daemon.audit_path().with_extension("1");
    fs::rename(daemon.audit_path(), &renamed)?;
    let kept = fs::read(&renamed)?;
    daemon.write_config(&rule().replace("\"idle\"", "\"other\""))?;
    daemon.signal(signal)?;
    eventually("a new audit file", patience(), || {
        Ok(daemon.audit_path().exists().then_some(()))
    })?;
    let after = Pair::open(&lab.outside, &listener)?;
    after.ends()?;
    daemon.wait_for_termination_of(&after)?;
    assert_eq!(daemon.terminations_of(&before)?.len(), 0);
    assert_eq!(fs::read(&renamed)?, kept);
    let said = |record: &Record| {
        let rule = match record.is_termination() {
            true => record.at("rule.name"),
            false => &record.at("session_enforcer.rules")[0],
        };
        let (action, rule) = (record.text("event.action"), rule.as_str());
        format!("{action} {}", rule.unwrap_or_default())
    };
    Ok(daemon.audit()?.iter().map(said).collect())
}

#[test]
fn the_audit_goes_to_standard_output_if_configured() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut daemon = lab
        .launch()
        .config(&rule())
        .args(&["--audit", "-"])
        .start()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?;
    daemon.stop()?;
    let lines: Vec<String> = daemon.stdout().lines().map(str::to_owned).collect();
    let actions = [
        "enforcer-started",
        "policy-loaded",
        "session-terminated",
        "enforcer-stopped",
    ];
    assert_eq!(lines.len(), actions.len(), "{lines:#?}");
    for (line, action) in lines.iter().zip(actions) {
        let value: serde_json::Value = serde_json::from_str(line)?;
        assert_eq!(value["event"]["action"], action);
    }
    Ok(())
}
