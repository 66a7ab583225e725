//! Node.js clients after a reset of their idle connection. `docs/clients.md` has these results.

use std::time::Duration;

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, patience,
    services::{MariaDb, Postgres, Program, Redis, node_client},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// More than the idle limit of 1 s that some clients have themselves, and longer than any takes to
/// connect.
fn limit() -> Duration {
    unhurried(Duration::from_secs(4))
}

fn rule(port: u16, more: &str) -> String {
    let limit = limit().as_secs();
    format!(
        "[[rule]]\nname = \"pools\"\nlocal_ports = [{port}]\nidle_timeout = \"{limit}s\"\n{more}\n"
    )
}

/// Waits until the session has ended, then has the client use its connection twice. Returns its
/// output.
fn two_uses(daemon: &Daemon, client: &mut Program) -> Result<String> {
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    for uses in 1..=2 {
        client.say("use")?;
        client.wait_for_said(uses)?;
    }
    let output = client.output();
    Ok(output.trim_end().replace("ready\n", "").replace('\n', ", "))
}

#[test]
fn a_process_with_a_pg_pool_crashes_unless_it_handles_errors_or_closes_earlier() -> Result<()> {
    let database = Postgres::start(AGENT)?;
    let port = database.port();
    let daemon = database.lab.daemon(&rule(port, ""))?;
    let client = |name| node_client(&database.lab, None, [name, "127.0.0.1", &port.to_string()]);
    let mut plain = client("pg")?;
    let status = plain.finish(patience())?;
    assert_eq!(status.code(), Some(1), "{}", plain.output());
    assert!(plain.output().contains("Unhandled 'error' event"));
    let mut hears = client("pg, error")?;
    assert_eq!(two_uses(&daemon, &mut hears)?, "idle: ECONNRESET, ok, ok");
    let mut short = client("pg, short")?;
    assert_eq!(two_uses(&daemon, &mut short)?, "ok, ok");
    Ok(())
}

#[test]
fn a_mysql2_pool_reconnects_and_a_mysql2_connection_does_not() -> Result<()> {
    let database = MariaDb::start(AGENT)?;
    let daemon = database.lab.daemon(&rule(MariaDb::PORT, ""))?;
    let mut pool = database.node_client("mysql2, pool")?;
    assert_eq!(two_uses(&daemon, &mut pool)?, "ok, ok");
    let mut bare = database.node_client("mysql2")?;
    let says = two_uses(&daemon, &mut bare)?;
    assert!(says.starts_with("idle: ECONNRESET, error: "), "{says}");
    assert_eq!(says.matches("error: ").count(), 2, "{says}");
    Ok(())
}

#[test]
fn ioredis_reconnects_by_itself() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = redis.lab.daemon(&rule(Redis::PORT, ""))?;
    let mut client = redis.node_client("ioredis")?;
    daemon.wait_for_terminations(1)?;
    client.say("use")?;
    client.wait_for("ok\n")?;
    assert!(!client.output().contains("error:"), "{}", client.output());
    Ok(())
}

#[test]
fn ioredis_repeats_a_blocking_command_on_the_next_connection() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = redis.lab.daemon(&rule(Redis::PORT, ""))?;
    let mut client = redis.node_client("ioredis, blocking")?;
    daemon.wait_for_terminations(1)?;
    redis.wait_for_blocked(1)?;
    redis.ask(&["LPUSH", "list", "element"])?;
    client.wait_for("got element")
}
