//! A session map that is too small is said, what fits into it is enforced, and what did not fit is
//! picked up when there is room.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{Daemon, Lab, Listener, Moment, Pair, longer_than_a_start, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Long enough to look at what is not tracked before the first session ends, on a busy machine too.
fn limit() -> Duration {
    longer_than_a_start() + Duration::from_secs(5)
}

fn short_limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

/// A map of so many sessions.
fn config(capacity: u32, limit: Duration) -> String {
    let daemon = format!("[daemon]\nmax_sessions = {capacity}\n");
    let limit = limit.as_secs();
    format!("{daemon}[[rule]]\nname = \"idle\"\nidle_timeout = \"{limit}s\"\n")
}

fn listen(lab: &Lab) -> Result<Listener> {
    lab.inside.listen((Ipv4Addr::LOCALHOST, 0))
}

fn open_many(lab: &Lab, listener: &Listener, count: usize) -> Result<Vec<Pair>> {
    let open = |_| Pair::open(&lab.outside, listener);
    (0..count).map(open).collect()
}

/// Of twenty sessions eight do not fit, which is said. The others are reset, which makes room, and
/// so are those then, none before its time.
fn assert_all_twenty_are_reset(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    assert!(daemon.is_degraded("untracked")?);
    let (status, body) = daemon.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("are not tracked"), "{body}");
    daemon.wait_for_log("raise daemon.max_sessions")?;
    let cause = [("cause", "map_full")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        8.0
    );
    for pair in pairs {
        for end in pair.ends()? {
            end.assert_not_early(&pair.opened, limit());
        }
        let record = daemon.wait_for_termination_of(pair)?;
        // Of one that was adopted on a busy machine the deadline may be a little later.
        assert_eq!(record.text("session_enforcer.result"), "reset");
        assert_eq!(record.text("event.reason"), "idle_timeout");
    }
    daemon.wait_for_trouble("untracked", false)?;
    let missed = [("kind", "missed")];
    assert_eq!(
        daemon.metric("session_enforcer_reconcile_repaired_total", &missed)?,
        8.0
    );
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        8.0
    );
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)
}

#[test]
fn sessions_beyond_the_capacity_are_counted_and_picked_up_when_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(12, limit()))?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 12.0);
    assert_eq!(daemon.metric("session_enforcer_map_capacity", &[])?, 12.0);
    assert_all_twenty_are_reset(&daemon, &pairs)
}

#[test]
fn older_sessions_beyond_the_capacity_are_counted_and_picked_up_when_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    let daemon = lab.launch().config(&config(12, limit())).start_unready()?;
    assert_all_twenty_are_reset(&daemon, &pairs)
}

/// How a session goes on that was picked up: by what passed while nobody stamped its packets.
fn picked_up_while_busy(lab: &Lab, daemon: &Daemon, listener: &Listener) -> Result<(Pair, Moment)> {
    let mut pairs = open_many(lab, listener, 2)?.into_iter();
    let [Some(tracked), Some(refused)] = [pairs.next(), pairs.next()] else {
        anyhow::bail!("two connections were opened");
    };
    daemon.wait_for_trouble("untracked", true)?;
    refused.keep_busy(short_limit() / 2)?;
    drop(tracked);
    let last = refused.keep_busy(2 * short_limit())?;
    Ok((refused, last))
}

#[test]
fn a_session_that_is_picked_up_while_it_is_busy_is_not_cut_early() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(1, short_limit()))?;
    let listener = listen(&lab)?;
    let (pair, last) = picked_up_while_busy(&lab, &daemon, &listener)?;
    daemon.wait_for_trouble("untracked", false)?;
    for end in pair.ends()? {
        end.assert_not_early(&last, short_limit());
    }
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &last, short_limit());
    Ok(())
}
