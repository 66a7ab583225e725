//! A session map that is too small is said, and what fits into it is enforced.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Daemon, Lab, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const CONFIG: &str =
    "[daemon]\nmax_sessions = 8\n[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

/// Eight of twenty are reset, twelve are counted as not tracked and live.
fn assert_eight_of_twenty(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    let cause = [("cause", "map_full")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        12.0
    );
    let records = daemon.wait_for_terminations(8)?;
    assert!(
        records
            .iter()
            .all(|record| record.text("session_enforcer.result") == "reset")
    );
    for pair in pairs {
        pair.opened.wait(2 * LIMIT);
    }
    assert_eq!(
        pairs
            .iter()
            .filter(|pair| pair.round_trip().is_ok())
            .count(),
        12
    );
    assert_eq!(daemon.terminations()?.len(), 8);
    Ok(())
}

#[test]
fn sessions_beyond_the_capacity_are_counted_and_the_others_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(CONFIG)?;
    let pairs: Result<Vec<_>> = (0..20)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect();
    let pairs = pairs?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 8.0);
    assert_eq!(daemon.metric("session_enforcer_map_capacity", &[])?, 8.0);
    assert_eight_of_twenty(&daemon, &pairs)?;
    // There is room again.
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    Ok(())
}

#[test]
fn older_sessions_beyond_the_capacity_are_counted_and_the_others_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pairs: Result<Vec<_>> = (0..20)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect();
    let daemon = lab.daemon(CONFIG)?;
    assert!(
        daemon.log().contains("max_sessions"),
        "the log says nothing of the full map"
    );
    assert_eight_of_twenty(&daemon, &pairs?)
}
