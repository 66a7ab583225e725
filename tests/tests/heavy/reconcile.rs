//! The comparison of session table, schedule and sockets at run time repairs every difference.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{
    Daemon, Lab, Netns, Pair, idle_rule, overwrite_callback_flags, reset_on_close, unhurried,
};

use crate::{overflow_events, turn};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const EVERY_SECOND: &str = "[daemon]\nreconcile_interval = \"1s\"\n";

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}
/// No deadline passes during the test, so only a comparison can find the difference.
const LONG_RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1h\"\n";

fn wait_until_repaired(daemon: &Daemon, kind: &str, count: f64) -> Result<()> {
    let name = "session_enforcer_reconcile_repaired_total";
    daemon.wait_for_metric(name, &[("kind", kind)], count)
}

#[test]
fn sessions_whose_close_another_program_hides_are_removed_at_the_interval() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&format!("{EVERY_SECOND}{LONG_RULE}"))?;
    let _other = overwrite_callback_flags(&lab.cgroup)?;
    let [closed, kept] = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 2.0)?;
    reset_on_close(&closed.client)?;
    drop(closed);
    wait_until_repaired(&daemon, "stale", 1.0)?;
    for name in ["map_entries", "sessions", "sessions_closed_total"] {
        assert_eq!(
            daemon.metric(&format!("session_enforcer_{name}"), &[])?,
            1.0,
            "{name}"
        );
    }
    kept.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn a_session_whose_close_another_program_hides_is_not_recorded_as_terminated() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let _other = overwrite_callback_flags(&lab.cgroup)?;
    let [closed, open] = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 2.0)?;
    reset_on_close(&closed.client)?;
    drop(closed);
    open.ends()?[0].assert_reset(Errno::ECONNRESET, &open.opened, limit());
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &open.opened, limit());
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    assert!(daemon.repaired("stale")? >= 1.0);
    Ok(())
}

#[test]
fn sessions_whose_close_event_was_lost_are_removed_soon() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(LONG_RULE)?;
    let [ended, kept] = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    daemon.freeze()?;
    overflow_events(&lab, &listener)?;
    reset_on_close(&ended.client)?;
    drop(ended);
    daemon.thaw()?;
    // The last events were lost: some openings arrived without their closings.
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    assert!(daemon.metric("session_enforcer_events_lost_total", &[])? > 0.0);
    assert!(daemon.repaired("unreported")? >= 1.0);
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 1.0)?;
    kept.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn a_missed_session_of_another_namespace_is_adopted() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let there = lab.inside_in(&netns)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let listener_there = there.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&format!("[daemon]\nmax_sessions = 1\n{}", rule()))?;
    let outside_there = lab.outside_in(&netns)?;
    let tracked = Pair::open(&lab.outside, &listener)?;
    let refused = Pair::open(&outside_there, &listener_there)?;
    daemon.wait_for_degraded("untracked", true)?;
    for pair in [&tracked, &refused] {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
        let record = daemon.wait_for_termination_of(pair)?;
        // On a busy machine the deadline of an adopted session may be a little later.
        assert_eq!(record.text("session_enforcer.result"), "reset");
    }
    daemon.wait_for_degraded("untracked", false)?;
    assert_eq!(daemon.repaired("missed")?, 1.0);
    Ok(())
}

#[test]
fn with_network_namespaces_own_no_other_namespace_is_compared() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let there = lab.inside_in(&netns)?;
    let own = "network_namespaces = \"own\"\n";
    let daemon = lab.daemon(&format!("{EVERY_SECOND}{own}{LONG_RULE}"))?;
    let elsewhere = Pair::open(&there, &there.listen((Ipv4Addr::LOCALHOST, 0))?)?;
    // A repair proves that a comparison has taken place since.
    let _other = overwrite_callback_flags(&lab.cgroup)?;
    let closed = Pair::open(&lab.outside, &lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 1.0)?;
    reset_on_close(&closed.client)?;
    drop(closed);
    wait_until_repaired(&daemon, "stale", 1.0)?;
    assert_eq!(daemon.metric("session_enforcer_sessions", &[])?, 0.0);
    assert_eq!(daemon.repaired("missed")?, 0.0);
    elsewhere.round_trip()?;
    Ok(())
}

#[test]
fn comparisons_under_churn_find_no_difference() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&format!("{EVERY_SECOND}{LONG_RULE}"))?;
    let kept = Pair::open(&lab.outside, &listener)?;
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        let pair = Pair::open(&lab.outside, &listener)?;
        reset_on_close(&pair.client)?;
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    assert_eq!(
        daemon.metric("session_enforcer_reconcile_repaired_total", &[])?,
        0.0
    );
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 1.0);
    kept.round_trip()?;
    Ok(())
}
