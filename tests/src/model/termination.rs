//! An audit record in the terms of the model. Pure.

use std::time::Duration;

use super::{book::End, timeline::Span};
use crate::{audit::Record, clock::Time};

/// The tolerance for times of the audit, which depend on the wall clock. The test and the daemon each read
/// two clocks one after the other, and the rate of one of them may be under adjustment.
pub(super) const SLACK: Duration = Duration::from_millis(100);

/// The termination of one session, done or observed.
#[derive(Clone, Debug)]
pub(super) struct Termination {
    /// The session's end of its connection.
    pub(super) end: End,
    pub(super) rule: String,
    pub(super) reason: String,
    pub(super) mode: String,
    pub(super) result: String,
    /// The reason of a failed reset; otherwise empty.
    pub(super) error: String,
    /// The time of the record.
    pub(super) at: Duration,
    pub(super) deadline: Duration,
    /// `None` if no payload is known to have passed.
    pub(super) last_activity: Option<Duration>,
    /// `None` if unknown.
    pub(super) established: Option<Duration>,
    /// In seconds. `None` if a change of the policy is the reason.
    pub(super) limit: Option<f64>,
    pub(super) idle_seconds: f64,
    pub(super) lateness_seconds: f64,
    /// Bytes from the client and from the server.
    pub(super) bytes: [u64; 2],
}

impl Termination {
    /// Converts a record. `start` is the beginning of the run.
    pub(super) fn of(record: &Record, start: &Time) -> Self {
        let time = |path: &str| record.time(path).saturating_sub(start.wall);
        let is_there = |path: &str| !record.at(path).is_null();
        let established = "session_enforcer.established";
        let [rule, reason, mode, result] = record.labels().map(str::to_owned);
        Self {
            end: Self::end_of(record),
            rule,
            reason,
            mode,
            result,
            error: record.text("error.message").to_owned(),
            at: time("@timestamp"),
            deadline: time("session_enforcer.deadline"),
            last_activity: ["last_received", "last_sent", "established"]
                .map(|key| format!("session_enforcer.{key}"))
                .into_iter()
                .filter(|path| is_there(path))
                .map(|path| time(&path))
                .max(),
            established: is_there(established).then(|| time(established)),
            limit: record.at("session_enforcer.limit_seconds").as_f64(),
            idle_seconds: record.number("session_enforcer.idle_seconds"),
            lateness_seconds: record.number("session_enforcer.lateness_seconds"),
            bytes: record.bytes(),
        }
    }

    /// The end whose session the record reports.
    pub(super) fn end_of(record: &Record) -> End {
        match record.text("network.direction") {
            "outbound" => End::Client,
            _ => End::Server,
        }
    }

    /// The time of the record with the tolerance.
    pub(super) fn recorded(&self) -> Span {
        around(self.at)
    }

    pub(super) fn is_observed(&self) -> bool {
        self.mode == "observe"
    }

    /// Whether the record reports a failed reset.
    pub(super) fn is_failed(&self) -> bool {
        self.result == "failed"
    }

    /// Whether the record reports the end of the session.
    pub(super) fn is_end(&self) -> bool {
        !self.is_observed() && !self.is_failed()
    }
}

/// A time of the audit with the tolerance.
pub(super) fn around(at: Duration) -> Span {
    Span {
        from: at.saturating_sub(SLACK),
        to: at + SLACK,
    }
}
