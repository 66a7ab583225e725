//! What follows from the result of a reset: a record, another attempt, or a quarantine.

use std::{rc::Rc, time::Duration};

use anyhow::Result;
use session_enforcer_common::Reason;

use super::{
    hang_limits::HangScope,
    judge::next_observation,
    phase::{Expired, Phase},
    state::{Cause, RECHECK_NS, RETRY_NS, State},
};
use crate::{
    config::Mode,
    host::clock::monotonic_ns,
    reaper::diag::Queued,
    report::{
        audit::{End, Outcome, Receipt, RequestedBy, Termination},
        control::KillResult,
        metrics::{Repair, Untracked},
    },
};

/// Delay before the first recheck of a session whose reset has no answer. It doubles each time.
pub(super) const UNANSWERED_NS: u64 = 10_000_000;

/// Number of consecutive requests without an answer that are retried. The next one counts as a failed reset.
pub(super) const MAX_UNANSWERED: u32 = 5;

/// Maximum number of doublings of the retry interval: from 10 s to 320 s.
pub(super) const MAX_DOUBLINGS: u32 = 5;

/// How long hanging resets may delay another one before it counts as failed.
const NO_ROOM_FOR_NS: u64 = 5_000_000_000;

/// By how much later it counts as failed for each session that waits, too: one user can have very many, and their
/// failures must not delay others.
const NO_ROOM_SPREAD_NS: u64 = 200_000;

/// The recorded errors of sessions that were not reset.
pub(super) const UNANSWERED: &str = "SOCK_DESTROY: the kernel cannot be asked, the log says why";
pub(super) const LOCKED: &str =
    "the reset waits for the socket, which its process keeps locked in the kernel";
const NO_ROOM: &str = "too many resets hang on sockets that their processes keep locked";

impl State {
    /// Counts the answer of a reaper. Returns false if the answer no longer matters, because another reaper has reset
    /// the session. The event of its end may have come first.
    pub(super) fn answered(&mut self, expired: &Expired) -> bool {
        let Some(tried) = self.tracker.tried(expired.cookie, &expired.session) else {
            return false;
        };
        tried.asked = tried.asked.saturating_sub(1);
        tried.is_quarantined &= tried.asked > 0;
        true
    }

    /// Whether the answer of another reaper is outstanding.
    pub(super) fn is_asked_of_another(&mut self, expired: &Expired) -> bool {
        let tried = self.tracker.tried(expired.cookie, &expired.session);
        tried.is_some_and(|tried| tried.asked > 0)
    }

    /// Records an observed session, once for each deadline that it reaches. The record shows the session at the time of
    /// the decision; later activity is not in it. A session past its lifetime may have been active until its record was
    /// read; its last activity is then the time of the audit record.
    pub(super) fn observe(&mut self, expired: &Expired) {
        let (cookie, session) = (expired.cookie, &expired.session);
        let Some(is_new) = self.tracker.observe(expired) else {
            return;
        };
        if is_new {
            let at_ns = expired.decided_ns.max(session.last_activity_ns());
            self.record(expired, at_ns, End::Observed);
        }
        let limits = self.rule_set.rules[usize::from(session.rule)].limits;
        self.tracker
            .rearm(cookie, next_observation(expired, &limits));
    }

    /// Handles a session that was reset. The kernel has already removed it from the table, and its event may not have
    /// been read yet. A session whose end is not reported is removed here.
    pub(super) fn was_reset(
        &mut self,
        expired: &Expired,
        at_ns: u64,
        queued: Option<Queued>,
    ) -> Result<()> {
        let (cookie, session) = (expired.cookie, &expired.session);
        self.record(expired, at_ns, End::Reset(queued));
        self.tracker.clear_phase(cookie);
        if session.end_is_unreported() {
            if self.still_there(cookie, session)?.is_some() {
                return self.release(cookie, session);
            }
            return self.forget_unless_another(cookie, session);
        }
        if self.tracker.contains(cookie) {
            // If the event does not come, the recheck removes the session. If the socket was connected again, its new
            // session is merely judged early.
            self.tracker.set_phase(cookie, session, Phase::Reset);
            self.tracker.hasten(cookie, at_ns + RECHECK_NS);
        }
        Ok(())
    }

    /// Handles a session whose socket the kernel did not find.
    pub(super) fn not_found(&mut self, expired: &Expired) -> Result<()> {
        let (cookie, session) = (expired.cookie, expired.session);
        if self.still_there(cookie, &session)?.is_some() {
            return self.query_later(cookie, session, Cause::NotFound(*expired));
        }
        // An earlier reaper without an answer may have reset it.
        let tried = self.tracker.tried(cookie, &session);
        let may_have_been_reset = tried.is_some_and(|tried| tried.unanswered > 0);
        if session.end_is_unreported() && !may_have_been_reset {
            self.records.metrics.repaired(Repair::Stale);
        } else {
            // It closed by itself between the decision and the request.
            self.record_gone(expired);
        }
        self.tracker.clear_phase(cookie);
        self.forget_unless_another(cookie, &session)
    }

    /// Handles a lost answer, or an answer about another socket. After [`MAX_UNANSWERED`] retries in a row the reset
    /// counts as failed with this error.
    pub(super) fn unanswered(&mut self, expired: &Expired, now_ns: u64, error: &str) {
        let (cookie, session) = (expired.cookie, &expired.session);
        if expired.reason == Reason::Untracked {
            // The session table has no record of it. If the connection still exists, the next sync finds it again.
            self.fail(expired, now_ns, error);
            return;
        }
        // It has ended or was released by a policy change, so it is not rechecked.
        if !matches!(self.still_there(cookie, session), Ok(Some(_))) {
            self.record_gone(expired);
            self.tracker.clear_phase(cookie);
            // A read error shows again in the next pass.
            let _ = self.forget_unless_another(cookie, session);
            return;
        }
        let Some(tried) = self.tracker.tried(cookie, session) else {
            return;
        };
        if tried.unanswered == MAX_UNANSWERED {
            tried.unanswered = 0;
            self.fail(expired, now_ns, error);
            return;
        }
        let pause_ns = UNANSWERED_NS << tried.unanswered;
        tried.unanswered += 1;
        self.tracker.rearm(cookie, now_ns + pause_ns);
    }

    /// Handles a failed reset. The session stays behind the gate until the next attempt. The failure is recorded once
    /// for each consecutive error text.
    pub(super) fn fail(&mut self, expired: &Expired, at_ns: u64, error: &str) {
        let (cookie, session) = (expired.cookie, &expired.session);
        if self.tracker.tried(cookie, session).is_none() {
            self.tracker.begin_reset(expired);
            self.answered(expired);
        }
        let Some(tried) = self.tracker.tried(cookie, session) else {
            return;
        };
        tried.unanswered = 0;
        tried.is_shadowed_by_socket = false;
        tried.journal_slot = None;
        let pause_ns = RETRY_NS << tried.refusals.min(MAX_DOUBLINGS);
        tried.refusals += 1;
        let is_recorded = tried.error.as_deref() == Some(error);
        tried.error = Some(error.to_owned());
        self.tracker.rearm(cookie, at_ns + pause_ns);
        if !is_recorded {
            self.record(expired, at_ns, End::Failed(error));
        }
        self.kills.failed(cookie, session, error);
        if !self.tracker.contains(cookie) {
            // It has ended, or has no slot in the table; in the latter case the next sync finds it again.
            self.tracker.clear_phase(cookie);
            self.holdings.remove(&cookie);
            self.kills.forgotten(cookie);
        }
    }

    /// Handles a reset that hangs on the socket lock.
    pub(super) fn quarantine(&mut self, expired: &Expired) {
        let (cookie, session) = (expired.cookie, &expired.session);
        let Some(tried) = self.tracker.tried(cookie, session) else {
            return;
        };
        tried.is_quarantined = true;
        let is_recorded = tried.error.as_deref() == Some(LOCKED);
        tried.error = Some(LOCKED.to_owned());
        if !is_recorded {
            tracing::error!("session {cookie} is not reset: {LOCKED}");
            self.record(expired, monotonic_ns(), End::Failed(LOCKED));
            self.records.audit.flush();
        }
        self.kills.failed(cookie, session, LOCKED);
        self.note_backlog();
    }

    /// Has a session wait because no other reset may hang in this scope. If the hanging ones are only slow, they end soon;
    /// after a while the reset counts as failed, and the session waits on. The deadline can be long past without a fault
    /// of theirs: the daemon was stopped, or the host suspended.
    pub(super) fn has_no_room(&mut self, expired: &Expired, full: Rc<HangScope>, now_ns: u64) {
        let (cookie, deadline_ns) = (expired.cookie, expired.deadline_ns);
        if !self.tracker.contains(cookie) {
            // The next sync finds it again.
            return;
        }
        let since_ns = self.without_room.add(full, cookie, deadline_ns, now_ns);
        let spread_ns = NO_ROOM_SPREAD_NS * self.without_room.len() as u64;
        let mut due_ns = since_ns + NO_ROOM_FOR_NS + spread_ns;
        if now_ns >= since_ns + NO_ROOM_FOR_NS {
            self.fail(expired, now_ns, NO_ROOM);
            due_ns = u64::MAX;
        }
        self.tracker.rearm(cookie, due_ns);
    }

    /// Has sessions whose sockets must be queried wait for the same reason.
    pub(super) fn query_has_no_room(&mut self, candidates: &[Expired], full: &Rc<HangScope>) {
        let now_ns = monotonic_ns();
        for expired in candidates {
            let (cookie, deadline_ns) = (expired.cookie, expired.deadline_ns);
            if let Some(Phase::Candidate) = self.tracker.phase(cookie, &expired.session) {
                self.tracker.clear_phase(cookie);
                self.has_no_room(expired, Rc::clone(full), now_ns);
            } else if self.tracker.contains(cookie) {
                let full = Rc::clone(full);
                self.without_room.add(full, cookie, deadline_ns, now_ns);
            }
        }
    }

    /// Handles a session whose namespace or process was not found, or whose reset the process or the kernel refused.
    pub(super) fn not_reset(&mut self, expired: &Expired, at_ns: u64, error: &str) -> Result<()> {
        let (cookie, session) = (expired.cookie, &expired.session);
        // The session table has no record of an untracked one.
        let is_tracked = expired.reason != Reason::Untracked;
        // The sockets of a vanished namespace close with it.
        if is_tracked && self.still_there(cookie, session)?.is_none() {
            let tried = self.tracker.tried(cookie, session);
            if tried.is_some_and(|tried| tried.unanswered > 0 || tried.error.is_some()) {
                self.record_gone(expired);
            }
            self.tracker.clear_phase(cookie);
            return self.forget_unless_another(cookie, session);
        }
        if self.handles.is_missed(session.netns_cookie) {
            self.records.metrics.untracked(Untracked::Namespace);
        }
        tracing::error!(
            "a session could not be reset; it stays behind the gate, and the daemon tries again: {error}"
        );
        self.fail(expired, at_ns, error);
        Ok(())
    }
}

/// Records.
impl State {
    /// Records the outcome for a session.
    pub(super) fn record(&mut self, expired: &Expired, at_ns: u64, end: End<'_>) {
        let outcome = end.outcome();
        let journal_slot = match outcome {
            Outcome::Reset | Outcome::Gone => self.tracker.take_journal_slot(expired),
            Outcome::Failed | Outcome::Observed => None,
        };
        if let Some(journal_slot) = &journal_slot {
            journal_slot.answer(outcome == Outcome::Gone, at_ns);
        }
        let session = &expired.session;
        let holding = self.holding(expired.cookie, session);
        let process = holding.and_then(|holding| holding.process);
        let rule = &self.rule_set.rules[usize::from(session.rule)];
        let kill = self.kills.of(expired.cookie, session);
        let kill = kill.filter(|_| expired.reason == Reason::Admin);
        let termination = Termination {
            cookie: expired.cookie,
            session,
            rule: &rule.name,
            reason: expired.reason,
            // The mode at the time of the decision; the rule may have another mode now.
            mode: match outcome {
                Outcome::Observed => Mode::Observe,
                _ => Mode::Enforce,
            },
            end,
            limit: (expired.limit_ns != 0).then(|| Duration::from_nanos(expired.limit_ns)),
            deadline_ns: expired.deadline_ns,
            idle_since_ns: expired.idle_since_ns,
            answered_ns: at_ns,
            process,
            cgroup: self.owner_resolver.path(session.owner.cgroup_id),
            user: self.owner_resolver.user_name(session.owner.uid),
            requested_by: kill.map(|kill| RequestedBy {
                requester: &kill.by,
                user: self.owner_resolver.user_name(kill.by.uid),
            }),
        };
        let receipt = journal_slot.map(|journal_slot| Box::new(journal_slot) as Receipt);
        self.records.termination(&termination, receipt);
        if matches!(outcome, Outcome::Reset | Outcome::Gone) {
            self.holdings.remove(&expired.cookie);
            let result = match outcome {
                Outcome::Reset => KillResult::Reset,
                _ => KillResult::Gone,
            };
            self.kills.ended(expired.cookie, &expired.session, &result);
        }
    }

    /// Records a session that was already gone when it should have been reset.
    pub(super) fn record_gone(&mut self, expired: &Expired) {
        self.record(expired, monotonic_ns(), End::Gone);
    }
}
