//! The daemon of a run: does to it what the plan requires and records the times.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use session_enforcer_common::PacketDirection;

use super::{
    book::{Book, End, FEW, Scarce},
    field::port_numbers,
    plan::{Blow, Which},
    timeline::{Change, List, Span, Struck, Timeline},
};
use crate::{
    audit::Record,
    clock::eventually,
    daemon::{Daemon, state_of},
    lab::Lab,
    metrics::Metrics,
    pace::patience,
    programs::drop_packets_longer_than,
    random::Random,
};

/// The counter of the sessions that reached a limit.
pub(super) const TERMINATIONS: &str = "session_enforcer_terminations_total";

/// The pause between two lists of the daemon's sessions.
const BETWEEN_LISTS: Duration = Duration::from_millis(200);

/// More than the length of the headers, plus a few bytes of payload.
const LITTLE: i32 = 150;

/// One daemon from its start to its end.
pub(super) struct Life {
    /// Its records of terminations.
    pub(super) records: Vec<Record>,
    /// Its records and metrics shortly before its end, if they could be read.
    pub(super) asked: Option<(Vec<Record>, Metrics)>,
    pub(super) ending: Ending,
    /// From the time when its start was complete to its end.
    pub(super) ran: Span,
}

/// The way in which a daemon ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    Killed,
    Stopped,
    /// It ran until the end of the run.
    Last,
}

/// The running daemon and its predecessors.
pub(super) struct Host<'a> {
    lab: &'a Lab,
    /// Set to request that all connections are used at once. The traffic clears it.
    alarm: &'a AtomicBool,
    start: Instant,
    random: Random,
    book: Book,
    daemon: Daemon,
    /// The time when the start of the running daemon was complete.
    started: Duration,
    pub(super) timeline: Timeline,
    pub(super) lives: Vec<Life>,
    pub(super) blows: usize,
}

impl<'a> Host<'a> {
    pub(super) fn new(
        lab: &'a Lab,
        alarm: &'a AtomicBool,
        start: Instant,
        mut random: Random,
        scarce: Scarce,
    ) -> Result<Self> {
        let book = Book::random(&mut random).with(scarce);
        let daemon = launch(lab, &book)?;
        let mut timeline = Timeline::default();
        timeline.changes.push(Change {
            when: Span::at(start.elapsed()),
            book: book.clone(),
            resumes: false,
        });
        Ok(Self {
            lab,
            alarm,
            start,
            random,
            book,
            daemon,
            started: start.elapsed(),
            timeline,
            lives: Vec::new(),
            blows: 0,
        })
    }

    /// Performs the next blow on the daemon after a pause. The daemon runs afterwards.
    pub(super) fn strike(&mut self) -> Result<()> {
        let (pause, blow) = Blow::random(&mut self.random, self.blows, &self.book);
        self.pause(pause)?;
        self.blows += 1;
        match blow {
            Blow::Freeze(time) => self.freeze(time),
            Blow::Kill { frozen, down, next } => self.kill(frozen, down, next),
            Blow::Stop { down, next } => self.stop(down, next),
            Blow::Reload { book, kill_after } => self.reload(book, kill_after),
            Blow::WrongReload => self.reload_wrong(),
            Blow::KillReapers {
                which,
                times,
                pause,
                frozen,
            } => self.kill_reapers(which, times, pause, frozen),
            Blow::StopReapers(which) => self.stop_reapers(which),
            Blow::Drop(way, time) => self.drop_packets(way, time),
        }
    }

    /// If the table is small, the next daemon replaces it by one in which every session has a slot. The daemon runs
    /// afterwards.
    pub(super) fn enlarge_table(&mut self) -> Result<()> {
        if self.book.scarce != Scarce::Table {
            return Ok(());
        }
        self.blows += 1;
        self.kill(false, Duration::ZERO, Some(self.book.with_ample_slots()))
    }

    /// Waits. If there are fewer slots than sessions, records which ones are tracked meanwhile.
    fn pause(&mut self, pause: Duration) -> Result<()> {
        let end = Instant::now() + pause;
        loop {
            self.list()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(BETWEEN_LISTS));
        }
    }

    /// Records which sessions the daemon lists of what is scarce. A list can exceed the number of slots if a session
    /// ends during the listing and another takes its slot. Such a list is discarded and the query is repeated.
    fn list(&mut self) -> Result<()> {
        let (Some(slots), Some(common)) = (self.book.slots(), self.book.common_slots()) else {
            return Ok(());
        };
        let path = match self.book.scarce {
            Scarce::Rule => format!("/v1/sessions?rule={FEW}"),
            _ => "/v1/sessions".to_owned(),
        };
        let list = eventually("no more sessions than slots", patience(), || {
            let from = self.start.elapsed();
            let (status, body) = self.daemon.ask("GET", &path, "")?;
            anyhow::ensure!(status == 200, "{status} {body}");
            let to = self.start.elapsed();
            let rows = body.lines().map(serde_json::from_str::<Value>);
            let sessions = rows.map(|row| {
                let row = row?;
                let (end, client) = match row["direction"].as_str() {
                    Some("outbound") => (End::Client, "local"),
                    _ => (End::Server, "remote"),
                };
                let port = row[client]["port"].as_u64().context("a port")?;
                let is_known = row["established"].is_string();
                Ok(((u16::try_from(port)?, end), is_known))
            });
            let sessions = sessions.collect::<Result<HashMap<_, _>>>()?;
            let list = List {
                when: Span { from, to },
                is_full: sessions.len() >= common,
                sessions,
            };
            Ok((list.sessions.len() <= slots).then_some(list))
        })?;
        self.timeline.lists.push(list);
        Ok(())
    }

    /// Drops packets with more than a little payload for this time. The kernel retransmits them later.
    fn drop_packets(&self, way: PacketDirection, time: Duration) -> Result<()> {
        let _dropping = drop_packets_longer_than(&self.lab.cgroup, way, LITTLE)?;
        thread::sleep(time);
        Ok(())
    }

    fn freeze(&mut self, time: Duration) -> Result<()> {
        let from = self.start.elapsed();
        self.daemon.freeze()?;
        thread::sleep(time);
        self.try_all()?;
        self.daemon.thaw()?;
        let to = self.start.elapsed();
        self.timeline.outages.push(Span { from, to });
        Ok(())
    }

    fn kill_reapers(
        &mut self,
        which: Which,
        times: u64,
        pause: Duration,
        frozen: Option<Duration>,
    ) -> Result<()> {
        if let Some(time) = frozen {
            self.freeze(time)?;
        }
        let from = self.start.elapsed();
        let mut struck = Vec::new();
        for _ in 0..times {
            struck.extend(signal_reapers(&self.daemon, which, Signal::SIGKILL)?);
            thread::sleep(pause);
        }
        self.note_killed(from, &struck)
    }

    fn note_killed(&mut self, from: Duration, reapers: &[u32]) -> Result<()> {
        let to = self.wait_for_reapers(reapers, &['Z'])?;
        self.timeline.struck.push(Struck {
            when: Span { from, to },
            reapers: reapers.len(),
            signal: Signal::SIGKILL,
        });
        Ok(())
    }

    fn stop_reapers(&mut self, which: Which) -> Result<()> {
        let from = self.start.elapsed();
        let struck = signal_reapers(&self.daemon, which, Signal::SIGSTOP)?;
        let to = self.wait_for_reapers(&struck, &['T', 'Z'])?;
        self.timeline.struck.push(Struck {
            when: Span { from, to },
            reapers: struck.len(),
            signal: Signal::SIGSTOP,
        });
        Ok(())
    }

    /// Waits until the reapers are in one of these states or have ended. A reaper that hangs on a locked
    /// socket gets there when the lock is released.
    fn wait_for_reapers(&self, reapers: &[u32], states: &[char]) -> Result<Duration> {
        eventually("reapers obey the signal", patience(), || {
            let obeys = |pid: &u32| state_of(*pid).is_none_or(|state| states.contains(&state));
            Ok(reapers.iter().all(obeys).then_some(()))
        })?;
        Ok(self.start.elapsed())
    }

    /// Uses all connections while no daemon resets expired sessions.
    fn try_all(&self) -> Result<()> {
        self.alarm.store(true, Ordering::Relaxed);
        eventually("all connections were tried", patience(), || {
            Ok((!self.alarm.load(Ordering::Relaxed)).then_some(()))
        })
    }

    fn kill(&mut self, frozen: bool, down: Duration, next: Option<Book>) -> Result<()> {
        let asked = if frozen { None } else { Some(self.ask()?) };
        let from = self.start.elapsed();
        if frozen {
            self.daemon.freeze()?;
        } else {
            self.daemon.kill()?;
        }
        // The last actions of the daemon were within this span.
        let to = self.start.elapsed();
        self.timeline.kills.push(Span { from, to });
        if frozen {
            thread::sleep(down);
            self.daemon.kill()?;
        }
        self.end_life(asked, Ending::Killed)?;
        thread::sleep(down);
        self.try_all()?;
        // Without them the gates are open and nothing is taken over: everything after this would be wrong.
        let pins = self.lab.pins.names()?;
        anyhow::ensure!(
            pins.iter().any(|name| name == "track_ingress"),
            "something else has removed pins of the killed daemon, there are {pins:?}"
        );
        self.start_next(from, next, false)
    }

    fn stop(&mut self, down: Duration, next: Option<Book>) -> Result<()> {
        let asked = self.ask()?;
        let from = self.start.elapsed();
        self.daemon.stop()?;
        let to = self.start.elapsed();
        self.timeline.stops.push(Span { from, to });
        self.end_life(Some(asked), Ending::Stopped)?;
        // No program is attached then.
        self.timeline.changes.push(Change {
            when: Span { from, to },
            book: Book::default(),
            resumes: false,
        });
        thread::sleep(down);
        self.start_next(from, next, true)
    }

    /// Reads the records and then the metrics, which count at least these records.
    fn ask(&self) -> Result<(Vec<Record>, Metrics)> {
        let records = self.daemon.terminations()?;
        Ok((records, self.daemon.metrics()?))
    }

    fn end_life(&mut self, asked: Option<(Vec<Record>, Metrics)>, ending: Ending) -> Result<()> {
        self.lives.push(Life {
            records: self.daemon.terminations()?,
            asked,
            ending,
            ran: self.ran(),
        });
        Ok(())
    }

    fn ran(&self) -> Span {
        Span {
            from: self.started,
            to: self.start.elapsed(),
        }
    }

    fn start_next(&mut self, down_from: Duration, next: Option<Book>, resumes: bool) -> Result<()> {
        let book = next.unwrap_or_else(|| self.book.clone());
        let from = self.start.elapsed();
        self.daemon = launch(self.lab, &book)?;
        let log = self.daemon.log();
        anyhow::ensure!(
            !log.contains("adopts the connections again"),
            "nothing was taken over: {log}"
        );
        let to = self.start.elapsed();
        self.started = to;
        self.timeline.outages.push(Span {
            from: down_from,
            to,
        });
        self.change(Span { from, to }, book, resumes);
        Ok(())
    }

    fn reload(&mut self, book: Book, kill_after: Option<Duration>) -> Result<()> {
        let from = self.start.elapsed();
        let daemon = &self.daemon;
        let (log, killed) = thread::scope(|scope| {
            let kill = kill_after.map(|after| {
                scope.spawn(move || {
                    thread::sleep(after);
                    signal_reapers(daemon, Which::All, Signal::SIGKILL)
                })
            });
            let log = daemon.reload(&book.toml(port_numbers))?;
            let killed = match kill.map(thread::ScopedJoinHandle::join) {
                Some(killed) => killed.ok().context("the killing panicked")??,
                None => Vec::new(),
            };
            anyhow::Ok((log, killed))
        })?;
        let to = self.start.elapsed();
        if !killed.is_empty() {
            self.note_killed(from, &killed)?;
        }
        anyhow::ensure!(log.contains("in force;"), "the policy was refused: {log}");
        self.change(Span { from, to }, book, false);
        Ok(())
    }

    fn reload_wrong(&self) -> Result<()> {
        let wrong = format!("{}idle_timeout = \"soon\"\n", self.book.toml(port_numbers));
        let log = self.daemon.reload(&wrong)?;
        anyhow::ensure!(log.contains("in force stays"), "it was taken: {log}");
        Ok(())
    }

    fn change(&mut self, when: Span, book: Book, resumes: bool) {
        self.book = book.clone();
        self.timeline.changes.push(Change {
            when,
            book,
            resumes,
        });
    }

    /// The running daemon.
    pub(super) const fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Reads the last daemon's records and metrics when their numbers agree, or after a timeout.
    pub(super) fn finish(&mut self) -> Result<()> {
        // An observed session may be recorded between the two reads.
        let agreeing = eventually("audit and counters agree", patience(), || {
            let (records, metrics) = self.ask()?;
            let counted = metrics.get(TERMINATIONS, &[])?;
            Ok((counted == records.len() as f64).then_some((records, metrics)))
        });
        // If they do not agree, the check reports the difference.
        let (records, metrics) = agreeing.or_else(|_| self.ask())?;
        self.lives.push(Life {
            records: records.clone(),
            asked: Some((records, metrics)),
            ending: Ending::Last,
            ran: self.ran(),
        });
        Ok(())
    }
}

/// Sends a signal to reapers. Returns those that existed.
fn signal_reapers(daemon: &Daemon, which: Which, signal: Signal) -> Result<Vec<u32>> {
    let mut reapers = which.of(&daemon.reapers()?);
    // Ignore a reaper that has ended meanwhile.
    reapers.retain(|pid| kill(Pid::from_raw(pid.cast_signed()), signal).is_ok());
    Ok(reapers)
}

fn launch(lab: &Lab, book: &Book) -> Result<Daemon> {
    let config = book.toml(port_numbers);
    let launch = lab.launch().pinned(&lab.pins).config(&config);
    // A daemon does not report readiness while there is no slot for a session.
    let daemon = match book.scarce {
        Scarce::Nothing => launch.start()?,
        Scarce::Rule | Scarce::Table => launch.start_unready()?,
    };
    Ok(daemon.quiet())
}
