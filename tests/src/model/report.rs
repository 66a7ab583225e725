//! What a run showed.

use std::{fmt, time::Duration};

/// What a run showed.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// What must not be, each with all that is known of it.
    pub(super) wrong: Vec<String>,
    pub(super) counts: Counts,
}

/// How often what occurred: a run in which little happens shows little.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) connections: usize,
    pub(super) payloads: usize,
    /// Reset by a daemon.
    pub(super) reset: usize,
    /// Of these, those whose record went with a daemon that was killed.
    pub(super) unrecorded: usize,
    /// Of these, those of which a reaper that was struck did not tell: recorded as gone.
    pub(super) untold: usize,
    /// Reset by what the test did.
    pub(super) reset_by_test: usize,
    /// Closed or ended in the orderly way.
    pub(super) ended: usize,
    /// Open at last.
    pub(super) open: usize,
    pub(super) adopted: usize,
    /// Sessions for which a rule had no place for a while, and those of them that were reset for that.
    pub(super) left_out: usize,
    pub(super) without_place: usize,
    /// How often another socket took a connection over.
    pub(super) restored: usize,
    /// Payloads that did not pass an expired session.
    pub(super) refused: usize,
    pub(super) observed: usize,
    pub(super) gone: usize,
    /// How often an end was locked, and how often a reset that hung on that was recorded.
    pub(super) locked: usize,
    pub(super) failed: usize,
    pub(super) by_policy: usize,
    /// How late a daemon that ran reset a session.
    pub(super) latest: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.counts;
        write!(
            f,
            "{} connections, {} payloads: {} reset ({} of them unrecorded, by a killed daemon; {} \
             gone, by a struck reaper; {} by a new policy; at most {:?} late), {} reset by the test, {} ended, {} open; {} sessions \
             adopted, {} observed, {} gone; {} left out for a while, {} reset for that; {} taken over by another socket; {} locked, {} failed meanwhile; {} \
             payloads refused",
            c.connections,
            c.payloads,
            c.reset,
            c.unrecorded,
            c.untold,
            c.by_policy,
            c.latest,
            c.reset_by_test,
            c.ended,
            c.open,
            c.adopted,
            c.observed,
            c.gone,
            c.left_out,
            c.without_place,
            c.restored,
            c.locked,
            c.failed,
            c.refused
        )
    }
}

impl Report {
    /// Whether all that a run is about occurred in it.
    pub(super) fn is_mixed(&self) -> bool {
        let c = &self.counts;
        [
            c.reset,
            c.reset_by_test,
            c.ended,
            c.open,
            c.observed,
            c.refused,
        ]
        .iter()
        .all(|count| *count > 0)
    }
}
