//! Which sessions there are and when to look at them: events, adoption, schedule.
//! What is done about an expired one is in [`terminate`](super::terminate).

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use session_enforcer_common::{
    ErrorKind, Event, EventKind, Policy, Reason, RuleCounters, Session, Verdict, verdict,
};

use super::terminate::Expired;
use crate::{
    audit::Audit,
    bpf::Kernel,
    clock::monotonic_ns,
    config::{Config, Mode, Rule},
    http::Request,
    metrics::{KernelSnapshot, Metrics, Repair},
    netns::Namespaces,
    schedule::Schedule,
    sock_diag::{MAX_BATCH, Target, state},
};

/// Sessions that one pass looks at before other work has its turn.
const MAX_PASS: usize = 8 * MAX_BATCH;

/// When a session that could not be looked at or destroyed is tried again. Soon enough after an
/// operator has mended the cause, long enough not to flood the audit.
pub(super) const RETRY_NS: u64 = 10_000_000_000;

/// How long after a FIN or RST the daemon looks whether a session has ended that the kernel does
/// not report: a few round trips.
const LOOK_NS: u64 = 200_000_000;

/// When it looks again at such a session that is closing but not closed.
const CLOSING_NS: u64 = 1_000_000_000;

/// What an [`Enforcer`] is made of.
pub struct Parts {
    /// The programs, loaded and attached.
    pub kernel: Kernel,
    /// The socket tables.
    pub namespaces: Namespaces,
    /// The audit's writer.
    pub audit: Audit,
    /// Every metric.
    pub metrics: Metrics,
    /// Length of a tick of the coarse clock.
    pub tick_ns: u64,
}

/// The sessions and what is done about them.
pub struct Enforcer {
    pub(super) kernel: Kernel,
    pub(super) namespaces: Namespaces,
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) tick_ns: u64,
    mode: Mode,
    pub(super) rules: Vec<ActiveRule>,
    pub(super) schedule: Schedule,
    /// Scheduled sessions by network namespace.
    sessions_in: HashMap<u64, usize>,
    /// Observed sessions that were recorded, with the deadline that was.
    pub(super) observed: HashMap<u64, u64>,
    /// Sessions that the kernel was asked to destroy, and whose answer was lost.
    pub(super) in_doubt: HashMap<u64, Expired>,
    /// Events that the kernel could not deliver, as far as they were made up for.
    repaired_losses: u64,
    pub(super) ready: Result<(), String>,
}

/// A rule with what is worked out from it once.
pub(super) struct ActiveRule {
    pub(super) name: String,
    pub(super) mode: Mode,
    pub(super) policy: Policy,
}

impl ActiveRule {
    fn new(config: &Config, rule: &Rule, tick_ns: u64) -> Self {
        Self {
            name: rule.name.clone(),
            mode: config.mode_of(rule),
            policy: rule.policy(tick_ns),
        }
    }

    /// The limit of this session that the reason speaks of.
    pub(super) fn limit(&self, reason: Reason, session: &Session) -> Duration {
        Duration::from_nanos(match reason {
            Reason::IdleTimeout => self.policy.idle_timeout_ns,
            Reason::MaxLifetime => self.policy.lifetime_ns(session),
            Reason::ResponseTimeout => self.policy.response_timeout_ns,
        })
    }
}

/// What the kernel's socket table says of a session whose end is not reported.
enum Look {
    Open,
    Closing,
    Gone,
}

impl Enforcer {
    /// An enforcer of the configuration's rules, without sessions yet.
    pub fn new(config: &Config, parts: Parts) -> Self {
        let Parts {
            kernel,
            namespaces,
            audit,
            metrics,
            tick_ns,
        } = parts;
        let rules = config
            .rules
            .iter()
            .map(|rule| ActiveRule::new(config, rule, tick_ns));
        Self {
            kernel,
            namespaces,
            audit,
            metrics,
            tick_ns,
            mode: config.mode,
            rules: rules.collect(),
            schedule: Schedule::new(),
            sessions_in: HashMap::new(),
            observed: HashMap::new(),
            in_doubt: HashMap::new(),
            repaired_losses: 0,
            ready: Err("the connections that are older than the daemon are not adopted yet".into()),
        }
    }

    /// When the next session is due.
    pub fn next_due_ns(&mut self) -> Option<u64> {
        // The end of time stands for "never".
        self.schedule
            .next_due_ns()
            .filter(|due_ns| *due_ns != u64::MAX)
    }

    /// Takes in what the kernel reports.
    pub fn handle(&mut self, kind: EventKind, event: &Event) {
        match kind {
            EventKind::Opened => match self.rules.get(usize::from(event.rule)) {
                Some(rule) => {
                    let due_ns = rule.policy.first_deadline_ns(event.established_ns);
                    self.add(event.cookie, event.netns_cookie, due_ns);
                }
                None => tracing::error!("the kernel reports a session of rule {}", event.rule),
            },
            EventKind::Closed => self.forget(event.cookie),
            EventKind::MayEnd => self.schedule.hasten(event.cookie, monotonic_ns() + LOOK_NS),
        }
    }

    /// Schedules a session.
    pub(super) fn add(&mut self, cookie: u64, netns_cookie: u64, due_ns: u64) {
        if self.schedule.insert(cookie, netns_cookie, due_ns) {
            *self.sessions_in.entry(netns_cookie).or_default() += 1;
        }
    }

    /// Forgets a session that has ended.
    pub(super) fn forget(&mut self, cookie: u64) {
        if let Some(expired) = self.in_doubt.remove(&cookie) {
            self.record_gone(&expired);
        }
        self.observed.remove(&cookie);
        let Some(netns_cookie) = self.schedule.remove(cookie) else {
            return;
        };
        if let Some(count) = self.sessions_in.get_mut(&netns_cookie) {
            *count -= 1;
        }
        self.close_if_unused(netns_cookie);
    }

    /// An open socket table keeps its namespace alive: one without sessions is closed.
    pub(super) fn close_if_unused(&mut self, netns_cookie: u64) {
        if self
            .sessions_in
            .get(&netns_cookie)
            .is_none_or(|count| *count == 0)
        {
            self.sessions_in.remove(&netns_cookie);
            self.namespaces.close(netns_cookie);
        }
    }

    /// Looks at the sessions that are due, as many as one pass may, and acts on them.
    ///
    /// # Errors
    ///
    /// Where the session map cannot be read.
    pub fn enforce_due(&mut self) -> Result<()> {
        let mut left = MAX_PASS;
        while left > 0 {
            // In batches, so that the look at a session comes right before its reset.
            let mut expired = Vec::new();
            let due = self.take_due(MAX_BATCH.min(left), &mut expired)?;
            self.terminate_all(expired)?;
            if due == 0 {
                break;
            }
            left = left.saturating_sub(due);
        }
        self.audit.flush();
        Ok(())
    }

    /// Looks at up to `count` due sessions; returns how many it looked at.
    fn take_due(&mut self, count: usize, expired: &mut Vec<Expired>) -> Result<usize> {
        for taken in 0..count {
            let now_ns = monotonic_ns();
            let Some(cookie) = self.schedule.take_due(now_ns) else {
                return Ok(taken);
            };
            expired.extend(self.judge(cookie, now_ns)?);
        }
        Ok(count)
    }

    /// Decides about a session that was taken as due. One that lives is re-armed here.
    fn judge(&mut self, cookie: u64, now_ns: u64) -> Result<Option<Expired>> {
        let Some(session) = self.kernel.session(cookie)? else {
            // It has closed; its event is still to be read, or was lost.
            self.forget(cookie);
            return Ok(None);
        };
        let Some(rule) = self.rules.get(usize::from(session.rule)) else {
            anyhow::bail!("the session map names rule {}, which is none", session.rule);
        };
        let decision = verdict(&session, &rule.policy, now_ns);
        let mut look_again_ns = u64::MAX;
        if session.end_is_unreported() {
            match self.look(cookie, &session) {
                Some(Look::Open) => {}
                Some(Look::Closing) => look_again_ns = now_ns + CLOSING_NS,
                Some(Look::Gone) => {
                    self.drop_stale(cookie, &session)?;
                    return Ok(None);
                }
                None => look_again_ns = now_ns + RETRY_NS,
            }
        }
        match decision {
            Verdict::Alive {
                look_again_ns: alive_ns,
            } => {
                self.schedule.rearm(cookie, alive_ns.min(look_again_ns));
                Ok(None)
            }
            Verdict::Expired {
                reason,
                deadline_ns,
            } => Ok(Some(Expired {
                cookie,
                session,
                reason,
                deadline_ns,
            })),
        }
    }

    /// What the socket table says of a session whose end the kernel does not report; `None` where
    /// it cannot be asked.
    fn look(&mut self, cookie: u64, session: &Session) -> Option<Look> {
        let target = Target::of(cookie, session);
        let diag = match self.namespaces.get(session.netns_cookie) {
            Ok(diag) => diag,
            Err(error) => {
                tracing::warn!("looking at session {cookie}: {error}");
                return None;
            }
        };
        match diag.look(&target) {
            Ok(Some(socket)) if !socket.is_mini => Some(match socket.state {
                state::LAST_ACK | state::CLOSING | state::FIN_WAIT1 => Look::Closing,
                _ => Look::Open,
            }),
            Ok(_) => Some(Look::Gone),
            Err(error) => {
                tracing::warn!("looking at session {cookie}: {error}");
                self.namespaces.reopen(session.netns_cookie);
                None
            }
        }
    }

    /// Removes a session that ended without the kernel's report.
    pub(super) fn drop_stale(&mut self, cookie: u64, session: &Session) -> Result<()> {
        if self.kernel.remove(cookie)? {
            self.metrics.removed(usize::from(session.rule));
        }
        self.forget(cookie);
        Ok(())
    }

    /// Makes up for events that the kernel could not deliver: schedules what is in the session map
    /// and not in the schedule. What has closed is found when it is due.
    ///
    /// # Errors
    ///
    /// Where the maps cannot be read.
    pub fn repair_lost_events(&mut self) -> Result<()> {
        let lost = self.kernel.error_count(ErrorKind::EventLost)?;
        if lost == self.repaired_losses {
            return Ok(());
        }
        tracing::warn!(
            "{} events were lost, the ring buffer was full",
            lost - self.repaired_losses
        );
        self.repaired_losses = lost;
        for cookie in self.kernel.cookies()? {
            if self.schedule.contains(cookie) {
                continue;
            }
            if let Some(session) = self.kernel.session(cookie)? {
                // Due at once: the pass that follows works out its deadline.
                self.add(cookie, session.netns_cookie, 0);
                self.metrics.repaired(Repair::Unscheduled);
            }
        }
        Ok(())
    }

    /// Answers a request of the HTTP server.
    pub fn answer(&mut self, request: Request) {
        // A client that has gone needs no answer.
        match request {
            Request::Metrics(reply) => drop(reply.send(self.render_metrics())),
            Request::Ready(reply) => drop(reply.send(self.ready.clone())),
            Request::Live(reply) => drop(reply.send(())),
        }
    }

    fn render_metrics(&self) -> Result<String, String> {
        let snapshot = self.snapshot().map_err(|error| format!("{error:#}"))?;
        self.metrics
            .render(&snapshot)
            .map_err(|error| format!("{error:#}"))
    }

    fn snapshot(&self) -> Result<KernelSnapshot> {
        let rules: Vec<RuleCounters> = self.kernel.rule_counters().context("reading counters")?;
        Ok(KernelSnapshot {
            rules,
            errors: self.kernel.errors()?,
            audit_lost: self.audit.lost(),
        })
    }

    /// Records that the enforcement begins.
    pub fn started(&mut self) {
        let rules: Vec<String> = self.rules.iter().map(|rule| rule.name.clone()).collect();
        self.audit.started(self.mode, &rules);
        self.audit.flush();
    }

    /// Takes the programs out of the kernel and records that the enforcement ends.
    pub fn stop(mut self) {
        drop(self.kernel);
        tracing::info!("the programs are detached");
        self.audit.stopped();
        self.audit.close();
    }

    /// Opens the audit file again, after it was renamed.
    pub fn reopen_audit(&mut self) {
        tracing::info!("SIGHUP: opening the audit file again");
        self.audit.reopen();
    }
}
