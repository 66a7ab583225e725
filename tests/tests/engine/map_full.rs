//! A full session table: the daemon reports it, enforces the tracked sessions, and adopts the
//! others once there is room.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{
    Call, Daemon, Fate, Lab, Listener, Moment, Pair, disconnect, longer_than_a_start, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Long enough to check the untracked sessions before the first one ends, even on a busy machine.
fn limit() -> Duration {
    longer_than_a_start() + Duration::from_secs(5)
}

fn short_limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

/// A session table with this capacity.
fn config(capacity: u32, limit: Duration) -> String {
    let daemon = format!("[daemon]\nmax_sessions = {capacity}\n");
    let limit = limit.as_secs();
    format!("{daemon}[[rule]]\nname = \"idle\"\nidle_timeout = \"{limit}s\"\n")
}

fn listen(lab: &Lab) -> Result<Listener> {
    lab.inside.listen((Ipv4Addr::LOCALHOST, 0))
}

fn open_many(lab: &Lab, listener: &Listener, count: usize) -> Result<Vec<Pair>> {
    let open = |_| Pair::open(&lab.outside, listener);
    (0..count).map(open).collect()
}

/// Of 20 sessions 8 do not fit, which the daemon reports. The other 12 are reset, which makes room;
/// then the 8 are adopted and reset. None is reset early.
fn assert_all_twenty_are_reset(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    assert!(daemon.is_degraded("untracked")?);
    let (status, body) = daemon.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("are not tracked"), "{body}");
    daemon.wait_for_log("raise daemon.max_sessions")?;
    let cause = [("cause", "map_full")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        8.0
    );
    for pair in pairs {
        for end in pair.ends()? {
            end.assert_not_early(&pair.opened, limit());
        }
        let record = daemon.wait_for_termination_of(pair)?;
        // On a busy machine the deadline of an adopted session may be a little later.
        assert_eq!(record.text("session_enforcer.result"), "reset");
        assert_eq!(record.text("event.reason"), "idle_timeout");
    }
    daemon.wait_for_degraded("untracked", false)?;
    let missed = [("kind", "missed")];
    assert_eq!(
        daemon.metric("session_enforcer_reconcile_repaired_total", &missed)?,
        8.0
    );
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        8.0
    );
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)
}

#[test]
fn sessions_beyond_the_capacity_are_counted_and_adopted_once_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(12, limit()))?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 12.0);
    assert_eq!(daemon.metric("session_enforcer_map_capacity", &[])?, 12.0);
    assert_all_twenty_are_reset(&daemon, &pairs)
}

#[test]
fn older_sessions_beyond_the_capacity_are_counted_and_adopted_once_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab)?;
    let pairs = open_many(&lab, &listener, 20)?;
    let daemon = lab.launch().config(&config(12, limit())).start_unready()?;
    assert_all_twenty_are_reset(&daemon, &pairs)
}

/// A session that is adopted after the table was full, and its last payload. Payload from before
/// the adoption was not stamped.
fn adopted_while_busy(lab: &Lab, daemon: &Daemon, listener: &Listener) -> Result<(Pair, Moment)> {
    let mut pairs = open_many(lab, listener, 2)?.into_iter();
    let [Some(tracked), Some(refused)] = [pairs.next(), pairs.next()] else {
        anyhow::bail!("not two connections");
    };
    daemon.wait_for_degraded("untracked", true)?;
    refused.keep_busy(short_limit() / 2)?;
    drop(tracked);
    let last = refused.keep_busy(2 * short_limit())?;
    Ok((refused, last))
}

#[test]
fn a_session_that_is_adopted_while_it_is_busy_is_not_reset_early() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&config(1, short_limit()))?;
    let listener = listen(&lab)?;
    let (pair, last) = adopted_while_busy(&lab, &daemon, &listener)?;
    daemon.wait_for_degraded("untracked", false)?;
    daemon.assert_reset_of(&pair, "idle_timeout", &last, short_limit())?;
    Ok(())
}

/// Rules with these names, each for the port of its listener.
fn rules(listeners: &[(&str, &Listener)], limits: &str) -> String {
    let rule = |(name, listener): &(&str, &Listener)| {
        let port = listener.port();
        format!("[[rule]]\nname = \"{name}\"\nlocal_ports = [{port}]\n{limits}\n")
    };
    listeners.iter().map(rule).collect()
}

fn sessions_of(daemon: &Daemon, rule: &str) -> Result<f64> {
    daemon.metric("session_enforcer_sessions", &[("rule", rule)])
}

fn wait_for_sessions(daemon: &Daemon, rule: &str, count: f64) -> Result<()> {
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", rule)], count)
}

#[test]
fn a_full_rule_leaves_each_other_rule_its_share_of_the_table() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [one, two, other] = [listen(&lab)?, listen(&lab)?, listen(&lab)?];
    let daemon = format!(
        "[daemon]\nmax_sessions = 160\n{}",
        rules(
            &[("one", &one), ("two", &two), ("other", &other)],
            "idle_timeout = \"60s\""
        )
    );
    let daemon = lab.daemon(&daemon)?;
    // An eighth of the table is reserved and divided among three rules: 6 slots for each.
    let _many = open_many(&lab, &one, 150)?;
    wait_for_sessions(&daemon, "one", 148.0)?;
    let _more = open_many(&lab, &two, 10)?;
    wait_for_sessions(&daemon, "two", 6.0)?;
    let last = open_many(&lab, &other, 6)?;
    wait_for_sessions(&daemon, "other", 6.0)?;
    let cause = [("cause", "map_full")];
    assert_eq!(
        daemon.metric("session_enforcer_sessions_untracked_total", &cause)?,
        6.0
    );
    // A slot that the rule frees is available to it again.
    drop(last);
    let again = open_many(&lab, &other, 6)?;
    wait_for_sessions(&daemon, "other", 6.0)?;
    drop(again);
    Ok(())
}

const MOST: &str = "idle_timeout = \"60s\"\nmax_sessions = 4";

/// Of six connections of a rule with `max_sessions = 4`, four are tracked.
fn assert_four_are_tracked(daemon: &Daemon, rule: &str) -> Result<()> {
    wait_for_sessions(daemon, rule, 4.0)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 4.0);
    daemon.wait_for_degraded("untracked", true)
}

#[test]
fn max_sessions_of_a_rule_holds_across_a_new_daemon_and_a_new_name() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab)?;
    let config = rules(&[("few", &listener)], MOST);
    let mut first = lab.pinned_daemon(&config)?;
    let mut pairs = open_many(&lab, &listener, 6)?;
    assert_four_are_tracked(&first, "few")?;
    let untracked = "session_enforcer_sessions_untracked_total";
    assert_eq!(first.metric(untracked, &[("cause", "rule_full")])?, 2.0);
    assert_eq!(first.metric(untracked, &[("cause", "map_full")])?, 0.0);
    let (status, body) = first.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("raise its max_sessions"), "{body}");
    first.kill()?;
    let second = lab
        .launch()
        .pinned(&lab.pins)
        .config(&config)
        .start_unready()?;
    assert_four_are_tracked(&second, "few")?;
    second.reload(&rules(&[("another", &listener)], MOST))?;
    assert_four_are_tracked(&second, "another")?;
    let _seventh = Pair::open(&lab.outside, &listener)?;
    wait_for_sessions(&second, "another", 4.0)?;
    // One new refusal, besides the two after the reload.
    second.wait_for_metric(untracked, &[("cause", "rule_full")], 3.0)?;
    // The first four were tracked. Once they close, the others are.
    pairs.drain(..4);
    wait_for_sessions(&second, "another", 3.0)?;
    second.wait_for_degraded("untracked", false)
}

#[test]
fn with_on_full_reset_sessions_that_do_not_fit_are_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [enforced, observed] = [listen(&lab)?, listen(&lab)?];
    let limits = "idle_timeout = \"60s\"\nmax_sessions = 2";
    let config = format!(
        "[daemon]\non_full = \"reset\"\n{}{}action = \"observe\"\n",
        rules(&[("enforced", &enforced)], limits),
        rules(&[("observed", &observed)], limits)
    );
    // One of these does not fit, and it is older than the daemon.
    let mut pairs = open_many(&lab, &enforced, 3)?;
    let daemon = lab.launch().config(&config).start_unready()?;
    let left = open_many(&lab, &observed, 3)?;
    wait_for_sessions(&daemon, "enforced", 2.0)?;
    pairs.push(Pair::open(&lab.outside, &enforced)?);
    let records = daemon.wait_for_terminations(2)?;
    for record in &records {
        assert_eq!(
            record.labels(),
            ["enforced", "untracked", "enforce", "reset"]
        );
        assert!(record.at("session_enforcer.limit_seconds").is_null());
    }
    let (reset, tracked): (Vec<Pair>, Vec<Pair>) = pairs.into_iter().partition(|pair| {
        let client = pair.client_address.port();
        records.iter().any(|record| record.ports()[0] == client)
    });
    assert_eq!(reset.len(), 2);
    for pair in &reset {
        pair.ends()?;
    }
    for pair in tracked.iter().chain(&left) {
        pair.round_trip()?;
    }
    let terminations = "session_enforcer_terminations_total";
    assert_eq!(
        daemon.metric(
            terminations,
            &[("reason", "untracked"), ("result", "reset")]
        )?,
        2.0
    );
    assert_eq!(sessions_of(&daemon, "observed")?, 2.0);
    daemon.wait_for_degraded("untracked", true)
}

/// A socket that connects again has no known owner at first, so its session is decided about later.
#[test]
fn a_rule_s_maximum_holds_for_sessions_that_are_decided_later() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&format!(
        "[daemon]\non_full = \"reset\"\n[[rule]]\nname = \"few\"\nusers = [0]\ndirection = \"outbound\"\n\
         remote_ports = [{}]\nidle_timeout = \"60s\"\nmax_sessions = 2\n",
        listener.port()
    ))?;
    let mut pairs = Vec::new();
    for _ in 0..5 {
        let first = Pair::open(&lab.inside, &listener)?;
        pairs.push(Pair::dial(
            disconnect(first.client)?,
            &listener,
            listener.address,
        )?);
    }
    let records = daemon.wait_for_terminations(3)?;
    for record in &records {
        assert_eq!(record.labels(), ["few", "untracked", "enforce", "reset"]);
    }
    wait_for_sessions(&daemon, "few", 2.0)
}

#[test]
fn with_on_full_reset_a_failed_reset_is_retried() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab)?;
    let limits = "idle_timeout = \"60s\"\nmax_sessions = 1";
    let config = format!(
        "[daemon]\non_full = \"reset\"\n{}",
        rules(&[("few", &listener)], limits)
    );
    let (daemon, interposer) = lab.launch().config(&config).start_interposed()?;
    interposer.set(Call::Destroy, Fate::Fail(Errno::EPERM));
    let pairs = open_many(&lab, &listener, 2)?;
    let failed = daemon.wait_for_terminations(1)?;
    assert_eq!(
        failed[0].labels(),
        ["few", "untracked", "enforce", "failed"]
    );
    interposer.set(Call::Destroy, Fate::Pass);
    daemon.wait_for_metric(
        "session_enforcer_terminations_total",
        &[("reason", "untracked"), ("result", "reset")],
        1.0,
    )?;
    pairs[1].ends()?;
    pairs[0].round_trip()?;
    Ok(())
}
