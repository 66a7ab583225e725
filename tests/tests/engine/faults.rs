//! Faults of kernel interfaces and interference with the programs: no session is reset early, none
//! is counted twice, and each fault is reported.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::Ipv4Addr,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use session_enforcer_tests::{
    Call, Daemon, Fate, Interposer, Lab, Launch, Netns, PROGRAMS, Pair, Place, Record,
    assert_all_reset, detach_by_force, reset_on_close, scaled,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const EVERY_SECOND: &str = "[daemon]\nreconcile_interval = \"1s\"\n";
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

fn results(daemon: &Daemon) -> Result<[f64; 3]> {
    let metrics = daemon.metrics()?;
    let name = "session_enforcer_terminations_total";
    let count = |result| metrics.get(name, &[("result", result)]);
    Ok([count("reset")?, count("gone")?, count("failed")?])
}

/// A session that the daemon has found late, and whose `SOCK_DESTROY` request is held back.
fn found_late(lab: &Lab) -> Result<(Daemon, Interposer, Pair)> {
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let (daemon, interposer) = lab.launch().config(RULE).start_interposed()?;
    interposer.set(Call::Destroy, Fate::Wait);
    let pair = Pair::open(&lab.outside, &listener)?;
    interposer.wait_for(Call::Destroy, 1)?;
    Ok((daemon, interposer, pair))
}

#[test]
fn a_session_that_closes_between_decision_and_reset_is_recorded_once_as_gone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, interposer, pair) = found_late(&lab)?;
    reset_on_close(&pair.client)?;
    let Pair {
        client,
        server,
        opened,
        ..
    } = pair;
    drop(client);
    // On a busy machine the client's RST may take a while to arrive.
    let read = (&server).read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(read, Err(ErrorKind::ConnectionReset));
    drop(server);
    interposer.set(Call::Destroy, Fate::Pass);
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("session_enforcer.result"), "gone");
    record.assert_due("idle_timeout", &opened, LIMIT);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    assert_eq!(results(&daemon)?, [0.0, 1.0, 0.0]);
    daemon.wait_for_termination()?;
    Ok(())
}

#[test]
fn payload_between_decision_and_reset_does_not_pass_and_does_not_save_the_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, interposer, pair) = found_late(&lab)?;
    (&pair.client).write_all(b"late")?;
    (&pair.server).write_all(b"late")?;
    thread::sleep(Duration::from_millis(300));
    for mut end in [&pair.client, &pair.server] {
        end.set_nonblocking(true)?;
        let read = end.read(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(read, Err(ErrorKind::WouldBlock));
    }
    interposer.set(Call::Destroy, Fate::Pass);
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &pair.opened, LIMIT);
    assert!(daemon.metric("session_enforcer_gate_dropped_packets_total", &[])? >= 2.0);
    assert_eq!(results(&daemon)?, [1.0, 0.0, 0.0]);
    Ok(())
}

#[test]
fn a_reset_whose_answer_is_lost_is_recorded_once() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, interposer, pair) = found_late(&lab)?;
    interposer.set(Call::Answer, Fate::Fail(Errno::ENOBUFS));
    interposer.set(Call::Destroy, Fate::Pass);
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    interposer.wait_for(Call::Answer, 1)?;
    interposer.set(Call::Answer, Fate::Pass);
    let record = daemon.wait_for_termination()?;
    record.assert_due("idle_timeout", &pair.opened, LIMIT);
    // Without the answer the daemon cannot know whether it reset the session or the peer did.
    assert_eq!(record.text("session_enforcer.result"), "gone");
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    assert_eq!(results(&daemon)?, [0.0, 1.0, 0.0]);
    daemon.wait_for_log("No buffer space available")
}

/// More sessions than one netlink exchange resets.
#[test]
fn many_resets_whose_answers_are_lost_are_recorded_once_each() -> Result<()> {
    const SESSIONS: usize = 400;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let (daemon, interposer) = lab.launch().config(RULE).start_interposed()?;
    // Opening so many connections may take longer than the limit.
    daemon.freeze()?;
    let open = |_| Pair::open(&lab.outside, &listener);
    let pairs = (0..SESSIONS).map(open).collect::<Result<Vec<_>>>()?;
    thread::sleep(LIMIT + scaled(Duration::from_millis(100)));
    interposer.set(Call::Answer, Fate::Fail(Errno::ENOBUFS));
    daemon.thaw()?;
    interposer.wait_for(Call::Answer, 3)?;
    interposer.set(Call::Answer, Fate::Pass);
    let records = daemon.wait_for_terminations(SESSIONS)?;
    assert_all_reset(&pairs, LIMIT)?;
    let result = |r: &Record| r.text("session_enforcer.result").to_owned();
    let gone = records.iter().filter(|r| result(r) == "gone").count();
    assert!(gone > 0, "no answer was lost");
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    let count = [(SESSIONS - gone) as f64, gone as f64, 0.0];
    assert_eq!(results(&daemon)?, count);
    assert_eq!(daemon.terminations()?.len(), SESSIONS);
    Ok(())
}

/// While reset requests fail with `error`, the failure is recorded, and the daemon retries at a
/// limited rate.
fn refused_then_reset(error: Errno) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, interposer, pair) = found_late(&lab)?;
    interposer.set(Call::Destroy, Fate::Fail(error));
    let failed = daemon.wait_for_termination()?;
    assert_eq!(failed.text("event.action"), "session-termination-failed");
    failed.assert_due("idle_timeout", &pair.opened, LIMIT);
    daemon.wait_for_log("broke off")?;
    let attempts = daemon.log().matches("broke off").count();
    assert!((1..=10).contains(&attempts), "{attempts} attempts");
    // The gate stays shut for a session whose reset failed.
    (&pair.client).write_all(b"late")?;
    interposer.set(Call::Destroy, Fate::Pass);
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    let records = daemon.wait_for_terminations(2)?;
    records[1].assert_reset("idle_timeout", &pair.opened, LIMIT);
    assert_eq!(results(&daemon)?, [1.0, 0.0, 1.0]);
    Ok(())
}

#[test]
fn a_reset_that_is_not_permitted_is_recorded_as_failed_and_retried() -> Result<()> {
    refused_then_reset(Errno::EPERM)
}

#[test]
fn a_session_whose_reset_failed_and_that_closes_by_itself_is_recorded_as_gone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, interposer, pair) = found_late(&lab)?;
    interposer.set(Call::Destroy, Fate::Fail(Errno::EPERM));
    daemon.wait_for_metric(
        "session_enforcer_terminations_total",
        &[("result", "failed")],
        1.0,
    )?;
    reset_on_close(&pair.server)?;
    let opened = pair.opened;
    drop(pair);
    let records = daemon.wait_for_terminations(2)?;
    assert_eq!(records[1].text("session_enforcer.result"), "gone");
    records[1].assert_due("idle_timeout", &opened, LIMIT);
    assert_eq!(results(&daemon)?, [0.0, 1.0, 1.0]);
    Ok(())
}

#[test]
fn a_reset_without_buffer_space_is_recorded_as_failed_and_retried() -> Result<()> {
    refused_then_reset(Errno::ENOBUFS)
}

#[test]
fn a_namespace_that_cannot_be_entered_is_reported_and_enforced_through_its_processes() -> Result<()>
{
    let lab = Lab::new(AGENT)?;
    let config = format!("{EVERY_SECOND}{RULE}");
    let (daemon, interposer) = lab.launch().config(&config).start_interposed()?;
    interposer.set(Call::EnterNamespace, Fate::Fail(Errno::EPERM));
    let netns = Netns::new()?;
    let listener = lab.inside_in(&netns)?.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside_in(&netns)?, &listener)?;
    daemon.wait_for_degraded("namespace", true)?;
    let cause = [("cause", "namespace")];
    assert!(daemon.metric("session_enforcer_sessions_untracked_total", &cause)? >= 1.0);
    // The daemon resets the session through a descriptor from its process.
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    pair.ends()?[0].assert_not_early(&pair.opened, LIMIT);
    interposer.set(Call::EnterNamespace, Fate::Pass);
    daemon.wait_for_degraded("namespace", false)
}

#[test]
fn the_removal_of_the_watched_cgroup_is_reported_and_its_sessions_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let watched = lab.cgroup.child()?;
    let agent = lab.at(&Place::here().in_cgroup(&watched))?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let (path, name) = (watched.path().to_owned(), watched.name()?);
    let named = format!(
        "[[rule]]\nname = \"named\"\ncgroups = [\"{name}/named\"]\nidle_timeout = \"1h\"\n"
    );
    let config = format!("{EVERY_SECOND}{RULE}{named}");
    let daemon = Launch::on(&path).config(&config).start()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    // The sockets belong to the test process and outlive the cgroup.
    drop((agent, watched));
    daemon.wait_for_degraded("detached", true)?;
    let (status, body) = daemon.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("restart the daemon"), "{body}");
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &pair.opened, LIMIT);
    // A new cgroup of the same name does not replace the removed one.
    fs::create_dir_all(path.join("named"))?;
    daemon.wait_for_log("connections are not adopted")?;
    // Comparisons and the daemon continue.
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(daemon.get("/healthz")?.0, 200);
    Ok(())
}

/// The ids of the links that the daemon holds.
fn links_of(daemon: &Daemon) -> Result<Vec<u32>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid()))? {
        // The descriptor may have been closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let id = text.lines().find_map(|line| line.strip_prefix("link_id:"));
        links.extend(id.map(|id| id.trim().parse::<u32>()).transpose()?);
    }
    Ok(links)
}

#[test]
fn programs_that_someone_else_detaches_are_reported() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(RULE)?;
    assert!(!daemon.is_degraded("detached")?);
    let links = links_of(&daemon)?;
    assert_eq!(links.len(), PROGRAMS as usize);
    detach_by_force(links.last().map(std::slice::from_ref).context("no link")?)?;
    assert!(daemon.is_degraded("detached")?);
    let (_, body) = daemon.get("/readyz")?;
    assert!(body.contains("detached by someone else"), "{body}");
    Ok(())
}
