//! Audit records, metrics and health. A termination is recorded and counted in one place.

use std::time::Duration;

use session_enforcer_common::Reason;

use super::{judge::Expired, state::State};
use crate::{
    config::{Config, Mode},
    host::clock::monotonic_ns,
    report::{
        audit::{Audit, End, Outcome, Receipt, RequestedBy, Termination},
        control::KillResult,
        health::{DegradedCause, Health},
        metrics::Metrics,
    },
};

/// Audit, metrics and health.
pub(super) struct Records {
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) health: Health,
}

impl Records {
    /// Updates the health if audit records are being lost.
    pub(super) fn note_audit(&mut self) {
        let what = self.audit.is_failing().then_some(
            "audit records are lost, they cannot be written; the log says why, and that they are \
             written again",
        );
        self.health.set(DegradedCause::Audit, what);
    }

    /// Records the start of enforcement under this policy.
    pub(super) fn started(&mut self, config: &Config) {
        self.audit.started();
        self.policy_loaded(config, None);
        self.audit.flush();
    }

    /// Writes the audit record of a termination and counts it. No other function does either. The receipt is dropped
    /// when the record is written.
    pub(super) fn termination(&mut self, termination: &Termination<'_>, receipt: Option<Receipt>) {
        self.audit.termination(termination, receipt);
        self.metrics.ended(termination);
    }

    /// Records that a policy came into force, and who requested it.
    pub(super) fn policy_loaded(&mut self, config: &Config, by: Option<RequestedBy<'_>>) {
        let names: Vec<String> = config.rules.iter().map(|rule| rule.name.clone()).collect();
        self.audit.policy_loaded(config.mode, &names, by);
    }
}

impl State {
    /// Records the outcome for a session.
    pub(super) fn record(&mut self, expired: &Expired, at_ns: u64, end: End<'_>) {
        let outcome = end.outcome();
        let place = match outcome {
            Outcome::Reset | Outcome::Gone => self.tracker.take_journal_slot(expired),
            Outcome::Failed | Outcome::Observed => None,
        };
        if let Some(place) = &place {
            place.answer(outcome == Outcome::Gone, at_ns);
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
        let receipt = place.map(|place| Box::new(place) as Receipt);
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
