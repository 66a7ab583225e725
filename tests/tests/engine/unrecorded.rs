//! A daemon is killed after a reset and before it writes the record: the next daemon writes the
//! record, once.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{ErrorKind, Write as _},
    net::Ipv4Addr,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::{errno::Errno, sys::stat::Mode, unistd::mkfifo};
use session_enforcer_tests::{
    Call, Daemon, Fate, Interposer, Lab, Pair, Record, eventually, patience, records, scaled,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

fn interposed(lab: &Lab, config: &str, audit: &str) -> Result<(Daemon, Interposer)> {
    let args = ["--audit", audit];
    let launch = lab.launch().pinned(&lab.pins).config(config).args(&args);
    launch.start_interposed()
}

fn starts(records: &[Record]) -> usize {
    let is_start = |record: &&Record| record.text("event.action") == "enforcer-started";
    records.iter().filter(is_start).count()
}

/// Starts the next daemon and returns all termination records of sessions so far.
fn next(lab: &Lab, config: &str, audit: &str) -> Result<(Daemon, Vec<Record>)> {
    let path = Path::new(audit);
    let before = if path.exists() {
        starts(&records(path)?)
    } else {
        0
    };
    let args = ["--audit", audit];
    let launch = lab.launch().pinned(&lab.pins).config(config).args(&args);
    let daemon = launch.start()?;
    // The daemon writes records that were left over before the record of its own start.
    let mut recorded = eventually("the start in the audit", patience(), || {
        let records = records(path)?;
        Ok((starts(&records) > before).then_some(records))
    })?;
    recorded.retain(Record::is_termination);
    Ok((daemon, recorded))
}

/// The kernel has reset the session, but the answer reached nobody: the reaper is killed together
/// with the daemon.
#[test]
fn a_reset_whose_answer_was_lost_with_the_daemon_is_recorded_once() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let directory = tempfile::tempdir()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let (mut daemon, interposer) = interposed(&lab, RULE, &audit)?;
    interposer.set(Call::Answer, Fate::Wait);
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    daemon.kill()?;
    drop(interposer);
    for _ in 0..2 {
        let (mut daemon, ended) = next(&lab, RULE, &audit)?;
        ensure!(ended.len() == 1, "{ended:#?}");
        ended[0].assert_due("idle_timeout", &pair.opened, LIMIT);
        // Without the answer the next daemon cannot know whether the session had closed by itself.
        assert_eq!(ended[0].text("session_enforcer.result"), "gone");
        daemon.kill()?;
    }
    Ok(())
}

/// Fills a pipe, so that the daemon's next record cannot be written.
fn fill(path: &Path) -> Result<File> {
    let options = || {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        options
    };
    let mut pipe = options().open(path)?;
    loop {
        match pipe.write(&[b'x'; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(pipe),
            Err(error) => return Err(error.into()),
        }
    }
}

#[test]
fn a_reset_whose_record_was_not_written_is_recorded_in_full() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let directory = tempfile::tempdir()?;
    let pipe = directory.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let _full = fill(&pipe)?;
    let args = ["--audit", &pipe.display().to_string()];
    let launch = lab.launch().pinned(&lab.pins).config(RULE).args(&args);
    let mut daemon = launch.start()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    let reset = [("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &reset, 1.0)?;
    daemon.kill()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let (daemon, ended) = next(&lab, RULE, &audit)?;
    ensure!(ended.len() == 1, "{ended:#?}");
    ended[0].assert_reset("idle_timeout", &pair.opened, LIMIT);
    assert_eq!(ended[0].text("rule.name"), "idle");
    // The counter of the second daemon agrees with its audit.
    daemon.wait_for_metric("session_enforcer_terminations_total", &reset, 1.0)
}

#[test]
fn a_record_that_was_already_written_is_not_written_again() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let directory = tempfile::tempdir()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let config = format!("[audit]\nsync = true\n{RULE}");
    let (mut daemon, interposer) = interposed(&lab, &config, &audit)?;
    interposer.set(Call::Sync, Fate::Wait);
    let pair = Pair::open(&lab.outside, &listener)?;
    interposer.wait_for(Call::Sync, 1)?;
    daemon.kill()?;
    let (_daemon, ended) = next(&lab, &config, &audit)?;
    ensure!(ended.len() == 1, "{ended:#?}");
    ended[0].assert_reset("idle_timeout", &pair.opened, LIMIT);
    Ok(())
}

/// A session that a daemon was about to reset when it was killed, and its local port.
fn killed_before_a_reset(lab: &Lab, audit: &str) -> Result<(Pair, u16)> {
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let (mut daemon, interposer) = interposed(lab, RULE, audit)?;
    interposer.set(Call::Destroy, Fate::Wait);
    let pair = Pair::open(&lab.outside, &listener)?;
    interposer.wait_for(Call::Destroy, 1)?;
    daemon.kill()?;
    Ok((pair, listener.port()))
}

#[test]
fn a_session_that_was_about_to_be_reset_is_reset_by_the_next_daemon() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let directory = tempfile::tempdir()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let (pair, _) = killed_before_a_reset(&lab, &audit)?;
    let (daemon, _) = next(&lab, RULE, &audit)?;
    let reset = [("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &reset, 1.0)?;
    let ended: Vec<_> = records(Path::new(&audit))?
        .into_iter()
        .filter(Record::is_termination)
        .collect();
    ensure!(ended.len() == 1, "{ended:#?}");
    ended[0].assert_reset("idle_timeout", &pair.opened, LIMIT);
    Ok(())
}

/// The session was not reset, so there is nothing to record.
#[test]
fn a_session_that_was_about_to_be_reset_is_not_recorded_if_no_rule_matches_it_any_more()
-> Result<()> {
    let lab = Lab::new(AGENT)?;
    let directory = tempfile::tempdir()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let (pair, port) = killed_before_a_reset(&lab, &audit)?;
    let elsewhere = format!("{RULE}local_ports = [{}]\n", port ^ 1);
    let (daemon, ended) = next(&lab, &elsewhere, &audit)?;
    ensure!(ended.is_empty(), "{ended:#?}");
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 0.0);
    pair.round_trip()?;
    Ok(())
}

/// Some sessions are older than the daemon, so the kernel does not report their close.
#[test]
fn each_reset_of_a_burst_is_recorded_once_though_the_daemon_is_killed_meanwhile() -> Result<()> {
    const SESSIONS: usize = 300;
    const KILLS: u64 = 4;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let directory = tempfile::tempdir()?;
    let audit = directory.path().join("audit.json").display().to_string();
    let open = || -> Result<Vec<Pair>> {
        (0..SESSIONS)
            .map(|_| Pair::open(&lab.outside, &listener))
            .collect()
    };
    let mut pairs = open()?;
    let (mut daemon, _) = next(
        &lab,
        "[[rule]]\nname = \"idle\"\nidle_timeout = \"1h\"\n",
        &audit,
    )?;
    for kill in 0..KILLS {
        daemon.kill()?;
        (daemon, _) = next(&lab, RULE, &audit)?;
        daemon.freeze()?;
        pairs.extend(open()?);
        thread::sleep(LIMIT + scaled(Duration::from_millis(100)));
        daemon.thaw()?;
        thread::sleep(Duration::from_millis(3 * (kill + 1)));
    }
    daemon.kill()?;
    let (_daemon, _) = next(&lab, RULE, &audit)?;
    let ended = eventually("a record of each session", patience(), || {
        let mut ended = records(Path::new(&audit))?;
        ended.retain(Record::is_termination);
        Ok((ended.len() >= pairs.len()).then_some(ended))
    })?;
    let names: BTreeSet<&str> = ended.iter().map(|record| record.text("event.id")).collect();
    assert_eq!((ended.len(), names.len()), (pairs.len(), pairs.len()));
    Ok(())
}
