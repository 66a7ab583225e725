//! A run of random operations on real sockets, and a model of the expected outcome of each session.
//!
//! The plan depends only on a seed ([`plan`]). Connections are opened, used, half closed, closed, aborted and
//! locked, and get forged segments. Meanwhile the daemon is stopped, killed and restarted, and gets valid and
//! invalid policies; its reapers are killed and stopped; and packets are dropped. The run records its actions
//! and observations ([`history`], [`timeline`]). Afterwards the model computes the clocks of every session
//! ([`replay`]), and each connection, record and counter is compared with it ([`check`]).
//!
//! A run does not set the system clock, because that would affect the whole machine.

mod book;
mod case;
mod check;
mod field;
mod history;
mod host;
mod plan;
mod replay;
mod report;
mod termination;
#[cfg(test)]
mod tests;
mod timeline;
mod traffic;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use self::{
    book::{Action, ENDLESS, End, LONGEST_LIMIT, Scarce},
    check::{Seen, UNTRACKED},
    field::Field,
    history::Connection,
    host::Host,
    plan::Operation,
    replay::Replay,
    termination::Termination,
    timeline::Timeline,
    traffic::Traffic,
};
use crate::{
    audit::Record,
    clock::{Time, eventually},
    daemon::Daemon,
    lab::Lab,
    pace::patience,
    random::Random,
};

/// Together these seeds cover every kind of blow to the daemon: with a small session table, with a slot for every
/// session, and with a rule that has few slots.
pub const SEEDS: [u64; 3] = [400, 70, 75];

/// The default number of operations of a seed.
pub const DEFAULT_OPERATIONS: usize = 2_000;

/// The number of operations on connections per blow to the daemon.
const TO_ONE_BLOW: usize = 350;

/// The maximum number of errors in a failure message.
const SHOWN: usize = 5;

/// Runs this number of operations of a seed. Returns the number performed and a summary in words.
///
/// # Errors
///
/// Fails if an observation contradicts the model, or if the run cannot continue.
pub fn run(agent: &Path, seed: u64, operations: usize) -> Result<(usize, String)> {
    let lab = Lab::new(agent)?;
    let field = Field::new(&lab)?;
    let start = Time::now();
    let alarm = AtomicBool::new(false);
    let scarce = Scarce::of(seed);
    let mut host = Host::new(&lab, &alarm, start.at, Random::of(seed, 0), scarce)?;
    let mut traffic = Traffic::new(field, start.at, scarce);
    let talk = |struck: &AtomicBool| talk((&mut traffic, &alarm), struck, seed, operations);
    operate(&mut host, operations.div_ceil(TO_ONE_BLOW), talk)?;
    let done = traffic.operations + host.blows;
    let is_doomed = |connection: &&Connection| is_doomed(connection, &host.timeline);
    traffic.look_until(patience(), |open| !open.iter().any(is_doomed))?;
    // Observed sessions must reach their limits, too.
    traffic.look_until(LONGEST_LIMIT + Duration::from_secs(1), |_| false)?;
    let survivors = check_survivors(&host, &traffic, start.at.elapsed());
    traffic.pass_a_byte()?;
    host.finish()?;
    let finished = start.at.elapsed();
    let spoofed = traffic.spoofed;
    let connections = traffic.finish()?;
    let mut report = Seen {
        start,
        finished,
        connections: &connections,
        timeline: &host.timeline,
        lives: &host.lives,
    }
    .check();
    report
        .wrong
        .extend(survivors.err().map(|error| format!("{error:#}")));
    let shown: Vec<_> = report.wrong.iter().take(SHOWN).cloned().collect();
    ensure!(
        shown.is_empty(),
        "{} things are wrong:\n{}\n{report}\n{}",
        report.wrong.len(),
        shown.join("\n"),
        host.timeline
    );
    let is_scarce = scarce == Scarce::Nothing || report.is_scarce();
    ensure!(
        report.is_mixed() && is_scarce,
        "too little happened: {report}"
    );
    Ok((done, format!("{report}; {spoofed} forged segments")))
}

/// Performs the operations on the connections. All connections are used whenever the alarm is set, until the
/// last blow was `struck`. A third of the operations follows the last blow, because the next daemon or a new
/// policy finds sessions that an earlier one missed.
fn talk(
    (traffic, alarm): (&mut Traffic, &AtomicBool),
    struck: &AtomicBool,
    seed: u64,
    operations: usize,
) -> Result<()> {
    let (mut random, mut random_of_all) = (Random::of(seed, 1), Random::of(seed, 2));
    let mut left = operations;
    while left > 0 {
        if alarm.load(Ordering::Relaxed) {
            traffic.try_all(&mut random_of_all)?;
            alarm.store(false, Ordering::Relaxed);
        }
        if left > operations / 3 || struck.load(Ordering::Relaxed) {
            traffic.perform(&Operation::random(&mut random))?;
            left -= 1;
        } else {
            traffic.look(Duration::from_millis(20))?;
        }
    }
    Ok(())
}

/// Performs the blows on the daemon, while another thread performs the operations. The daemon does not
/// outlive this thread.
fn operate(
    host: &mut Host<'_>,
    blows: usize,
    talk: impl FnOnce(&AtomicBool) -> Result<()> + Send,
) -> Result<()> {
    let struck = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| talk(&struck));
        let blows = (0..blows).try_for_each(|_| host.strike());
        let blows = blows.and_then(|()| host.enlarge_table());
        struck.store(true, Ordering::Relaxed);
        let talked = talk.join().ok().context("the traffic panicked")?;
        talked.and(blows.context("striking the daemon"))
    })
}

/// The open sessions of a connection that are tracked with this action, each with the time from which it is
/// past a limit. [`Duration::MAX`] if it is not known to reach one.
fn due_sessions(
    connection: &Connection,
    timeline: &Timeline,
    action: Action,
) -> Vec<(End, Duration)> {
    let replay = Replay::of(connection, timeline);
    let open = connection.open_sessions();
    let due = open.filter_map(|end| {
        let rule = timeline.last()?.rule(connection.port, end)?;
        (rule.action == action).then(|| (end, replay.clocks(end).due(rule).to))
    });
    due.collect()
}

/// Whether a session of the connection must be reset, now or later.
fn is_doomed(connection: &Connection, timeline: &Timeline) -> bool {
    let enforced = due_sessions(connection, timeline, Action::Enforce);
    enforced.iter().any(|(_, due)| *due < ENDLESS)
}

/// Checks the state after all limits were reached: the daemon tracks exactly the remaining sessions, observed
/// ones are recorded, and nothing was lost.
fn check_survivors(host: &Host<'_>, traffic: &Traffic, now: Duration) -> Result<()> {
    let daemon = host.daemon();
    let book = host.timeline.last().context("a policy")?;
    let open = traffic.open_connections();
    let tracked = |connection: &&Connection| {
        let ends = connection.open_sessions();
        ends.filter(|end| book.rule(connection.port, *end).is_some())
            .count()
    };
    let tracked: usize = open.iter().map(tracked).sum();
    let expected = tracked..=tracked + left_behind(host, traffic);
    for name in ["session_enforcer_map_entries", "session_enforcer_sessions"] {
        let what = format!("{name} is {expected:?}");
        eventually(&what, patience(), || {
            let sessions = daemon.metric(name, &[])? as usize;
            Ok(expected.contains(&sessions).then_some(()))
        })?;
    }
    // No reaper hangs on a lock any longer, and the daemon has given up the stopped reapers.
    for state in ["busy", "stuck"] {
        daemon.wait_for_metric("session_enforcer_reapers", &[("state", state)], 0.0)?;
    }
    daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 0.0)?;
    for connection in open {
        for (end, due) in due_sessions(connection, &host.timeline, Action::Observe) {
            if due < now {
                wait_for_observation(daemon, connection, end)?;
            }
        }
    }
    for counter in ["events_lost", "audit_records_lost", "kernel_errors"] {
        let name = format!("session_enforcer_{counter}_total");
        let count = daemon.metric(&name, &[])?;
        ensure!(count == 0.0, "{name} {count}");
    }
    let may_be_refused = book.scarce.cause();
    for cause in ["map_full", "rule_full", "namespace"] {
        let count = daemon.metric(UNTRACKED, &[("cause", cause)])?;
        let is_right = count == 0.0 || may_be_refused == Some(cause);
        ensure!(is_right, "{UNTRACKED} of {cause}: {count}");
    }
    Ok(())
}

/// The maximum number of sessions that the daemon may still track although their sockets are closed, because the kernel
/// did not report the close. At each policy change the daemon compares its sessions with the sockets.
fn left_behind(host: &Host<'_>, traffic: &Traffic) -> usize {
    let changed = host.timeline.changes.last();
    let changed = changed.map(|change| change.when.from);
    let restored = traffic.connections().flat_map(|connection| {
        let replay = Replay::of(connection, &host.timeline);
        replay.left_behind.into_iter()
    });
    restored.filter(|when| Some(when.to) >= changed).count()
}

/// Waits until the last daemon has recorded the observed termination. A restarted daemon records observed terminations
/// again, so the last daemon must have a record of each.
fn wait_for_observation(daemon: &Daemon, connection: &Connection, end: End) -> Result<()> {
    let is_of_it =
        |record: &Record| record.ports() == connection.ports && Termination::end_of(record) == end;
    let recorded = eventually("what is observed is recorded", patience(), || {
        Ok(daemon.terminations()?.iter().any(is_of_it).then_some(()))
    });
    recorded.with_context(|| format!("the {end:?}'s session of {connection}"))
}
