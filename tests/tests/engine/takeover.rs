//! A daemon that is killed leaves its programs attached and its sessions to the next one.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_tests::{
    Cgroup, Daemon, Lab, Launch, Moment, PROGRAMS, Pair, Place, idle_rule,
    longer_than_a_start as limit, reset_on_close,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn idle() -> String {
    idle_rule(limit())
}

fn assert_reset_for(daemon: &Daemon, pair: &Pair, reason: &str, since: &Moment) -> Result<()> {
    daemon.assert_reset_of(pair, reason, since, limit())
}

fn taken_over(daemon: &Daemon) -> Result<f64> {
    daemon.metric("session_enforcer_sessions_taken_over_total", &[])
}

#[test]
fn no_clock_restarts_when_the_daemon_is_killed_and_started_again() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = format!(
        "[[rule]]\nname = \"old\"\nlocal_ports = [{}]\nmax_lifetime = \"{}s\"\n{}",
        listener.port(),
        limit().as_secs(),
        idle()
    );
    let mut first = lab.pinned_daemon(&config)?;
    let old = Pair::open(&lab.outside, &listener)?;
    let other = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let idle = Pair::open(&lab.outside, &other)?;
    let last = idle.round_trip()?;
    first.kill()?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    old.opened.wait(Duration::from_secs(1));
    let second = lab.pinned_daemon(&config)?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    assert_eq!(taken_over(&second)?, 2.0);
    old.round_trip()?;
    assert_reset_for(&second, &old, "max_lifetime", &old.opened)?;
    assert_reset_for(&second, &idle, "idle_timeout", &last)
}

#[test]
fn packets_that_pass_while_no_daemon_runs_are_stamped() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut first = lab.pinned_daemon(&idle())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.kill()?;
    pair.opened.wait(Duration::from_secs(2));
    let last = pair.round_trip()?;
    let second = lab.pinned_daemon(&idle())?;
    assert_reset_for(&second, &pair, "idle_timeout", &last)?;
    let record = second.wait_for_termination_of(&pair)?;
    assert_eq!(record.bytes(), [4, 4]);
    Ok(())
}

#[test]
fn a_session_that_came_due_while_no_daemon_ran_is_reset_at_once_with_its_true_lateness()
-> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut first = lab.pinned_daemon(&idle())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.kill()?;
    pair.opened.wait(limit() + Duration::from_secs(1));
    assert_eq!(first.terminations()?.len(), 0);
    let second = lab.pinned_daemon(&idle())?;
    assert_reset_for(&second, &pair, "idle_timeout", &pair.opened)?;
    let record = second.wait_for_termination_of(&pair)?;
    assert!(record.number("session_enforcer.lateness_seconds") > 0.9);
    Ok(())
}

#[test]
fn connections_that_opened_and_closed_while_no_daemon_ran_are_known_to_the_next() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = || Pair::open(&lab.outside, &listener);
    // Adopted sessions: the kernel does not report their close.
    let [older, older_closed] = [open()?, open()?];
    let mut first = lab.pinned_daemon(&idle())?;
    let [closed, kept] = [open()?, open()?];
    // Two starts may take longer than the limit.
    let active = older.round_trip()?;
    first.kill()?;
    let opened = open()?;
    for pair in [closed, older_closed] {
        reset_on_close(&pair.server)?;
    }
    let second = lab.pinned_daemon(&idle())?;
    assert_eq!(taken_over(&second)?, 4.0);
    assert_eq!(second.repaired("stale")?, 0.0);
    assert_eq!(second.repaired("missed")?, 0.0);
    let sessions = || second.metric("session_enforcer_sessions", &[]);
    assert_eq!(sessions()?, 3.0);
    assert_eq!(second.metric("session_enforcer_map_entries", &[])?, 3.0);
    assert_reset_for(&second, &older, "idle_timeout", &active)?;
    for pair in [&kept, &opened] {
        assert_reset_for(&second, pair, "idle_timeout", &pair.opened)?;
    }
    second.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    assert_eq!(second.terminations()?.len(), 3);
    Ok(())
}

#[test]
fn the_close_of_a_session_that_was_taken_over_is_counted_for_its_rule() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listeners = [0, 1].map(|_| lab.inside.listen((Ipv4Addr::LOCALHOST, 0)));
    let [a, b] = listeners;
    let (a, b) = (a?, b?);
    let rule = |name: &str, port: u16| {
        format!("[[rule]]\nname = \"{name}\"\nlocal_ports = [{port}]\nidle_timeout = \"1h\"\n")
    };
    let first_rules = rule("a", a.port()) + &rule("b", b.port());
    let mut first = lab.pinned_daemon(&first_rules)?;
    let pairs = [Pair::open(&lab.outside, &a)?, Pair::open(&lab.outside, &b)?];
    // No packet of this session matches it against the new policy before it closes.
    let quiet = Pair::open(&lab.outside, &a)?;
    first.kill()?;
    // The rules have other ids in the new policy.
    let second_rules = rule("new", 1) + &rule("b", b.port()) + &rule("a", a.port());
    let second = lab.pinned_daemon(&second_rules)?;
    let of = |name: &str, rule: &str| second.metric(name, &[("rule", rule)]);
    assert_eq!(of("session_enforcer_sessions", "a")?, 2.0);
    assert_eq!(of("session_enforcer_sessions", "b")?, 1.0);
    pairs[0].round_trip()?;
    pairs[1].round_trip()?;
    drop((pairs, quiet));
    for (rule, closed) in [("new", 0.0), ("a", 2.0), ("b", 1.0)] {
        let labels = [("rule", rule)];
        second.wait_for_metric("session_enforcer_sessions_closed_total", &labels, closed)?;
        second.wait_for_metric("session_enforcer_sessions", &labels, 0.0)?;
    }
    assert_eq!(second.metric("session_enforcer_map_entries", &[])?, 0.0);
    Ok(())
}

#[test]
fn sessions_follow_the_rules_of_the_daemon_that_takes_over() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [long, released, tightened] = [listen()?, listen()?, listen()?];
    let limit_text = format!("{}s", limit().as_secs());
    let rule = |name: &str, port: u16, limit: &str| {
        format!("[[rule]]\nname = \"{name}\"\nlocal_ports = [{port}]\nidle_timeout = \"{limit}\"\n")
    };
    let mut first = lab.pinned_daemon(
        &[
            rule("long", long.port(), &limit_text),
            rule("released", released.port(), &limit_text),
            rule("tightened", tightened.port(), "1h"),
        ]
        .concat(),
    )?;
    let open = |listener| Pair::open(&lab.outside, listener);
    let [long_pair, released_pair, tightened_pair] =
        [open(&long)?, open(&released)?, open(&tightened)?];
    first.kill()?;
    let rules = rule("tightened", tightened.port(), &limit_text) + &rule("long", long.port(), "1h");
    let second = lab.pinned_daemon(&rules)?;
    assert_reset_for(
        &second,
        &tightened_pair,
        "idle_timeout",
        &tightened_pair.opened,
    )?;
    tightened_pair.opened.wait(limit() + Duration::from_secs(1));
    long_pair.round_trip()?;
    released_pair.round_trip()?;
    assert_eq!(second.terminations()?.len(), 1);
    assert_eq!(second.metric("session_enforcer_map_entries", &[])?, 1.0);
    Ok(())
}

#[test]
fn reloads_do_not_disturb_the_next_daemon() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let other = "[[rule]]\nname = \"other\"\nremote_ports = [1]\nidle_timeout = \"1h\"\n";
    let mut first = lab.pinned_daemon(&idle())?;
    for _ in 0..3 {
        first.reload(&format!("{other}{}", idle()))?;
    }
    let pair = Pair::open(&lab.outside, &listener)?;
    first.kill()?;
    // The rule id of the session now belongs to another rule.
    let second = lab.pinned_daemon(&(idle() + other))?;
    assert_reset_for(&second, &pair, "idle_timeout", &pair.opened)?;
    assert_eq!(second.wait_for_termination()?.text("rule.name"), "idle");
    Ok(())
}

#[test]
fn a_session_map_of_another_size_takes_over_the_sessions_of_a_killed_daemon() -> Result<()> {
    for (before, after) in [(64, 32), (32, 64)] {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let config = |size: u32| format!("[daemon]\nmax_sessions = {size}\n{}", idle());
        let mut first = lab.pinned_daemon(&config(before))?;
        let open = || Pair::open(&lab.outside, &listener);
        let [quiet, active] = [open()?, open()?];
        first.kill()?;
        active.opened.wait(Duration::from_secs(1));
        let last = active.round_trip()?;
        let second = lab.pinned_daemon(&config(after))?;
        assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
        assert_eq!(taken_over(&second)?, 2.0);
        let capacity = second.metric("session_enforcer_map_capacity", &[])?;
        assert_eq!(capacity, f64::from(after));
        assert!(second.log().contains("are copied"), "{}", second.log());
        assert_reset_for(&second, &quiet, "idle_timeout", &quiet.opened)?;
        assert_reset_for(&second, &active, "idle_timeout", &last)?;
        assert_eq!(lab.pins.sets()?.len(), 1);
    }
    Ok(())
}

#[test]
fn a_smaller_session_map_counts_the_sessions_for_which_it_has_no_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = |size: u32| {
        format!(
            "[daemon]\nmax_sessions = {size}\n{}",
            idle_rule(Duration::from_secs(60))
        )
    };
    let mut first = lab.pinned_daemon(&config(8))?;
    let pairs = [0; 4].map(|_| Pair::open(&lab.outside, &listener));
    first.kill()?;
    let config = config(3);
    let launch = lab.launch().pinned(&lab.pins).config(&config);
    let second = launch.start_unready()?;
    second.wait_for_degraded("untracked", true)?;
    assert_eq!(taken_over(&second)?, 3.0);
    let full = [("cause", "map_full")];
    second.wait_for_metric("session_enforcer_sessions_untracked_total", &full, 1.0)?;
    second.wait_for_log("raise daemon.max_sessions")?;
    for pair in pairs {
        pair?.round_trip()?;
    }
    Ok(())
}

#[test]
fn a_daemon_of_another_cgroup_takes_over_the_sessions_in_that_cgroup() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let child = lab.cgroup.child()?;
    let inner = lab.at(&Place::here().in_cgroup(&child))?;
    let [listener, inner_listener] = [
        lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?,
        inner.listen((Ipv4Addr::LOCALHOST, 0))?,
    ];
    let mut first = lab.pinned_daemon(&idle())?;
    let outer_pair = Pair::open(&lab.outside, &listener)?;
    let inner_pair = Pair::open(&lab.outside, &inner_listener)?;
    first.kill()?;
    let config = idle();
    let launch = Launch::on(child.path()).pinned(&lab.pins).config(&config);
    let second = launch.start()?;
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    assert_eq!(child.attached_programs()?, PROGRAMS);
    assert_reset_for(&second, &inner_pair, "idle_timeout", &inner_pair.opened)?;
    outer_pair.opened.wait(limit() + Duration::from_secs(1));
    outer_pair.round_trip()?;
    assert_eq!(second.terminations()?.len(), 1);
    assert_eq!(second.metric("session_enforcer_map_entries", &[])?, 0.0);
    Ok(())
}

#[test]
fn attachments_to_a_removed_cgroup_are_replaced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let gone = Cgroup::new()?;
    let config = idle();
    let launch = Launch::on(gone.path()).pinned(&lab.pins).config(&config);
    launch.start()?.kill()?;
    drop(gone);
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let second = lab.pinned_daemon(&idle())?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let pair = Pair::open(&lab.outside, &listener)?;
    assert_reset_for(&second, &pair, "idle_timeout", &pair.opened)
}

#[test]
fn a_take_over_leaves_no_gap_in_the_attachment() -> Result<()> {
    for (size, most) in [(64, PROGRAMS), (32, 2 * PROGRAMS)] {
        let lab = Lab::new(AGENT)?;
        let config = |size| format!("[daemon]\nmax_sessions = {size}\n{}", idle());
        lab.pinned_daemon(&config(64))?.kill()?;
        let stop = AtomicBool::new(false);
        let counts = thread::scope(|scope| {
            let counting = scope.spawn(|| -> Result<Vec<u32>> {
                let mut counts = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    counts.push(lab.cgroup.attached_programs()?);
                }
                Ok(counts)
            });
            let daemon = lab.pinned_daemon(&config(size));
            stop.store(true, Ordering::Relaxed);
            let counts = counting.join().expect("the thread that counts programs");
            daemon.and(counts)
        })?;
        let within = |count: &u32| (PROGRAMS..=most).contains(count);
        assert!(counts.len() > 1 && counts.iter().all(within), "{counts:?}");
    }
    Ok(())
}
