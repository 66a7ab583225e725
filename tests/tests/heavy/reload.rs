//! Reload (SIGHUP): a new policy applies to live connections, completely or not at all.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Daemon, Lab, Launch, Pair, Place, Time, unhurried};

use crate::turn;

const HOUR: Duration = Duration::from_secs(3600);
const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// A configuration with one rule.
fn rule(name: &str, port: u16, rest: &str) -> String {
    format!(
        "[[rule]]\nname = \"{name}\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n{rest}\n"
    )
}

fn idle(name: &str, port: u16, timeout: Duration) -> String {
    rule(name, port, &idle_for(timeout))
}

fn idle_for(timeout: Duration) -> String {
    format!("idle_timeout = \"{}s\"", timeout.as_secs())
}

/// The unit of the limits in these tests.
fn second() -> Duration {
    unhurried(Duration::from_secs(1))
}

fn in_force(daemon: &Daemon) -> Result<f64> {
    daemon.metric("session_enforcer_config_last_reload_successful", &[])
}

#[test]
fn a_session_that_is_past_its_new_limit_is_reset_at_once_and_an_active_one_lives() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&idle("r", listener.port(), HOUR))?;
    let silent = Pair::open(&lab.outside, &listener)?;
    let active = Pair::open(&lab.outside, &listener)?;
    active.keep_busy(2 * second())?;
    daemon.reload(&idle("r", listener.port(), second()))?;
    let [client, server] = silent.ends()?;
    client.assert_reset(Errno::ECONNRESET, &silent.opened, 2 * second());
    server.assert_reset(Errno::ECONNABORTED, &silent.opened, 2 * second());
    let record = daemon.wait_for_termination_of(&silent)?;
    assert_eq!(record.text("event.reason"), "policy");
    let labels = [("rule", "r"), ("reason", "policy"), ("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &labels, 1.0)?;
    // The new limit also applies to the active session, counted from its last activity.
    let last = active.round_trip()?;
    let record = daemon.wait_for_termination_of(&active)?;
    record.assert_reset("idle_timeout", &last, second());
    Ok(())
}

#[test]
fn a_longer_limit_replaces_the_shorter_one_for_a_live_session() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&idle("r", listener.port(), 3 * second()))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    daemon.reload(&idle("r", listener.port(), 5 * second()))?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, 5 * second());
    Ok(())
}

#[test]
fn a_reload_with_an_invalid_file_is_reported_and_changes_nothing() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let good = idle("r", listener.port(), 2 * second());
    let daemon = lab.daemon(&good)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let wrong = good.replace("s\"\n", " fortnights\"\n");
    let log = daemon.reload(&wrong)?;
    assert!(
        log.contains("idle_timeout") && log.contains("config.toml:5"),
        "{log}"
    );
    assert!(in_force(&daemon)? < 0.5);
    for (from, to, key) in [
        (
            "[[rule]]",
            "[daemon]\nmax_sessions = 5\n[[rule]]",
            "daemon.max_sessions",
        ),
        (
            "[[rule]]",
            "[daemon]\nnetwork_namespaces = \"own\"\n[[rule]]",
            "daemon.network_namespaces",
        ),
    ] {
        let log = daemon.reload(&good.replace(from, to))?;
        assert!(
            log.contains(&format!("{key} cannot change while the daemon runs")),
            "{log}"
        );
    }
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, 2 * second());
    daemon.reload(&good)?;
    assert!(in_force(&daemon)? > 0.5);
    Ok(())
}

#[test]
fn a_session_that_no_rule_matches_any_more_is_released() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let other = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&idle("r", listener.port(), 2 * second()))?;
    let unmatched = Pair::open(&lab.outside, &listener)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "r")], 1.0)?;
    daemon.reload(&idle("other", other.port(), second()))?;
    for rule in ["r", "other"] {
        daemon.wait_for_metric("session_enforcer_sessions", &[("rule", rule)], 0.0)?;
    }
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    unmatched.opened.wait(4 * second());
    unmatched.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn a_connection_that_a_new_rule_matches_is_adopted_with_its_true_idle_time() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let port = listener.port();
    let exempt = rule("r", port, "action = \"exempt\"");
    let daemon = lab.daemon(&exempt)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.keep_busy(second())?;
    last.wait(2 * second());
    assert_eq!(daemon.terminations()?.len(), 0);
    daemon.reload(&idle("r", port, 4 * second()))?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, 4 * second());
    Ok(())
}

#[test]
fn the_minimum_payload_of_another_rule_applies_to_a_live_session() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let port = listener.port();
    let daemon = lab.daemon(&idle("first", port, 2 * second()))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let limits = format!("{}\nmin_payload = 100", idle_for(2 * second()));
    daemon.reload(&rule("second", port, &limits))?;
    let large = pair.to_server(&[b'x'; 100])?;
    let start = Instant::now();
    while start.elapsed() < 4 * second() && pair.to_server(&[b'x'; 99]).is_ok() {
        thread::sleep(Duration::from_millis(50));
    }
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("rule.name"), "second");
    record.assert_reset("idle_timeout", &large, 2 * second());
    Ok(())
}

#[test]
fn a_change_to_observe_applies_to_live_sessions() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let config = idle("r", listener.port(), 2 * second());
    let daemon = lab.daemon(&config)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    daemon.reload(&format!("[daemon]\nmode = \"observe\"\n{config}"))?;
    pair.opened.wait(4 * second());
    pair.round_trip()?;
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("event.action"), "session-would-terminate");
    record.assert_due("idle_timeout", &pair.opened, 2 * second());
    Ok(())
}

#[test]
fn a_reload_matches_five_thousand_sessions_anew() -> Result<()> {
    let _turn = turn(module_path!());
    const SESSIONS: usize = 5_000;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let port = listener.port();
    let daemon = lab.daemon(&idle("r", port, HOUR))?.quiet();
    let pairs: Vec<Pair> = (0..SESSIONS)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect::<Result<_>>()?;
    let entries = SESSIONS as f64;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], entries)?;
    let start = Instant::now();
    let log = daemon.reload(&idle("renamed", port, 2 * HOUR))?;
    println!("reload of {SESSIONS} sessions: {:?}", start.elapsed());
    assert!(
        log.contains("5000 kept, 0 released, 0 expired, 0 adopted"),
        "{log}"
    );
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "renamed")], entries)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "r")], 0.0)?;
    // 100 sessions are active afterwards; the others are past the next limit.
    thread::sleep(3 * second());
    let active = &pairs[..100];
    for pair in active {
        pair.round_trip()?;
    }
    let start = Instant::now();
    daemon.reload(&idle("renamed", port, 3 * second()))?;
    daemon.wait_for_terminations(SESSIONS - active.len())?;
    println!(
        "reset of {} of them: {:?}",
        SESSIONS - active.len(),
        start.elapsed()
    );
    let reset = daemon.wait_for_terminations(SESSIONS)?;
    let by_policy = reset
        .iter()
        .filter(|r| r.text("event.reason") == "policy")
        .count();
    assert_eq!(by_policy, SESSIONS - active.len());
    assert_eq!(reset.len(), SESSIONS);
    Ok(())
}

#[test]
fn after_the_watched_cgroup_was_removed_a_reload_adopts_no_other_connection() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let watched = lab.cgroup.child()?;
    let config = idle("r", listener.port(), second());
    let daemon = Launch::on(watched.path()).config(&config).start()?;
    let path = watched.path().to_owned();
    std::fs::remove_dir(&path)?;
    let beside = Pair::open(&lab.outside, &listener)?;
    for recreated in [false, true] {
        if recreated {
            std::fs::create_dir(&path)?;
        }
        let log = daemon.reload(&config)?;
        assert!(log.contains("was removed"), "{log}");
    }
    beside.keep_busy(3 * second())?;
    assert_eq!(
        daemon.metric("session_enforcer_sessions_adopted_total", &[])?,
        0.0
    );
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn an_observed_session_that_a_new_policy_ends_is_recorded_once() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let config = |timeout| {
        let rule = idle("r", listener.port(), timeout);
        format!("[daemon]\nmode = \"observe\"\n{rule}")
    };
    let daemon = lab.daemon(&config(HOUR))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(2 * second());
    daemon.reload(&config(second()))?;
    daemon.wait_for_terminations(1)?;
    thread::sleep(3 * second());
    let records = daemon.terminations_of(&pair)?;
    assert_eq!(records.len(), 1, "{records:#?}");
    assert_eq!(records[0].text("event.reason"), "policy");
    // Under another limit the lateness counts from that limit. The change of the policy was already
    // recorded as the cause.
    daemon.reload(&config(2 * second()))?;
    let record = daemon.wait_for_terminations(2)?.remove(1);
    record.assert_due("idle_timeout", &pair.opened, 2 * second());
    Ok(())
}

/// A refused reload does not affect the owners and cgroups of the rules in force.
#[test]
fn after_a_refused_reload_a_later_cgroup_of_the_rules_in_force_is_still_found() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let unit = slice.path().join("unit");
    let owned = format!(
        "[[rule]]\nname = \"owned\"\ncgroups = [\"{}/unit\"]\nusers = [\"nobody\", 0]\n\
         {}\n",
        slice.name()?,
        idle_for(2 * second()),
    );
    let daemon = lab.daemon(&owned)?;
    // Together with the rule in force, these exceed the number of rule names.
    let other = |n| format!("[[rule]]\nname = \"r{n}\"\nremote_ports = [1]\naction = \"exempt\"\n");
    let log = daemon.reload(&(0..1024).map(other).collect::<String>())?;
    assert!(log.contains("more than 1024 names of rules"), "{log}");
    std::fs::create_dir(&unit)?;
    let agent = lab.at(&Place::here().in_directory(&unit))?;
    let pair = Pair::open(&lab.outside, &agent.listen(([127, 0, 0, 1], 0))?)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, 2 * second());
    Ok(())
}

/// Many reloads while sessions reach their deadlines and others are busy. Each idle session is
/// reset once and not early; a busy session is not reset.
#[test]
fn during_many_reloads_each_session_ends_once_and_not_early() -> Result<()> {
    let _turn = turn(module_path!());
    const IDLE: usize = 60;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let (port, cgroup) = (listener.port(), lab.cgroup.name()?);
    // Rules with the same limits but other names, positions and conditions.
    let limits = idle_for(2 * second());
    let configs = [
        idle("a", port, 2 * second()) + &idle("b", 1, HOUR),
        idle("b", 1, HOUR) + &idle("c", port, 2 * second()),
        format!("[[rule]]\nname = \"d\"\ncgroups = [\"{cgroup}\"]\nusers = [0]\n{limits}\n"),
        "[[rule]]\n".to_owned() + "name = wrong",
        rule("a", port, &format!("{limits}\nactivity = \"received\"")),
    ];
    let daemon = lab.daemon(&configs[0])?;
    let busy = Pair::open(&lab.outside, &listener)?;
    let mut idle_ones = Vec::new();
    let start = Instant::now();
    let mut reloads = 0;
    while start.elapsed() < 5 * second() || idle_ones.len() < IDLE {
        if idle_ones.len() < IDLE {
            idle_ones.push(Pair::open(&lab.outside, &listener)?);
        }
        daemon.reload_soon(&configs[reloads % configs.len()])?;
        busy.round_trip()?;
        reloads += 1;
        thread::sleep(Duration::from_millis(20));
    }
    // Earlier reloads may still be in progress. Only the last configuration has three rules.
    daemon.reload_soon(&(configs[0].clone() + &idle("e", 2, HOUR)))?;
    daemon.wait_for_log(" 3 rule(s) in force")?;
    busy.round_trip()?;
    println!("{reloads} reloads");
    daemon.wait_for_terminations(IDLE)?;
    for pair in &idle_ones {
        let records = daemon.terminations_of(pair)?;
        assert_eq!(records.len(), 1, "{records:#?}");
        records[0].assert_reset("idle_timeout", &pair.opened, 2 * second());
    }
    let record = daemon.wait_for_termination_of(&busy)?;
    assert_eq!(record.text("rule.name"), "a");
    assert_eq!(daemon.terminations()?.len(), IDLE + 1);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)
}

/// The usual introduction of a policy: observe first, then enforce. The change ends the session, so
/// its deadline is the change and not hours ago.
#[test]
fn a_session_observed_past_its_deadline_ends_by_the_change_to_enforce() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let config = idle("r", listener.port(), second());
    let daemon = lab.daemon(&format!("[daemon]\nmode = \"observe\"\n{config}"))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    daemon.wait_for_terminations(1)?;
    pair.opened.wait(3 * second());
    assert_ended_by_change(&daemon, &pair, &config)
}

#[test]
fn an_exempt_connection_past_its_new_limit_ends_by_the_change_of_the_policy() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let port = listener.port();
    let daemon = lab.daemon(&rule("r", port, "action = \"exempt\""))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(3 * second());
    assert_ended_by_change(&daemon, &pair, &idle("r", port, second()))
}

/// Asserts that the recorded deadline of the session is the change of the policy.
fn assert_ended_by_change(daemon: &Daemon, pair: &Pair, config: &str) -> Result<()> {
    let before = daemon.terminations()?.len();
    let change = Time::now();
    daemon.reload(config)?;
    let record = daemon.wait_for_terminations(before + 1)?.remove(before);
    assert_eq!(record.text("event.action"), "session-terminated");
    assert_eq!(record.text("event.reason"), "policy");
    assert!(
        record.time("session_enforcer.deadline") >= change.wall,
        "{record:?}"
    );
    pair.ends()?;
    Ok(())
}
