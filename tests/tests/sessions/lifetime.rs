//! The maximum lifetime: a session is reset at this age, however busy it is.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair, Record, TrackedPair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(2);

#[test]
fn a_busy_session_is_reset_when_it_is_too_old() -> Result<()> {
    let case = TrackedPair::open(AGENT, "[[rule]]\nname = \"old\"\nmax_lifetime = \"2s\"\n")?;
    let end = case.pair.keep_busy_until_end()?;
    end.assert_not_early(&case.pair.opened, LONG);
    // The client sees an error when it writes or reads, or the server sees one.
    let expected = [Errno::ECONNRESET, Errno::EPIPE, Errno::ECONNABORTED];
    assert!(
        end.error.is_some_and(|error| expected.contains(&error)),
        "{end:?}"
    );
    let record = case.daemon.wait_for_termination_of(&case.pair)?;
    record.assert_reset("max_lifetime", &case.pair.opened, LONG);
    Ok(())
}

/// Nanoseconds between two times of a record.
fn between(record: &Record, from: &str, to: &str) -> i128 {
    let at = |name: &str| record.time(&format!("session_enforcer.{name}")).as_nanos() as i128;
    at(to) - at(from)
}

#[test]
fn the_limit_that_is_reached_first_is_the_reason() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [idle_first, old_first] = [
        lab.inside.listen(([127, 0, 0, 1], 0))?,
        lab.inside.listen(([127, 0, 0, 1], 0))?,
    ];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"a\"\nlocal_ports = [{}]\nidle_timeout = \"1s\"\nmax_lifetime = \"1h\"\n\
         [[rule]]\nname = \"b\"\nlocal_ports = [{}]\nidle_timeout = \"1h\"\nmax_lifetime = \"2s\"\n",
        idle_first.port(),
        old_first.port(),
    ))?;
    let idle = Pair::open(&lab.outside, &idle_first)?;
    let old = Pair::open(&lab.outside, &old_first)?;
    let [client, _] = old.ends()?;
    client.assert_reset(Errno::ECONNRESET, &old.opened, LONG);
    let record = daemon.wait_for_termination_of(&idle)?;
    record.assert_reset("idle_timeout", &idle.opened, SHORT);
    assert_eq!(record.text("rule.name"), "a");
    // No margin is added to a limit.
    let limit = |limit: Duration| limit.as_nanos() as i128;
    assert_eq!(between(&record, "counted_from", "deadline"), limit(SHORT));
    let record = daemon.wait_for_termination_of(&old)?;
    record.assert_reset("max_lifetime", &old.opened, LONG);
    assert_eq!(record.text("rule.name"), "b");
    assert_eq!(between(&record, "established", "deadline"), limit(LONG));
    Ok(())
}
