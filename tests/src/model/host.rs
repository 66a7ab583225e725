//! The daemon of a run: does to it what the plan says, and writes down when.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    book::Book,
    field::port_numbers,
    plan::Blow,
    timeline::{Change, Span, Timeline},
};
use crate::{
    audit::Record, clock::eventually, daemon::Daemon, lab::Lab, metrics::Metrics, pace::patience,
    random::Random,
};

/// The counter of the sessions that reached a limit.
pub(super) const TERMINATIONS: &str = "session_enforcer_terminations_total";

/// One daemon, from its start to its end.
pub(super) struct Life {
    /// Its records of terminations.
    pub(super) records: Vec<Record>,
    /// Its records and its metrics shortly before its end, where it could be asked then.
    pub(super) asked: Option<(Vec<Record>, Metrics)>,
    pub(super) ending: Ending,
}

/// How a daemon ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    Killed,
    Stopped,
    /// It ran until nothing more happened.
    Last,
}

/// The running daemon, and those before it.
pub(super) struct Host<'a> {
    lab: &'a Lab,
    /// Set where all connections are to be tried at once, which clears it.
    alarm: &'a AtomicBool,
    start: Instant,
    random: Random,
    book: Book,
    daemon: Daemon,
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
    ) -> Result<Self> {
        let book = Book::random(&mut random);
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
            timeline,
            lives: Vec::new(),
            blows: 0,
        })
    }

    /// Does the next thing to the daemon, after a while. It runs afterwards.
    pub(super) fn strike(&mut self) -> Result<()> {
        let (pause, blow) = Blow::random(&mut self.random, self.blows, &self.book);
        thread::sleep(pause);
        self.blows += 1;
        match blow {
            Blow::Freeze(time) => self.freeze(time),
            Blow::Kill { frozen, down, next } => self.kill(frozen, down, next),
            Blow::Stop { down, next } => self.stop(down, next),
            Blow::Reload(book) => self.reload(book),
            Blow::WrongReload => self.reload_wrong(),
        }
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

    /// Has all connections tried, while nobody resets what has expired.
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
        // What it did last was within this.
        let to = self.start.elapsed();
        self.timeline.kills.push(Span { from, to });
        if frozen {
            thread::sleep(down);
            self.daemon.kill()?;
        }
        self.end_life(asked, Ending::Killed)?;
        thread::sleep(down);
        self.try_all()?;
        self.start_next(from, next, false)
    }

    fn stop(&mut self, down: Duration, next: Option<Book>) -> Result<()> {
        let asked = self.ask()?;
        let from = self.start.elapsed();
        self.daemon.stop()?;
        let to = self.start.elapsed();
        self.end_life(Some(asked), Ending::Stopped)?;
        // Nothing is attached.
        self.timeline.changes.push(Change {
            when: Span { from, to },
            book: Book::default(),
            resumes: false,
        });
        thread::sleep(down);
        self.start_next(from, next, true)
    }

    /// The records and then the metrics, which count them all.
    fn ask(&self) -> Result<(Vec<Record>, Metrics)> {
        let records = self.daemon.terminations()?;
        Ok((records, self.daemon.metrics()?))
    }

    fn end_life(&mut self, asked: Option<(Vec<Record>, Metrics)>, ending: Ending) -> Result<()> {
        self.lives.push(Life {
            records: self.daemon.terminations()?,
            asked,
            ending,
        });
        Ok(())
    }

    fn start_next(&mut self, down_from: Duration, next: Option<Book>, resumes: bool) -> Result<()> {
        let book = next.unwrap_or_else(|| self.book.clone());
        let from = self.start.elapsed();
        self.daemon = launch(self.lab, &book)?;
        let to = self.start.elapsed();
        self.timeline.outages.push(Span {
            from: down_from,
            to,
        });
        self.change(Span { from, to }, book, resumes);
        Ok(())
    }

    fn reload(&mut self, book: Book) -> Result<()> {
        let from = self.start.elapsed();
        let log = self.daemon.reload(&book.toml(port_numbers))?;
        let to = self.start.elapsed();
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

    /// The daemon that runs.
    pub(super) const fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The last daemon's records and metrics, once they are the same number, or will not be.
    pub(super) fn finish(&mut self) -> Result<()> {
        // Whatever is still observed may be recorded between the two answers.
        let agreeing = eventually("audit and counters agree", patience(), || {
            let (records, metrics) = self.ask()?;
            let counted = metrics.get(TERMINATIONS, &[])?;
            Ok((counted == records.len() as f64).then_some((records, metrics)))
        });
        // Where they do not, the check finds out which.
        let (records, metrics) = agreeing.or_else(|_| self.ask())?;
        self.lives.push(Life {
            records: records.clone(),
            asked: Some((records, metrics)),
            ending: Ending::Last,
        });
        Ok(())
    }
}

fn launch(lab: &Lab, book: &Book) -> Result<Daemon> {
    Ok(lab.pinned_daemon(&book.toml(port_numbers))?.quiet())
}
