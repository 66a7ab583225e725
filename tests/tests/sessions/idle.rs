//! The idle timeout: a session is reset one timeout after its last new payload, never earlier.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair, TrackedPair, idle_rule, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}

#[test]
fn an_idle_session_is_reset_at_the_deadline_where_the_server_is_tracked() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    let record =
        case.assert_reset_when_idle([Errno::ECONNRESET, Errno::ECONNABORTED], &last, limit())?;
    assert_eq!(record.text("network.direction"), "inbound");
    Ok(())
}

#[test]
fn an_idle_session_is_reset_at_the_deadline_where_the_client_is_tracked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.inside, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNABORTED, &last, limit());
    server.assert_reset(Errno::ECONNRESET, &last, limit());
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    Ok(())
}

#[test]
fn an_idle_session_is_reset_at_the_deadline_where_both_ends_are_tracked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.inside, &listener)?;
    let last = pair.round_trip()?;
    let ends = pair.ends()?;
    // Both ends are due at the same time. The reset of one also resets the other, before or after
    // the daemon destroys it.
    assert!(
        ends.iter()
            .any(|end| end.error == Some(Errno::ECONNABORTED)),
        "{ends:?}"
    );
    for end in ends {
        end.assert_not_early(&last, limit());
        let error = end.error;
        assert!(
            matches!(error, Some(Errno::ECONNABORTED | Errno::ECONNRESET)),
            "{error:?}"
        );
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    for record in daemon.wait_for_terminations(1)? {
        record.assert_due("idle_timeout", &last, limit());
        assert_ne!(record.text("session_enforcer.result"), "failed");
    }
    Ok(())
}

#[test]
fn the_clock_of_a_session_that_never_carried_payload_starts_when_it_is_established() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let [client, _] = case.pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &case.pair.opened, limit());
    let record = case.daemon.wait_for_termination_of(&case.pair)?;
    record.assert_reset("idle_timeout", &case.pair.opened, limit());
    assert_eq!(record.bytes(), [0, 0]);
    Ok(())
}

#[test]
fn payload_in_either_direction_keeps_a_session_alive_for_one_timeout_more() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let open = || Pair::open(&lab.outside, &listener);
    let pairs = [open()?, open()?, open()?];
    let start = Instant::now();
    let mut last = pairs.each_ref().map(|pair| pair.opened);
    while start.elapsed() < 2 * limit() {
        last = [
            pairs[0].round_trip()?,
            pairs[1].to_server(b"x")?,
            pairs[2].to_client(b"x")?,
        ];
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(daemon.terminations()?.len(), 0);
    for (pair, last) in pairs.iter().zip(last) {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, limit());
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, limit());
    }
    Ok(())
}
