//! The audit: contents and numbering of the records. An audit that cannot be written delays no
//! reset; lost records are counted and reported.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
};
use session_enforcer_tests::{
    Call, Daemon, Fate, Lab, Listener, Moment, Pair, Record, TrackedPair,
};
use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

/// A directory that exists on every system. The daemon gets a small file system mounted there.
const DISK: &str = "/mnt";

/// Gives the command its own mount namespace, with a file system of 64 KiB.
fn on_a_small_disk(command: &mut Command) {
    let prepare = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let (kind, options) = (Some("tmpfs"), Some("size=64k"));
        mount(kind, DISK, kind, MsFlags::empty(), options)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Limits the size of the command's files to 8 KiB.
fn limit_files(command: &mut Command) {
    let prepare = || Ok(setrlimit(Resource::RLIMIT_FSIZE, 8192, 8192)?);
    // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// The small file system, as seen from outside of the daemon's mount namespace.
fn disk_of(daemon: &Daemon) -> PathBuf {
    format!("/proc/{}/root{DISK}", daemon.pid()).into()
}

/// Writes until there is no room.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    loop {
        match file.write(&[b'x'; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn terminate_one(lab: &Lab, listener: &Listener) -> Result<()> {
    let pair = Pair::open(&lab.outside, listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    Ok(())
}

fn reset_and_lost(daemon: &Daemon) -> Result<[f64; 2]> {
    let name = "session_enforcer_terminations_total";
    Ok([
        daemon.metric(name, &[("result", "reset")])?,
        daemon.metric("session_enforcer_audit_records_lost_total", &[])?,
    ])
}

#[test]
fn the_queued_bytes_of_a_session_that_is_reset_are_in_its_record() -> Result<()> {
    let case = TrackedPair::open(AGENT, RULE)?;
    let (last, ()) = Moment::of(|| Ok((&case.pair.client).write_all(b"unread")?))?;
    // The FIN must not count as a byte.
    case.pair.client.shutdown(Shutdown::Write)?;
    case.daemon.freeze()?;
    last.wait(LIMIT);
    // After the deadline the gate drops all of this.
    (&case.pair.server).write_all(b"unacknowledged")?;
    case.daemon.thaw()?;
    let record = case.daemon.wait_for_termination_of(&case.pair)?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    let queued = |side| record.number(&format!("session_enforcer.queued_bytes.{side}"));
    assert_eq!([queued("send"), queued("receive")], [14.0, 6.0]);
    // Payload that arrived before the reset can still be read.
    let mut unread = [0; 6];
    (&case.pair.server).read_exact(&mut unread)?;
    assert_eq!(&unread, b"unread");
    Ok(())
}

#[test]
fn a_full_disk_delays_no_reset_and_is_reported_until_there_is_room() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let audit = format!("{DISK}/audit.json");
    let args = ["--audit", &audit];
    let launch = lab.launch().config(RULE).args(&args);
    let daemon = launch.prepared(on_a_small_disk).start()?;
    terminate_one(&lab, &listener)?;
    let (filler, audit) = (
        disk_of(&daemon).join("filler"),
        disk_of(&daemon).join("audit.json"),
    );
    fill(&filler)?;
    // The last allocated page of the file may still take some records.
    while reset_and_lost(&daemon)?[1] == 0.0 {
        terminate_one(&lab, &listener)?;
        let [reset, _] = reset_and_lost(&daemon)?;
        ensure!(reset < 20.0, "no record is lost on a full disk");
    }
    daemon.wait_for_degraded("audit", true)?;
    assert_eq!(daemon.get("/readyz")?.0, 503);
    fs::remove_file(filler)?;
    terminate_one(&lab, &listener)?;
    daemon.wait_for_degraded("audit", false)?;
    let [reset, lost] = reset_and_lost(&daemon)?;
    let text = fs::read_to_string(audit)?;
    let is_record = |line: &&str| line.contains("session-terminated") && line.ends_with('}');
    assert_eq!(text.lines().filter(is_record).count() as f64, reset - lost);
    Ok(())
}

#[test]
fn an_audit_that_cannot_be_written_delays_no_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let args = ["--audit", "/dev/full"];
    let daemon = lab.launch().config(RULE).args(&args).start_unready()?;
    daemon.wait_for_degraded("audit", true)?;
    terminate_one(&lab, &listener)?;
    daemon.wait_for_metric(
        "session_enforcer_terminations_total",
        &[("result", "reset")],
        1.0,
    )?;
    // Three records: the start, the policy, and the termination.
    daemon.wait_for_metric("session_enforcer_audit_records_lost_total", &[], 3.0)?;
    daemon.wait_for_log("audit records are lost")?;
    Ok(())
}

#[test]
fn a_limit_on_the_size_of_files_delays_no_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let audit = TempDir::new()?;
    let args = [
        "--audit",
        &audit.path().join("audit.json").display().to_string(),
    ];
    let launch = lab.launch().config(RULE).args(&args);
    let daemon = launch.prepared(limit_files).start()?;
    while reset_and_lost(&daemon)?[1] == 0.0 {
        terminate_one(&lab, &listener)?;
        let [reset, _] = reset_and_lost(&daemon)?;
        ensure!(reset < 20.0, "no record is lost beyond the limit");
    }
    daemon.wait_for_degraded("audit", true)?;
    terminate_one(&lab, &listener)
}

/// Asserts that the deadline of the record is `counted_from` plus the limit.
fn assert_counted(record: &Record, reason: &str, limit: Duration) {
    assert_eq!(record.text("event.reason"), reason);
    let [from, deadline] =
        ["counted_from", "deadline"].map(|key| record.time(&format!("session_enforcer.{key}")));
    assert_eq!(from + limit, deadline, "{record:?}");
    let told = record.number("session_enforcer.limit_seconds");
    assert!((told - limit.as_secs_f64()).abs() < 1e-9, "{record:?}");
}

#[test]
fn a_record_says_from_when_the_limit_was_counted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [pushed, old, asked] = [listen()?, listen()?, listen()?];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"pushed\"\nlocal_ports = [{}]\nidle_timeout = \"2s\"\nactivity = \"received\"\n\
         [[rule]]\nname = \"old\"\nlocal_ports = [{}]\nmax_lifetime = \"2s\"\n\
         [[rule]]\nname = \"asked\"\nlocal_ports = [{}]\nidle_timeout = \"1h\"\nresponse_timeout = \"2s\"\n",
        pushed.port(),
        old.port(),
        asked.port()
    ))?;
    let limit = Duration::from_secs(2);
    let [pushed, old, asked] = [
        Pair::open(&lab.outside, &pushed)?,
        Pair::open(&lab.outside, &old)?,
        Pair::open(&lab.outside, &asked)?,
    ];
    let (input, ()) = Moment::of(|| Ok((&pushed.client).write_all(b"input")?))?;
    (&asked.client).write_all(b"request")?;
    // The server sends until the session ends.
    while (&pushed.server).write_all(b"screen").is_ok() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let record = daemon.wait_for_termination_of(&pushed)?;
    assert_counted(&record, "idle_timeout", limit);
    record.assert_reset("idle_timeout", &input, limit);
    let [from, received, sent] = ["counted_from", "last_received", "last_sent"]
        .map(|key| record.time(&format!("session_enforcer.{key}")));
    assert_eq!(from, received);
    assert!(sent > received, "{record:?}");
    let idle = record.number("session_enforcer.idle_seconds");
    assert!(idle >= limit.as_secs_f64(), "{record:?}");
    let record = daemon.wait_for_termination_of(&old)?;
    assert_counted(&record, "max_lifetime", limit);
    for key in ["last_received", "last_sent"] {
        assert!(record.at(&format!("session_enforcer.{key}")).is_null());
    }
    let record = daemon.wait_for_termination_of(&asked)?;
    assert_counted(&record, "response_timeout", limit);
    Ok(())
}

#[test]
fn a_reload_during_a_reset_does_not_change_the_limit_in_the_record() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let (daemon, interposer) = lab.launch().config(RULE).start_interposed()?;
    interposer.set(Call::Destroy, Fate::Wait);
    let pair = Pair::open(&lab.outside, &listener)?;
    interposer.wait_for(Call::Destroy, 1)?;
    daemon.reload(
        "[daemon]\nmode = \"observe\"\n[[rule]]\nname = \"idle\"\nidle_timeout = \"1h\"\n",
    )?;
    interposer.set(Call::Destroy, Fate::Pass);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    assert_counted(&record, "idle_timeout", LIMIT);
    Ok(())
}

#[test]
fn records_have_unique_ids_and_consecutive_numbers() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut names = BTreeSet::new();
    for _ in 0..2 {
        let mut daemon = lab.daemon(RULE)?;
        terminate_one(&lab, &listener)?;
        daemon.reload(RULE)?;
        terminate_one(&lab, &listener)?;
        daemon.stop()?;
        let records = daemon.audit()?;
        // Start, policy, termination, policy, termination, stop.
        assert_eq!(records.len(), 6);
        for (record, number) in records.iter().zip(1..) {
            assert_eq!(record.number("event.sequence"), f64::from(number));
            let name = record.text("event.id").to_owned();
            ensure!(names.insert(name.clone()), "{name} twice");
        }
    }
    Ok(())
}

#[test]
fn with_sync_the_next_resets_wait_until_records_are_on_the_disk() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = format!("[audit]\nsync = true\n{RULE}");
    let (daemon, interposer) = lab.launch().config(&config).start_interposed()?;
    interposer.set(Call::Sync, Fate::Wait);
    let first = Pair::open(&lab.outside, &listener)?;
    interposer.wait_for(Call::Sync, 1)?;
    assert_eq!(daemon.terminations_of(&first)?.len(), 1);
    interposer.set(Call::Destroy, Fate::Wait);
    let second = Pair::open(&lab.outside, &listener)?;
    second.opened.wait(2 * LIMIT);
    assert_eq!(interposer.met(Call::Destroy), 0);
    interposer.set(Call::Sync, Fate::Pass);
    interposer.wait_for(Call::Destroy, 1)?;
    interposer.set(Call::Destroy, Fate::Pass);
    let record = daemon.wait_for_termination_of(&second)?;
    record.assert_due("idle_timeout", &second.opened, LIMIT);
    Ok(())
}

#[test]
fn sync_to_a_pipe_is_no_failure() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let config = format!("[audit]\nsync = true\n{RULE}");
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let args = ["--audit", "/dev/null"];
    let daemon = lab.launch().config(&config).args(&args).start()?;
    terminate_one(&lab, &listener)?;
    ensure!(!daemon.is_degraded("audit")?);
    Ok(())
}
