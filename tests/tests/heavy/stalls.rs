//! A daemon that could not run for a while catches up and resets no session early.

use std::{net::Ipv4Addr, process::Stdio, thread, time::Duration};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use session_enforcer_tests::{
    Lab, PROGRAMS, Pair, daemon_command, die_with_parent, ends_of, eventually, idle_rule, patience,
    reset_on_close, unhurried,
};

use crate::{Killed, overflow_events, turn};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}

#[test]
fn sessions_whose_deadline_passes_during_a_stall_are_reset_after_it() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let [busy, idle] = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    daemon.wait_for_metric("session_enforcer_sessions_opened_total", &[], 2.0)?;
    daemon.signal(Signal::SIGSTOP)?;
    let newer = Pair::open(&lab.outside, &listener)?;
    let last = busy.keep_busy(limit() + Duration::from_millis(500))?;
    daemon.signal(Signal::SIGCONT)?;
    for (pair, since) in [(&idle, idle.opened), (&newer, newer.opened), (&busy, last)] {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &since, limit());
        daemon
            .wait_for_termination_of(pair)?
            .assert_reset("idle_timeout", &since, limit());
    }
    Ok(())
}

#[test]
fn a_session_whose_opened_event_was_lost_is_found_and_enforced() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let before = Pair::open(&lab.outside, &listener)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    daemon.signal(Signal::SIGSTOP)?;
    overflow_events(&lab, &listener)?;
    // The daemon receives no event of this opening and this close.
    let lost = Pair::open(&lab.outside, &listener)?;
    reset_on_close(&before.client)?;
    let Pair { client, server, .. } = before;
    drop(client);
    // The close is complete when the server's socket has received the RST.
    ends_of(&[&server])?;
    drop(server);
    daemon.signal(Signal::SIGCONT)?;
    lost.ends()?[0].assert_reset(Errno::ECONNRESET, &lost.opened, limit());
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &lost.opened, limit());
    assert!(daemon.metric("session_enforcer_events_lost_total", &[])? > 0.0);
    let repaired = [("kind", "unscheduled")];
    assert!(daemon.metric("session_enforcer_reconcile_repaired_total", &repaired)? > 0.0);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)
}

#[test]
fn a_log_that_nobody_reads_does_not_block_the_enforcement() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let daemon = "[daemon]\npin_dir = \"\"\n[metrics]\nlisten = \"\"\n";
    std::fs::write(&config, format!("{daemon}{}", rule()))?;
    let mut command = daemon_command()?;
    command.arg("run").arg("--cgroup").arg(lab.cgroup.path());
    command.arg("--config").arg(&config).stdout(Stdio::null());
    // The read end stays open and nobody reads it.
    let (reader, writer) = std::io::pipe()?;
    let mut daemon = Killed(die_with_parent(command.stderr(writer)).spawn()?);
    drop(command);
    eventually("the attached programs", patience(), || {
        Ok((lab.cgroup.attached_programs()? == PROGRAMS).then_some(()))
    })?;
    // More lines than fit into a pipe.
    let pid = Pid::from_raw(daemon.0.id().try_into()?);
    for _ in 0..2_000 {
        kill(pid, Signal::SIGHUP)?;
        thread::sleep(Duration::from_millis(1));
    }
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
    kill(pid, Signal::SIGTERM)?;
    let status = eventually("the end of the daemon", patience(), || {
        Ok(daemon.0.try_wait()?)
    })?;
    assert_eq!(status.code(), Some(0));
    drop(reader);
    Ok(())
}
