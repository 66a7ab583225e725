//! The idle timeout: a session without new payload is reset at its deadline, never before, and one
//! with payload lives.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Daemon, Lab, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

/// The audit of the one session that was reset.
fn assert_recorded(
    daemon: &Daemon,
    pair: &Pair,
    since: &session_enforcer_tests::Moment,
) -> Result<()> {
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", since, LIMIT);
    assert_eq!(
        record.source_port(),
        u64::from(pair.client.local_addr()?.port())
    );
    Ok(())
}

#[test]
fn an_idle_client_is_reset_at_the_deadline_where_the_server_is_tracked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(RULE)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &last, LIMIT);
    server.assert_reset(Errno::ECONNABORTED, &last, LIMIT);
    assert_recorded(&daemon, &pair, &last)
}

#[test]
fn an_idle_client_is_reset_at_the_deadline_where_it_is_tracked_itself() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(RULE)?;
    let pair = Pair::open(&lab.inside, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNABORTED, &last, LIMIT);
    server.assert_reset(Errno::ECONNRESET, &last, LIMIT);
    assert_recorded(&daemon, &pair, &last)
}
