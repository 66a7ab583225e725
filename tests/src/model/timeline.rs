//! When which policy was in force, and when the daemon did not run. Pure.
//!
//! Times are those of `CLOCK_MONOTONIC` since the run began.

use std::{collections::HashMap, fmt, time::Duration};

use nix::sys::signal::Signal;

use super::book::Book;

/// When something happened: not before the one, not after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: Duration,
    pub(super) to: Duration,
}

impl Span {
    pub(super) const fn at(at: Duration) -> Self {
        Self { from: at, to: at }
    }

    /// Whether both may be of the same moment.
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }

    /// When the later of two things happened.
    #[must_use]
    pub(super) fn later(self, other: Self) -> Self {
        Self {
            from: self.from.max(other.from),
            to: self.to.max(other.to),
        }
    }

    /// When the last of two things happened, of which the second may not have happened at all.
    #[must_use]
    pub(super) fn perhaps_later(self, other: Self) -> Self {
        Self {
            from: self.from,
            to: self.to.max(other.to),
        }
    }

    /// So much later. What may have been before the run may have been long before it.
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

/// A policy came into force; the empty one where a daemon was stopped.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) when: Span,
    pub(super) book: Book,
    /// Whether it came with a daemon that took over what a stopped one had left.
    pub(super) resumes: bool,
}

/// What happened to the daemon.
#[derive(Clone, Debug, Default)]
pub(super) struct Timeline {
    /// In the order of time; the first is of before the first connection.
    pub(super) changes: Vec<Change>,
    /// When the daemon may not have run, frozen or dead.
    pub(super) outages: Vec<Span>,
    /// When it did its last before it was killed.
    pub(super) kills: Vec<Span>,
    /// When it was stopped in the orderly way.
    pub(super) stops: Vec<Span>,
    /// When reapers were killed or stopped.
    pub(super) struck: Vec<Struck>,
    /// Which sessions of the rule with few places the daemon had.
    pub(super) lists: Vec<List>,
}

/// What the daemon listed: the client's port of each session, and whether it was tracked from its establishment on.
#[derive(Clone, Debug)]
pub(super) struct List {
    pub(super) when: Span,
    pub(super) sessions: HashMap<u16, bool>,
}

/// Reapers were killed, or stopped for good. What each of them had asked the kernel for last, and had not told,
/// the daemon does not know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Struck {
    /// When they did their last.
    pub(super) when: Span,
    pub(super) reapers: usize,
    pub(super) signal: Signal,
}

/// For a failure: all of it, but the rules.
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

    /// The policy that was in force last.
    pub(super) fn last(&self) -> Option<&Book> {
        self.changes.last().map(|change| &change.book)
    }

    /// Since when, until `at`, the daemon has run and the policy has been the same.
    pub(super) fn steady_since(&self, at: Duration) -> Duration {
        let changes = self.changes.iter().map(|change| change.when);
        let disturbances = changes.chain(self.outages.iter().copied());
        let ends = disturbances.filter(|span| span.from <= at);
        ends.map(|span| span.to.min(at)).max().unwrap_or_default()
    }
}
