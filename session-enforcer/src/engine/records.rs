//! What people see: audit records, counters, and what is wrong now. A termination is recorded and counted
//! in one place.

use std::time::Duration;

use super::{judge::Expired, state::State};
use crate::{
    config::Config,
    host::clock::monotonic_ns,
    report::{
        audit::{Audit, End, Termination},
        health::{Health, Trouble},
        metrics::{Ended, Metrics},
    },
};

/// The audit, the metrics and the health.
pub(super) struct Records {
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) health: Health,
}

impl Records {
    /// Notes whether records are lost.
    pub(super) fn note_audit(&mut self) {
        let what = self.audit.is_failing().then_some(
            "audit records are lost, they cannot be written; the log says why, and that they are \
             written again",
        );
        self.health.set(Trouble::Audit, what);
    }

    /// Records that the enforcement begins, under this policy.
    pub(super) fn started(&mut self, config: &Config) {
        self.audit.started();
        self.policy_loaded(config);
        self.audit.flush();
    }

    /// Records that a policy is in force.
    pub(super) fn policy_loaded(&mut self, config: &Config) {
        let names: Vec<String> = config.rules.iter().map(|rule| rule.name.clone()).collect();
        self.audit.policy_loaded(config.mode, &names);
    }
}

impl State {
    /// Writes the audit record and counts: the one place where either is done.
    pub(super) fn record(&mut self, expired: &Expired, at_ns: u64, end: End<'_>) {
        let session = &expired.session;
        let rule = &self.book.rules[usize::from(session.rule)];
        let idle_since_ns = rule.policy.idle_since(session);
        let since = |then_ns: u64| Duration::from_nanos(at_ns.saturating_sub(then_ns));
        self.records.audit.termination(&Termination {
            cookie: expired.cookie,
            session,
            rule: &rule.name,
            reason: expired.reason,
            mode: rule.mode,
            end,
            limit: rule.limit(expired.reason, session),
            deadline_ns: expired.deadline_ns,
            idle_since_ns,
            answered_ns: at_ns,
            cgroup: self.directory.path(session.owner.cgroup_id),
            user: self.directory.user_name(session.owner.uid),
        });
        self.records.metrics.ended(&Ended {
            rule: usize::from(session.rule),
            reason: expired.reason,
            mode: rule.mode,
            outcome: end.outcome(),
            lateness: since(expired.deadline_ns),
            age: since(session.established_ns),
            idle: since(idle_since_ns),
        });
    }

    /// Records a session that was gone when it was to be destroyed.
    pub(super) fn record_gone(&mut self, expired: &Expired) {
        self.record(expired, monotonic_ns(), End::Gone);
    }
}
