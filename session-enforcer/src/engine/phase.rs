//! A session that is past a limit, and the exceptional states of sessions. Pure.

use std::sync::Arc;

use session_enforcer_common::{Reason, Session};

use crate::datapath::JournalSlot;

/// A session that is past a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expired {
    pub(super) cookie: u64,
    /// The session's record, with the rule of the active policy.
    pub(super) session: Session,
    pub(super) reason: Reason,
    /// The deadline: when it reached its limit, or when a policy change made it late.
    pub(super) deadline_ns: u64,
    /// When it reached its limit.
    pub(super) reached_ns: u64,
    /// When it was found to be late. Its record was read after this time.
    pub(super) decided_ns: u64,
    /// The limit that it reached, by the policy in force at that time; 0 if a policy change made it late.
    pub(super) limit_ns: u64,
    /// When the idle clock of its rule started.
    pub(super) idle_since_ns: u64,
}

/// The exceptional state of a session. Most sessions have none.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// A sync has inserted it into the session table but has not confirmed it yet; it is not counted.
    Adopting {
        /// Whether a FIN or RST has passed since.
        may_have_ended: bool,
    },
    /// A policy change made it late. It is due.
    LateByPolicy {
        /// When the policy changed.
        changed_ns: u64,
        /// When it reached the limit.
        reached_ns: u64,
    },
    /// Its rule only observes; its deadline was recorded.
    Observed {
        /// The recorded deadline.
        reached_ns: u64,
        /// Time of the last decision.
        decided_ns: u64,
    },
    /// It is late unless its socket confirms a candidate. A reaper is asking the socket.
    Candidate,
    /// Reapers were asked to reset it.
    Tried(Box<Tried>),
    /// It was reset; the kernel has not reported its end yet.
    Reset,
}

/// The attempts to reset a session.
#[derive(Clone, Debug)]
pub(super) struct Tried {
    /// The last decision about it.
    pub(super) expired: Expired,
    /// Number of reapers that were asked and have not answered.
    pub(super) asked: u32,
    /// Number of consecutive lost answers, up to the last attempt. After a lost answer it is unknown whether the
    /// session was reset.
    pub(super) unanswered: u32,
    /// Number of failed attempts.
    pub(super) refusals: u32,
    /// The error that was recorded last.
    pub(super) error: Option<String>,
    /// Whether the kernel finds another socket under this one's name.
    pub(super) is_shadowed_by_socket: bool,
    /// Whether the reset hangs on the socket lock.
    pub(super) is_quarantined: bool,
    /// Its slot in the journal, if it has one.
    pub(super) journal_slot: Option<Arc<JournalSlot>>,
}

impl Tried {
    /// An earlier daemon had asked for the reset, and its answer is lost.
    pub(super) fn unanswered(expired: Expired, journal_slot: Arc<JournalSlot>) -> Self {
        Self {
            unanswered: 1,
            journal_slot: Some(journal_slot),
            ..Self::new(expired)
        }
    }

    pub(super) fn new(expired: Expired) -> Self {
        Self {
            expired,
            asked: 0,
            unanswered: 0,
            refusals: 0,
            error: None,
            is_shadowed_by_socket: false,
            is_quarantined: false,
            journal_slot: None,
        }
    }
}

impl Phase {
    /// The decision that the attempts belong to, if there were attempts.
    pub(super) fn expired(&self) -> Option<&Expired> {
        match self {
            Self::Tried(tried) => Some(&tried.expired),
            _ => None,
        }
    }

    /// Whether a reaper or a sync is handling the session, so that the engine must not decide about it.
    pub(super) fn is_in_other_hands(&self) -> bool {
        match self {
            Self::Adopting { .. } | Self::Candidate => true,
            Self::Tried(tried) => tried.asked > 0,
            _ => false,
        }
    }
}
