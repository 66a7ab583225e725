//! A run of random operations on real sockets, and a model that says what must become of each session.
//!
//! The plan is made from a seed alone ([`plan`]): connections are opened, talk, are half closed,
//! closed, aborted, locked and taken over by another socket, and get forged segments, while the daemon is frozen, killed and started anew, and given other policies,
//! good and bad, its reapers are killed and stopped, and packets are dropped.
//! What was done and seen is written down ([`history`], [`timeline`]). Afterwards the
//! model works out what the clocks of every session showed ([`replay`]), and each connection, record
//! and counter is held to it ([`check`]).
//!
//! The system's clock is not set here, as that would be the whole machine's.

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
    book::{Action, ENDLESS, End, LONGEST_LIMIT},
    check::Seen,
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

/// Together these seeds have all that can happen to a daemon.
pub const SEEDS: [u64; 3] = [54, 70, 75];

/// How many operations a seed has where nothing else is said.
pub const DEFAULT_OPERATIONS: usize = 2_000;

/// How many operations on connections there are for one on the daemon.
const TO_ONE_BLOW: usize = 350;

/// How many of the things that are wrong a failure shows.
const SHOWN: usize = 5;

/// Runs so many operations of a seed; how many there were, and in words what they showed.
///
/// # Errors
///
/// Where anything is not as the model says, or the run cannot go on.
pub fn run(agent: &Path, seed: u64, operations: usize) -> Result<(usize, String)> {
    let lab = Lab::new(agent)?;
    let field = Field::new(&lab)?;
    let start = Time::now();
    let alarm = AtomicBool::new(false);
    let has_few = seed % 2 == 1;
    let mut host = Host::new(&lab, &alarm, start.at, Random::of(seed, 0), has_few)?;
    let mut traffic = Traffic::new(field, start.at, has_few);
    let talk = |struck: &AtomicBool| talk((&mut traffic, &alarm), struck, seed, operations);
    operate(&mut host, operations.div_ceil(TO_ONE_BLOW), talk)?;
    let done = traffic.operations + host.blows;
    let is_doomed = |connection: &&Connection| is_doomed(connection, &host.timeline);
    traffic.look_until(patience(), |open| !open.iter().any(is_doomed))?;
    // What is only observed reaches its limits, too.
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
    ensure!(report.is_mixed(), "too little happened: {report}");
    Ok((done, format!("{report}; {spoofed} forged segments")))
}

/// The operations on the connections. All of them are tried whenever the alarm is set, until the daemon
/// was `struck` for the last time. A third of the operations is left for then: whom a daemon has missed,
/// the next one finds, and a new policy does.
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

/// Strikes the daemon, which does not outlive this thread, while another one talks.
fn operate(
    host: &mut Host<'_>,
    blows: usize,
    talk: impl FnOnce(&AtomicBool) -> Result<()> + Send,
) -> Result<()> {
    let struck = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| talk(&struck));
        let blows = (0..blows).try_for_each(|_| host.strike());
        struck.store(true, Ordering::Relaxed);
        let talked = talk.join().ok().context("the traffic panicked")?;
        talked.and(blows.context("striking the daemon"))
    })
}

/// The sessions of a connection that are open and tracked with this action, each with the time from
/// which it is past a limit; the end of time where it is not known to reach one.
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

/// What lives when everything has come due: the daemon knows these sessions and no others, those that
/// are only observed were recorded, and nothing was lost.
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
    // Nothing hangs any more, and who stood still was left behind.
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
    check_refused(host, traffic)?;
    for counter in [
        "events_lost",
        "sessions_untracked",
        "audit_records_lost",
        "kernel_errors",
    ] {
        let name = format!("session_enforcer_{counter}_total");
        let of_full_table = [("cause", "map_full")];
        let labels: &[_] = match counter {
            "sessions_untracked" if book.has_few => &of_full_table,
            _ => &[],
        };
        let count = daemon.metric(&name, labels)?;
        ensure!(count == 0.0, "{name} {count}");
    }
    Ok(())
}

/// The daemon has counted each session for which its rule had no place when it was established.
fn check_refused(host: &Host<'_>, traffic: &Traffic) -> Result<()> {
    let is_refused = |connection: &&Connection| {
        let replay = Replay::of(connection, &host.timeline);
        let mut sessions = connection.sessions();
        let is_left_out = |end| replay.clocks(end).left_out > Some(Duration::ZERO);
        connection.opened.from > host.started && sessions.any(is_left_out)
    };
    let refused = traffic.connections().filter(is_refused).count();
    let of_full_rule = [("cause", "rule_full")];
    let counted = host
        .daemon()
        .metric("session_enforcer_sessions_untracked_total", &of_full_rule)?;
    ensure!(
        counted >= refused as f64,
        "{refused} sessions found no place, and {counted} are counted"
    );
    Ok(())
}

/// How many sessions the daemon may still believe to be there, since it was not told that their sockets closed. Each
/// change of the policy has it look.
fn left_behind(host: &Host<'_>, traffic: &Traffic) -> usize {
    let changed = host.timeline.changes.last();
    let changed = changed.map(|change| change.when.from);
    let restored = traffic.connections().flat_map(|connection| {
        let replay = Replay::of(connection, &host.timeline);
        replay.left_behind.into_iter()
    });
    restored.filter(|when| Some(when.to) >= changed).count()
}

/// A daemon records what it observes anew after a restart: each has a record of the last one.
fn wait_for_observation(daemon: &Daemon, connection: &Connection, end: End) -> Result<()> {
    let is_of_it =
        |record: &Record| record.ports() == connection.ports && Termination::end_of(record) == end;
    let recorded = eventually("what is observed is recorded", patience(), || {
        Ok(daemon.terminations()?.iter().any(is_of_it).then_some(()))
    });
    recorded.with_context(|| format!("the {end:?}'s session of {connection}"))
}
