//! What the engine knows, and what it does about it at once: events, sessions that are due, requests of the
//! HTTP server. What takes a reaper is begun elsewhere.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use session_enforcer_common::{Ancestors, ErrorKind, Event, EventKind, RuleCounters, Session};

use super::{
    backlog::Backlog,
    ending::{self, Holding},
    handles::Handles,
    hanging::Hanging,
    judge::{Expired, Judgement, judge},
    kills::Kills,
    records::Records,
    rule_set::RuleSet,
    tracker::{Phase, Tracker, group_of, group_of_event},
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
        http::{Request, Scrape},
        metrics::{KernelSnapshot, Metrics, Repair},
        service_manager::Standing,
    },
};

/// Sessions that one pass looks at before other work has its turn: some 10 ms, where none is late.
pub(super) const MAX_PASS: usize = 8 * MAX_BATCH;

/// When a session that could not be looked at is tried again.
pub(super) const RETRY_NS: u64 = 10_000_000_000;

/// How long after a FIN or RST the daemon looks whether a session has ended that the kernel does
/// not report: a few round trips. Also how long it waits for the report of a reset.
pub(super) const RECHECK_NS: u64 = 200_000_000;

/// What a [`State`] is made of.
pub struct Parts {
    /// The programs, loaded.
    pub datapath: Datapath,
    /// The audit's writer.
    pub audit: Audit,
    /// Every metric.
    pub metrics: Metrics,
    /// Whose sessions are.
    pub owner_resolver: OwnerResolver,
    /// How far the kernel's time stamps may lag behind the events.
    pub lag_ns: u64,
    /// The daemon's own network namespace.
    pub own_netns: u64,
}

/// What the engine knows.
pub(super) struct State {
    pub(super) datapath: Datapath,
    pub(super) records: Records,
    pub(super) owner_resolver: OwnerResolver,
    pub(super) lag_ns: u64,
    pub(super) rule_set: RuleSet,
    /// The change of the policy that is under way.
    pub(super) change: Option<Change>,
    pub(super) tracker: Tracker,
    pub(super) backlog: Backlog,
    pub(super) handles: Handles,
    pub(super) hanging: Hanging,
    /// Whether the kernel was found to have no `SOCK_DESTROY`.
    pub(super) has_no_destroy: bool,
    /// Whether sessions that are due are ended: from the attachment on.
    pub(super) is_enforcing: bool,
    /// Sessions whose owner has to be found before they are judged.
    pub(super) without_owner: Vec<(u64, Session)>,
    /// Sessions that are only observed, and late unless their sockets have taken or sent payload that is waited for.
    pub(super) candidates: Vec<Expired>,
    /// Sessions whose end the kernel does not report, and that may have ended.
    pub(super) maybe_ended: Vec<MaybeEnded>,
    /// Events that the kernel could not deliver, as far as they were made up for.
    repaired_losses: u64,
    /// Who waits for the metrics.
    pub(super) scrapes: Vec<Scrape>,
    /// Sessions that end soon, whose holders are to be looked for.
    pub(super) ending: Vec<u64>,
    /// Who holds those for which that was done.
    pub(super) holdings: HashMap<u64, Holding>,
    /// Sessions that somebody has asked to be reset.
    pub(super) kills: Kills,
    /// When the policy in force came into force.
    pub(super) in_force_since_ns: u64,
}

/// Sessions are decided about anew by another policy.
pub(super) struct Change {
    /// The policy before.
    pub(super) before: RuleSet,
    /// When the other came into force.
    pub(super) at_ns: u64,
}

/// A session whose socket is looked for: it may have ended without a report.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaybeEnded {
    pub(super) cookie: u64,
    pub(super) session: Session,
    pub(super) cause: Cause,
}

/// Why a socket is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cause {
    /// Its end would not be reported.
    Unreported,
    /// The same, and the session is to be recorded if it is there: it is late, and only observed.
    Observed(Expired),
    /// The kernel did not find it when it was to be reset.
    NotFound(Expired),
}

impl State {
    /// Without rules and sessions yet.
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            datapath,
            audit,
            metrics,
            owner_resolver,
            lag_ns,
            own_netns,
        } = parts;
        // The generations go on: a session of an earlier daemon must not seem to be of this one.
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
            has_no_destroy: false,
            is_enforcing: false,
            without_owner: Vec::new(),
            candidates: Vec::new(),
            maybe_ended: Vec::new(),
            repaired_losses: 0,
            scrapes: Vec::new(),
            ending: Vec::new(),
            holdings: HashMap::new(),
            kills: Kills::default(),
            in_force_since_ns: 0,
        }
    }

    /// The status line of the service.
    pub(super) fn standing(&self, config: &Config) -> String {
        let standing = Standing {
            mode: config.mode,
            rules: config.rules.len(),
            sessions: self.tracker.len(),
            resets: self.records.metrics.resets(),
            is_refused: self.records.metrics.is_config_refused(),
            trouble: self.records.health.ready().err(),
        };
        standing.line()
    }

    pub(super) fn has_room(&self) -> bool {
        self.tracker.len() < self.datapath.common_capacity()
    }
}

/// Whose sessions are, and which rule is theirs.
impl State {
    /// The cgroups above one, the kernel's word first: it remembers those that are no more. None of one that
    /// has gone and is remembered by nobody.
    pub(super) fn ancestors_of(&self, cgroup_id: u64) -> Option<Ancestors> {
        let known = self.datapath.ancestors(cgroup_id).ok().flatten();
        known.or_else(|| self.owner_resolver.ancestors(cgroup_id))
    }

    /// The rule of a session; none where no rule matches it any more, or an exempting one does.
    pub(super) fn rule_of(&self, session: &Session) -> Option<u16> {
        self.rule_set.rule_of(session, |id| self.ancestors_of(id))
    }

    /// The same as far as it is known now: of a session whose owner is still to be found, a rule
    /// that there is.
    pub(super) fn provisional_rule(&self, session: &Session) -> Option<u16> {
        if self.rule_set.needs_owner_of(session) {
            return Some(0);
        }
        self.rule_of(session)
    }

    /// When the change of the policy that is under way made a session late, which is past its limit since
    /// `reached_ns`: by the policy before it would live, within its limits, or only observed.
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

/// Events of the datapath.
impl State {
    /// Takes in what the kernel reports.
    pub(super) fn handle(&mut self, kind: EventKind, event: &Event) {
        match kind {
            EventKind::Opened => self.opened(event),
            EventKind::Closed => self.forget(event.cookie),
            EventKind::MayEnd => self
                .tracker
                .may_end(event.cookie, monotonic_ns() + RECHECK_NS),
            EventKind::Expired => self.gate_refused(event),
        }
    }

    /// The gate refused payload of a session: it is due, whatever the schedule says.
    fn gate_refused(&mut self, event: &Event) {
        match self.tracker.phase_of_cookie(event.cookie) {
            // Somebody is about it, or it stands behind the gate until it is tried again.
            Some(Phase::Tried(tried)) if tried.error.is_some() => return,
            Some(phase) if phase.is_in_other_hands() => return,
            _ => {}
        }
        if self.tracker.contains(event.cookie) {
            self.tracker.hasten(event.cookie, 0);
            return;
        }
        // Its opening was lost, or it has ended since: its record tells.
        self.tracker.add(event.cookie, group_of_event(event), 0);
    }

    fn opened(&mut self, event: &Event) {
        self.owner_resolver.remember(event.cgroup_id);
        let Some(rule) = self.rule_set.rule(event.rule) else {
            tracing::error!("the kernel reports a session of rule {}", event.rule);
            return;
        };
        let due_ns = if event.generation == self.rule_set.generation as u16 {
            ending::ahead_of(
                rule.limits.first_deadline_ns(event.established_ns),
                &rule.limits,
            )
        } else {
            // Of an earlier policy: it is decided about anew.
            0
        };
        if due_ns == 0 && self.tracker.contains(event.cookie) {
            // It was decided about when the policy changed.
            self.tracker.hasten(event.cookie, due_ns);
            return;
        }
        self.tracker
            .add(event.cookie, group_of_event(event), due_ns);
    }

    /// Forgets a session that has ended. One whose reset has no answer was reset by the daemon or has ended
    /// by itself: nobody knows.
    pub(super) fn forget(&mut self, cookie: u64) {
        let netns_cookie = self.tracker.group(cookie).map(|group| group.netns_cookie);
        if let Some(expired) = self.tracker.unrecorded(cookie) {
            self.record_gone(&expired);
        }
        self.tracker.forget(cookie);
        // The record of a session that is being reset comes later.
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

    /// A handle keeps its namespace alive: that of one without sessions is given up.
    pub(super) fn give_up_if_unused(&mut self, netns_cookie: u64) {
        if !self.tracker.has_sessions_in(netns_cookie) {
            self.handles.give_up(netns_cookie);
        }
    }

    /// The record of a session as it is now, if the session is there still.
    pub(super) fn still_there(&self, cookie: u64, session: &Session) -> Result<Option<Session>> {
        let is_same = |now: &Session| now.established_ns == session.established_ns;
        Ok(self.datapath.session(cookie)?.filter(is_same))
    }

    /// Lets go of a session: takes it out of the session map, where the kernel does not. One that was
    /// never decided about was not counted as opened, and is not as closed.
    pub(super) fn release(&mut self, cookie: u64, session: &Session) -> Result<()> {
        // The rule in the record may be one of an earlier daemon's.
        let group = self.tracker.group(cookie);
        let rule = group.map_or(session.rule, |group| group.rule);
        let removed = self.datapath.remove(cookie, session.established_ns)?;
        // Before the attachment, what an earlier daemon has counted as opened is not this one's to count.
        if removed && session.generation != 0 && self.is_enforcing {
            self.records.metrics.removed(usize::from(rule));
        }
        self.forget(cookie);
        Ok(())
    }

    /// Removes a session that ended without the kernel's report.
    pub(super) fn drop_stale(&mut self, cookie: u64, session: &Session) -> Result<()> {
        self.records.metrics.repaired(Repair::Stale);
        self.release(cookie, session)
    }

    /// Makes up for what the kernel programs could not do.
    pub(super) fn repair(&mut self) -> Result<()> {
        self.backlog.refused = self.datapath.error_count(ErrorKind::MapFull)?;
        self.backlog.refused_by_rules = self.datapath.error_count(ErrorKind::RuleFull)?;
        self.note_backlog();
        self.repair_lost_events()
    }

    /// Makes up for events that the kernel could not deliver: schedules what is in the session map
    /// and not in the schedule. What has closed is found by the comparison that follows.
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
                // Due at once: the pass that follows works out its deadline.
                self.tracker.add(cookie, group_of(&session), 0);
                self.records.metrics.repaired(Repair::Unscheduled);
            }
        }
        Ok(())
    }
}

/// Sessions that are due.
impl State {
    /// Whether a session is due now.
    pub(super) fn is_due(&self) -> bool {
        let due_ns = self.tracker.next_due_ns().filter(|_| self.is_enforcing);
        due_ns.is_some_and(|due_ns| due_ns <= monotonic_ns())
    }

    /// Looks at up to `count` due sessions; those that are late, and how many it looked at.
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

    /// Whether the session cannot be judged before its owner is found.
    pub(super) fn needs_owner(&self, cookie: u64, session: &Session) -> bool {
        let was_reset = matches!(self.tracker.phase(cookie, session), Some(Phase::Reset));
        let is_asked_for = self.kills.of(cookie, session).is_some();
        !was_reset && !is_asked_for && self.rule_set.needs_owner_of(session)
    }

    /// Decides about a session that is scheduled without a time, by its record as it was read not before
    /// `now_ns`. One that lives is re-armed here.
    pub(super) fn judge(
        &mut self,
        cookie: u64,
        session: Option<Session>,
        now_ns: u64,
    ) -> Result<Option<Expired>> {
        let Some(session) = session else {
            // It has closed; its event is still to be read, or was lost.
            self.forget(cookie);
            return Ok(None);
        };
        match self.tracker.phase(cookie, &session) {
            Some(phase) if phase.is_in_other_hands() => return Ok(None),
            Some(Phase::Reset) => {
                // Its end was not reported: another `sock_ops` program has undone that it is, or the
                // kernel (6.1 before 6.1.158) has said that it destroyed what it did not.
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
            anyhow::bail!("the session map names rule {rule}, which is none");
        };
        let (limits, mode) = (active.limits, active.mode);
        let phase = self.tracker.phase(cookie, &session);
        let by_change =
            |reached_ns| self.late_by_change(&session, phase, reached_ns, mode == Mode::Enforce);
        let judged = judge(cookie, &session, (rule, &limits), phase, now_ns, by_change);
        match self.with_holder(judged) {
            Judgement::Alive { recheck_ns } => {
                // Whatever was asked of the datapath, it was not done.
                self.tracker.clear_phase(cookie);
                if session.is_shut() {
                    self.datapath.reopen(cookie, session.established_ns)?;
                }
                let times = (recheck_ns, ending::ahead_of(recheck_ns, &limits));
                let is_looked_for = self.recheck_ahead(cookie, times, now_ns);
                if session.end_is_unreported() && !is_looked_for {
                    self.query_later(cookie, session, Cause::Unreported);
                }
                Ok(None)
            }
            Judgement::Late(expired) if mode == Mode::Enforce => Ok(Some(expired)),
            Judgement::Late(expired) if session.has_candidate() => {
                self.candidates.push(expired);
                Ok(None)
            }
            Judgement::Late(expired) => {
                self.note_observed(&expired);
                Ok(None)
            }
        }
    }

    /// Records a session that is only observed and late, if it is there.
    pub(super) fn note_observed(&mut self, expired: &Expired) {
        if expired.session.end_is_unreported() {
            self.query_later(expired.cookie, expired.session, Cause::Observed(*expired));
        } else {
            self.observe(expired);
        }
    }

    pub(super) fn query_later(&mut self, cookie: u64, session: Session, cause: Cause) {
        self.maybe_ended.push(MaybeEnded {
            cookie,
            session,
            cause,
        });
    }
}

/// What others ask.
impl State {
    /// Answers requests of the HTTP server, all but those for the metrics.
    pub(super) fn answer(&mut self, requests: Vec<Request>) {
        self.records.note_audit();
        for request in requests {
            // A client that has gone needs no answer.
            match request {
                Request::Metrics(scrape) => self.scrapes.push(scrape),
                Request::Ready(reply) => drop(reply.send(self.records.health.ready())),
                Request::Live(reply) => drop(reply.send(())),
                // The loop has answered those.
                Request::Control(_) => {}
            }
        }
    }

    /// Sends the metrics to all who wait for them.
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
            troubles: self.records.health.troubles(),
            quarantined: self.tracker.quarantined(),
            reapers,
        })
    }

    /// Takes the programs out of the kernel and records that the enforcement ends.
    pub(super) fn stop(&mut self) -> Result<(), BpfError> {
        self.is_enforcing = false;
        self.datapath.detach()?;
        tracing::info!("the programs are detached");
        self.records.audit.stopped();
        Ok(())
    }

    /// Notes what is known to be missed.
    pub(super) fn note_backlog(&mut self) {
        let has_room = self.has_room() || self.datapath.can_grow();
        for (trouble, what) in self.backlog.troubles(has_room) {
            self.records.health.set(trouble, what);
        }
        let stuck = self.hanging.trouble(self.tracker.quarantined());
        self.records
            .health
            .set(DegradedCause::Stuck, stuck.as_deref());
    }
}
