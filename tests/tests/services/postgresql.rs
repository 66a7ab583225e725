//! PostgreSQL: an idle or too old session is reset and its transaction is rolled back; clients in
//! use are not affected.

use std::time::Duration;

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Moment, Record, Time, eventually, longer_than_a_start, patience,
    services::{Postgres, Program, payload_bytes},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
/// Four times the limit of the tests with a long query.
const QUERY: Duration = Duration::from_secs(20);
const QUERY_LIMIT: Duration = Duration::from_secs(5);

/// Longer than a query takes while pgbench keeps the server busy.
fn limit() -> Duration {
    longer_than_a_start().max(Duration::from_secs(6))
}

/// A psql with an open transaction that has written.
struct OpenTransaction {
    psql: Program,
    backend: u64,
    client_port: u16,
    last: Moment,
}

impl OpenTransaction {
    fn begin(database: &Postgres) -> Result<Self> {
        let mut psql = database.psql()?;
        let (last, [backend, client_port]) = Moment::of(|| {
            psql.say(
                "BEGIN; INSERT INTO account VALUES (42); \
                 SELECT 'who: ' || pg_backend_pid() || ' ' || inet_client_port();",
            )?;
            psql.numbers_after("who: ")
        })?;
        let client_port = client_port.try_into()?;
        Ok(Self {
            psql,
            backend,
            client_port,
            last,
        })
    }

    /// The server's view of the session: its state, whether it has locks, and the rows that others
    /// see.
    fn seen_by_others(&self, database: &Postgres) -> Result<String> {
        let backend = self.backend;
        database.query(&format!(
            "SELECT coalesce((SELECT state FROM pg_stat_activity WHERE pid = {backend}), 'gone'), \
             EXISTS (SELECT FROM pg_locks WHERE pid = {backend}), \
             (SELECT count(*) FROM account)"
        ))
    }
}

fn assert_record(record: &Record, client_port: u16, database: &Postgres) {
    assert_eq!(record.ports(), [client_port, database.port()]);
    for (path, text) in [
        ("rule.name", "postgres"),
        ("network.direction", "inbound"),
        ("network.type", "ipv4"),
        ("source.ip", "127.0.0.1"),
        ("destination.ip", "127.0.0.1"),
        ("session_enforcer.mode", "enforce"),
    ] {
        assert_eq!(record.text(path), text, "{path}");
    }
}

fn rule(database: &Postgres, limit: &str) -> String {
    let port = database.port();
    format!(
        "[[rule]]\nname = \"postgres\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n{limit}\n"
    )
}

/// Asserts that pgbench ended and that all its transactions succeeded.
fn assert_no_error(pgbench: &mut Program, running: Duration) -> Result<()> {
    let status = pgbench.finish(running + patience())?;
    let output = pgbench.output();
    assert_eq!(status.code(), Some(0), "{output}");
    // Versions before 15 do not print the number of failed transactions.
    let output = output.replace("number of failed transactions: 0 (0.000%)", "");
    for bad in ["failed", "aborted", "error"] {
        assert!(!output.to_lowercase().contains(bad), "{output}");
    }
    let processed = output.split_once("transactions actually processed: ");
    assert!(
        processed.is_some_and(|(_, count)| !count.starts_with('0')),
        "{output}"
    );
    Ok(())
}

#[test]
fn an_idle_psql_is_reset_and_rolled_back_while_pgbench_sees_no_error() -> Result<()> {
    let database = Postgres::start(AGENT)?;
    database.prepare_pgbench()?;
    database.query("CREATE TABLE account (id integer PRIMARY KEY)")?;
    let limit = limit();
    let idle_timeout = format!("idle_timeout = \"{}s\"", limit.as_secs());
    let daemon = database.lab.daemon(&rule(&database, &idle_timeout))?;
    let running = 2 * limit + Duration::from_secs(2);
    let seconds = running.as_secs().to_string();
    let mut pgbench = database.pgbench(&["-c", "4", "-j", "2", "-T", &seconds, "--rate=200"])?;

    let mut idle = OpenTransaction::begin(&database)?;
    let payload = payload_bytes(idle.client_port, database.port())?;
    assert_eq!(idle.seen_by_others(&database)?, "idle in transaction|t|0");

    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &idle.last, limit);
    assert_record(&record, idle.client_port, &database);
    assert_eq!(record.bytes(), payload);
    eventually("the end of the transaction", patience(), || {
        Ok((idle.seen_by_others(&database)? == "gone|f|0").then_some(()))
    })?;
    // This would fail or wait if the row or its lock still existed.
    database.query("SET lock_timeout = '1s'; INSERT INTO account VALUES (42)")?;
    assert_lost(&mut idle.psql)?;

    assert_no_error(&mut pgbench, running)?;
    assert_eq!(daemon.terminations()?.len(), 1);
    assert_eq!(
        daemon.metric("session_enforcer_terminations_total", &[])?,
        1.0
    );
    Ok(())
}

/// Asserts that psql finds its connection lost at the next command, and exits.
fn assert_lost(psql: &mut Program) -> Result<()> {
    psql.say("COMMIT;")?;
    let status = psql.finish(patience())?;
    assert!(
        psql.output().contains("connection to server was lost"),
        "{}",
        psql.output()
    );
    // Exit status 2: the connection was lost and psql is not interactive (psql(1)).
    assert_eq!(status.code(), Some(2));
    Ok(())
}

#[test]
fn busy_connections_are_reset_when_they_are_too_old_and_younger_ones_are_not() -> Result<()> {
    // Longer than a connection of the pgbench that connects for each transaction.
    let lifetime = unhurried(Duration::from_secs(3));
    let limit = format!("max_lifetime = \"{}s\"", lifetime.as_secs());
    let database = Postgres::start(AGENT)?;
    database.prepare_pgbench()?;
    let daemon = database.lab.daemon(&rule(&database, &limit))?;
    // Connections of the first pgbench only end by a reset. The second pgbench connects for each
    // transaction.
    let (opened, mut old) = Moment::of(|| {
        let old = database.pgbench(&["-c", "2", "-j", "2", "-T", "600", "--rate=50"])?;
        // pgbench first reads the database over a connection of its own.
        daemon.wait_for_metric("session_enforcer_sessions_opened_total", &[], 3.0)?;
        Ok(old)
    })?;
    let longer = 2 * lifetime + Duration::from_secs(2);
    let seconds = longer.as_secs().to_string();
    let dials = ["-c", "1", "-T", &seconds, "--rate=20", "--connect"];
    let mut young = database.pgbench(&dials)?;

    let records = daemon.wait_for_terminations(2)?;
    for record in &records {
        record.assert_reset("max_lifetime", &opened, lifetime);
        assert_eq!(record.text("rule.name"), "postgres");
        assert!(record.number("session_enforcer.idle_seconds") < lifetime.as_secs_f64());
    }
    let status = old.finish(patience())?;
    assert_eq!(status.code(), Some(2), "{}", old.output());
    let aborted = old.output().matches("aborted in command").count();
    assert_eq!(aborted, 2, "{}", old.output());

    assert_no_error(&mut young, longer)?;
    assert_eq!(daemon.terminations()?.len(), 2);
    Ok(())
}

/// A psql that waits for the result of a query of 20 s.
struct LongQuery {
    psql: Program,
    client_port: u16,
    /// When the query was sent.
    asked: Moment,
}

impl LongQuery {
    fn ask(database: &Postgres) -> Result<Self> {
        let mut psql = database.psql()?;
        psql.say("SELECT 'who: ' || pg_backend_pid() || ' ' || inet_client_port();")?;
        let [backend, client_port] = psql.numbers_after("who: ")?;
        let asleep = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {backend} AND wait_event = 'PgSleep'"
        );
        let (asked, ()) = Moment::of(|| {
            let seconds = QUERY.as_secs();
            psql.say(&format!(
                "SELECT 'answer: ' || 42 FROM pg_sleep({seconds});"
            ))?;
            eventually("the query runs", patience(), || {
                Ok((database.query(&asleep)? == "1").then_some(()))
            })
        })?;
        Ok(Self {
            psql,
            client_port: client_port.try_into()?,
            asked,
        })
    }

    fn assert_cut(&self, daemon: &Daemon, database: &Postgres, since: &Moment) -> Result<()> {
        let record = daemon.wait_for_termination()?;
        record.assert_reset("idle_timeout", since, QUERY_LIMIT);
        assert_record(&record, self.client_port, database);
        let labels = [("rule", "postgres"), ("reason", "idle_timeout")];
        daemon.wait_for_metric("session_enforcer_terminations_total", &labels, 1.0)?;
        assert_eq!(daemon.terminations()?.len(), 1);
        Ok(())
    }
}

#[test]
fn with_a_response_timeout_a_long_query_finishes_and_its_idle_session_is_reset() -> Result<()> {
    let database = Postgres::start(AGENT)?;
    let limits = "idle_timeout = \"5s\"\nresponse_timeout = \"60s\"";
    let daemon = database.lab.daemon(&rule(&database, limits))?;
    let mut query = LongQuery::ask(&database)?;
    query.asked.wait(QUERY - Duration::from_secs(1));
    assert_eq!(daemon.terminations()?.len(), 0);
    let (mut answered, [answer]) = Moment::of(|| query.psql.numbers_after("answer: "))?;
    assert_eq!(answer, 42);
    // pg_sleep() never returns early, which bounds the time of the answer.
    let asked = query.asked.earliest;
    answered.earliest = Time {
        at: asked.at + QUERY,
        wall: asked.wall + QUERY,
    };
    query.assert_cut(&daemon, &database, &answered)?;
    assert_lost(&mut query.psql)
}

#[test]
fn without_a_response_timeout_a_long_query_is_reset() -> Result<()> {
    let database = Postgres::start(AGENT)?;
    let daemon = database
        .lab
        .daemon(&rule(&database, "idle_timeout = \"5s\""))?;
    let mut query = LongQuery::ask(&database)?;
    query.assert_cut(&daemon, &database, &query.asked)?;
    // psql waits for the answer, so it sees the reset without another command.
    assert_eq!(query.psql.finish(patience())?.code(), Some(2));
    let output = query.psql.output();
    assert!(output.contains("connection to server was lost"), "{output}");
    assert!(!output.contains("answer: "), "{output}");
    Ok(())
}
