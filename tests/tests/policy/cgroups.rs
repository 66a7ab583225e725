//! The daemon watches a cgroup and all cgroups below it.

use std::{net::Ipv4Addr, os::unix::process::CommandExt as _, process::Command, time::Duration};

use anyhow::Result;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
    unistd::mkdir,
};
use session_enforcer_tests::{Lab, Netns, PROGRAMS, Pair, Pins, Place};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

#[test]
fn sessions_of_cgroups_below_the_watched_one_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let child = lab.cgroup.child()?;
    let grandchild = child.child()?;
    let agent = lab.at(&Place::here().in_cgroup(&grandchild))?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let older = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(RULE)?;
    let newer = Pair::open(&lab.outside, &listener)?;
    for pair in [&older, &newer] {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    }
    Ok(())
}

#[test]
fn sessions_of_cgroups_beside_and_above_the_watched_one_are_untouched() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [watched, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let agent = lab.at(&Place::here().in_cgroup(&beside))?;
    let open_to = |agent: &session_enforcer_tests::Agent| {
        Pair::open(&lab.outside, &agent.listen((Ipv4Addr::LOCALHOST, 0))?)
    };
    let older = [open_to(&agent)?, open_to(&lab.inside)?];
    let daemon = session_enforcer_tests::Launch::on(watched.path())
        .config(RULE)
        .start()?;
    let newer = [open_to(&agent)?, open_to(&lab.inside)?];
    newer[1].opened.wait(2 * LIMIT);
    for pair in older.iter().chain(&newer) {
        pair.round_trip()?;
    }
    assert_eq!(daemon.terminations()?.len(), 0);
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        0.0
    );
    Ok(())
}

/// Mounts a file system at a path that is not UTF-8, in a mount namespace of the command.
fn with_a_mount_that_is_not_utf8(command: &mut Command) {
    let prepare = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let kind = Some("tmpfs");
        mount(kind, "/mnt", kind, MsFlags::empty(), None::<&str>)?;
        mkdir(c"/mnt/\xff", Mode::S_IRWXU)?;
        mount(kind, c"/mnt/\xff", kind, MsFlags::empty(), None::<&str>)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

#[test]
fn a_mount_whose_path_is_not_utf8_does_not_hide_other_mounts() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let named = Netns::new()?;
    let agent = lab.inside_in(&named)?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside_in(&named)?, &listener)?;
    let launch = lab.launch().config(RULE);
    let daemon = launch.prepared(with_a_mount_that_is_not_utf8).start()?;
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &pair.opened, LIMIT);
    Ok(())
}

#[test]
fn a_second_daemon_on_the_same_cgroup_needs_force_and_does_not_disturb_the_first() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let enforcing = lab.pinned_daemon(RULE)?;
    let observe = lab.launch().config(RULE).args(&["--observe"]);
    let refused = observe.refused()?;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused
            .stderr
            .contains("the programs of another session-enforcer are attached here"),
        "{refused:?}"
    );
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let observing = observe.args(&["--observe", "--force"]).start()?;
    assert_eq!(lab.cgroup.attached_programs()?, 2 * PROGRAMS);
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    enforcing
        .wait_for_termination()?
        .assert_reset("idle_timeout", &pair.opened, LIMIT);
    for daemon in [&enforcing, &observing] {
        daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 1.0)?;
        daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    }
    Ok(())
}

#[test]
fn programs_that_a_killed_daemon_left_with_another_pin_directory_are_reported() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(RULE)?.kill()?;
    let elsewhere = Pins::new();
    let launch = lab.launch().config(RULE);
    for other in [launch.pinned(&elsewhere), lab.launch().config(RULE)] {
        let refused = other.refused()?;
        assert!(
            refused
                .stderr
                .contains("--pin-dir DIR` with its daemon.pin_dir"),
            "{refused:?}"
        );
    }
    assert!(!elsewhere.path().exists());
    // With the pin directory of the killed daemon the start succeeds.
    lab.pinned_daemon(RULE)?;
    Ok(())
}
