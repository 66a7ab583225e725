//! Python clients after a reset of their idle connection. `docs/clients.md` has these results.

use std::time::Duration;

use anyhow::Result;
use session_enforcer_tests::{
    Daemon,
    services::{Postgres, Program, Redis},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const SCRIPT: &str = include_str!("../../clients/clients.py");

/// More than three times the idle limit of 1 s that some clients have themselves.
fn limit() -> Duration {
    unhurried(Duration::from_secs(6))
}

fn rule(port: u16) -> String {
    let limit = limit().as_secs();
    format!("[[rule]]\nname = \"pools\"\nlocal_ports = [{port}]\nidle_timeout = \"{limit}s\"\n")
}

/// Waits until the sessions have ended, then has each client use its connection three times.
/// Returns the output of each.
fn uses(daemon: &Daemon, clients: &mut [Program]) -> Result<Vec<String>> {
    for client in &mut *clients {
        client.wait_for("ready\n")?;
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    let three_uses = |client: &mut Program| {
        for lines in 2..=4 {
            client.say("use")?;
            client.wait_for_lines(lines)?;
        }
        let output = client.output();
        Ok(output.trim_end().replace("ready\n", "").replace('\n', ", "))
    };
    clients.iter_mut().map(three_uses).collect()
}

#[test]
fn pools_of_postgresql_recover_and_some_fail_once() -> Result<()> {
    let expected = [
        // One failure for each of the two connections in the pool.
        (
            "psycopg_pool",
            "error: OperationalError, error: OperationalError, ok",
        ),
        ("psycopg_pool, short", "ok, ok, ok"),
        ("sqlalchemy", "error: OperationalError, ok, ok"),
        ("sqlalchemy, pre_ping", "ok, ok, ok"),
        ("sqlalchemy, recycle", "ok, ok, ok"),
        ("asyncpg", "ok, ok, ok"),
    ];
    let database = Postgres::start(AGENT)?;
    let daemon = database.lab.daemon(&rule(database.port()))?;
    let client = |(name, _)| database.python(name, SCRIPT, &[name]);
    let mut clients = expected
        .map(client)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(uses(&daemon, &mut clients)?, expected.map(|(_, says)| says));
    // Two resets of `psycopg_pool`, none of the variant whose own limit is shorter, and one of each
    // other client.
    let resets = 2 + (expected.len() - 2);
    assert_eq!(daemon.terminations()?.len(), resets);
    let log = database.log();
    let reset = "could not receive data from client: Software caused connection abort";
    assert_eq!(log.matches(reset).count(), resets, "{log}");
    Ok(())
}

#[test]
fn redis_py_reconnects_without_an_error() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = redis.lab.daemon(&rule(Redis::PORT))?;
    let address = Redis::ADDRESS.to_string();
    let client = redis.python("redis-py", SCRIPT, &["redis", &address])?;
    assert_eq!(uses(&daemon, &mut [client])?, ["ok, ok, ok"]);
    assert_eq!(daemon.terminations()?.len(), 1);
    let log = redis.log();
    let reset = "Reading from client: Software caused connection abort";
    assert_eq!(log.matches(reset).count(), 1, "{log}");
    Ok(())
}
