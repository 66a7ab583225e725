//! Which sessions there are and when to look at them: events, adoption, schedule.
//! What is done about an expired one is in [`terminate`](super::terminate).

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use session_enforcer_common::{
    ErrorKind, Event, EventKind, Policy, Reason, RuleCounters, Session, Verdict, verdict,
};

use super::{
    book::RuleBook,
    destroyer::Destroyer,
    pace::Pace,
    reconcile::{Comparison, Missed},
    terminate::Expired,
};
use crate::{
    audit::Audit,
    bpf::Kernel,
    clock::monotonic_ns,
    health::{Health, Trouble},
    http::Request,
    metrics::{KernelSnapshot, Metrics, Repair},
    netns::Namespaces,
    owners::Directory,
    schedule::{Group, Schedule},
    sock_diag::{MAX_BATCH, Target, state},
};

/// Sessions that one pass looks at before other work has its turn: some 40 ms, of the 100 that events may
/// lie, where no namespace has to be searched for and no owner found.
pub(super) const MAX_PASS: usize = 32 * MAX_BATCH;

/// When a session that could not be looked at or destroyed is tried again. Soon enough after an
/// operator has mended the cause, long enough not to flood the audit.
pub(super) const RETRY_NS: u64 = 10_000_000_000;

/// How long after a FIN or RST the daemon looks whether a session has ended that the kernel does
/// not report: a few round trips.
pub(super) const LOOK_NS: u64 = 200_000_000;

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
    /// Whose sessions are.
    pub directory: Directory,
    /// How much later than the kernel tells an event in an adopted socket may have been.
    pub lag_ns: u64,
}

/// The sessions and what is done about them.
pub struct Enforcer {
    pub(super) kernel: Kernel,
    pub(super) namespaces: Namespaces,
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) directory: Directory,
    pub(super) lag_ns: u64,
    pub(super) book: RuleBook,
    pub(super) schedule: Schedule,
    /// Scheduled sessions by the place of their rule.
    sessions_of: Vec<u64>,
    /// Observed sessions that were recorded, with the deadline that was.
    pub(super) observed: HashMap<u64, u64>,
    /// Sessions that the kernel was asked to destroy, and whose answer was lost.
    pub(super) in_doubt: HashMap<u64, Expired>,
    /// Sessions that the kernel refused to destroy and that will be tried again, as they were
    /// recorded.
    pub(super) refused: HashMap<u64, Expired>,
    /// Sessions that were reset, with the time of their establishment, until the kernel reports their
    /// end.
    pub(super) reset: HashMap<u64, u64>,
    /// Sessions that a change of the policy made late, until they are looked at again.
    pub(super) late_by_policy: HashMap<u64, LateByPolicy>,
    /// Events that the kernel could not deliver, as far as they were made up for.
    repaired_losses: u64,
    /// What is not as it should be.
    pub(super) health: Health,
    /// Sessions that the map can hold.
    pub(super) capacity: usize,
    pub(super) missed: Missed,
    pub(super) pace: Pace,
    /// The comparison of sessions and sockets that is under way.
    pub(super) comparison: Option<Comparison>,
    /// Whether the owners of the sockets that listened at the start were noted.
    pub(super) listeners_noted: bool,
}

/// When a change of the policy made a session late, and since when it was past the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LateByPolicy {
    pub(super) changed_ns: u64,
    pub(super) reached_ns: u64,
}

/// What the kernel's socket table says of a session whose end is not reported.
pub(super) enum Look {
    Open,
    Closing,
    Gone,
}

impl Enforcer {
    /// An enforcer without rules and sessions yet.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            kernel,
            namespaces,
            audit,
            metrics,
            directory,
            lag_ns,
        } = parts;
        // The generations go on: a session of an earlier daemon must not seem to be of this one.
        let book = RuleBook::after(kernel.inherited_generation());
        let capacity = kernel.capacity();
        Self {
            kernel,
            namespaces,
            audit,
            metrics,
            directory,
            lag_ns,
            book,
            schedule: Schedule::new(),
            sessions_of: Vec::new(),
            observed: HashMap::new(),
            in_doubt: HashMap::new(),
            refused: HashMap::new(),
            reset: HashMap::new(),
            late_by_policy: HashMap::new(),
            repaired_losses: 0,
            health: Health::of_a_start(),
            capacity,
            missed: Missed::default(),
            pace: Pace::from(monotonic_ns()),
            comparison: None,
            listeners_noted: false,
        }
    }

    /// When the next session is due.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.schedule.next_due_ns()
    }

    /// Takes in what the kernel reports.
    pub fn handle(&mut self, kind: EventKind, event: &Event) {
        match kind {
            EventKind::Opened => self.opened(event),
            EventKind::Closed => self.forget(event.cookie),
            EventKind::MayEnd => self.schedule.hasten(event.cookie, monotonic_ns() + LOOK_NS),
            EventKind::Expired => self.gate_refused(event),
        }
    }

    /// The gate refused payload of a session: it is due, whatever the schedule says.
    fn gate_refused(&mut self, event: &Event) {
        // The session that is tried again stands behind the gate until then.
        if self.refused.contains_key(&event.cookie) {
            return;
        }
        if self.schedule.contains(event.cookie) {
            self.schedule.hasten(event.cookie, 0);
            return;
        }
        // Its opening was lost, or it has ended since: the look at it tells.
        let group = Group {
            netns_cookie: event.netns_cookie,
            rule: event.rule,
        };
        self.add(event.cookie, group, 0);
    }

    fn opened(&mut self, event: &Event) {
        self.directory.remember(event.cgroup_id);
        let Some(rule) = self.book.rule(event.rule) else {
            tracing::error!("the kernel reports a session of rule {}", event.rule);
            return;
        };
        let due_ns = if event.generation == self.book.generation as u16 {
            rule.policy.first_deadline_ns(event.established_ns)
        } else {
            // Of an earlier policy: the look at it decides anew.
            0
        };
        if due_ns == 0 && self.schedule.contains(event.cookie) {
            // It was decided about when the policy changed.
            self.schedule.hasten(event.cookie, due_ns);
            return;
        }
        let group = Group {
            netns_cookie: event.netns_cookie,
            rule: event.rule,
        };
        self.add(event.cookie, group, due_ns);
    }

    /// Schedules a session.
    pub(super) fn add(&mut self, cookie: u64, group: Group, due_ns: u64) {
        let place = usize::from(group.rule);
        if self.sessions_of.len() <= place {
            self.sessions_of.resize(place + 1, 0);
        }
        self.sessions_of[place] += 1;
        if let Some(before) = self.schedule.insert(cookie, group, due_ns) {
            self.leave(before);
        }
    }

    fn leave(&mut self, group: Group) {
        self.sessions_of[usize::from(group.rule)] -= 1;
        self.close_if_unused(group.netns_cookie);
    }

    /// Forgets a session that has ended.
    pub(super) fn forget(&mut self, cookie: u64) {
        if let Some(expired) = take_from(&mut self.in_doubt, cookie) {
            self.record_gone(&expired);
        }
        take_from(&mut self.refused, cookie);
        take_from(&mut self.reset, cookie);
        take_from(&mut self.late_by_policy, cookie);
        take_from(&mut self.observed, cookie);
        if let Some(group) = self.schedule.remove(cookie) {
            self.leave(group);
        }
    }

    /// An open socket table keeps its namespace alive: one without sessions is closed.
    pub(super) fn close_if_unused(&mut self, netns_cookie: u64) {
        if !self.schedule.has_sessions_in(netns_cookie) {
            self.namespaces.close(netns_cookie);
        }
    }

    /// Whether a session is due now.
    pub fn is_due(&self) -> bool {
        self.next_due_ns()
            .is_some_and(|due_ns| due_ns <= monotonic_ns())
    }

    /// Looks at the sessions that are due, as many as one pass may, and acts on them.
    ///
    /// # Errors
    ///
    /// Where the session map cannot be read.
    pub fn enforce_due(&mut self) -> Result<()> {
        let mut destroyer = None;
        let mut settled_owners = Vec::new();
        let passed = self.pass(&mut destroyer, &mut settled_owners);
        // Whatever has gone wrong, what the kernel was asked for is recorded.
        let settled = destroyer.map_or(Ok(()), |mut destroyer| self.settle_rest(&mut destroyer));
        self.audit.flush();
        passed.and(settled)?;
        for (cookie, _) in self.compared_with_sockets(settled_owners)? {
            self.schedule.rearm(cookie, 0);
        }
        Ok(())
    }

    /// Takes in the answers that are still to come, also behind one that does not.
    fn settle_rest(&mut self, destroyer: &mut Destroyer) -> Result<()> {
        let mut settled = Ok(());
        loop {
            let answer = match destroyer.wait() {
                Ok(None) => return settled,
                Ok(Some(answered)) => self.settle_all(answered),
                Err(error) => Err(error),
            };
            settled = settled.and(answer);
        }
    }

    fn pass(
        &mut self,
        destroyer: &mut Option<Destroyer>,
        settled: &mut Vec<(u64, Session)>,
    ) -> Result<()> {
        let mut left = MAX_PASS;
        while left > 0 {
            // In batches, so that the look at a session comes right before its reset.
            let mut expired = Vec::new();
            let due = self.take_due(MAX_BATCH.min(left), &mut expired, settled)?;
            if destroyer.is_none() && self.is_due() {
                // Where there can be no thread, this one does it all.
                *destroyer = Destroyer::start().ok();
            }
            self.terminate_all(expired, destroyer.as_mut())?;
            if due == 0 {
                break;
            }
            left = left.saturating_sub(due);
        }
        Ok(())
    }

    /// Looks at up to `count` due sessions; returns how many it looked at. Those whose owner had to be found
    /// are `settled`, and not judged yet.
    fn take_due(
        &mut self,
        count: usize,
        expired: &mut Vec<Expired>,
        settled: &mut Vec<(u64, Session)>,
    ) -> Result<usize> {
        let now_ns = monotonic_ns();
        let due: Vec<u64> = std::iter::from_fn(|| self.schedule.take_due(now_ns))
            .take(count)
            .collect();
        for (cookie, session) in due.iter().zip(self.kernel.sessions(&due)?) {
            match session.filter(|session| self.asks_for_owner(*cookie, session)) {
                Some(open) => settled.extend(self.settle_owner(*cookie, &open)?),
                None => expired.extend(self.judge(*cookie, session, now_ns, None)?),
            }
        }
        Ok(due.len())
    }

    /// Decides about a session that is scheduled without a time, and whose owner is
    /// [settled](Self::settle_owner), by its record as it was read not before `now_ns`. One that lives is
    /// re-armed here. `before` is the policy that another has just taken the place of.
    pub(super) fn judge(
        &mut self,
        cookie: u64,
        session: Option<Session>,
        now_ns: u64,
        before: Option<&RuleBook>,
    ) -> Result<Option<Expired>> {
        let Some(mut session) = session else {
            // It has closed; its event is still to be read, or was lost.
            self.forget(cookie);
            return Ok(None);
        };
        if self.was_reset(cookie, &session) {
            // Its end was not reported: another `sock_ops` program has undone that it is, or the
            // kernel (6.1 before 6.1.158) has said that it destroyed what it did not.
            self.release(cookie, &session)?;
            return Ok(None);
        }
        let Some(rule) = self.rule_of(&session) else {
            self.in_doubt.remove(&cookie);
            self.release(cookie, &session)?;
            return Ok(None);
        };
        let Some(policy) = self.book.rule(rule).map(|rule| rule.policy) else {
            anyhow::bail!("the session map names rule {rule}, which is none");
        };
        let look_again_ns = match self.look_again(cookie, &session, now_ns)? {
            Some(look_again_ns) => look_again_ns,
            None => return Ok(None),
        };
        match verdict(&session, &policy, now_ns) {
            Verdict::Alive {
                look_again_ns: alive_ns,
            } => {
                // Whatever was asked of the kernel, it was not done.
                self.in_doubt.remove(&cookie);
                self.refused.remove(&cookie);
                self.late_by_policy.remove(&cookie);
                if session.is_shut() {
                    self.kernel.reopen(cookie, session.established_ns)?;
                }
                self.schedule.rearm(cookie, alive_ns.min(look_again_ns));
                Ok(None)
            }
            Verdict::Expired {
                reason,
                deadline_ns,
            } => {
                let reached_ns = deadline_ns;
                let (reason, deadline_ns) = self
                    .known_cause(cookie, reached_ns)
                    .or_else(|| self.change_as_cause(cookie, &session, now_ns, before?, &policy))
                    .unwrap_or((reason, deadline_ns));
                session.rule = rule;
                Ok(Some(Expired {
                    cookie,
                    session,
                    reason,
                    deadline_ns,
                    reached_ns,
                    decided_ns: now_ns,
                    doubts: 0,
                }))
            }
        }
    }

    /// Whether the kernel has said that it destroyed this very session.
    pub(super) fn was_reset(&self, cookie: u64, session: &Session) -> bool {
        self.reset.get(&cookie) == Some(&session.established_ns)
    }

    /// Why and since when a session is late, where that was found before for the same limit: at an
    /// attempt that was refused or is in doubt, or when the policy changed.
    fn known_cause(&self, cookie: u64, reached_ns: u64) -> Option<(Reason, u64)> {
        let tried = self.in_doubt.get(&cookie).or(self.refused.get(&cookie));
        if let Some(tried) = tried.filter(|tried| tried.reached_ns == reached_ns) {
            return Some((tried.reason, tried.deadline_ns));
        }
        let late = self.late_by_policy.get(&cookie)?;
        (late.reached_ns == reached_ns).then_some((Reason::Policy, late.changed_ns))
    }

    /// The change of the policy as the cause: by the one before, the session would live, within its
    /// limits or only observed, or was made late by its coming and not looked at since.
    fn change_as_cause(
        &self,
        cookie: u64,
        session: &Session,
        now_ns: u64,
        before: &RuleBook,
        policy: &Policy,
    ) -> Option<(Reason, u64)> {
        if let Some(late) = self.late_by_policy.get(&cookie) {
            return Some((Reason::Policy, late.changed_ns));
        }
        let ancestors = |id| self.ancestors_of(id);
        let lived = before.lets_live(session, now_ns, ancestors)
            || policy.gate == 1 && before.only_observes(session, ancestors);
        lived.then_some((Reason::Policy, now_ns))
    }

    /// When a session whose end the kernel does not report has to be looked for again; `None`, after
    /// it was removed, where it has gone.
    fn look_again(&mut self, cookie: u64, session: &Session, now_ns: u64) -> Result<Option<u64>> {
        if !session.end_is_unreported() {
            return Ok(Some(u64::MAX));
        }
        Ok(match self.look(cookie, session) {
            Some(Look::Open) => Some(u64::MAX),
            Some(Look::Closing) => Some(now_ns + CLOSING_NS),
            Some(Look::Gone) => {
                self.drop_stale(cookie, session)?;
                None
            }
            None => Some(now_ns + RETRY_NS),
        })
    }

    /// The record of a session as it is now, if the session is there still.
    pub(super) fn still_there(&self, cookie: u64, session: &Session) -> Result<Option<Session>> {
        let is_same = |now: &Session| now.established_ns == session.established_ns;
        Ok(self.kernel.session(cookie)?.filter(is_same))
    }

    /// Lets go of a session: takes it out of the session map, where the kernel does not. One that was
    /// never decided about was not counted as opened, and is not as closed.
    pub(super) fn release(&mut self, cookie: u64, session: &Session) -> Result<()> {
        // The place in the record may be one of an earlier daemon's rules.
        let group = self.schedule.group(cookie);
        let place = group.map_or(session.rule, |group| group.rule);
        let removed = self.kernel.remove(cookie, session.established_ns)?;
        if removed && session.generation != 0 {
            self.metrics.removed(usize::from(place));
        }
        self.forget(cookie);
        Ok(())
    }

    /// What the socket table says of a session whose end the kernel does not report; `None` where
    /// it cannot be asked.
    pub(super) fn look(&mut self, cookie: u64, session: &Session) -> Option<Look> {
        let target = Target::of(cookie, session);
        let namespaces = &mut self.namespaces;
        let diag = match namespaces.get_existing(session.netns_cookie, session.established_ns) {
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
        self.metrics.repaired(Repair::Stale);
        self.release(cookie, session)
    }

    /// Looks at what the kernel programs could not do, and makes up for it.
    ///
    /// # Errors
    ///
    /// Where the maps cannot be read.
    pub fn repair(&mut self) -> Result<()> {
        self.note_refusals()?;
        self.repair_lost_events()
    }

    /// Makes up for events that the kernel could not deliver: schedules what is in the session map
    /// and not in the schedule. What has closed is found by the comparison that follows.
    fn repair_lost_events(&mut self) -> Result<()> {
        let lost = self.kernel.error_count(ErrorKind::EventLost)?;
        if lost == self.repaired_losses {
            return Ok(());
        }
        tracing::warn!(
            "{} events were lost, the ring buffer was full",
            lost - self.repaired_losses
        );
        self.repaired_losses = lost;
        self.missed.events = true;
        for cookie in self.kernel.cookies()? {
            if self.schedule.contains(cookie) {
                continue;
            }
            if let Some(session) = self.kernel.session(cookie)? {
                // Due at once: the pass that follows works out its deadline.
                self.add(cookie, group_of(&session), 0);
                self.metrics.repaired(Repair::Unscheduled);
            }
        }
        Ok(())
    }

    /// Answers a request of the HTTP server.
    pub fn answer(&mut self, request: Request) {
        self.note_audit();
        // A client that has gone needs no answer.
        match request {
            Request::Metrics(reply) => drop(reply.send(self.render_metrics())),
            Request::Ready(reply) => drop(reply.send(self.health.ready())),
            Request::Live(reply) => drop(reply.send(())),
        }
    }

    fn note_audit(&mut self) {
        let what = self.audit.is_failing().then_some(
            "audit records are lost, they cannot be written; the log says why, and that they are \
             written again",
        );
        self.health.set(Trouble::Audit, what);
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
            sessions: self.sessions_of.clone(),
            map_entries: self.kernel.session_count()?,
            errors: self.kernel.errors()?,
            gate_drops: self.kernel.gate_drops()?,
            audit_lost: self.audit.lost(),
            troubles: self.health.troubles(),
        })
    }

    /// Takes the programs out of the kernel and records that the enforcement ends.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn stop(mut self) -> Result<()> {
        let detached = self.kernel.detach().context("detaching the programs");
        if detached.is_ok() {
            tracing::info!("the programs are detached");
            self.audit.stopped();
        }
        self.audit.close();
        detached
    }

    /// Hands the records of this turn to the audit's writer.
    pub fn flush_audit(&mut self) {
        self.audit.flush();
    }

    /// Opens the audit file again, after it was renamed.
    pub fn reopen_audit(&mut self) {
        self.audit.reopen();
    }

    /// Notes that the configuration that was read last is in force.
    pub fn reload_succeeded(&mut self) {
        self.metrics.config_loaded();
    }

    /// Notes that the configuration that was read last is not in force.
    pub fn reload_failed(&mut self) {
        self.metrics.config_refused();
    }
}

/// What a session belongs to, as the kernel has it.
pub(super) fn group_of(session: &Session) -> Group {
    Group {
        netns_cookie: session.netns_cookie,
        rule: session.rule,
    }
}

/// Takes out what is kept of a session. Most have nothing anywhere, and an empty map need not work out a
/// hash for each that ends.
fn take_from<T>(map: &mut HashMap<u64, T>, cookie: u64) -> Option<T> {
    if map.is_empty() {
        None
    } else {
        map.remove(&cookie)
    }
}
