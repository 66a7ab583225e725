//! A stopped daemon enforces nothing, and the next one continues with the true ages.

use std::{io::Write as _, net::Ipv4Addr, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Lab, Moment, Netns, PROGRAMS, Pair, Veth, eventually, idle_rule,
    longer_than_a_start as limit, patience, reset_on_close, tcp_info,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn idle() -> String {
    idle_rule(limit())
}

fn lifetime() -> String {
    format!(
        "[[rule]]\nname = \"old\"\nmax_lifetime = \"{}s\"\n",
        limit().as_secs()
    )
}

fn assert_reset_for(daemon: &Daemon, pair: &Pair, reason: &str, since: &Moment) -> Result<()> {
    daemon.assert_reset_of(pair, reason, since, limit())
}

#[test]
fn a_stopped_daemon_leaves_its_maps_and_no_program() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut daemon = lab.pinned_daemon(&idle())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    daemon.stop()?;
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    assert_eq!(
        lab.pins.names()?,
        [
            "ANCESTORS",
            "BUCKETS",
            "JOURNAL",
            "MATCH_TABLES",
            "OWNERS",
            "SESSIONS",
            "TABLE"
        ]
    );
    pair.opened.wait(limit() + Duration::from_secs(1));
    pair.round_trip()?;
    Ok(())
}

#[test]
fn a_busy_session_keeps_its_age_from_stop_to_start() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut first = lab.pinned_daemon(&lifetime())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.keep_busy(Duration::from_secs(1))?;
    first.stop()?;
    pair.round_trip()?;
    let second = lab.pinned_daemon(&lifetime())?;
    assert_eq!(
        second.metric("session_enforcer_sessions_adopted_total", &[])?,
        0.0
    );
    pair.keep_busy_until_end()?
        .assert_not_early(&pair.opened, limit());
    let record = second.wait_for_termination_of(&pair)?;
    record.assert_reset("max_lifetime", &pair.opened, limit());
    Ok(())
}

#[test]
fn payload_while_no_program_is_attached_counts_as_activity() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = || Pair::open(&lab.outside, &listener);
    let mut first = lab.pinned_daemon(&idle())?;
    let [quiet, received, sent] = [open()?, open()?, open()?];
    first.stop()?;
    sent.opened.wait(Duration::from_secs(2));
    let last = [received.to_server(b"to")?, sent.to_client(b"from")?];
    let second = lab.pinned_daemon(&idle())?;
    assert_eq!(second.repaired("behind")?, 2.0);
    assert_reset_for(&second, &quiet, "idle_timeout", &quiet.opened)?;
    assert_reset_for(&second, &received, "idle_timeout", &last[0])?;
    assert_reset_for(&second, &sent, "idle_timeout", &last[1])?;
    let bytes = |pair| Ok::<_, anyhow::Error>(second.wait_for_termination_of(pair)?.bytes());
    assert_eq!(bytes(&received)?, [2, 0]);
    assert_eq!(bytes(&sent)?, [0, 4]);
    Ok(())
}

#[test]
fn payload_while_no_program_is_attached_counts_in_its_direction_only() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = idle() + "activity = \"sent\"\n";
    let mut first = lab.pinned_daemon(&config)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.stop()?;
    pair.opened.wait(Duration::from_secs(2));
    pair.to_server(b"received")?;
    let second = lab.pinned_daemon(&config)?;
    assert_reset_for(&second, &pair, "idle_timeout", &pair.opened)
}

#[test]
fn a_request_while_no_program_is_attached_is_owed_an_answer() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = idle() + "response_timeout = \"1h\"\n";
    let mut first = lab.pinned_daemon(&config)?;
    let [asked, answered] = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    answered.to_server(b"before")?;
    first.stop()?;
    asked.to_server(b"query")?;
    let last = answered.to_client(b"answer")?;
    let second = lab.pinned_daemon(&config)?;
    assert_reset_for(&second, &answered, "idle_timeout", &last)?;
    last.wait(limit() + Duration::from_secs(1));
    asked.to_client(b"answer")?;
    assert_eq!(second.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn less_than_min_answer_while_no_program_is_attached_is_no_answer() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = idle() + "response_timeout = \"1h\"\nmin_answer = 100\n";
    let mut first = lab.pinned_daemon(&config)?;
    let pairs = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    let [asked_before, asked_meanwhile] = &pairs;
    asked_before.to_server(b"query")?;
    first.stop()?;
    asked_meanwhile.to_server(b"query")?;
    asked_before.to_client(&[b'x'; 50])?;
    let last = asked_meanwhile.to_client(&[b'x'; 50])?;
    let second = lab.pinned_daemon(&config)?;
    last.wait(limit() + Duration::from_secs(1));
    assert_eq!(second.terminations()?.len(), 0);
    for pair in &pairs {
        let answered = pair.to_client(&[b'x'; 100])?;
        assert_reset_for(&second, pair, "idle_timeout", &answered)?;
    }
    Ok(())
}

#[test]
fn payload_sent_while_no_program_is_attached_is_no_answer_if_none_is_owed() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = idle() + "response_timeout = \"1h\"\nactivity = \"received\"\n";
    let mut first = lab.pinned_daemon(&config)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.to_server(b"query")?;
    let answered = pair.to_client(b"answer")?;
    first.stop()?;
    answered.wait(Duration::from_secs(2));
    pair.to_client(b"push")?;
    let second = lab.pinned_daemon(&config)?;
    assert_reset_for(&second, &pair, "idle_timeout", &answered)
}

#[test]
fn payload_that_could_not_leave_while_no_program_is_attached_is_no_activity() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let mut first = lab.pinned_daemon(&idle())?;
    let listener = lab.outside_in(&right)?.listen((Veth::RIGHT, 0))?;
    let mut pair = Pair::open(&lab.inside_in(&left)?, &listener)?;
    let last = pair.to_server(b"ping")?;
    first.stop()?;
    left.ip(&format!("route add blackhole {}/32", Veth::RIGHT))?;
    last.wait(Duration::from_secs(1));
    pair.client.write_all(b"stays")?;
    // The socket counts every attempt to send.
    eventually("an attempt to send", patience(), || {
        Ok((tcp_info(&pair.client)?.tcpi_bytes_sent > 4).then_some(()))
    })?;
    let second = lab.pinned_daemon(&idle())?;
    let record = second.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.bytes(), [4, 0]);
    Ok(())
}

#[test]
fn connections_that_closed_and_opened_between_stop_and_start_are_found() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = || Pair::open(&lab.outside, &listener);
    let mut first = lab.pinned_daemon(&idle())?;
    let [closed, aborted, kept, closed_later] = [open()?, open()?, open()?, open()?];
    first.stop()?;
    reset_on_close(&aborted.server)?;
    drop((closed, aborted));
    let opened = open()?;
    let second = lab.pinned_daemon(&idle())?;
    let metric = |name: &str| second.metric(&format!("session_enforcer_{name}"), &[]);
    assert_eq!(second.repaired("stale")?, 2.0);
    assert_eq!(metric("sessions_taken_over_total")?, 2.0);
    assert_eq!(metric("sessions_adopted_total")?, 1.0);
    assert_eq!(metric("map_entries")?, 3.0);
    // The kernel still reports the close of a session whose callback flag the first daemon's
    // program set.
    drop(closed_later);
    second.wait_for_metric("session_enforcer_sessions_closed_total", &[], 1.0)?;
    second.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    assert_reset_for(&second, &kept, "idle_timeout", &kept.opened)?;
    assert_reset_for(&second, &opened, "idle_timeout", &opened.opened)?;
    second.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    assert_eq!(second.terminations()?.len(), 2);
    Ok(())
}

#[test]
fn sessions_of_a_namespace_that_is_unreachable_after_a_restart_are_kept() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let mut first = lab.pinned_daemon(&idle())?;
    {
        let listener = lab.inside_in(&right)?.listen((Veth::RIGHT, 0))?;
        let client = lab.outside_in(&left)?;
        let pair = Pair::open(&client, &listener)?;
        pair.round_trip()?;
        first.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
        first.stop()?;
    }
    drop((left, right));
    let second = lab.pinned_daemon(&idle())?;
    // A session in an unreachable namespace may still be open.
    assert_eq!(second.repaired("stale")?, 0.0);
    assert_eq!(second.metric("session_enforcer_sessions", &[])?, 1.0);
    let record = second.wait_for_termination()?;
    assert_eq!(record.text("session_enforcer.result"), "failed");
    Ok(())
}

#[test]
fn a_session_map_of_another_size_takes_over_the_sessions_of_a_stopped_daemon() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = |size: u32| format!("[daemon]\nmax_sessions = {size}\n{}", lifetime());
    let mut first = lab.pinned_daemon(&config(8))?;
    let pairs = [0; 4].map(|_| Pair::open(&lab.outside, &listener));
    first.stop()?;
    let second = lab.pinned_daemon(&config(3))?;
    assert_eq!(
        second.metric("session_enforcer_sessions_taken_over_total", &[])?,
        3.0
    );
    let full = [("cause", "map_full")];
    assert_eq!(
        second.metric("session_enforcer_sessions_untracked_total", &full)?,
        1.0
    );
    for record in second.wait_for_terminations(3)? {
        let of = |pair: &&Result<Pair>| {
            pair.as_ref()
                .is_ok_and(|p| p.client_address.port() == record.ports()[0])
        };
        let Some(Ok(pair)) = pairs.iter().find(of) else {
            panic!("a record without a session: {record:?}");
        };
        record.assert_reset("max_lifetime", &pair.opened, limit());
    }
    Ok(())
}

#[test]
fn an_incomplete_attachment_is_completed() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut first = lab.pinned_daemon(&lifetime())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.kill()?;
    // As if a daemon was killed during its stop.
    for set in lab.pins.sets()? {
        std::fs::remove_file(set.join("track_egress"))?;
    }
    let last = pair.round_trip()?;
    let second = lab.pinned_daemon(&lifetime())?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    assert!(last.latest.at > pair.opened.latest.at);
    assert_reset_for(&second, &pair, "max_lifetime", &pair.opened)
}
