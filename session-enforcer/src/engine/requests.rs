//! Requests of the control socket that need the engine. Each answer is quick: session lists are read from the table on
//! another thread.

use std::rc::Rc;

use session_enforcer_common::{Ancestors, Reason, Session};

use super::{
    Reload,
    context::Context,
    judge::Judgement,
    phase::{Expired, Phase},
    rule_set::RuleSet,
    state::State,
    tracker::group_of,
};
use crate::{
    config::{Action, Config},
    host::{
        boot,
        clock::{WallClock, monotonic_ns},
    },
    report::{
        audit::mode_name,
        control::{
            ConfigInForce, Degradation, KillRequest, KillResult, Killed, OwnerNames, Request,
            RuleInForce, RuleStatus, Rules, Status, TerminationCount,
        },
    },
};

/// Answers a request other than a reload. A failed send means that the client has gone and needs no handling.
pub(super) fn answer(
    context: &Rc<Context>,
    reload: &Reload,
    request: Request,
) -> anyhow::Result<()> {
    let mut state = context.state();
    match request {
        Request::Status(reply) => {
            let _ = reply.send(state.status(context, reload)?);
        }
        Request::Rules(reply) => drop(reply.send(Box::new(state.rule_set.clone()))),
        Request::Owners {
            cgroups,
            users,
            reply,
        } => drop(reply.send(state.owner_names(&cgroups, &users))),
        Request::Kill(request) => {
            state.kill(&request)?;
            context.wake.notify_one();
        }
        Request::Events(reply) => drop(reply.send(state.records.audit.subscribe())),
        // The loop has started it.
        Request::Reload(_) => {}
    }
    Ok(())
}

impl Rules for RuleSet {
    fn rule_of(
        &self,
        session: &Session,
        ancestors: &dyn Fn(u64) -> Option<Ancestors>,
    ) -> Option<RuleInForce<'_>> {
        let rule_id = RuleSet::rule_of(self, session, ancestors)?;
        let rule = self.rule(rule_id)?;
        Some(RuleInForce {
            name_rank: self
                .name_ranks
                .get(usize::from(rule_id))
                .copied()
                .unwrap_or(0),
            name: &rule.name,
            mode: rule.mode,
            limits: &rule.limits,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.rules.iter().any(|rule| rule.name == name)
    }

    fn name_owners(&self) -> bool {
        self.asks_owner
    }
}

impl State {
    fn owner_names(&self, cgroups: &[u64], users: &[u32]) -> OwnerNames {
        let cgroup = |id: &u64| {
            let path = self.owner_resolver.path(*id).map(str::to_owned);
            (*id, path, self.ancestors_of(*id))
        };
        let user = |uid: &u32| (*uid, self.owner_resolver.user_name(*uid).map(str::to_owned));
        OwnerNames {
            cgroups: cgroups.iter().map(cgroup).collect(),
            users: users.iter().map(user).collect(),
        }
    }

    /// Requests the reset of sessions now. They become due and are handled like all late sessions.
    fn kill(&mut self, request: &KillRequest) -> anyhow::Result<()> {
        let now_ns = monotonic_ns();
        let cookies: Vec<u64> = request.sessions.iter().map(|(cookie, _)| *cookie).collect();
        let read = self.datapath.sessions(&cookies)?;
        for ((cookie, established_ns), session) in request.sessions.iter().zip(read) {
            let session = session.filter(|session| session.established_ns == *established_ns);
            let tell = |result| {
                let _ = request.results.send(Killed {
                    id: *cookie,
                    result,
                });
            };
            let Some(session) = session.filter(|_| self.is_enforcing) else {
                tell(KillResult::Gone);
                continue;
            };
            match self.tracker.phase(*cookie, &session) {
                // It was reset already; the kernel's report of its end is outstanding.
                Some(Phase::Reset) => {
                    tell(KillResult::Gone);
                    continue;
                }
                Some(Phase::Tried(tried)) if tried.is_quarantined => {
                    let why = tried.error.clone().unwrap_or_default();
                    tell(KillResult::Failed(why));
                    continue;
                }
                _ => {}
            }
            self.kills
                .ask(*cookie, &session, now_ns, &request.by, &request.results);
            self.make_due_by_request(*cookie, &session);
        }
        Ok(())
    }

    fn make_due_by_request(&mut self, cookie: u64, session: &Session) {
        if let Some(tried) = self.tracker.tried(cookie, session) {
            // Cleared so that another failure is recorded again, with the name of the requester.
            tried.error = None;
        }
        let phase = self.tracker.phase(cookie, session);
        if self.tracker.contains(cookie) {
            self.tracker.hasten(cookie, 0);
        } else if !phase.is_some_and(Phase::is_in_other_hands) {
            // Its opening event was lost.
            self.tracker.add(cookie, group_of(session), 0);
        }
    }

    /// The decision about a session that a client has asked to be reset, regardless of its limits.
    pub(super) fn late_by_request(
        &self,
        cookie: u64,
        session: &Session,
        now_ns: u64,
    ) -> Option<Expired> {
        let asked_ns = self.kills.of(cookie, session)?.asked_ns;
        let is_rule = |rule_id: &u16| self.rule_set.rule(*rule_id).is_some();
        let rule = self
            .rule_of(session)
            .or(Some(session.rule).filter(is_rule))?;
        let limits = &self.rule_set.rule(rule)?.limits;
        let late = Judgement::Late(Expired {
            cookie,
            session: Session { rule, ..*session },
            reason: Reason::Admin,
            deadline_ns: asked_ns,
            reached_ns: asked_ns,
            decided_ns: now_ns,
            limit_ns: 0,
            idle_since_ns: limits.idle_since(session),
        });
        match self.with_holder(late) {
            Judgement::Late(expired) => Some(expired),
            Judgement::Alive { .. } => None,
        }
    }

    fn status(&mut self, context: &Context, reload: &Reload) -> anyhow::Result<Status> {
        let config = reload.config.borrow();
        self.records.note_audit();
        let clock = WallClock::now();
        let at = |ns| clock.at(ns).to_string();
        let degraded = self.records.health.list();
        let audit = &self.records.audit;
        let counters = self.datapath.rule_counters()?;
        let (opened_total, closed_total) = self.records.metrics.turnover(&counters);
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: boot::kernel_release(),
            pid: std::process::id(),
            started: at(audit.began_ns()),
            ready: degraded.is_empty(),
            degraded: degraded
                .into_iter()
                .map(|(cause, what)| Degradation {
                    cause: cause.name().to_owned(),
                    what: what.to_owned(),
                })
                .collect(),
            mode: mode_name(config.mode).to_owned(),
            cgroup: context.cgroup.path().display().to_string(),
            attached: self.is_enforcing && self.datapath.is_attached() && !context.cgroup.is_gone(),
            config: ConfigInForce {
                file: config
                    .file
                    .as_ref()
                    .map(|file| file.path.display().to_string()),
                sha256: config.file.as_ref().map(|file| file.sha256.clone()),
                since: at(self.in_force_since_ns),
                last_reload_successful: reload.refused.borrow().is_none(),
                last_reload_error: reload.refused.borrow().clone(),
            },
            sessions: self.tracker.len() as u64,
            max_sessions: self.datapath.max_sessions().into(),
            opened_total,
            closed_total,
            quarantined: self.tracker.quarantined() as u64,
            audit_records: audit.sequence(),
            audit_records_lost: audit.lost(),
            rules: self.rule_statuses(&config),
        })
    }

    /// The rules of the configuration in their order, then those that it had before.
    fn rule_statuses(&self, config: &Config) -> Vec<RuleStatus> {
        let sessions = self.tracker.sessions_of();
        let mut statuses: Vec<(usize, RuleStatus)> = Vec::new();
        for (rule_id, rule) in self.rule_set.rules.iter().enumerate() {
            let mut configured = config.rules.iter();
            let position = configured.position(|known| known.name == rule.name);
            let is_exempt =
                position.is_some_and(|position| config.rules[position].action == Action::Exempt);
            let counts = self.records.metrics.terminations_of(&rule.name);
            let counts = counts
                .into_iter()
                .map(|(reason, result, count)| TerminationCount {
                    reason,
                    result,
                    count,
                });
            let status = RuleStatus {
                name: rule.name.clone(),
                mode: if is_exempt {
                    "exempt"
                } else {
                    mode_name(rule.mode)
                }
                .to_owned(),
                in_force: position.is_some(),
                sessions: sessions.get(rule_id).copied().unwrap_or(0),
                terminations: counts.collect(),
            };
            statuses.push((position.unwrap_or(usize::MAX), status));
        }
        statuses.sort_by_key(|(position, _)| *position);
        statuses.into_iter().map(|(_, status)| status).collect()
    }
}
