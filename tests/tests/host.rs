//! Tests that need a whole host. `cargo xtask vm` runs them in virtual machines, a module for each
//! way in which a machine is started; elsewhere they fail.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};
use session_enforcer_tests::{
    Agent, Daemon, Finished, Lab, Launch, Moment, Netns, Pair, Place, Time, daemon_command,
    die_with_parent, eventually, late_ticks, patience, run_to_end, scaled,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(3);
const RULE: &str = "[[rule]]\nname = \"idle\"\ndirection = \"inbound\"\nidle_timeout = \"3s\"\n";
const BPFFS: &str = "/sys/fs/bpf";
const PINS: &str = "/sys/fs/bpf/session-enforcer";
/// A directory that survives the restart of the machine.
const KEPT: &str = "/run/session-enforcer-vm";

/// Fails unless `cargo xtask vm` has started this machine. The tests call it first, because a
/// daemon that watches a whole host would reset the connections of the person who runs the test.
fn ensure_own_machine() -> Result<()> {
    let words = fs::read_to_string("/proc/cmdline")?;
    let is_ours = words
        .split_whitespace()
        .any(|word| word == "session_enforcer.vm=1");
    ensure!(
        is_ours,
        "this is for the virtual machines of `cargo xtask vm` only: it works on the whole host"
    );
    Ok(())
}

/// A lab on a machine of `cargo xtask vm`.
fn lab() -> Result<Lab> {
    ensure_own_machine()?;
    Lab::new(AGENT)
}

/// The root of cgroup v2, wherever it is mounted.
fn root_cgroup() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let found = lines.find(|words| words.get(2) == Some(&"cgroup2"));
    let mount = found.context("cgroup v2 is not mounted")?;
    Ok(mount[1].into())
}

fn without_bpffs() {
    // Unmount all file systems that are mounted on top of each other.
    while umount2(BPFFS, MntFlags::MNT_DETACH).is_ok() {}
}

fn is_mounted(place: &str) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(place)))
}

/// Asserts that an idle connection of this agent to itself is reset at both ends.
fn assert_enforced(daemon: &Daemon, agent: &Agent) -> Result<()> {
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(agent, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &last, LIMIT);
    server.assert_reset(Errno::ECONNABORTED, &last, LIMIT);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    Ok(())
}

/// An agent in its own namespaces, as in a container.
fn contained() -> Result<Agent> {
    let mut command = Command::new("unshare");
    command
        .args(["--net", "--pid", "--mount", "--cgroup", "--ipc", "--uts"])
        .args(["--fork", "--kill-child", "--mount-proc", "--"])
        .args(["sh", "-c", "ip link set lo up && exec \"$0\" serve", AGENT]);
    Agent::start_with(command)
}

/// Asserts that the daemon on the root cgroup enforces everywhere: in a child cgroup, in its own
/// cgroup, in another network namespace, and in a container.
fn assert_whole_host_is_enforced(daemon: &Daemon, lab: &Lab) -> Result<()> {
    let netns = Netns::new()?;
    for agent in [
        &lab.inside,
        &lab.outside,
        &lab.inside_in(&netns)?,
        &lab.outside_in(&netns)?,
        &contained()?,
    ] {
        assert_enforced(daemon, agent)?;
    }
    Ok(())
}

/// The output of `doctor`.
fn doctor() -> Result<Finished> {
    let mut command = daemon_command()?;
    command.arg("doctor");
    run_to_end(command, patience())
}

/// Asserts that `doctor` finds no problem.
fn assert_doctor_finds_no_problem() -> Result<()> {
    let report = doctor()?;
    ensure!(report.code == 0, "{}{}", report.stdout, report.stderr);
    Ok(())
}

mod unified {
    use super::*;

    #[test]
    fn a_daemon_at_the_root_cgroup_enforces_every_connection_of_the_host() -> Result<()> {
        let lab = lab()?;
        let daemon = Launch::on(&root_cgroup()?).config(RULE).start()?;
        assert_whole_host_is_enforced(&daemon, &lab)?;
        assert_doctor_finds_no_problem()
    }

    #[test]
    fn without_bpffs_the_daemon_mounts_it_and_the_next_one_takes_over() -> Result<()> {
        let lab = lab()?;
        without_bpffs();
        ensure!(!is_mounted(BPFFS)?);
        let root = root_cgroup()?;
        let launch = Launch::on(&root).config(RULE).args(&["--pin-dir", PINS]);
        let mut daemon = launch.start()?;
        ensure!(is_mounted(BPFFS)?);
        daemon.kill()?;
        let next = launch.start()?;
        assert_enforced(&next, &lab.outside)?;
        drop(next);
        assert_detached()
    }

    /// Asserts that `detach` removes everything that the earlier daemons left.
    fn assert_detached() -> Result<()> {
        let mut command = daemon_command()?;
        command.args(["detach", "--pin-dir", PINS]);
        let done = run_to_end(command, patience())?;
        ensure!(done.code == 0, "{}", done.stderr);
        ensure!(!Path::new(PINS).exists());
        Ok(())
    }

    #[test]
    fn a_user_without_privileges_sees_the_missing_capabilities() -> Result<()> {
        let lab = lab()?;
        let mut command = Place::here()
            .as_user(65534)
            .command(lab.agent_binary(), daemon_binary()?);
        command.args(["run", "--port", "5432", "--idle-timeout", "15m"]);
        let refused = run_to_end(command, patience())?;
        assert_eq!(refused.code, 77, "{}", refused.stderr);
        assert!(refused.stderr.contains("CAP_"), "{}", refused.stderr);
        assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
        Ok(())
    }

    fn daemon_binary() -> Result<PathBuf> {
        Ok(daemon_command()?.get_program().into())
    }

    /// Sets the wall clock forward or back.
    fn set_clock(by: Duration, forward: bool) -> Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        let then = if forward { now + by } else { now - by };
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(then))?;
        Ok(())
    }

    #[test]
    fn setting_the_wall_clock_moves_no_deadline_and_the_audit_follows_it() -> Result<()> {
        const JUMP: Duration = Duration::from_secs(7200);
        let lab = lab()?;
        let daemon = Launch::on(&root_cgroup()?).config(RULE).start()?;
        for forward in [true, false] {
            let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
            let pair = Pair::open(&lab.outside, &listener)?;
            let last = pair.round_trip()?;
            set_clock(JUMP, forward)?;
            let [client, _] = pair.ends()?;
            client.assert_reset(Errno::ECONNRESET, &last, LIMIT);
            let seen = Time::now();
            ensure!(
                seen.at - last.latest.at < scaled(Duration::from_secs(10)),
                "the reset came {:?} after the last payload",
                seen.at - last.latest.at
            );
            let record = daemon.wait_for_termination_of(&pair)?;
            // All times in the record are on the new clock, even earlier ones.
            let told = record.time("session_enforcer.deadline");
            ensure!(
                told.abs_diff(seen.wall) < scaled(Duration::from_secs(10)),
                "a deadline at {told:?}, and now it is {:?}",
                seen.wall
            );
            let lateness = record.number("session_enforcer.lateness_seconds");
            ensure!((0.0..scaled(Duration::from_secs(10)).as_secs_f64()).contains(&lateness));
            let idle = record.number("session_enforcer.idle_seconds");
            ensure!(
                idle + late_ticks().as_secs_f64() >= LIMIT.as_secs_f64(),
                "idle for {idle} s"
            );
        }
        Ok(())
    }

    #[test]
    fn a_daemon_in_namespaces_of_its_own_enforces_its_cgroup() -> Result<()> {
        let lab = lab()?;
        let netns = Netns::new()?;
        let directory = tempfile::tempdir()?;
        let _daemon = ContainedDaemon::start(&lab, &netns, directory.path())?;
        let agent = lab.inside_in(&netns)?;
        let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&agent, &listener)?;
        let last: Moment = pair.round_trip()?;
        let [client, server] = pair.ends()?;
        client.assert_reset(Errno::ECONNRESET, &last, LIMIT);
        server.assert_reset(Errno::ECONNABORTED, &last, LIMIT);
        Ok(())
    }

    /// A daemon in its own network, process, mount and cgroup namespaces.
    struct ContainedDaemon(Child);

    impl ContainedDaemon {
        fn start(lab: &Lab, netns: &Netns, directory: &Path) -> Result<Self> {
            let (config, log) = (directory.join("config.toml"), directory.join("log"));
            fs::write(&config, RULE)?;
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--net={}", netns.path().display()))
                .args(["unshare", "--pid", "--mount", "--cgroup", "--ipc", "--uts"])
                .args(["--fork", "--kill-child", "--mount-proc", "--"])
                .arg(daemon_binary()?)
                .args(["run", "--pin-dir", "", "--config"])
                .arg(&config)
                .arg("--cgroup")
                .arg(lab.cgroup.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log)?);
            let child = die_with_parent(&mut command).spawn()?;
            let daemon = Self(child);
            eventually("the start of the daemon", patience(), || {
                let said = fs::read_to_string(&log)?;
                Ok(said.contains("metrics at").then_some(()))
            })
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
            Ok(daemon)
        }
    }

    impl Drop for ContainedDaemon {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

mod hybrid {
    use super::*;

    #[test]
    fn with_cgroup_v1_mounted_every_connection_of_the_host_is_enforced() -> Result<()> {
        let lab = lab()?;
        let root = root_cgroup()?;
        assert_eq!(root, Path::new("/sys/fs/cgroup/unified"));
        let daemon = Launch::on(&root).config(RULE).start()?;
        assert_whole_host_is_enforced(&daemon, &lab)?;
        assert_doctor_finds_no_problem()
    }
}

/// Afterwards the machine is switched off while the programs of a killed daemon are still attached.
mod before_restart {
    use super::*;

    #[test]
    fn a_killed_daemon_leaves_its_pins() -> Result<()> {
        let lab = lab()?;
        let audit = format!("{KEPT}/audit.json");
        let root = root_cgroup()?;
        let args = ["--pin-dir", PINS, "--audit", &audit];
        let mut daemon = Launch::on(&root).config(RULE).args(&args).start()?;
        let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&lab.outside, &listener)?;
        pair.round_trip()?;
        daemon.kill()?;
        ensure!(fs::read_dir(PINS)?.next().is_some(), "nothing is pinned");
        Ok(())
    }
}

mod after_restart {
    use super::*;

    #[test]
    fn nothing_is_left_and_the_daemon_starts_anew() -> Result<()> {
        let lab = lab()?;
        ensure!(!Path::new(PINS).exists(), "pins outlived the machine");
        let audit = format!("{KEPT}/audit.json");
        let before = fs::read_to_string(&audit)?;
        ensure!(before.contains("enforcer-started"), "{before}");
        let root = root_cgroup()?;
        let args = ["--pin-dir", PINS, "--audit", &audit];
        let mut daemon = Launch::on(&root).config(RULE).args(&args).start()?;
        ensure!(
            daemon.log().contains(" 0 session(s) taken over"),
            "{}",
            daemon.log()
        );
        let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&lab.outside, &listener)?;
        let last = pair.round_trip()?;
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, LIMIT);
        daemon.stop()?;
        let after = fs::read_to_string(&audit)?;
        let new = after
            .strip_prefix(&before)
            .context("the audit has lost its earlier records")?;
        for action in ["enforcer-started", "session-terminated", "enforcer-stopped"] {
            ensure!(new.contains(action), "no {action}: {new}");
        }
        Ok(())
    }
}

/// The `tcp_diag` of this machine cannot destroy sockets, like a kernel without
/// `CONFIG_INET_DIAG_DESTROY`.
mod without_destroy {
    use super::*;

    #[test]
    fn the_daemon_warns_and_resets_connections_through_their_processes() -> Result<()> {
        let lab = lab()?;
        let daemon = Launch::on(&root_cgroup()?).config(RULE).start()?;
        assert!(daemon.log().contains("SOCK_DESTROY"), "{}", daemon.log());
        let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&lab.outside, &listener)?;
        let last = pair.round_trip()?;
        let [client, server] = pair.ends()?;
        client.assert_reset(Errno::ECONNRESET, &last, LIMIT);
        server.assert_not_early(&last, LIMIT);
        let record = daemon.wait_for_termination_of(&pair)?;
        record.assert_reset("idle_timeout", &last, LIMIT);
        Ok(())
    }

    #[test]
    fn doctor_reports_the_missing_sock_destroy() -> Result<()> {
        lab()?;
        let report = doctor()?;
        let line = report
            .stdout
            .lines()
            .find(|line| line.contains("SOCK_DESTROY"));
        let line = line.context("doctor does not mention SOCK_DESTROY")?;
        ensure!(!line.starts_with("ok"), "{line}");
        Ok(())
    }
}

mod below_floor {
    use super::*;

    const FLOOR: &str = "Linux 6.1 or newer";

    /// Keeps the output beside the log, so that one can read which feature is missing.
    fn keep(name: &str, text: &str) -> Result<()> {
        Ok(fs::write(Path::new(KEPT).join(name), text)?)
    }

    #[test]
    fn the_daemon_says_that_the_kernel_is_too_old_and_ends() -> Result<()> {
        ensure_own_machine()?;
        let mut command = daemon_command()?;
        command.args(["run", "--port", "5432", "--idle-timeout", "15m"]);
        let refused = run_to_end(command, patience())?;
        keep("run.txt", &refused.stderr)?;
        assert_eq!(refused.code, 69, "{}", refused.stderr);
        assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
        assert!(refused.stderr.contains(FLOOR), "{}", refused.stderr);
        Ok(())
    }

    #[test]
    fn doctor_reports_the_missing_features() -> Result<()> {
        ensure_own_machine()?;
        let report = doctor()?;
        keep("doctor.txt", &format!("{}{}", report.stdout, report.stderr))?;
        assert_eq!(report.code, 69, "{}", report.stdout);
        assert!(report.stdout.contains(FLOOR), "{}", report.stdout);
        Ok(())
    }
}
