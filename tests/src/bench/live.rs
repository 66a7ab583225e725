//! Measures `list` and `top` with many sessions, and their effect on the enforcement.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::pty::{Winsize, openpty};
use session_enforcer_tests::{Cgroup, Daemon, Launch, Pins};

use crate::{
    Bench,
    crowd::Crowd,
    exact::after_the_limit,
    party::daemon,
    process::{cpu_time, daemon_bytes, daemon_time},
    report::{Budget, Row},
};

/// The budget in seconds for a list of all sessions.
const SOON: f64 = 1.0;

/// The budget in bytes for additional memory of the daemon.
const MORE: f64 = 8e6;

/// The budget for `top` in percent of a processor.
const SHARE: f64 = 5.0;

/// The budget in milliseconds for the lateness of 99 % of the other sessions.
const LATE: f64 = 5.0;

/// The interval of reading the daemon's memory.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Measures lists of all sessions while sessions are due, and `top`.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let all = bench.pick(20_000, 100_000);
    let spread = Duration::from_secs(bench.pick(3, 10));
    let limit = spread + Duration::from_secs(2);
    let parent = Cgroup::new()?;
    let (mut many, mut due) = (Crowd::below(&parent)?, Crowd::below(&parent)?);
    let config = two_rules(&due, limit, &many)?;
    let daemon = daemon(&parent, &config, &bench.stop)?;
    many.open(all / 2, bench)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "all")], all as f64)?;
    let rest = daemon_bytes(&daemon)?;
    due.spread(bench.pick(1_000, 5_000), spread.as_millis() as u64, bench)?;
    due.watch()?;
    let (mut taken, mut more) = (Vec::new(), 0.0_f64);
    let all_have_ended = Instant::now() + limit;
    while Instant::now() < all_have_ended {
        bench.stop.check()?;
        let (seconds, most) = list(&daemon, all)?;
        taken.push(seconds);
        more = more.max(most.saturating_sub(rest) as f64);
    }
    let late = after_the_limit(&due.ends(bench)?, limit, "during lists");
    let list = format!("`list --json` of {all} sessions");
    let mut rows = vec![
        Row::new(list, "s", &taken).budget(Budget::AtMost(SOON)),
        Row::new("the daemon's memory above rest meanwhile", "B", &[more])
            .budget(Budget::AtMost(MORE)),
    ];
    rows.extend(late);
    rows[4] = rows[4].clone().budget(Budget::AtMost(LATE));
    rows.extend(top(&daemon, Duration::from_secs(bench.pick(5, 15)))?);
    Ok(rows)
}

/// Measures sessions that are due while the table grows twice because of new connections.
pub(crate) fn growth(bench: &Bench) -> Result<Vec<Row>> {
    let spread = Duration::from_secs(bench.pick(5, 10));
    let limit = spread + Duration::from_secs(2);
    let parent = Cgroup::new()?;
    let (mut many, mut due) = (Crowd::below(&parent)?, Crowd::below(&parent)?);
    let config = two_rules(&due, limit, &many)?;
    let pins = Pins::new();
    let launch = Launch::on(parent.path()).config(&config).pinned(&pins);
    let daemon = bench.stop.unblocked(|| launch.start())?.quiet();
    due.spread(bench.pick(2_000, 5_000), spread.as_millis() as u64, bench)?;
    due.watch()?;
    // Each connection has two sessions.
    many.open(bench.pick(10_000, 40_000), bench)?;
    let late = after_the_limit(&due.ends(bench)?, limit, "while the table grows");
    let times = daemon.log().matches("has room for").count();
    ensure!(times > 0, "the table has not grown");
    let mut rows = vec![Row::new("larger tables", "", &[times as f64])];
    rows.extend(late);
    rows[3] = rows[3].clone().budget(Budget::AtMost(LATE));
    Ok(rows)
}

/// A configuration with a rule for sessions that are due soon, and one for the others.
fn two_rules(due: &Crowd, limit: Duration, many: &Crowd) -> Result<String> {
    Ok(format!(
        "[[rule]]\nname = \"due\"\ndirection = \"inbound\"\ncgroups = [{:?}]\nidle_timeout = \"{}s\"\n\
         [[rule]]\nname = \"all\"\ncgroups = [{:?}]\nidle_timeout = \"1h\"\n",
        due.cgroup.name()?,
        limit.as_secs(),
        many.cgroup.name()?,
    ))
}

/// Reads a complete list. Returns its duration in seconds and the daemon's maximum memory meanwhile.
fn list(daemon: &Daemon, all: usize) -> Result<(f64, u64)> {
    let mut command = daemon.command_for(&["list", "--json"])?;
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("the output")?;
    let reader = thread::spawn(move || {
        let lines = BufReader::new(output).lines().count();
        (lines, start.elapsed().as_secs_f64())
    });
    let mut most = 0;
    while !reader.is_finished() {
        most = most.max(daemon_bytes(daemon)?);
        thread::sleep(POLL_INTERVAL);
    }
    let (lines, seconds) = reader.join().map_err(|_| anyhow::anyhow!("the reader"))?;
    ensure!(
        child.wait()?.success() && lines >= all,
        "{lines} of {all} were listed"
    );
    Ok((seconds, most))
}

/// Measures the processor time of `top` in percent: that of the daemon and its own.
fn top(daemon: &Daemon, time: Duration) -> Result<Vec<Row>> {
    let mut top = OnTerminal::start(daemon.command_for(&["top"])?)?;
    // `top` has drawn its first screen by then.
    thread::sleep(Duration::from_secs(2));
    let pid = top.0.id();
    let (before, own_before) = (daemon_time(daemon)?, cpu_time(pid)?);
    thread::sleep(time);
    ensure!(top.0.try_wait()?.is_none(), "top has ended");
    let percent = |used: Duration| 100.0 * used.as_secs_f64() / time.as_secs_f64();
    let own = percent(cpu_time(pid)? - own_before);
    let share = percent(daemon_time(daemon)? - before) + own;
    Ok(vec![
        Row::new("`top`, with what the daemon does for it", "%", &[share])
            .budget(Budget::AtMost(SHARE)),
        Row::new("of that, the program", "%", &[own]),
    ])
}

/// A program on a pseudo-terminal whose output is read.
struct OnTerminal(Child);

impl OnTerminal {
    fn start(mut command: Command) -> Result<Self> {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let terminal = openpty(Some(&size), None)?;
        command
            .env("TERM", "xterm-256color")
            .stdin(Stdio::from(terminal.slave.try_clone()?))
            .stdout(Stdio::from(terminal.slave.try_clone()?))
            .stderr(Stdio::from(terminal.slave));
        let child = command.spawn()?;
        let mut screen = File::from(terminal.master);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while screen.read(&mut bytes).is_ok_and(|read| read > 0) {}
        });
        Ok(Self(child))
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // The program may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
