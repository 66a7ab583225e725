//! Audit records, metrics and health. A termination is recorded and counted in one place.

use crate::{
    config::Config,
    report::{
        audit::{Audit, Receipt, RequestedBy, Termination},
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
