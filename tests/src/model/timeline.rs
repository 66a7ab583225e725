//! The times at which each policy was in force, and at which the daemon did not run. Pure.
//!
//! Times are those of `CLOCK_MONOTONIC` since the start of the run.

use std::{collections::HashMap, fmt, time::Duration};

use nix::sys::signal::Signal;

use super::book::{Book, End};

/// The time of an event, as an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: Duration,
    pub(super) to: Duration,
}

impl Span {
    pub(super) const fn at(at: Duration) -> Self {
        Self { from: at, to: at }
    }

    /// Whether both may be the same moment.
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }

    /// The time of the later of two events.
    #[must_use]
    pub(super) fn later(self, other: Self) -> Self {
        Self {
            from: self.from.max(other.from),
            to: self.to.max(other.to),
        }
    }

    /// The time of the last of two events, of which the second may not have happened.
    #[must_use]
    pub(super) fn perhaps_later(self, other: Self) -> Self {
        Self {
            from: self.from,
            to: self.to.max(other.to),
        }
    }

    /// The span shifted by a delay.
    #[must_use]
    pub(super) fn after(self, delay: Duration) -> Self {
        let from = match self.from {
            Duration::ZERO => Duration::ZERO,
            from => from.saturating_add(delay),
        };
        Self {
            from,
            to: self.to.saturating_add(delay),
        }
    }
}

/// A policy came into force. The policy is empty if a daemon was stopped.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) when: Span,
    pub(super) book: Book,
    /// Whether the daemon took over the state of a stopped one.
    pub(super) resumes: bool,
}

/// The events of the daemon.
#[derive(Clone, Debug, Default)]
pub(super) struct Timeline {
    /// In chronological order. The first one precedes the first connection.
    pub(super) changes: Vec<Change>,
    /// The times when the daemon may not have run: stopped or dead.
    pub(super) outages: Vec<Span>,
    /// The times of the last actions of killed daemons.
    pub(super) kills: Vec<Span>,
    /// The times of normal stops.
    pub(super) stops: Vec<Span>,
    /// The times when reapers were killed or stopped.
    pub(super) struck: Vec<Struck>,
    /// The daemon's lists of its sessions, if there are fewer slots than sessions: those of the rule with a small
    /// `max_sessions`, or all.
    pub(super) lists: Vec<List>,
}

/// A session list of the daemon: for the client's port and the end of each session, whether the session was tracked
/// from its establishment.
#[derive(Clone, Debug)]
pub(super) struct List {
    pub(super) when: Span,
    pub(super) sessions: HashMap<(u16, End), bool>,
    /// Whether only a rule below its share can have found a slot.
    pub(super) is_full: bool,
}

/// Reapers were killed, or stopped for good. The daemon does not know the outcome of the last, unreported
/// request of each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Struck {
    /// The time of their last actions.
    pub(super) when: Span,
    pub(super) reapers: usize,
    pub(super) signal: Signal,
}

/// Prints everything except the rules, for a failure message.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Change { when, resumes, .. } in &self.changes {
            writeln!(f, "a policy came into force {when:?}, resumes {resumes}")?;
        }
        write!(
            f,
            "outages {:?}\nkills {:?}\nstops {:?}\n{:?}",
            self.outages, self.kills, self.stops, self.struck
        )
    }
}

impl Timeline {
    /// The policies that may have been in force at some moment of the span.
    pub(super) fn books(&self, span: Span) -> impl Iterator<Item = &Book> {
        let ends = self.changes.iter().skip(1).map(|change| change.when.to);
        let ends = ends.chain([Duration::MAX]);
        let in_force = self.changes.iter().zip(ends);
        in_force
            .filter(move |(change, end)| change.when.from <= span.to && *end >= span.from)
            .map(|(change, _)| &change.book)
    }

    /// The last policy.
    pub(super) fn last(&self) -> Option<&Book> {
        self.changes.last().map(|change| &change.book)
    }

    /// The start of the period up to `at` during which the daemon ran and the policy did not change.
    pub(super) fn steady_since(&self, at: Duration) -> Duration {
        let changes = self.changes.iter().map(|change| change.when);
        let disturbances = changes.chain(self.outages.iter().copied());
        let ends = disturbances.filter(|span| span.from <= at);
        ends.map(|span| span.to.min(at)).max().unwrap_or_default()
    }
}
