//! The engine's state and the actions that need no reaper: events, due sessions, HTTP requests. Tasks in other modules
//! do what takes a reaper.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
};

use anyhow::{Context as _, Result};
use session_enforcer_common::{
    Ancestors, ErrorKind, Event, EventKind, RuleCounters, Session, flags,
};

use super::{
    backlog::{Backlog, FULL_RULE},
    handles::Handles,
    hang_limits::{HangScope, Hanging},
    holder_searches::{Holding, ahead_of},
    judge::{Judgement, judge},
    kills::Kills,
    phase::{Expired, Phase},
    records::Records,
    rule_set::RuleSet,
    slow_owners::SlowOwners,
    tracker::{Tracker, group_of, group_of_event},
    waiting::Waiting,
};
use crate::{
    config::{Config, Mode},
    datapath::{BpfError, Datapath},
    engine::owner_resolver::OwnerResolver,
    host::{boot, clock::monotonic_ns},
    reaper::{diag::MAX_BATCH, pool},
    report::{
        audit::Audit,
        health::{DegradedCause, Health},
        metrics::{KernelSnapshot, Metrics, Repair},
        service_manager::Standing,
        to_engine::{Request, Scrape},
    },
};

/// Maximum number of sessions in one pass before other work gets its turn: about 10 ms if none is late.
pub(super) const MAX_PASS: usize = 8 * MAX_BATCH;

/// Retry interval for a session whose check failed.
pub(super) const RETRY_NS: u64 = 10_000_000_000;

/// Delay between a FIN or RST and the check whether an unreported session has ended: a few round trips. Also the time
/// to wait for the report of a reset.
pub(super) const RECHECK_NS: u64 = 200_000_000;

/// The parts from which a [`State`] is built.
pub struct Parts {
    /// The loaded programs.
    pub datapath: Datapath,
    /// The audit writer.
    pub audit: Audit,
    /// All metrics.
    pub metrics: Metrics,
    /// Resolves session owners (users, cgroups).
    pub owner_resolver: OwnerResolver,
    /// By how much the kernel's time stamps may lag behind the events.
    pub lag_ns: u64,
    /// Cookie of the daemon's own network namespace.
    pub own_netns: u64,
}

/// The engine's state.
pub(super) struct State {
    pub(super) datapath: Datapath,
    pub(super) records: Records,
    pub(super) owner_resolver: OwnerResolver,
    pub(super) lag_ns: u64,
    pub(super) rule_set: RuleSet,
    /// The policy change in progress.
    pub(super) change: Option<Change>,
    pub(super) tracker: Tracker,
    pub(super) backlog: Backlog,
    pub(super) handles: Handles,
    pub(super) hanging: Hanging,
    /// The sessions that wait for room among the hanging resets.
    pub(super) without_room: Waiting<Rc<HangScope>>,
    pub(super) slow: SlowOwners,
    /// Whether the kernel was found to lack `SOCK_DESTROY`.
    pub(super) has_no_destroy: bool,
    /// Whether due sessions are terminated; true from the attachment on.
    pub(super) is_enforcing: bool,
    /// Sessions whose owner must be resolved before they are judged.
    pub(super) without_owner: Vec<(u64, Session)>,
    /// Sessions to reset that their rules have no room for.
    pub(super) untracked: Vec<(u64, Session)>,
    /// Sessions that are late unless their sockets confirm a candidate.
    pub(super) candidates: Vec<Expired>,
    /// Late sessions that no candidate can save; their sockets only tell the byte counts.
    pub(super) only_counts: Vec<Expired>,
    /// Sessions that may have ended without a report of the kernel.
    pub(super) maybe_ended: Vec<MaybeEnded>,
    /// Number of lost events for which the repair was done.
    repaired_losses: u64,
    /// Clients that wait for the metrics.
    pub(super) scrapes: Vec<Scrape>,
    /// Sessions that end soon and whose holders must be searched for.
    pub(super) ending: Vec<u64>,
    /// The holders that were found.
    pub(super) holdings: HashMap<u64, Holding>,
    /// Sessions that a client has asked to be reset.
    pub(super) kills: Kills,
    /// When the active policy came into force.
    pub(super) in_force_since_ns: u64,
}

/// A policy change in progress.
pub(super) struct Change {
    /// The previous policy.
    pub(super) before: RuleSet,
    /// When the new policy came into force.
    pub(super) at_ns: u64,
}

/// A session whose socket is queried, because it may have ended without a report.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaybeEnded {
    pub(super) cookie: u64,
    pub(super) session: Session,
    pub(super) cause: Cause,
}

/// Why a socket is queried.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cause {
    /// The kernel does not report the session's end.
    Unreported,
    /// As above; if the socket exists, the session is late and must be recorded (its rule only observes).
    Observed(Expired),
    /// The kernel did not find the socket when the session should have been reset.
    NotFound(Expired),
}

impl State {
    /// A state without rules and sessions.
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            datapath,
            audit,
            metrics,
            owner_resolver,
            lag_ns,
            own_netns,
        } = parts;
        // Continues the earlier daemon's generations, so that none of its sessions seems to be of this daemon's policy.
        let rule_set = RuleSet::after(datapath.inherited_generation(), boot::key());
        Self {
            datapath,
            records: Records {
                audit,
                metrics,
                health: Health::of_a_start(),
            },
            owner_resolver,
            lag_ns,
            rule_set,
            change: None,
            tracker: Tracker::default(),
            backlog: Backlog::from(monotonic_ns()),
            handles: Handles::new(own_netns),
            hanging: Hanging::default(),
            without_room: Waiting::default(),
            slow: SlowOwners::default(),
            has_no_destroy: false,
            is_enforcing: false,
            without_owner: Vec::new(),
            untracked: Vec::new(),
            candidates: Vec::new(),
            only_counts: Vec::new(),
            maybe_ended: Vec::new(),
            repaired_losses: 0,
            scrapes: Vec::new(),
            ending: Vec::new(),
            holdings: HashMap::new(),
            kills: Kills::default(),
            in_force_since_ns: 0,
        }
    }

    /// The status line for the service manager.
    pub(super) fn standing(&self, config: &Config) -> String {
        let standing = Standing {
            mode: config.mode,
            rules: config.rules.len(),
            sessions: self.tracker.len(),
            resets: self.records.metrics.resets(),
            is_refused: self.records.metrics.is_config_refused(),
            problem: self.records.health.ready().err(),
        };
        standing.line()
    }

    /// The time of the next sync; none while there must be none.
    pub(super) fn next_sync_ns(&self) -> Option<u64> {
        let next_ns = self.backlog.next_sync_ns(self.has_room());
        next_ns.filter(|_| self.is_enforcing && !self.hanging.is_diag_blocked)
    }

    pub(super) fn has_room(&self) -> bool {
        self.tracker.len() < self.datapath.common_capacity()
    }
}

/// Owners and rules of sessions.
impl State {
    /// The ancestors of a cgroup. The kernel's map comes first, since it may still have removed cgroups. Returns `None`
    /// if a removed cgroup is not known any more.
    pub(super) fn ancestors_of(&self, cgroup_id: u64) -> Option<Ancestors> {
        let known = self.datapath.ancestors(cgroup_id).ok().flatten();
        known.or_else(|| self.owner_resolver.ancestors(cgroup_id))
    }

    /// The rule of a session; `None` if no rule, or an exempting entry, matches it.
    pub(super) fn rule_of(&self, session: &Session) -> Option<u16> {
        self.rule_set.rule_of(session, |id| self.ancestors_of(id))
    }

    /// The rule of a session as far as it is known. A session whose owner must still be resolved gets an arbitrary
    /// valid rule.
    pub(super) fn provisional_rule(&self, session: &Session) -> Option<u16> {
        if self.rule_set.needs_owner_of(session) {
            return Some(0);
        }
        self.rule_of(session)
    }

    /// Returns the time of the policy change in progress if that change made the session late: the session had reached
    /// its new limit before the change, and the previous policy would have let it live or only observed it.
    fn late_by_change(
        &self,
        session: &Session,
        phase: Option<&Phase>,
        reached_ns: u64,
        is_enforced: bool,
    ) -> Option<u64> {
        let change = self.change.as_ref()?;
        if let Some(Phase::LateByPolicy { changed_ns, .. }) = phase {
            return Some(*changed_ns);
        }
        let ancestors = |id| self.ancestors_of(id);
        let lived = || {
            change.before.lets_live(session, change.at_ns, ancestors)
                || is_enforced && change.before.only_observes(session, ancestors)
        };
        (reached_ns <= change.at_ns && lived()).then_some(change.at_ns)
    }
}

/// Events of the kernel programs.
impl State {
    /// Handles an event.
    pub(super) fn handle(&mut self, kind: EventKind, event: &Event) {
        match kind {
            EventKind::Opened => self.opened(event),
            EventKind::Closed => {
                self.backlog.closed(event.rule);
                self.forget(event.cookie);
            }
            EventKind::MayEnd => self
                .tracker
                .may_end(event.cookie, monotonic_ns() + RECHECK_NS),
            EventKind::Expired => self.gate_refused(event),
        }
    }

    /// The gate has dropped payload of the session, so it is due regardless of the schedule.
    fn gate_refused(&mut self, event: &Event) {
        match self.tracker.phase_of_cookie(event.cookie) {
            // A reaper has it, or its reset has failed and it waits behind the gate for its next attempt.
            Some(Phase::Tried(tried)) if tried.error.is_some() => return,
            Some(phase) if phase.is_in_other_hands() => return,
            _ => {}
        }
        if self.tracker.contains(event.cookie) {
            self.tracker.hasten(event.cookie, 0);
            return;
        }
        // The opening event was lost, or the session has ended since; its record shows which.
        self.tracker.add(event.cookie, group_of_event(event), 0);
    }

    fn opened(&mut self, event: &Event) {
        self.owner_resolver.remember(event.cgroup_id);
        let Some(rule) = self.rule_set.rule(event.rule) else {
            tracing::error!(
                "an event names rule {}, which does not exist; the event is ignored",
                event.rule
            );
            return;
        };
        let is_current =
            event.generation != 0 && event.generation == self.rule_set.generation as u16;
        let due_ns = if is_current {
            ahead_of(
                rule.limits.first_deadline_ns(event.established_ns),
                &rule.limits,
            )
        } else {
            // Opened under an earlier policy, or not decided about yet: due at once.
            0
        };
        if due_ns == 0 && self.tracker.contains(event.cookie) {
            // It was already decided when the policy changed.
            self.tracker.hasten(event.cookie, due_ns);
            return;
        }
        self.tracker
            .add(event.cookie, group_of_event(event), due_ns);
    }

    /// Removes a session that has ended. If its reset has no answer, it is recorded as gone, because the reset may or
    /// may not have ended it.
    pub(super) fn forget(&mut self, cookie: u64) {
        let netns_cookie = self.tracker.group(cookie).map(|group| group.netns_cookie);
        if let Some(expired) = self.tracker.unrecorded(cookie) {
            self.record_gone(&expired);
        }
        self.tracker.forget(cookie);
        self.leave_queues(cookie);
        // If a reset is outstanding, its record still needs these.
        if self.tracker.phase_of_cookie(cookie).is_none() {
            if !self.holdings.is_empty() {
                self.holdings.remove(&cookie);
            }
            self.kills.forgotten(cookie);
        }
        if let Some(netns_cookie) = netns_cookie {
            self.give_up_if_unused(netns_cookie);
        }
    }

    /// Notes that a session does not wait any more.
    fn leave_queues(&mut self, cookie: u64) {
        self.without_room.remove(cookie);
        self.slow.waiting.remove(cookie);
    }

    /// Stops tracking a session that has ended, but not a later session of the same socket.
    pub(super) fn forget_unless_another(&mut self, cookie: u64, session: &Session) -> Result<()> {
        let now = self.datapath.session(cookie)?;
        if now.is_none_or(|now| now.established_ns == session.established_ns) {
            self.forget(cookie);
        }
        Ok(())
    }

    /// Drops the handle of a namespace without sessions; a handle keeps its namespace alive.
    pub(super) fn give_up_if_unused(&mut self, netns_cookie: u64) {
        if !self.tracker.has_sessions_in(netns_cookie) {
            self.handles.give_up(netns_cookie);
        }
    }

    /// The current record of the session, if the session still exists.
    pub(super) fn still_there(&self, cookie: u64, session: &Session) -> Result<Option<Session>> {
        let is_same = |now: &Session| now.established_ns == session.established_ns;
        Ok(self.datapath.session(cookie)?.filter(is_same))
    }

    /// Removes a session from the session table and stops tracking it. An undecided session was not counted as opened,
    /// so it is not counted as closed.
    pub(super) fn release(&mut self, cookie: u64, session: &Session) -> Result<()> {
        // The rule in the record may belong to an earlier daemon.
        let group = self.tracker.group(cookie);
        let rule = group.map_or(session.rule, |group| group.rule);
        let removed = self.datapath.remove(cookie, session.established_ns)?;
        // Before the attachment, openings were counted by the earlier daemon.
        if removed && session.generation != 0 && self.is_enforcing {
            self.records.metrics.removed(usize::from(rule));
        }
        self.forget_unless_another(cookie, session)
    }

    /// Removes a session that ended without a report of the kernel.
    pub(super) fn drop_stale(&mut self, cookie: u64, session: &Session) -> Result<()> {
        self.records.metrics.repaired(Repair::Stale);
        self.release(cookie, session)
    }

    /// Repairs what the kernel programs could not do.
    pub(super) fn repair(&mut self) -> Result<()> {
        self.backlog.refused = self.datapath.error_count(ErrorKind::MapFull)?;
        self.backlog.refused_by_rules = self.datapath.error_count(ErrorKind::RuleFull)?;
        self.note_backlog();
        self.repair_lost_events()
    }

    /// Repairs lost events: schedules the sessions that are in the table but not in the schedule. The sync that follows
    /// finds sessions that have closed.
    fn repair_lost_events(&mut self) -> Result<()> {
        let lost = self.datapath.error_count(ErrorKind::EventLost)?;
        if lost == self.repaired_losses {
            return Ok(());
        }
        tracing::warn!(
            "{} events were lost, the ring buffer was full",
            lost - self.repaired_losses
        );
        self.repaired_losses = lost;
        self.backlog.events = true;
        for cookie in self.datapath.cookies()? {
            if self.tracker.contains(cookie) || self.tracker.phase_of_cookie(cookie).is_some() {
                continue;
            }
            if let Some(session) = self.datapath.session(cookie)? {
                // Due at once: the next pass computes the deadline.
                self.tracker.add(cookie, group_of(&session), 0);
                self.records.metrics.repaired(Repair::Unscheduled);
            }
        }
        Ok(())
    }
}

/// Due sessions.
impl State {
    /// Whether a session is due now.
    pub(super) fn is_due(&self) -> bool {
        let due_ns = self.tracker.next_due_ns().filter(|_| self.is_enforcing);
        due_ns.is_some_and(|due_ns| due_ns <= monotonic_ns())
    }

    /// Judges up to `count` due sessions. Returns those that are late, and how many were checked.
    pub(super) fn take_due(&mut self, count: usize) -> Result<(Vec<Expired>, usize)> {
        let now_ns = monotonic_ns();
        let due = self.tracker.take_due(now_ns, count);
        let mut late = Vec::new();
        for (cookie, session) in due.iter().zip(self.datapath.sessions(&due)?) {
            match session {
                Some(session) if self.needs_owner(*cookie, &session) => {
                    self.without_owner.push((*cookie, session));
                }
                session => late.extend(self.judge(*cookie, session, now_ns)?),
            }
        }
        Ok((late, due.len()))
    }

    /// Whether the session's owner must be resolved before it is judged.
    pub(super) fn needs_owner(&self, cookie: u64, session: &Session) -> bool {
        let was_reset = matches!(self.tracker.phase(cookie, session), Some(Phase::Reset));
        let is_asked_for = self.kills.of(cookie, session).is_some();
        !was_reset && !is_asked_for && self.rule_set.needs_owner_of(session)
    }

    /// Judges a session that is scheduled without a due time. Its record must have been read at `now_ns` or later. A
    /// session that lives is rescheduled here.
    pub(super) fn judge(
        &mut self,
        cookie: u64,
        session: Option<Session>,
        now_ns: u64,
    ) -> Result<Option<Expired>> {
        let Some(session) = session else {
            // It has closed; its event was not read yet or was lost.
            self.forget(cookie);
            return Ok(None);
        };
        match self.tracker.phase(cookie, &session) {
            Some(phase) if phase.is_in_other_hands() => return Ok(None),
            Some(Phase::Reset) => {
                // Its end was not reported: another `sock_ops` program has cleared the callback flag, or the kernel
                // (6.1 before 6.1.158) has acknowledged a `SOCK_DESTROY` that it did not do.
                self.release(cookie, &session)?;
                return Ok(None);
            }
            _ => {}
        }
        if let Some(expired) = self.late_by_request(cookie, &session, now_ns) {
            return Ok(Some(expired));
        }
        let Some(rule) = self.rule_of(&session) else {
            self.tracker.clear_phase(cookie);
            self.release(cookie, &session)?;
            return Ok(None);
        };
        let Some(active) = self.rule_set.rule(rule) else {
            anyhow::bail!("the session table names rule {rule}, which does not exist");
        };
        let (limits, mode) = (active.limits, active.mode);
        let phase = self.tracker.phase(cookie, &session);
        let by_change =
            |reached_ns| self.late_by_change(&session, phase, reached_ns, mode == Mode::Enforce);
        let judged = judge(cookie, &session, (rule, &limits), phase, now_ns, by_change);
        match self.with_holder(judged) {
            Judgement::Alive { recheck_ns } => {
                // If a reset was requested, it was not done.
                self.tracker.clear_phase(cookie);
                self.leave_queues(cookie);
                if session.is_shut() {
                    self.datapath.reopen(cookie, session.established_ns)?;
                }
                let times = (recheck_ns, ahead_of(recheck_ns, &limits));
                let is_looked_for = self.recheck_ahead(cookie, times, now_ns);
                if session.end_is_unreported() && !is_looked_for {
                    self.query_later(cookie, session, Cause::Unreported)?;
                }
                Ok(None)
            }
            Judgement::Late(expired) if mode == Mode::Enforce => Ok(Some(expired)),
            Judgement::Late(expired) if session.has_candidate() => {
                self.add_candidate(expired);
                Ok(None)
            }
            Judgement::Late(expired) => {
                self.note_observed(&expired)?;
                Ok(None)
            }
        }
    }

    /// Records a late session whose rule only observes, if its socket exists.
    pub(super) fn note_observed(&mut self, expired: &Expired) -> Result<()> {
        if expired.session.end_is_unreported() {
            return self.query_later(expired.cookie, expired.session, Cause::Observed(*expired));
        }
        self.observe(expired);
        Ok(())
    }

    /// Has the socket of a session queried. From now on the programs report again that it may have ended: a packet after
    /// the query is reported.
    pub(super) fn query_later(
        &mut self,
        cookie: u64,
        session: Session,
        cause: Cause,
    ) -> Result<()> {
        if session.flags & flags::END_REPORTED != 0
            && let Some(now) = self.still_there(cookie, &session)?
        {
            let flags = now.flags & !flags::END_REPORTED;
            self.datapath.update(cookie, &Session { flags, ..now })?;
        }
        self.maybe_ended.push(MaybeEnded {
            cookie,
            session,
            cause,
        });
        Ok(())
    }
}

/// Requests of clients.
impl State {
    /// Answers requests of the HTTP server except those for the metrics, which are queued.
    pub(super) fn answer(&mut self, requests: Vec<Request>) {
        self.records.note_audit();
        for request in requests {
            // A send fails if the client has gone, which needs no handling.
            match request {
                Request::Metrics(scrape) => self.scrapes.push(scrape),
                Request::Ready(reply) => drop(reply.send(self.records.health.ready())),
                Request::Live(reply) => drop(reply.send(())),
                // The loop has answered these.
                Request::Control(_) => {}
            }
        }
    }

    /// Sends the metrics to all waiting clients.
    pub(super) fn answer_scrapes(&mut self, reapers: pool::Counts) {
        let scrapes = std::mem::take(&mut self.scrapes);
        if scrapes.is_empty() {
            return;
        }
        self.records.note_audit();
        let rendered = self.render_metrics(reapers);
        for scrape in scrapes {
            let _ = scrape.send(rendered.clone());
        }
    }

    fn render_metrics(&self, reapers: pool::Counts) -> Result<String, String> {
        let rendered = self
            .snapshot(reapers)
            .and_then(|snapshot| Ok(self.records.metrics.render(&snapshot)?));
        rendered.map_err(|error| format!("{error:#}"))
    }

    fn snapshot(&self, reapers: pool::Counts) -> Result<KernelSnapshot> {
        let rules: Vec<RuleCounters> = self.datapath.rule_counters().context("reading counters")?;
        Ok(KernelSnapshot {
            rules,
            sessions: self.tracker.sessions_of().to_vec(),
            map_entries: self.datapath.session_count()?,
            errors: self.datapath.errors()?,
            gate_drops: self.datapath.gate_drops()?,
            audit_lost: self.records.audit.lost(),
            degraded: self.records.health.causes(),
            quarantined: self.tracker.quarantined(),
            reapers,
        })
    }

    /// Detaches the programs and records the end of the enforcement.
    pub(super) fn stop(&mut self) -> Result<(), BpfError> {
        self.is_enforcing = false;
        self.datapath.detach()?;
        tracing::info!("the programs are detached");
        self.records.audit.stopped();
        Ok(())
    }

    /// Notes whether new cgroups of the rules are reported, and why not.
    pub(super) fn note_watch(&mut self, error: Option<&std::io::Error>) {
        let was_unwatched = std::mem::replace(&mut self.backlog.is_unwatched, error.is_some());
        if let Some(error) = error.filter(|_| !was_unwatched) {
            tracing::error!("watching for cgroups of the rules: {error}");
        }
        self.note_backlog();
    }

    /// The names of the rules that have their maximum, as far as a sync has found them.
    fn full_rules(&self) -> String {
        let rules = self.backlog.full_rules();
        let names = rules.filter_map(|rule| Some(self.rule_set.rule(rule)?.name.as_str()));
        let names: BTreeSet<&str> = names.collect();
        match names.is_empty() {
            true => String::new(),
            false => format!(": {}", Vec::from_iter(names).join(", ")),
        }
    }

    /// Updates the health with what is known to be missed.
    pub(super) fn note_backlog(&mut self) {
        let has_room = self.has_room() || self.datapath.can_grow();
        self.backlog.has_left_out_cgroups = self.owner_resolver.has_left_out();
        for (cause, what) in self.backlog.problems(has_room) {
            match what {
                Some(FULL_RULE) => {
                    let what = format!("{FULL_RULE}{}", self.full_rules());
                    self.records.health.set(cause, Some(&what));
                }
                _ => self.records.health.set(cause, what),
            }
        }
        let stuck = self.hanging.problem(self.tracker.quarantined());
        self.records
            .health
            .set(DegradedCause::Stuck, stuck.as_deref());
    }
}
