//! A policy comes into force: the first one, and those that follow.

use anyhow::Result;
use session_enforcer_common::{Reason, Session, Verdict, verdict};

use super::{
    adoption::Adopted,
    book::RuleBook,
    enforcer::{Enforcer, LateByPolicy, MAX_PASS, group_of},
    terminate::Expired,
};
use crate::{cgroup::Cgroup, clock::monotonic_ns, config::Config, sock_diag::MAX_BATCH};

/// What a change of the policy did to the sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Redecided {
    /// Sessions that are tracked on.
    pub kept: usize,
    /// Sessions that were tracked and that no rule matches any more.
    pub released: usize,
    /// Sessions that were past a limit.
    pub expired: usize,
}

impl Enforcer {
    /// Puts the rules of a configuration into force, whole or not at all; the policy before.
    ///
    /// # Errors
    ///
    /// Where there are too many rules, a user is not there, or the kernel refuses.
    pub fn put_policy(&mut self, config: &Config) -> Result<RuleBook> {
        let found = self.directory.look_up(config)?;
        let next = self.book.next(config, &found.owners)?;
        self.kernel
            .put_policy(next.generation, &next.entries, &next.policies())?;
        self.directory.keep(found);
        self.metrics.set_rules(&next.names());
        self.pace.set_interval(config.reconcile_interval);
        Ok(std::mem::replace(&mut self.book, next))
    }

    /// Puts another policy into force, and decides anew about every session that is tracked.
    ///
    /// # Errors
    ///
    /// As above, and where the session map cannot be read.
    pub fn change_policy(&mut self, config: &Config) -> Result<Redecided> {
        let before = self.put_policy(config)?;
        self.record_policy(config);
        let redecided = self.redecide(&before)?;
        self.kernel.narrow_ports()?;
        self.audit.flush();
        Ok(redecided)
    }

    /// Adopts the connections that no rule matched before the policy changed. Those that are past a
    /// limit are so by the change.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt).
    pub fn adopt_by_change(&mut self, cgroup: &Cgroup, all_namespaces: bool) -> Result<usize> {
        let adopted = self.adopt_all(cgroup, all_namespaces)?;
        let changed_ns = monotonic_ns();
        for (cookie, Adopted { session, .. }) in &adopted {
            let policy = self.book.rules[usize::from(session.rule)].policy;
            if let Verdict::Expired { deadline_ns, .. } = verdict(session, &policy, changed_ns) {
                let late = LateByPolicy {
                    changed_ns,
                    reached_ns: deadline_ns,
                };
                self.late_by_policy.insert(*cookie, late);
            }
        }
        Ok(adopted.len())
    }

    /// Records that the enforcement begins, under this policy.
    pub fn started(&mut self, config: &Config) {
        self.audit.started();
        self.record_policy(config);
        self.audit.flush();
    }

    fn record_policy(&mut self, config: &Config) {
        let names: Vec<String> = config.rules.iter().map(|rule| rule.name.clone()).collect();
        self.audit.policy_loaded(config.mode, &names);
    }

    /// Those that are late now are made due, and ended by the passes that follow: between these the
    /// ring buffer is read, which the closings of a hundred thousand would fill.
    fn redecide(&mut self, before: &RuleBook) -> Result<Redecided> {
        let mut redecided = Redecided::default();
        for some in self.kernel.cookies()?.chunks(MAX_PASS) {
            let mut settled = Vec::new();
            for cookies in some.chunks(MAX_BATCH) {
                let now_ns = monotonic_ns();
                for (cookie, session) in cookies.iter().zip(self.kernel.sessions(cookies)?) {
                    let Some(session) = session else {
                        continue;
                    };
                    self.reschedule(*cookie, &session);
                    if self.asks_for_owner(*cookie, &session) {
                        match self.settle_owner(*cookie, &session)? {
                            Some(open) => settled.push(open),
                            None => self.note_redecided(&mut redecided, *cookie, None),
                        }
                        continue;
                    }
                    let expired = self.judge(*cookie, Some(session), now_ns, Some(before))?;
                    self.note_redecided(&mut redecided, *cookie, expired);
                }
            }
            let open = settled.len();
            let settled = self.compared_with_sockets(settled)?;
            // Those that have ended meanwhile.
            redecided.released += open - settled.len();
            for (cookie, session) in settled {
                let now_ns = monotonic_ns();
                // Other comparisons came in between.
                let session = self.still_there(cookie, &session)?;
                let expired = self.judge(cookie, session, now_ns, Some(before))?;
                self.note_redecided(&mut redecided, cookie, expired);
            }
        }
        Ok(redecided)
    }

    /// Counts what became of a session; one that is late is made due.
    fn note_redecided(&mut self, redecided: &mut Redecided, cookie: u64, expired: Option<Expired>) {
        match expired {
            Some(expired) => {
                redecided.expired += 1;
                self.make_due(&expired);
            }
            None if self.schedule.contains(cookie) => redecided.kept += 1,
            None => redecided.released += 1,
        }
    }

    fn make_due(&mut self, expired: &Expired) {
        if expired.reason == Reason::Policy {
            let late = LateByPolicy {
                changed_ns: expired.deadline_ns,
                reached_ns: expired.reached_ns,
            };
            self.late_by_policy.insert(expired.cookie, late);
        }
        self.schedule.rearm(expired.cookie, 0);
    }

    /// Moves a session to the rule that is now its own, without a time.
    fn reschedule(&mut self, cookie: u64, session: &Session) {
        let before = self.schedule.group(cookie).map(|group| group.rule);
        let rule = self.provisional_rule(session).or(before);
        let rule = rule.unwrap_or(session.rule);
        let group = crate::schedule::Group {
            rule,
            ..group_of(session)
        };
        self.add(cookie, group, u64::MAX);
    }
}
