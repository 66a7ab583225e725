//! A session map that is too small is said, what fits into it is enforced, and what did not fit is
//! picked up when there is room.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{Daemon, Lab, Listener, Moment, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);

/// A map of so many sessions.
fn config(capacity: u32) -> String {
    format!(
        "[daemon]\nmax_sessions = {capacity}\n[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n"
    )
}

fn listen(lab: &Lab) -> Result<Listener> {
    lab.inside.listen((Ipv4Addr::LOCALHOST, 0))
}

fn open_many(lab: &Lab, listener: &Listener, count: usize) -> Result<Vec<Pair>> {
    let open = |_| Pair::open(&lab.outside, listener);
    (0..count).map(open).collect()
}

/// Of twenty sessions twelve do not fit, which is said. The others are reset, which makes room, and
/// so are those then, none before its time.
fn assert_all_twenty_are_reset(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    assert!(daemon.is_degraded("untracked")?);
    let (status, body) = daemon.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("raise daemon.max_sessions"), "{body}");
    let cause = [("cause", "map_full")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        12.0
    );
    for pair in pairs {
        for end in pair.ends()? {
            end.assert_not_early(&pair.opened, LIMIT);
        }
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    }
    daemon.wait_for_trouble("untracked", false)?;
    let missed = [("kind", "missed")];
    assert_eq!(
        daemon.metric("session_enforcer_reconcile_repaired_total", &missed)?,
        12.0
    );
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        12.0
    );
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)
}

#[test]
fn sessions_beyond_the_capacity_are_counted_and_picked_up_when_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(8))?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 8.0);
    assert_eq!(daemon.metric("session_enforcer_map_capacity", &[])?, 8.0);
    assert_all_twenty_are_reset(&daemon, &pairs)
}

#[test]
fn older_sessions_beyond_the_capacity_are_counted_and_picked_up_when_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    let daemon = lab.launch().config(&config(8)).start_unready()?;
    assert_all_twenty_are_reset(&daemon, &pairs)
}

/// How a session goes on that was picked up: by what passed while nobody stamped its packets.
fn picked_up_while_busy(lab: &Lab, daemon: &Daemon, listener: &Listener) -> Result<(Pair, Moment)> {
    let mut pairs = open_many(lab, listener, 2)?.into_iter();
    let [Some(tracked), Some(refused)] = [pairs.next(), pairs.next()] else {
        anyhow::bail!("two connections were opened");
    };
    daemon.wait_for_trouble("untracked", true)?;
    refused.keep_busy(LIMIT / 2)?;
    drop(tracked);
    let last = refused.keep_busy(2 * LIMIT)?;
    Ok((refused, last))
}

#[test]
fn a_session_that_is_picked_up_while_it_is_busy_is_not_cut_early() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(1))?;
    let listener = listen(&lab)?;
    let (pair, last) = picked_up_while_busy(&lab, &daemon, &listener)?;
    daemon.wait_for_trouble("untracked", false)?;
    for end in pair.ends()? {
        end.assert_not_early(&last, LIMIT);
    }
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &last, LIMIT);
    Ok(())
}
