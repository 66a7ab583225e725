//! The findings of a run.

use std::{fmt, time::Duration};

/// The findings of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// The violations of the model, each with its details.
    pub(super) wrong: Vec<String>,
    pub(super) counts: Counts,
}

/// The numbers of events. A run with few events proves little.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) connections: usize,
    pub(super) payloads: usize,
    /// Sessions that a daemon reset.
    pub(super) reset: usize,
    /// Of these, the ones whose record was lost with a killed daemon.
    pub(super) unrecorded: usize,
    /// Of these, the ones that a killed or stopped reaper did not report, so that they are recorded as gone.
    pub(super) untold: usize,
    /// Connections that an action of the test reset.
    pub(super) reset_by_test: usize,
    /// Connections that were closed or shut down normally.
    pub(super) ended: usize,
    /// Connections that were open at the end.
    pub(super) open: usize,
    pub(super) adopted: usize,
    /// Sessions that were untracked for a while because there was no slot, and those that were reset for that reason.
    pub(super) left_out: usize,
    pub(super) without_slot: usize,
    /// Sessions that were perhaps untracked for a while: no list shows it.
    pub(super) unlisted: usize,
    /// The daemon's lists of its sessions, and those of a full table or rule.
    pub(super) lists: usize,
    pub(super) full_lists: usize,
    /// The number of times that another socket took over a connection.
    pub(super) restored: usize,
    /// Payloads that were dropped because a session had expired.
    pub(super) refused: usize,
    pub(super) observed: usize,
    pub(super) gone: usize,
    /// Locked ends, and recorded resets that hung on a lock.
    pub(super) locked: usize,
    pub(super) failed: usize,
    pub(super) by_policy: usize,
    /// The greatest lateness of a reset by a running daemon.
    pub(super) latest: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.counts;
        write!(
            f,
            "{} connections, {} payloads: {} reset ({} of them unrecorded, by a killed daemon; {} \
             gone, by a struck reaper; {} by a new policy; at most {:?} late), {} reset by the test, {} ended, {} open; {} sessions \
             adopted, {} observed, {} gone; {} left out for a while, {} reset for that, {} perhaps left out, {} of {} lists full; {} taken over by another socket; {} locked, {} failed meanwhile; {} \
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
            c.without_slot,
            c.unlisted,
            c.full_lists,
            c.lists,
            c.restored,
            c.locked,
            c.failed,
            c.refused
        )
    }
}

impl Report {
    /// Whether every kind of event occurred.
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

    /// Whether there were fewer slots than sessions.
    pub(super) const fn is_scarce(&self) -> bool {
        self.counts.left_out > 0 && self.counts.full_lists > 0
    }
}
