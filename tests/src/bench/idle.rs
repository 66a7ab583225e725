//! Measures the cost of idle sessions in processor time and memory, compared with a script that lists all of
//! them every second.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{Daemon, Place, run_to_end};

use crate::{
    Bench,
    bpf::{Map, Programs},
    crowd::Crowd,
    party::{EVERYTHING, daemon},
    process::{children_time, daemon_bytes, daemon_time},
    report::{Budget, Row},
    statistics::ratios,
};

/// The capacity for all sessions of the largest measurement.
const CAPACITY: usize = 1 << 19;

/// The time over which the daemon is measured, and the time limit of one run of the script.
const WINDOW: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_secs(60);

/// A generous estimate of a connection's memory for both ends in the kernel, with their files.
const PAIR_BYTES: u64 = 16 << 10;

const CPU_PERCENT: f64 = 0.05;
const KERNEL_BYTES: f64 = 200.0;
const DAEMON_BYTES: f64 = 64.0;
const RESIDENT_MB: f64 = 20.0;

/// One run of the script: it kills each connection that has neither sent nor received for an hour.
const SCRIPT: &str = r#"
ss -tinHO state established | awk '{
    sent = received = 0
    for (i = 1; i <= NF; i++) {
        if (index($i, "lastsnd:") == 1) sent = substr($i, 9) + 0
        if (index($i, "lastrcv:") == 1) received = substr($i, 9) + 0
    }
    if (sent > 3600000 && received > 3600000) print $3, $4
}' | while read -r local remote; do
    ss -KH -t src "$local" dst "$remote"
done
"#;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = at_rest(bench)?;
    let mut crowd = Crowd::new()?;
    let config = format!("[daemon]\nmax_sessions = {CAPACITY}\n{EVERYTHING}");
    let daemon = daemon(&crowd.cgroup, &config, &bench.stop)?;
    let mut resident = 0;
    let mut open = 0;
    for sessions in bench.pick(&[0, 100_000][..], &[0, 10_000, 100_000, 500_000]) {
        let more = sessions / 2 - open;
        if !fits(more as u64 * PAIR_BYTES)? {
            rows.push(Row::unavailable(
                format!("{sessions} sessions"),
                "too little memory is free",
            ));
            continue;
        }
        crowd.open(more, bench)?;
        open += more;
        daemon.wait_for_metric("session_enforcer_sessions", &[], *sessions as f64)?;
        rows.extend(at_work(*sessions, &crowd, &daemon, bench)?);
        let now = daemon_bytes(&daemon)?;
        if *sessions == 0 {
            resident = now;
        } else {
            let each = now.saturating_sub(resident) as f64 / *sessions as f64;
            let row = Row::new(
                format!("{sessions} sessions, daemon's memory for one"),
                "B",
                &[each],
            );
            rows.push(row.budget(Budget::AtMost(DAEMON_BYTES)));
        }
    }
    Ok(rows)
}

/// Measures the memory of a daemon with the default capacity.
fn at_rest(bench: &Bench) -> Result<Vec<Row>> {
    let crowd = Crowd::new()?;
    let daemon = daemon(&crowd.cgroup, EVERYTHING, &bench.stop)?;
    bench.stop.pause(Duration::from_secs(1))?;
    let resident = daemon_bytes(&daemon)? as f64 / 1e6;
    let programs = Programs::of(crowd.cgroup.path())?;
    let sessions = programs.sessions()?;
    let all: u64 = programs
        .maps()?
        .iter()
        .map(Map::memory)
        .sum::<Result<u64>>()?;
    let others = all - sessions.memory()?;
    let capacity = daemon.metric("session_enforcer_map_capacity", &[])?;
    let each = sessions.memory()? as f64 / capacity;
    Ok(vec![
        Row::new("memory of engine and reapers at rest", "MB", &[resident])
            .budget(Budget::AtMost(RESIDENT_MB)),
        Row::new("kernel's memory for one session", "B", &[each])
            .budget(Budget::AtMost(KERNEL_BYTES)),
        Row::new("kernel's memory besides", "MB", &[others as f64 / 1e6]),
    ])
}

/// Measures the processor time of the daemon and of the script in percent of one processor.
fn at_work(sessions: usize, crowd: &Crowd, daemon: &Daemon, bench: &Bench) -> Result<Vec<Row>> {
    // Wait until the work of opening the connections is done.
    bench.stop.pause(Duration::from_secs(2))?;
    let (mut own, mut script) = (Vec::new(), Vec::new());
    for _ in 0..bench.pick(2, 4) {
        let before = daemon_time(daemon)?;
        bench.stop.pause(WINDOW)?;
        let used = daemon_time(daemon)? - before;
        own.push(used.as_secs_f64() / WINDOW.as_secs_f64() * 100.0);
        script.push(poll(crowd, bench)?.as_secs_f64() * 100.0);
    }
    let unit = "% of a core";
    let row = Row::new(format!("{sessions} sessions, daemon"), unit, &own)
        .beside("the script", &ratios(&own, &script));
    let row = match sessions {
        100_000 => row.budget(Budget::AtMost(CPU_PERCENT)),
        _ => row,
    };
    let what = format!("{sessions} sessions, a script that polls with ss every second");
    Ok(vec![row, Row::new(what, unit, &script)])
}

/// The processor time of one run of the script.
fn poll(crowd: &Crowd, bench: &Bench) -> Result<Duration> {
    let mut command = Place::here()
        .in_netns(&crowd.netns)
        .command(&bench.agent, "sh");
    command.args(["-c", SCRIPT]);
    let before = children_time()?;
    let finished = run_to_end(command, POLL)?;
    ensure!(finished.code == 0, "the script: {}", finished.stderr);
    Ok(children_time()? - before)
}

/// Whether this number of bytes leaves half of the free memory unused.
fn fits(bytes: u64) -> Result<bool> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let free: u64 = kib.context("MemAvailable in meminfo")?.trim().parse()?;
    Ok(bytes < free * 1024 / 2)
}
