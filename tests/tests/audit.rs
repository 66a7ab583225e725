//! What waits at a reset is recorded. An audit that cannot be written holds nothing up: what is lost is counted, and
//! said.

use std::{
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
};
use session_enforcer_tests::{Daemon, Lab, Listener, Moment, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

/// A directory that every system has, over which the daemon gets a small disk of its own.
const DISK: &str = "/mnt";

/// Gives the command a mount namespace of its own, with a disk of 64 KiB.
fn on_a_small_disk(command: &mut Command) {
    let prepare = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let (kind, options) = (Some("tmpfs"), Some("size=64k"));
        mount(kind, DISK, kind, MsFlags::empty(), options)?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(prepare) };
}

/// The disk, from outside of the daemon's mount namespace.
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
fn what_waits_at_this_end_when_a_session_is_reset_is_in_its_record() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let (last, ()) = Moment::of(|| Ok((&pair.client).write_all(b"unread")?))?;
    // The FIN is no byte.
    pair.client.shutdown(Shutdown::Write)?;
    daemon.freeze()?;
    last.wait(LIMIT);
    // Past the deadline the gate lets none of it pass.
    (&pair.server).write_all(b"unacknowledged")?;
    daemon.thaw()?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    let queued = |side| record.number(&format!("session_enforcer.queued_bytes.{side}"));
    assert_eq!([queued("send"), queued("receive")], [14.0, 6.0]);
    // What came before the reset is not lost.
    let mut unread = [0; 6];
    (&pair.server).read_exact(&mut unread)?;
    assert_eq!(&unread, b"unread");
    Ok(())
}

#[test]
fn a_full_disk_holds_up_no_termination_and_is_said_until_there_is_room() -> Result<()> {
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
    // The page of the disk that the file has already may take some records more.
    while reset_and_lost(&daemon)?[1] == 0.0 {
        terminate_one(&lab, &listener)?;
        let [reset, _] = reset_and_lost(&daemon)?;
        ensure!(reset < 20.0, "no record is lost on a full disk");
    }
    daemon.wait_for_trouble("audit", true)?;
    assert_eq!(daemon.get("/readyz")?.0, 503);
    fs::remove_file(filler)?;
    terminate_one(&lab, &listener)?;
    daemon.wait_for_trouble("audit", false)?;
    let [reset, lost] = reset_and_lost(&daemon)?;
    let text = fs::read_to_string(audit)?;
    let is_record = |line: &&str| line.contains("session-terminated") && line.ends_with('}');
    assert_eq!(text.lines().filter(is_record).count() as f64, reset - lost);
    Ok(())
}

#[test]
fn an_audit_that_never_takes_a_record_holds_up_no_termination() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let args = ["--audit", "/dev/full"];
    let daemon = lab.launch().config(RULE).args(&args).start_unready()?;
    daemon.wait_for_trouble("audit", true)?;
    terminate_one(&lab, &listener)?;
    daemon.wait_for_metric(
        "session_enforcer_terminations_total",
        &[("result", "reset")],
        1.0,
    )?;
    // The start, the policy, and the termination.
    daemon.wait_for_metric("session_enforcer_audit_records_lost_total", &[], 3.0)?;
    daemon.wait_for_log("audit records are lost")?;
    Ok(())
}
