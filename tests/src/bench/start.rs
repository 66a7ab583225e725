//! Measures how long the daemon takes to start and to change its policy with many sessions.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use session_enforcer_tests::Daemon;

use crate::{
    Bench,
    crowd::Crowd,
    party::daemon,
    process::daemon_time,
    report::{Budget, Row},
};

const SESSIONS: usize = 100_000;

/// The budget in seconds until a daemon with this number of sockets is ready.
const START: f64 = 1.0;

/// The time limit of a reload on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn rule(name: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\nidle_timeout = \"1h\"\n")
}

/// Durations in seconds, and the daemon's processor time within them.
#[derive(Default)]
pub(crate) struct Taken {
    elapsed: Vec<f64>,
    processor: Vec<f64>,
}

impl Taken {
    pub(crate) fn note(&mut self, start: Instant, processor: Duration) {
        self.elapsed.push(start.elapsed().as_secs_f64());
        self.processor.push(processor.as_secs_f64());
    }

    pub(crate) fn rows(&self, what: &str) -> [Row; 2] {
        [
            Row::new(what, "s", &self.elapsed),
            Row::new(
                format!("{what}, daemon's processor time"),
                "s",
                &self.processor,
            ),
        ]
    }
}

/// Measures the time until `/readyz` reports that everything is attached and adopted, with no socket and with
/// many.
pub(crate) fn start(bench: &Bench) -> Result<Vec<Row>> {
    let rounds = bench.pick(2, 7);
    let mut crowd = Crowd::new()?;
    let without = starts(&crowd, 0, rounds, bench)?;
    crowd.open(SESSIONS / 2, bench)?;
    let with = starts(&crowd, SESSIONS, rounds, bench)?;
    let [elapsed, processor] = with.rows(&format!("{SESSIONS} sockets adopted"));
    let mut rows = without.rows("no socket").to_vec();
    rows.extend([elapsed.budget(Budget::AtMost(START)), processor]);
    Ok(rows)
}

fn starts(crowd: &Crowd, sessions: usize, rounds: usize, bench: &Bench) -> Result<Taken> {
    let mut taken = Taken::default();
    for _ in 0..rounds {
        let start = Instant::now();
        let daemon = daemon(&crowd.cgroup, &rule("all"), &bench.stop)?;
        taken.note(start, daemon_time(&daemon)?);
        let adopted = sessions_of(&daemon, "all")?;
        ensure!(adopted == sessions, "{adopted} of {sessions} were adopted");
    }
    Ok(taken)
}

fn sessions_of(daemon: &Daemon, rule: &str) -> Result<usize> {
    Ok(daemon.metric("session_enforcer_sessions", &[("rule", rule)])? as usize)
}

/// Measures the time from the signal until the new policy is in force and every session has a rule of it.
pub(crate) fn reload(bench: &Bench) -> Result<Vec<Row>> {
    let mut crowd = Crowd::new()?;
    let daemon = daemon(&crowd.cgroup, &rule("first"), &bench.stop)?;
    crowd.open(SESSIONS / 2, bench)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], SESSIONS as f64)?;
    let mut taken = Taken::default();
    for round in 0..bench.pick(4, 10) {
        bench.stop.check()?;
        let name = ["second", "first"][round % 2];
        let (start, before) = (Instant::now(), daemon_time(&daemon)?);
        daemon.reload_within(&rule(name), PATIENCE)?;
        taken.note(start, daemon_time(&daemon)? - before);
        let redecided = sessions_of(&daemon, name)?;
        ensure!(redecided == SESSIONS, "{redecided} of {SESSIONS} follow it");
    }
    Ok(taken
        .rows(&format!("{SESSIONS} sessions matched again"))
        .to_vec())
}
