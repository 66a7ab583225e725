//! Measures how precise the end of a session is, and how fast many sessions end.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{Daemon, Place, Record, Time, run_to_end};

use crate::{
    Bench,
    crowd::{Crowd, FIRST_PORT, LAST_PORT},
    party::daemon,
    process::{children_time, daemon_time},
    report::{Budget, Row},
    statistics::{quantile, ratios, sorted},
};

const MILLISECOND: f64 = 1e6;

/// The budget for the speed relative to `ss -K`.
const FASTER: f64 = 2.5;

/// A rule for the accepted ends only, so that one reset does not end two sessions.
pub(crate) fn accepted(limit: Duration) -> String {
    format!(
        "[[rule]]\nname = \"accepted\"\ndirection = \"inbound\"\nidle_timeout = \"{}s\"\n",
        limit.as_secs()
    )
}

/// Measures sessions whose deadlines are spread evenly over some time.
pub(crate) fn lateness(bench: &Bench) -> Result<Vec<Row>> {
    let sessions = bench.pick(5_000, 10_000);
    let spread = Duration::from_secs(bench.pick(5, 10));
    // No session is due before the last is open and all are watched.
    let limit = spread + Duration::from_secs(2);
    let mut crowd = Crowd::new()?;
    let daemon = daemon(&crowd.cgroup, &accepted(limit), &bench.stop)?;
    crowd.spread(sessions, spread.as_millis() as u64, bench)?;
    crowd.watch()?;
    let lives = crowd.ends(bench)?;
    let records = reset(&daemon, sessions)?;
    let recorded = |record: &Record| record.number("session_enforcer.lateness_seconds") * 1e3;
    let recorded = sorted(&records.iter().map(recorded).collect::<Vec<_>>());
    let mut rows = distribution("after the deadline, in the audit", &recorded);
    rows.extend(after_the_limit(&lives, limit, "as the client sees it"));
    rows[5] = rows[5].clone().budget(Budget::AtMost(0.3));
    rows[6] = rows[6].clone().budget(Budget::AtMost(2.0));
    Ok(rows)
}

/// The delays between the limit and the ends that the clients see.
pub(crate) fn after_the_limit(lives: &[f64], limit: Duration, when: &str) -> Vec<Row> {
    let late = |life: &f64| (life - limit.as_nanos() as f64) / MILLISECOND;
    let seen = sorted(&lives.iter().map(late).collect::<Vec<_>>());
    distribution(&format!("after the configured limit, {when}"), &seen)
}

fn distribution(what: &str, sorted: &[f64]) -> Vec<Row> {
    let row = |name: &str, share: f64| {
        let value: Vec<f64> = quantile(sorted, share).into_iter().collect();
        Row::new(format!("{name}, ms {what}"), "ms", &value)
    };
    vec![
        row("earliest", 0.0).budget(Budget::AtLeast(0.0)),
        row("p50", 0.5),
        row("p99", 0.99),
        row("latest", 1.0),
    ]
}

/// Waits for this number of reset records, and fails on other terminations.
fn reset(daemon: &Daemon, count: usize) -> Result<Vec<Record>> {
    let records = daemon.wait_for_terminations(count)?;
    let mut results: BTreeMap<&str, usize> = BTreeMap::new();
    for record in &records {
        let error = record.text("error.message");
        let result = record.text("session_enforcer.result");
        *results
            .entry(if error.is_empty() { result } else { error })
            .or_default() += 1;
    }
    ensure!(
        results == BTreeMap::from([("reset", count)]),
        "the terminations are {results:?}, {count} resets were expected"
    );
    Ok(records)
}

/// The effort for ending many sessions.
#[derive(Clone, Copy)]
struct Effort {
    /// Sessions per second.
    rate: f64,
    /// Microseconds of processor time per session.
    processor: f64,
}

impl Effort {
    fn of(sessions: usize, elapsed: Duration, processor: Duration) -> Self {
        Self {
            rate: sessions as f64 / elapsed.as_secs_f64(),
            processor: processor.as_secs_f64() * 1e6 / sessions as f64,
        }
    }
}

/// Measures sessions that are all due when the daemon resumes, compared with `ss -K` on the same number.
pub(crate) fn instant(bench: &Bench) -> Result<Vec<Row>> {
    const SESSIONS: usize = 20_000;
    let mut efforts = [Vec::new(), Vec::new()];
    for round in 0..bench.pick(2, 6) {
        for turn in 0..2 {
            let who = (round + turn) % 2;
            let effort = if who == 0 {
                by_the_daemon(SESSIONS, bench)?
            } else {
                by_ss(SESSIONS, bench)?
            };
            efforts[who].push(effort);
        }
    }
    let figures =
        |of: &[Effort], which: fn(&Effort) -> f64| -> Vec<f64> { of.iter().map(which).collect() };
    let [rates, peers] = [0, 1].map(|n| figures(&efforts[n], |effort| effort.rate));
    let [times, peers_times] = [0, 1].map(|n| figures(&efforts[n], |effort| effort.processor));
    Ok(vec![
        Row::new("ss -K", "sessions/s", &peers),
        Row::new("session-enforcer", "sessions/s", &rates)
            .beside("ss -K", &ratios(&rates, &peers))
            .budget(Budget::RatioAtLeast(FASTER)),
        Row::new("ss -K, processor time of one", "us", &peers_times),
        Row::new("session-enforcer, processor time of one", "us", &times)
            .beside("ss -K", &ratios(&times, &peers_times)),
    ])
}

/// Nobody watches the connections during this time. Applications that wake up at every reset would take
/// processor time from both programs. Afterwards a check shows that no connection is left.
const UNDISTURBED: Duration = Duration::from_secs(2);

fn by_the_daemon(sessions: usize, bench: &Bench) -> Result<Effort> {
    let limit = Duration::from_secs(8);
    let mut crowd = Crowd::new()?;
    let daemon = daemon(&crowd.cgroup, &accepted(limit), &bench.stop)?;
    crowd.open(sessions, bench)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], sessions as f64)?;
    // All sessions become due while the daemon is stopped.
    daemon.freeze()?;
    let early = daemon.terminations()?.len();
    ensure!(early == 0, "{early} sessions ended before all were open");
    bench.stop.pause(limit + Duration::from_secs(1))?;
    let (before, start) = (daemon_time(&daemon)?, Time::now());
    daemon.thaw()?;
    bench.stop.pause(UNDISTURBED)?;
    crowd.watch()?;
    crowd.ends(bench)?;
    let records = reset(&daemon, sessions)?;
    let last = records.iter().map(|record| record.time("@timestamp")).max();
    let elapsed = last.context("a record")?.saturating_sub(start.wall);
    Ok(Effort::of(
        sessions,
        elapsed,
        daemon_time(&daemon)? - before,
    ))
}

/// `ss -K` destroys sockets while it lists them and may miss some, so only the destroyed ones count.
fn by_ss(sessions: usize, bench: &Bench) -> Result<Effort> {
    let mut crowd = Crowd::new()?;
    crowd.open(sessions, bench)?;
    let ss = |options: &str, output: &str| {
        let filter = format!("sport >= :{FIRST_PORT} and sport <= :{LAST_PORT}");
        let mut command = Place::here()
            .in_netns(&crowd.netns)
            .command(&bench.agent, "sh");
        let line = format!("ss {options} state established '{filter}' {output}");
        command.args(["-c", &line]);
        let finished = run_to_end(command, Duration::from_secs(60))?;
        ensure!(finished.code == 0, "ss {options}: {}", finished.stderr);
        Ok(finished.stdout)
    };
    let (before, start) = (children_time()?, Time::now());
    ss("-KHtn", ">/dev/null")?;
    let elapsed = start.at.elapsed();
    let processor = children_time()? - before;
    let left = ss("-Htn", "")?.lines().count();
    ensure!(left <= sessions / 100, "ss -K has left {left} connections");
    Ok(Effort::of(sessions - left, elapsed, processor))
}
