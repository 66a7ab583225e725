//! The cookbook's recipes for databases, as shipped but with shorter limits.

use std::time::Duration;

use anyhow::{Context as _, Result};
use session_enforcer_tests::{
    Daemon, Moment, Recipe, Record, eventually, patience,
    services::{Host, Postgres, Program},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
/// More than the server sends in one packet.
const ROW: &str = "repeat('x', 10000)";

/// What 15 minutes of the recipes last here: longer than a client takes to connect and query on a
/// busy machine.
fn fifteen_minutes() -> Duration {
    unhurried(Duration::from_secs(6))
}

/// The factor by which limits are shortened.
fn shorter() -> Result<u32> {
    Ok((15 * 60 / fifteen_minutes().as_secs()).try_into()?)
}

/// The factor by which a lifetime of `hours` is shortened so that it lasts `lifetime`.
fn to_last(hours: u32, lifetime: Duration) -> Result<u32> {
    Ok(hours * 3_600 / u32::try_from(lifetime.as_secs())?)
}

/// A psql and the time of its last activity.
struct Client {
    psql: Program,
    port: u16,
    last: Moment,
}

impl Client {
    /// Sends a command and does not wait for its result.
    fn ask(database: &Postgres, host: Host, sql: &str) -> Result<Self> {
        let mut psql = database.psql_at(host)?.quiet();
        psql.say("SELECT 'port: ' || inet_client_port();")?;
        let [port] = psql.numbers_after("port: ")?;
        let (last, ()) = Moment::of(|| {
            psql.say(sql)?;
            // The server has read the command, whether it has finished or not.
            eventually("the command at the server", patience(), || {
                let asked = "SELECT query <> '' AND query NOT LIKE '%inet_client_port%' \
                             FROM pg_stat_activity WHERE client_port = ";
                Ok((database.query(&format!("{asked}{port}"))? == "t").then_some(()))
            })
        })?;
        let port = port.try_into()?;
        Ok(Self { psql, port, last })
    }

    /// A query that sends nothing for `duration`.
    fn slow(database: &Postgres, host: Host, duration: Duration) -> Result<Self> {
        let seconds = duration.as_secs_f64();
        let sql = format!("SELECT 'answer: ' || 42 FROM pg_sleep({seconds});");
        Self::ask(database, host, &sql)
    }

    /// A result whose last row comes after a pause of `duration`.
    fn paused(database: &Postgres, host: Host, duration: Duration) -> Result<Self> {
        let seconds = duration.as_secs_f64();
        let rows = "generate_series(1, 21) AS row";
        Self::ask(
            database,
            host,
            &format!(
                "COPY (SELECT CASE WHEN row = 21 THEN pg_sleep({seconds})::text END, {ROW} \
                 FROM {rows}) TO STDOUT;"
            ),
        )
    }

    /// A result with a row every tenth of a second, for `duration`.
    fn dump(database: &Postgres, host: Host, duration: Duration) -> Result<Self> {
        let rows = format!("generate_series(1, {})", duration.as_secs() * 10);
        let sql = format!("COPY (SELECT pg_sleep(0.1), {ROW} FROM {rows}) TO STDOUT;");
        Self::ask(database, host, &sql)
    }

    /// The termination record of this client.
    fn record(&self, daemon: &Daemon) -> Result<Record> {
        let found = eventually("the end of a client", 3 * patience(), || {
            let records = daemon.terminations()?;
            let own = |record: &Record| record.ports()[0] == self.port;
            Ok(records.into_iter().find(own))
        });
        found.with_context(|| format!("port {}", self.port))
    }

    fn assert_idle(&self, daemon: &Daemon, rule: &str, limit: Duration) -> Result<()> {
        let record = self.record(daemon)?;
        record.assert_reset("idle_timeout", &self.last, limit);
        assert_eq!(record.text("rule.name"), rule);
        Ok(())
    }

    /// Asserts that the session is not terminated, and makes a short query.
    fn round_trip(&mut self, daemon: &Daemon, word: &str) -> Result<()> {
        assert_eq!(
            daemon
                .terminations()?
                .iter()
                .filter(|record| record.ports()[0] == self.port)
                .count(),
            0
        );
        let (last, ()) = Moment::of(|| {
            self.psql.say(&format!("SELECT 'still ' || '{word}';"))?;
            self.psql.wait_for(&format!("still {word}"))
        })?;
        self.last = last;
        Ok(())
    }
}

#[test]
fn in_the_pooler_recipe_slow_queries_may_take_an_hour_and_pooled_connections_live_for_four()
-> Result<()> {
    let replica = "10.77.0.6";
    let database = Postgres::start_on_host(AGENT)?;
    let lifetime = unhurried(Duration::from_secs(16));
    let recipe = Recipe::new("postgresql-pooler", [shorter()?, to_last(4, lifetime)?])?
        .with("10.0.0.6", replica)?
        .with("10.0.0.20", "10.77.0.2")?;
    let daemon = database.lab.daemon(recipe.text())?;
    let mut receiver = database.start_replica(replica.parse()?)?;
    let _pooler = database.start_pooler()?;
    let (pooled, answer) = Moment::of(|| database.query_pooler("SELECT 42"))?;
    assert_eq!(answer, "42");
    let [idle, hour] = [15, 60].map(|minutes| recipe.minutes(minutes));
    let near = Host::Near;
    let listening = Client::ask(&database, near, "LISTEN news;")?;
    let paused = Client::paused(&database, near, 3 * idle)?;
    let endless = Client::slow(&database, near, 2 * hour)?;
    let mut slow = Client::slow(&database, near, 2 * idle)?;
    let mut dump = Client::dump(&database, near, 2 * idle)?;

    listening.assert_idle(&daemon, "direct", idle)?;
    paused.assert_idle(&daemon, "direct", idle)?;
    let record = endless.record(&daemon)?;
    record.assert_reset("response_timeout", &endless.last, hour);
    // The answers came within the response timeout; after them the sessions were idle.
    for client in [&mut slow, &mut dump] {
        let record = client.record(&daemon)?;
        assert_eq!(record.text("event.reason"), "idle_timeout");
        let counted = record.time("session_enforcer.counted_from");
        assert!(
            counted >= client.last.earliest.wall + 2 * idle,
            "{record:?}"
        );
    }
    assert!(slow.psql.output().contains("answer: 42"));

    let records = daemon.terminations()?;
    let pooler = |record: &&Record| record.text("rule.name") == "pooler";
    let record = records
        .iter()
        .find(pooler)
        .context("no record of the pooler")?;
    assert_eq!(record.text("event.reason"), "max_lifetime");
    assert!(recipe.lifetime(4) == lifetime && lifetime > 2 * idle);
    let limit = record.number("session_enforcer.limit_seconds");
    let allowed = lifetime.as_secs_f64() * 0.75..=lifetime.as_secs_f64();
    assert!(allowed.contains(&limit), "{limit}");
    assert!(record.time("session_enforcer.deadline") <= pooled.latest.wall + lifetime);
    assert_eq!(database.query_pooler("SELECT 43")?, "43");

    assert!(receiver.is_running()?);
    let replicas = [("rule", "replicas")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &replicas)?,
        0.0
    );
    assert_eq!(records.len(), 6);
    Ok(())
}

/// Asserts that the recipe resets every silent session after `minutes`, whatever was sent last, and
/// that a session with constant payload lives.
fn assert_holds(recipe: &Recipe, rule: &str, host: Host, minutes: u32) -> Result<()> {
    let database = Postgres::start_on_host(AGENT)?;
    let daemon = database.lab.daemon(recipe.text())?;
    let limit = recipe.minutes(minutes);
    let long = 2 * limit + Duration::from_secs(2);
    let mut dump = Client::dump(&database, host, long)?;
    let silent = [
        Client::ask(&database, host, "BEGIN;")?,
        Client::ask(&database, host, "LISTEN news;")?,
        Client::slow(&database, host, long)?,
        Client::paused(&database, host, long)?,
        Client::ask(
            &database,
            host,
            "PREPARE one AS SELECT 1; EXECUTE one; DEALLOCATE one;",
        )?,
    ];
    for client in &silent {
        client.assert_idle(&daemon, rule, limit)?;
    }
    dump.round_trip(&daemon, "here")?;
    dump.assert_idle(&daemon, rule, limit)?;
    assert_eq!(daemon.terminations()?.len(), silent.len() + 1);
    Ok(())
}

#[test]
fn the_pci_dss_recipe_resets_after_15_minutes_and_exempts_the_applications_pool() -> Result<()> {
    let recipe = Recipe::new("pci-dss", [shorter()?, 200])?.with("10.10.1.0/24", "10.77.0.2/32")?;
    assert_holds(&recipe, "databases", Host::Near, 15)?;
    let database = Postgres::start_on_host(AGENT)?;
    let daemon = database.lab.daemon(recipe.text())?;
    let mut pooled = Client::ask(&database, Host::Far, "SELECT 1;")?;
    pooled.last.wait(2 * recipe.minutes(15));
    pooled.round_trip(&daemon, "here")
}

#[test]
fn the_fedramp_recipe_resets_administrators_after_10_minutes_and_others_after_15() -> Result<()> {
    let recipe = Recipe::new("fedramp", [shorter()?, 1])?.with("10.9.0.0/24", "10.77.0.2/32")?;
    assert_holds(&recipe, "privileged-networks", Host::Far, 10)?;
    assert_holds(&recipe, "users-database", Host::Near, 15)
}

#[test]
fn the_nist_recipe_resets_after_30_minutes_and_after_12_hours() -> Result<()> {
    let recipe = Recipe::new("nist-800-63b", [2 * shorter()?, 200])?;
    assert_holds(&recipe, "aal2", Host::Near, 30)?;
    let lifetime = unhurried(Duration::from_secs(10));
    let recipe = Recipe::new("nist-800-63b", [1, to_last(12, lifetime)?])?;
    let database = Postgres::start_on_host(AGENT)?;
    let daemon = database.lab.daemon(recipe.text())?;
    let (opened, busy) =
        Moment::of(|| Client::dump(&database, Host::Near, 2 * recipe.lifetime(12)))?;
    let record = busy.record(&daemon)?;
    assert_eq!(record.text("event.reason"), "max_lifetime");
    let limit = record.number("session_enforcer.limit_seconds");
    let allowed = lifetime.as_secs_f64() * 0.9..=lifetime.as_secs_f64();
    assert!(allowed.contains(&limit), "{limit}");
    record.assert_due("max_lifetime", &opened, Duration::from_secs_f64(limit));
    Ok(())
}

#[test]
fn the_first_configuration_resets_after_15_minutes() -> Result<()> {
    let recipe = Recipe::new("config", [shorter()?, 200])?;
    assert_holds(&recipe, "postgres", Host::Near, 15)
}
