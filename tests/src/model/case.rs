//! Compares one connection and everything that was observed of it with the model. Pure.

use std::time::Duration;

use nix::{errno::Errno, sys::signal::Signal};

use super::{
    book::{Action, Activity, Book, End, Rule},
    check::Seen,
    history::{Connection, Fate, Payload},
    replay::{Clocks, Deadline, Replay, Truth},
    report::Counts,
    termination::{SLACK, Termination, around},
    timeline::Span,
};
use crate::pace::scaled;

/// The maximum time after its deadline that a session may live while a daemon runs, on a busy machine.
const LATEST: Duration = Duration::from_secs(10);

/// The maximum time that a record may be in flight when its daemon is killed.
fn on_its_way() -> Duration {
    scaled(Duration::from_millis(500))
}

/// One connection.
pub(super) struct Case<'a> {
    seen: &'a Seen<'a>,
    connection: &'a Connection,
    replay: Replay<'a>,
    /// Each record with the number of the daemon that wrote it.
    records: &'a [(usize, Termination)],
    pub(super) wrong: Vec<String>,
}

impl<'a> Case<'a> {
    pub(super) fn new(
        seen: &'a Seen<'a>,
        connection: &'a Connection,
        records: &'a [(usize, Termination)],
    ) -> Self {
        Self {
            seen,
            connection,
            replay: Replay::of(connection, seen.timeline),
            records,
            wrong: Vec::new(),
        }
    }
}

impl Case<'_> {
    pub(super) fn check(&mut self, counts: &mut Counts) {
        self.check_payloads();
        self.check_end();
        self.check_records();
        self.check_overdue();
        self.check_observed();
        self.count(counts);
    }

    fn fail(&mut self, wrong: impl Into<String>) {
        self.wrong.push(wrong.into());
    }

    fn rule<'b>(&self, book: &'b Book, end: End) -> Option<&'b Rule> {
        book.rule(self.connection.port, end)
    }

    /// The enforcing rule of a session, if it has one.
    fn enforced<'b>(&self, book: &'b Book, end: End) -> Option<&'b Rule> {
        let rule = self.rule(book, end);
        rule.filter(|rule| rule.action == Action::Enforce)
    }

    /// Whether a session of the connection may have reached a limit within the span.
    fn may_have_expired(&self, span: Span) -> bool {
        let mut books = self.seen.timeline.books(span);
        books.any(|book| {
            self.connection.sessions().any(|end| {
                let rule = self.enforced(book, end);
                let clocks = self.replay.clocks(end);
                rule.is_some_and(|rule| clocks.may_be_reset(book, rule, span.to))
            })
        })
    }
}

/// Checks of the payload and of the end.
impl Case<'_> {
    fn check_payloads(&mut self) {
        for late in self.replay.passed_late.clone() {
            self.fail(format!("payload passed after the deadline, {late:?}"));
        }
        let closed = |fate: &Fate| matches!(fate, Fate::Closed(_));
        if self.connection.fates.iter().any(closed) {
            // Payload to a closed end is no longer observed.
            return;
        }
        let broken = self.connection.broken();
        let end = broken.map_or(self.seen.finished, |span| span.to);
        let lost = self.connection.payloads().find(|p| p.arrived.is_none());
        if let Some(lost) = lost.copied() {
            // Payload that a lock has delayed may arrive after the reset of the other end.
            let from = broken.map_or(lost.written.from, |span| span.from.min(lost.written.from));
            let since = Span { from, to: end };
            if !self.may_have_expired(since) {
                self.fail(format!("payload was lost, {lost:?}"));
            }
        }
    }

    fn check_end(&mut self) {
        let Some(broken) = self.connection.broken() else {
            return;
        };
        for end in End::BOTH {
            let is_open = self.connection.fate(end) == Fate::Open;
            if is_open && !self.connection.may_stay_open(end) {
                self.fail("one end was reset and the other is open");
            }
            let inside = self.connection.inside[end as usize];
            if let Fate::Broken(Errno::ECONNABORTED, _) = self.connection.fate(end)
                && !inside
            {
                self.fail("an end was reset that is not below the cgroup");
            }
        }
        if self.connection.may_have_reset_itself() {
            return;
        }
        if !self.may_have_expired(broken) && !self.may_have_hung(broken) {
            self.fail("it was reset, and no session of it had expired");
        }
        if self.resets().count() == 0
            && !self.may_be_unrecorded(broken)
            && !End::BOTH.into_iter().any(|end| self.was_reset_untold(end))
        {
            self.fail("it was reset, and no record says so");
        }
        self.check_errors();
    }

    /// Whether a justified reset may have hung on a lock and come after the payload that the lock had
    /// delayed. Such a reset is not withdrawn, and a stopped daemon leaves no gate that drops the payload.
    fn may_have_hung(&self, broken: Span) -> bool {
        self.connection.sessions().any(|end| {
            let mut locks = self.connection.locks(end);
            locks.any(|lock| {
                let hung_until = Span {
                    from: lock.from,
                    to: lock.to + on_its_way(),
                };
                let mut books = self.seen.timeline.books(lock);
                hung_until.meets(&broken)
                    && books.any(|book| {
                        let rule = self.enforced(book, end);
                        let mut clocks = self.replay.all_clocks(end);
                        rule.is_some_and(|rule| {
                            clocks.any(|clocks| clocks.may_be_reset(book, rule, lock.to))
                        })
                    })
            })
        })
    }

    /// The records of resets.
    fn resets(&self) -> impl Iterator<Item = &Termination> {
        let records = self.records.iter().map(|(_, record)| record);
        records.filter(|record| record.result == "reset")
    }

    /// Whether a reset may have no record: its daemon was killed, and the next one recorded the session as
    /// gone. A reset that hangs in a reaper happens when the lock is released, even without its daemon.
    fn may_be_unrecorded(&self, broken: Span) -> bool {
        let timeline = &self.seen.timeline;
        let recent = |end: &Span| Span {
            from: end.from.saturating_sub(on_its_way()),
            ..*end
        };
        let mut locks = self
            .connection
            .sessions()
            .flat_map(|end| self.connection.locks(end));
        let hung = locks.any(|lock| {
            let mut ends = timeline.kills.iter().chain(&timeline.stops);
            let hung_until = Span {
                from: lock.from,
                to: lock.to + on_its_way(),
            };
            hung_until.meets(&broken) && ends.any(|end| lock.meets(&recent(end)))
        });
        let mut kills = timeline.kills.iter();
        let was_killed = kills.any(|kill| broken.meets(&recent(kill)));
        let mut records = self.records.iter();
        hung || was_killed && records.any(|(_, record)| record.result == "gone")
    }

    /// Whether a reaper reset the session but was killed or stopped before its answer, so that the daemon
    /// recorded the session as gone.
    fn was_reset_untold(&self, end: End) -> bool {
        self.untold_by(end).is_some()
    }

    /// The index in [`Timeline::struck`] of the reapers that reset a session without answering.
    ///
    /// [`Timeline::struck`]: super::timeline::Timeline::struck
    pub(super) fn untold_by(&self, end: End) -> Option<usize> {
        let of_end = |record: &&(usize, Termination)| record.1.end == end;
        let mut records = self.records.iter().filter(of_end);
        records.find(|(_, record)| record.result == "gone")?;
        let when = match self.connection.fate(end) {
            Fate::Broken(Errno::ECONNABORTED, when) => when,
            Fate::Closed(_) if self.connection.is_held_up() => self.connection.broken()?,
            _ => return None,
        };
        let struck = &self.seen.timeline.struck;
        struck.iter().position(|struck| struck.when.meets(&when))
    }

    /// Checks the socket errors. The reset session gets ECONNABORTED. The peer gets ECONNRESET, or EPIPE if
    /// it had read the end of the stream.
    fn check_errors(&mut self) {
        let untold = End::BOTH.into_iter().any(|end| self.was_reset_untold(end));
        if self.resets().count() == 0 && !untold {
            return;
        }
        for end in End::BOTH {
            let Fate::Broken(error, _) = self.connection.fate(end) else {
                continue;
            };
            let by_daemon = self.resets().any(|record| record.end == end);
            let expected = match error {
                Errno::ECONNABORTED => by_daemon || self.was_reset_untold(end),
                Errno::ECONNRESET | Errno::EPIPE => !by_daemon,
                _ => false,
            };
            if !expected {
                self.fail(format!("the {end:?}'s end read {error}"));
            }
        }
    }

    /// Checks that no session lives long after its deadline while a daemon runs.
    fn check_overdue(&mut self) {
        let broken = self.connection.broken().map(|span| span.to);
        let at = match (broken, self.connection.is_open()) {
            (Some(broken), _) => broken,
            (None, true) => self.seen.finished,
            (None, false) => return,
        };
        let steady = self.seen.timeline.steady_since(at);
        for end in self.connection.sessions() {
            if let Fate::Closed(_) = self.connection.fate(end) {
                continue;
            }
            // There was no slot for it, so the daemon could not reset it at its deadline, only after it had adopted it.
            if self.replay.clocks(end).left_out.is_some() && broken.is_some() {
                continue;
            }
            let mut books = self.seen.timeline.books(Span {
                from: steady,
                to: at,
            });
            let overdue = books.all(|book| {
                self.enforced(book, end).is_some_and(|rule| {
                    let due = self.replay.clocks(end).due(rule).to.max(steady);
                    due.saturating_add(LATEST) <= at
                })
            });
            if overdue {
                self.fail(format!("the {end:?}'s session was missed"));
            }
        }
    }
}

/// Checks of the records.
impl Case<'_> {
    fn check_records(&mut self) {
        let records = self.records;
        for (_, record) in records {
            if !self.connection.inside[record.end as usize] {
                self.fail("a record of an end that is not below the cgroup");
                continue;
            }
            if let Err(wrong) = self.check_record(record) {
                let clocks = self.replay.clocks(record.end);
                self.fail(format!("{wrong} in {record:?}, {clocks:?}"));
            }
        }
        for end in End::BOTH {
            let of_end = records.iter().filter(|(_, record)| record.end == end);
            let ends = of_end.clone().filter(|(_, record)| record.is_end());
            let ends = ends.filter(|(_, record)| !self.was_replaced(record));
            if ends.count() > 1 {
                self.fail(format!("the {end:?}'s session ended twice"));
            }
            for life in 0..self.seen.lives.len() {
                let failed = of_end
                    .clone()
                    .filter(|(of, r)| *of == life && r.is_failed());
                if failed.count() > self.connection.locks(end).count() {
                    self.fail(format!("the {end:?}'s session failed too often"));
                }
            }
        }
    }

    fn check_record(&self, record: &Termination) -> Result<(), &'static str> {
        if record.lateness_seconds < 0.0 {
            return Err("before its deadline");
        }
        match record.result.as_str() {
            "reset" if self.was_reset(record) => {}
            "gone" if self.connection.fate(record.end) != Fate::Open => {}
            "gone" if self.was_replaced(record) => {}
            "none" if record.is_observed() => {}
            "failed" if self.was_locked(record) => {}
            _ => return Err("a result that the connection does not show"),
        }
        // The daemon queries the socket of an untracked session before the reset. Payload after the query is not in
        // the record.
        let is_untracked = record.reason == "untracked";
        let is_of_last = record.is_end() && !self.was_replaced(record) && !is_untracked;
        let mut clocks: Vec<Clocks> = if !is_of_last || self.was_decided_before(record) {
            let all = self.replay.all_clocks(record.end);
            all.copied().collect()
        } else {
            vec![self.replay.clocks(record.end)]
        };
        let counted = self.counted_as_active(record);
        clocks.extend(counted.map(|at| self.replay.clocks(record.end).active_at(at)));
        if !clocks.iter().any(|clocks| self.is_due(record, clocks)) {
            return Err("a rule, reason, limit or deadline that is not the session's");
        }
        if !clocks.iter().any(|clocks| is_of_activity(record, clocks)) {
            return Err("an activity that is not the session's last");
        }
        let is_unknown = counted.is_some() || is_untracked;
        let adopted = clocks.iter().map(|clocks| clocks.adopted).max();
        self.check_establishment(record, adopted.unwrap_or(Truth::No), &clocks)?;
        self.check_bytes(record, adopted.unwrap_or(Truth::No), is_unknown)
    }

    /// The time at which the daemon may have counted the session as active because it could not query the
    /// socket: at the record's last activity the socket was locked, or its reaper was killed or stopped.
    fn counted_as_active(&self, record: &Termination) -> Option<Span> {
        let idle = Duration::try_from_secs_f64(record.idle_seconds).unwrap_or_default();
        let idle_since = record.at.saturating_sub(idle);
        let when = around(record.last_activity.unwrap_or(idle_since));
        let mut locks = self.connection.locks(record.end);
        let mut struck = self.seen.timeline.struck.iter();
        let is_unknown =
            locks.any(|lock| lock.meets(&when)) || struck.any(|struck| struck.when.meets(&when));
        is_unknown.then_some(when)
    }

    /// Whether an earlier daemon may have decided about a session that was gone when the next one started.
    /// The record then has the state at the decision.
    fn was_decided_before(&self, record: &Termination) -> bool {
        let since = Span {
            from: record.deadline.min(record.recorded().from),
            ..record.recorded()
        };
        let mut outages = self.seen.timeline.outages.iter();
        record.result == "gone" && outages.any(|outage| outage.meets(&since))
    }

    /// Whether the record says that the session was gone, and another socket took over the connection at that time.
    fn was_replaced(&self, record: &Termination) -> bool {
        let decided = self.decided(record);
        let mut restores = self.connection.restores(record.end);
        record.result == "gone" && restores.any(|when| when.meets(&decided))
    }

    /// Whether the record reports a reset that failed because the socket was locked, and the test held a lock then.
    fn was_locked(&self, record: &Termination) -> bool {
        let mut locks = self.connection.locks(record.end);
        record.error.contains("keeps locked") && locks.any(|lock| lock.meets(&record.recorded()))
    }

    /// The time of the decision to reset the session. A reaper that hangs or is stopped reports the result
    /// later.
    fn decided(&self, record: &Termination) -> Span {
        let recorded = record.recorded();
        let since = Span {
            from: around(record.deadline).from.min(recorded.from),
            ..recorded
        };
        let mut locks = self.connection.locks(record.end);
        let mut struck = self.seen.timeline.struck.iter();
        let was_late = locks.any(|lock| lock.meets(&since))
            || struck.any(|s| s.signal == Signal::SIGSTOP && s.when.from <= recorded.to);
        if was_late { since } else { recorded }
    }

    /// Whether the session existed and could be reset.
    fn was_reset(&self, record: &Termination) -> bool {
        match self.connection.fate(record.end) {
            Fate::Broken(..) => true,
            Fate::Closed(when) => self.connection.is_held_up() || record.recorded().from <= when.to,
            Fate::Open | Fate::Ended(_) => false,
        }
    }

    /// Whether the session was due with these clocks, as the record says.
    fn is_due(&self, record: &Termination, clocks: &Clocks) -> bool {
        let mode = match record.is_observed() {
            true => Action::Observe,
            false => Action::Enforce,
        };
        let mut books = self.seen.timeline.books(self.decided(record));
        books.any(|book| {
            let rule = self.rule(book, record.end);
            let rule = rule.filter(|rule| rule.name == record.rule && rule.action == mode);
            rule.is_some_and(|rule| match record.reason.as_str() {
                "policy" => self.is_due_by_change(record, clocks, rule),
                "untracked" => {
                    let has_no_slot = book.resets_untracked && clocks.left_out.is_some();
                    has_no_slot && record.limit.is_none()
                }
                _ => {
                    let deadlines = clocks.deadlines(rule);
                    let reached = deadlines.iter().any(|d| is_reached(record, d));
                    reached && was_idle_enough(record, rule)
                }
            })
        })
    }

    /// Whether a new policy ended a session that the previous one permitted, at the moment when it came into
    /// force.
    fn is_due_by_change(&self, record: &Termination, clocks: &Clocks, rule: &Rule) -> bool {
        let at = around(record.deadline);
        let mut changes = self.seen.timeline.changes.windows(2);
        let changed = changes.any(|pair| {
            let before = self.rule(&pair[0].book, record.end);
            let lived = before.is_none_or(|before| {
                let spared = before.action == Action::Observe && rule.action == Action::Enforce;
                spared || clocks.due(before).to >= at.from
            });
            // The daemon may adopt a session during the change that had no slot before. It does not know then that
            // the session was overdue under the previous policy.
            let lived = lived || clocks.left_out.is_some();
            lived && pair[1].when.meets(&at)
        });
        changed && record.limit.is_none() && clocks.due(rule).from <= at.to
    }

    fn check_establishment(
        &self,
        record: &Termination,
        adopted: Truth,
        clocks: &[Clocks],
    ) -> Result<(), &'static str> {
        let is_restored = self.connection.restores(record.end).next().is_some();
        let told = record.established.map(|established| {
            let established = around(established);
            let mut inherited = clocks.iter().map(|clocks| clocks.established);
            established.meets(&self.connection.opened)
                || is_restored && inherited.any(|since| established.meets(&since))
        });
        match (told, adopted) {
            (Some(true), Truth::No | Truth::Perhaps) | (None, Truth::Yes | Truth::Perhaps) => {
                Ok(())
            }
            // The session was observed before it was released and adopted again.
            (Some(true), Truth::Yes) if record.is_observed() => Ok(()),
            _ => Err("an establishment that is not the session's"),
        }
    }

    /// For a session that was adopted without a query of its socket, the earlier payload is unknown.
    fn check_bytes(
        &self,
        record: &Termination,
        adopted: Truth,
        is_unknown: bool,
    ) -> Result<(), &'static str> {
        let recorded = record.recorded();
        let decided_before = self.was_decided_before(record);
        // A socket that takes over the connection starts its byte counts at zero.
        let restores = self.connection.restores(record.end);
        let begun = restores.filter(|when| when.from <= recorded.to);
        let begun: Vec<Duration> = begun.map(|when| when.to).collect();
        let settled = begun.iter().filter(|at| **at < recorded.from).max();
        let [earliest, latest] = [settled, begun.iter().max()].map(Option::<&Duration>::copied);
        for from in End::BOTH {
            let told = record.bytes[from as usize];
            let of = self.connection.payloads().filter(|p| p.from == from);
            let since = |from: Option<Duration>| {
                let from = from.unwrap_or_default();
                of.clone().filter(move |p| p.written.from >= from)
            };
            // No program counts payload after a stop, and a socket that is gone cannot be queried.
            let is_counted = |payload: &Payload| {
                let passing = self.connection.passing(payload);
                let mut books = self.seen.timeline.books(passing);
                !decided_before || books.all(|book| self.rule(book, record.end).is_some())
            };
            let before =
                |p: &&Payload| p.arrived.is_some_and(|at| at < recorded.from) && is_counted(p);
            let arrived: u64 = since(latest).filter(before).map(|p| p.bytes).sum();
            let written: u64 = since(earliest).map(|p| p.bytes).sum();
            // The kernel programs may have missed the peer's FIN of an adopted session. The byte count then
            // includes the FIN.
            let fin = u64::from(adopted != Truth::No);
            if told < arrived && !is_unknown || told > written + fin {
                return Err("other bytes than the session's");
            }
        }
        Ok(())
    }

    /// Checks that no daemon records the same observed termination twice.
    fn check_observed(&mut self) {
        let records = self.records;
        for (n, (life, record)) in records.iter().enumerate() {
            let again = |other: &&(usize, Termination)| {
                let since = Span {
                    from: other.1.recorded().from,
                    to: record.recorded().to,
                };
                let mut restores = self.connection.restores(record.end);
                other.0 == *life
                    && other.1.end == record.end
                    && is_the_same(&other.1, record)
                    && !restores.any(|when| when.meets(&since))
            };
            if record.is_observed() && records[..n].iter().any(|other| again(&other)) {
                self.fail(format!("recorded twice, {record:?}"));
            }
        }
    }

    fn count(&self, counts: &mut Counts) {
        let connection = self.connection;
        counts.connections += 1;
        counts.payloads += connection.payloads().count();
        counts.locked += End::BOTH
            .into_iter()
            .flat_map(|end| connection.locks(end))
            .count();
        let left_out = |end: &End| self.replay.clocks(*end).left_out > Some(Duration::ZERO);
        counts.left_out += connection.sessions().filter(left_out).count();
        let unlisted = |end: &End| self.replay.clocks(*end).left_out == Some(Duration::ZERO);
        counts.unlisted += connection.sessions().filter(unlisted).count();
        let ends = End::BOTH.into_iter();
        counts.restored += ends.flat_map(|end| connection.restores(end)).count();
        counts.refused += self.replay.refused;
        let sessions = connection.sessions();
        let adopted = |end: &End| self.replay.clocks(*end).adopted == Truth::Yes;
        counts.adopted += sessions.filter(adopted).count();
        match connection.broken() {
            Some(_) if connection.may_have_reset_itself() => counts.reset_by_test += 1,
            Some(_) => {
                counts.reset += 1;
                let untold = End::BOTH.into_iter().any(|end| self.was_reset_untold(end));
                counts.untold += usize::from(untold);
                counts.unrecorded += usize::from(self.resets().count() == 0 && !untold);
            }
            None if connection.is_open() => counts.open += 1,
            None => counts.ended += 1,
        }
        for (_, record) in self.records {
            counts.observed += usize::from(record.is_observed());
            counts.gone += usize::from(record.result == "gone");
            counts.failed += usize::from(record.is_failed());
            counts.by_policy += usize::from(record.reason == "policy");
            counts.without_slot += usize::from(record.reason == "untracked");
            let left_out = self.replay.clocks(record.end).left_out;
            if record.result == "reset" && left_out.is_none() {
                // A session that came due during an outage or under another policy waits for the daemon or for the
                // new policy. Its lateness counts from then.
                let steady = self.seen.timeline.steady_since(record.at);
                let late = record.at.saturating_sub(record.deadline.max(steady));
                counts.latest = counts.latest.max(late);
            }
        }
    }
}

/// Whether the record reports this deadline.
fn is_reached(record: &Termination, deadline: &Deadline) -> bool {
    let [shortest, longest] = deadline.limit.map(|limit| limit.as_secs_f64());
    let of_limit = record
        .limit
        .is_some_and(|limit| shortest <= limit && limit <= longest);
    deadline.reason == record.reason && of_limit && deadline.at.meets(&around(record.deadline))
}

/// The idle time does not depend on the wall clock, so it is compared without tolerance.
fn was_idle_enough(record: &Termination, rule: &Rule) -> bool {
    let heeds_all = rule.activity == Activity::Any && record.reason == "idle_timeout";
    !heeds_all
        || record
            .limit
            .is_some_and(|limit| record.idle_seconds >= limit)
}

fn is_of_activity(record: &Termination, clocks: &Clocks) -> bool {
    let last = clocks.received.later(clocks.sent);
    let told = record.last_activity;
    told.is_none_or(|told| last.meets(&around(told)))
}

/// Whether two records of one daemon report the same reached limit.
fn is_the_same(one: &Termination, other: &Termination) -> bool {
    one.reason == other.reason
        && one.rule == other.rule
        && one.bytes == other.bytes
        && one.deadline.abs_diff(other.deadline) < SLACK / 2
}
