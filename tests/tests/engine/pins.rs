//! The pin directory: its lock, pins that are not trusted, `detach`, and where it may be.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
use session_enforcer::datapath::{Datapath, Options, PinDir};
use session_enforcer_common::{Session, table::TableHead};
use session_enforcer_tests::{
    Daemon, Finished, Lab, Moment, PROGRAMS, Pair, daemon_command, idle_rule,
    longer_than_a_start as limit, patience, plant_map, run_to_end, without_bpffs,
};

/// The pins of a running daemon: its programs and the maps that outlive it.
const PINS: usize = PROGRAMS as usize + 7;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn idle() -> String {
    idle_rule(limit())
}

fn assert_reset_for(daemon: &Daemon, pair: &Pair, since: &Moment) -> Result<()> {
    daemon.assert_reset_of(pair, "idle_timeout", since, limit())
}

fn detach(directory: &Path) -> Result<Finished> {
    let mut command = daemon_command()?;
    command.args(["detach", "--pin-dir"]).arg(directory);
    run_to_end(command, patience())
}

/// The only pin set of the lab.
fn set(lab: &Lab) -> Result<std::path::PathBuf> {
    let sets = lab.pins.sets()?;
    ensure!(sets.len() == 1, "expected one set: {sets:?}");
    sets.into_iter().next().context("no set")
}

/// Sessions that an interrupted start left in the table carry its generation. The next start must
/// not use the same number, because its policy differs.
#[test]
fn an_interrupted_start_and_the_next_one_have_different_generations() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.stop()?;
    let load = || -> Result<Datapath> {
        let options = Options {
            max_sessions: 1_000,
            only_netns: None,
            notes_owners: true,
            verbose: false,
        };
        Ok(Datapath::load(
            options,
            Some(PinDir::hold(lab.pins.path())?),
        )?)
    };
    let cut_short = load()?.inherited_generation() + 1;
    // Wait until the start must have attached its programs.
    thread::sleep(Duration::from_millis(100));
    let next = load()?.inherited_generation() + 1;
    assert!(next > cut_short, "{next} and {cut_short}");
    Ok(())
}

#[test]
fn a_second_daemon_is_refused_with_the_process_id_of_the_first() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut first = lab.pinned_daemon(&idle())?;
    let config = idle();
    let launch = lab.launch().pinned(&lab.pins).config(&config);
    // A stopped process keeps the lock, too.
    first.signal(Signal::SIGSTOP)?;
    let refused = launch.refused()?;
    let said = refused.stderr.trim();
    assert_eq!(refused.code, 1, "{said}");
    assert!(
        said.contains(&format!("process {}:", first.pid())),
        "{said}"
    );
    assert!(
        said.contains(&lab.pins.path().display().to_string()),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    first.signal(Signal::SIGCONT)?;
    first.kill()?;
    launch.start()?.stop()
}

#[test]
fn daemons_with_separate_pin_directories_do_not_disturb_each_other() -> Result<()> {
    let labs = [Lab::new(AGENT)?, Lab::new(AGENT)?];
    let daemons = [
        labs[0].pinned_daemon(&idle())?,
        labs[1].pinned_daemon(&idle())?,
    ];
    for (lab, daemon) in labs.iter().zip(&daemons) {
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&lab.outside, &listener)?;
        assert_reset_for(daemon, &pair, &pair.opened)?;
        assert_eq!(daemon.terminations()?.len(), 1);
    }
    Ok(())
}

#[test]
fn detach_removes_everything_and_can_be_repeated() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    lab.pinned_daemon(&idle())?.kill()?;
    // A set of another version, and a set that an interrupted start left.
    let other = lab.pins.path().join("layout-00000000");
    fs::rename(set(&lab)?, &other)?;
    fs::create_dir(lab.pins.path().join("layout-00000000-next"))?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let detached = detach(lab.pins.path())?;
    assert_eq!((detached.code, detached.stderr.as_str()), (0, ""));
    assert!(detached.stdout.contains("removed"), "{}", detached.stdout);
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    assert!(!lab.pins.path().exists());
    let again = detach(lab.pins.path())?;
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(
        again.stdout.contains("nothing is pinned"),
        "{}",
        again.stdout
    );
    Pair::open(&lab.outside, &listener)?.round_trip()?;
    Ok(())
}

#[test]
fn detach_takes_the_directory_from_the_configuration() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.kill()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    let detach = |pin_dir: &str| {
        fs::write(
            &path,
            format!("[daemon]\npin_dir = \"{pin_dir}\"\n{}", idle()),
        )?;
        let mut command = daemon_command()?;
        command.args(["detach", "--config"]).arg(&path);
        run_to_end(command, patience())
    };
    let none = detach("")?;
    assert_eq!(none.code, 0, "{}", none.stderr);
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let detached = detach(&lab.pins.path().display().to_string())?;
    assert_eq!(detached.code, 0, "{}", detached.stderr);
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    Ok(())
}

#[test]
fn detach_is_refused_while_a_daemon_runs() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.pinned_daemon(&idle())?;
    let refused = detach(lab.pins.path())?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let pid = format!("process {}:", daemon.pid());
    assert!(refused.stderr.contains(&pid), "{}", refused.stderr);
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    Ok(())
}

#[test]
fn detach_leaves_other_pins_and_files_alone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.kill()?;
    let foreign = lab.pins.path().join("someone-else");
    fs::create_dir(&foreign)?;
    plant_map(&foreign.join("map"), 2, 4, 4, 1)?;
    let link = lab.pins.path().join("layout-ffffffff");
    symlink(&foreign, &link)?;
    assert_eq!(detach(lab.pins.path())?.code, 0);
    assert_eq!(lab.pins.sets()?, [link, foreign.clone()]);
    assert!(foreign.join("map").exists());
    // A directory that is not on bpffs.
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("layout-00000000/SESSIONS");
    fs::create_dir(file.parent().context("a file has a parent")?)?;
    fs::write(&file, "")?;
    let refused = detach(directory.path())?;
    assert_eq!(refused.code, 78, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("bpffs") && file.exists(),
        "{}",
        refused.stderr
    );
    Ok(())
}

/// Starts a daemon on damaged pins. Asserts that it reports the damage, adopts the connections and
/// enforces.
fn assert_adopted_anew(damage: impl FnOnce(&Path) -> Result<()>, said: &[&str]) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut first = lab.pinned_daemon(&idle())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.kill()?;
    damage(&set(&lab)?)?;
    let second = lab.pinned_daemon(&idle())?;
    let log = second.log();
    assert!(
        said.iter().all(|part| log.contains(part)),
        "{said:?} in {log}"
    );
    // The programs and pins of the first daemon have been replaced.
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let current = set(&lab)?;
    assert_ne!(current.file_name(), Some("layout-00000000".as_ref()));
    assert_eq!(lab.pins.names()?.len(), PINS);
    assert_eq!(
        second.metric("session_enforcer_sessions_adopted_total", &[])?,
        1.0
    );
    assert_reset_for(&second, &pair, &pair.opened)?;
    let new = Pair::open(&lab.outside, &listener)?;
    assert_reset_for(&second, &new, &new.opened)
}

#[test]
fn a_pinned_map_of_another_kind_is_not_used() -> Result<()> {
    for (map_type, key, value, entries) in [(1, 8, 144, 262_144), (2, 4, 112, 8), (9, 8, 144, 8)] {
        let replace = |set: &Path| {
            let path = set.join("SESSIONS");
            fs::remove_file(&path)?;
            plant_map(&path, map_type, key, value, entries)
        };
        assert_adopted_anew(
            replace,
            &["SESSIONS", "instead of", "adopts the connections again"],
        )?;
    }
    Ok(())
}

#[test]
fn a_session_table_whose_maps_do_not_fit_together_is_not_used() -> Result<()> {
    let replace = |set: &Path| {
        let path = set.join("SESSIONS");
        fs::remove_file(&path)?;
        plant_map(&path, 2, 4, size_of::<Session>() as u32, 16)
    };
    let said = [
        "a session table for ",
        "16 records",
        "adopts the connections again",
    ];
    assert_adopted_anew(replace, &said)
}

#[test]
fn a_session_table_with_a_wrong_count_is_not_used_after_a_stop() -> Result<()> {
    for wrong in [0, 1 << 40, u64::MAX] {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let mut first = lab.pinned_daemon(&idle())?;
        let pair = Pair::open(&lab.outside, &listener)?;
        first.stop()?;
        let map = Map::from_map_data(MapData::from_pin(set(&lab)?.join("TABLE"))?)?;
        let mut table: Array<MapData, TableHead> = Array::try_from(map)?;
        let head = table.get(&0, 0)?;
        assert_eq!(head.sessions, 1);
        let sessions = wrong;
        table.set(0, TableHead { sessions, ..head }, 0)?;
        let second = lab.pinned_daemon(&idle())?;
        let log = second.log();
        assert!(
            log.contains("and has 1; the daemon adopts the connections again"),
            "{log}"
        );
        assert_reset_for(&second, &pair, &pair.opened)?;
        second.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    }
    Ok(())
}

#[test]
fn pins_with_a_missing_map_or_a_pin_of_another_kind_are_not_used() -> Result<()> {
    assert_adopted_anew(
        |set| Ok(fs::remove_file(set.join("SESSIONS"))?),
        &["SESSIONS is missing", "adopts the connections again"],
    )?;
    assert_adopted_anew(
        |set| {
            Ok(fs::rename(
                set.join("track_egress"),
                set.join("MATCH_TABLES"),
            )?)
        },
        &["MATCH_TABLES is a Link", "adopts the connections again"],
    )?;
    assert_adopted_anew(
        |set| {
            fs::rename(set.join("track_egress"), set.join("SESSIONS"))?;
            Ok(fs::rename(
                set.join("track_ingress"),
                set.join("track_egress"),
            )?)
        },
        &["SESSIONS is a Link", "adopts the connections again"],
    )
}

#[test]
fn pins_of_another_version_are_removed_and_connections_are_adopted_anew() -> Result<()> {
    assert_adopted_anew(
        |set| Ok(fs::rename(set, set.with_file_name("layout-00000000"))?),
        &[
            "layout-00000000 is of another version",
            "adopts the connections again",
        ],
    )
}

#[test]
fn an_unknown_pin_is_removed() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.kill()?;
    // A pin of a later version that uses the same records.
    let set = set(&lab)?;
    plant_map(&set.join("LATER"), 2, 4, 4, 1)?;
    let _second = lab.pinned_daemon(&idle())?;
    assert!(!set.join("LATER").exists());
    assert_eq!(lab.pins.names()?.len(), PINS);
    Ok(())
}

#[test]
fn an_interrupted_start_leaves_nothing_behind() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.kill()?;
    let set = set(&lab)?;
    let mut staged = set.clone().into_os_string();
    staged.push("-next");
    fs::create_dir(&staged)?;
    fs::rename(
        set.join("track_ingress"),
        Path::new(&staged).join("track_ingress"),
    )?;
    let second = lab.pinned_daemon(&idle())?;
    assert_eq!(lab.pins.sets()?.len(), 1);
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    drop(second);
    Ok(())
}

#[test]
fn a_pin_directory_that_others_may_write_to_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(&idle())?.stop()?;
    fs::set_permissions(lab.pins.path(), fs::Permissions::from_mode(0o777))?;
    let config = idle();
    let launch = lab.launch().pinned(&lab.pins).config(&config);
    for refused in [launch.refused()?, detach(lab.pins.path())?] {
        assert_eq!(refused.code, 78, "{}", refused.stderr);
        assert!(refused.stderr.contains("0700"), "{}", refused.stderr);
    }
    Ok(())
}

#[test]
fn a_pin_directory_that_cannot_hold_pins_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let directory = tempfile::tempdir()?;
    let link = directory.path().join("link");
    symlink(directory.path(), &link)?;
    let dotted = lab.pins.path().join("a.b");
    for (path, why) in [
        (directory.path(), "not on bpffs"),
        (&directory.path().join("below"), "not on bpffs"),
        (&link, "not on bpffs"),
        (&dotted, "dots"),
    ] {
        let args = ["--pin-dir", &path.display().to_string()];
        let refused = lab.launch().config(&idle()).args(&args).refused()?;
        assert_eq!(refused.code, 78, "{}", refused.stderr);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
        assert_eq!(lab.cgroup.attached_programs()?, 0);
    }
    Ok(())
}

#[test]
fn bpffs_is_mounted_if_it_is_missing() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut daemon = lab
        .launch()
        .pinned(&lab.pins)
        .config(&idle())
        .prepared(without_bpffs)
        .start()?;
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", daemon.pid()))?;
    assert!(mounts.contains(" /sys/fs/bpf "), "{mounts}");
    let log = daemon.log();
    assert!(log.contains("bpffs is mounted at /sys/fs/bpf"), "{log}");
    daemon.stop()
}

#[test]
fn an_error_says_that_bpffs_cannot_be_mounted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // Only CAP_SYS_ADMIN is missing.
    let launch = lab
        .launch()
        .pinned(&lab.pins)
        .config("[daemon]\nnetwork_namespaces = \"own\"\n[[rule]]\nname = \"a\"\nidle_timeout = \"3s\"\n")
        .capabilities(&[1, 2, 12, 38, 39])
        .prepared(without_bpffs);
    let refused = launch.refused()?;
    assert_eq!(refused.code, 77, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("mount -t bpf") && refused.stderr.contains("pin_dir"),
        "{}",
        refused.stderr
    );
    Ok(())
}
