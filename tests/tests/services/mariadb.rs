//! `MariaDB`: some commands of its protocol have no answer.

use std::time::Duration;

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Moment, Recipe, Record, eventually, patience,
    services::{MariaDb, Program},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(4))
}

fn rule(more: &str) -> String {
    let (port, limit) = (MariaDb::PORT, limit().as_secs());
    format!(
        "[[rule]]\nname = \"databases\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n\
         idle_timeout = \"{limit}s\"\n{more}\n"
    )
}

/// A client that has just executed this command.
fn did(database: &MariaDb, what: &str) -> Result<(Program, u16, Moment)> {
    let (mut client, port) = database.client(what)?;
    let (last, ()) = Moment::of(|| {
        client.say(what)?;
        client.wait_for("done")
    })?;
    Ok((client, port, last))
}

fn record(daemon: &Daemon, port: u16) -> Result<Record> {
    eventually("the end of a client", patience(), || {
        let mut records = daemon.terminations()?.into_iter();
        Ok(records.find(|record| record.ports()[0] == port))
    })
}

#[test]
fn closing_a_prepared_statement_counts_as_a_request_that_is_never_answered() -> Result<()> {
    let database = MariaDb::start(AGENT)?;
    let response = 4 * limit();
    let more = format!("response_timeout = \"{}s\"", response.as_secs());
    let daemon = database.lab.daemon(&rule(&more))?;
    let (_prepared, prepared_port, closed) = did(&database, "prepared SELECT 1")?;
    let (_text, port, asked) = did(&database, "query SELECT 1")?;
    record(&daemon, port)?.assert_reset("idle_timeout", &asked, limit());
    let record = record(&daemon, prepared_port)?;
    record.assert_reset("response_timeout", &closed, response);
    Ok(())
}

#[test]
fn with_a_minimum_of_10_bytes_the_close_is_no_request_and_a_slow_query_still_is() -> Result<()> {
    let database = MariaDb::start(AGENT)?;
    let daemon = database
        .lab
        .daemon(&rule("response_timeout = \"1h\"\nmin_payload = 10"))?;
    let (_prepared, prepared_port, closed) = did(&database, "prepared SELECT 1")?;
    let seconds = 2 * limit().as_secs();
    let (mut slow, slow_port) = database.client("a slow query")?;
    slow.say(&format!("query SELECT SLEEP({seconds})"))?;
    record(&daemon, prepared_port)?.assert_reset("idle_timeout", &closed, limit());
    slow.wait_for("done")?;
    // A ping is too small for a request, but its answer of 11 bytes is activity.
    closed.wait(2 * limit() + limit() / 2);
    let (pinged, ()) = Moment::of(|| {
        slow.say("ping")?;
        slow.wait_for("done\ndone")
    })?;
    record(&daemon, slow_port)?.assert_due("idle_timeout", &pinged, limit());
    Ok(())
}

#[test]
fn the_pci_dss_recipe_resets_after_15_minutes_whatever_was_sent() -> Result<()> {
    let shorter = (15 * 60 / limit().as_secs()).try_into()?;
    let recipe = Recipe::new("pci-dss", [shorter, shorter])?;
    let database = MariaDb::start(AGENT)?;
    let daemon = database.lab.daemon(recipe.text())?;
    let (_prepared, prepared_port, closed) = did(&database, "prepared SELECT 1")?;
    let (mut slow, slow_port) = database.client("a slow query")?;
    let seconds = 2 * limit().as_secs();
    let (asked, ()) = Moment::of(|| slow.say(&format!("query SELECT SLEEP({seconds})")))?;
    for (port, since) in [(prepared_port, &closed), (slow_port, &asked)] {
        let record = record(&daemon, port)?;
        assert_eq!(record.text("rule.name"), "databases");
        record.assert_due("idle_timeout", since, recipe.minutes(15));
    }
    slow.wait_for("ConnectionResetError")?;
    // `docs/clients.md` quotes this line of the log.
    let (log, aborted) = (database.log(), "Got an error reading communication packets");
    assert!(log.contains(aborted), "{log}");
    Ok(())
}
