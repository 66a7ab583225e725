//! The model: computes the clocks of a connection's sessions from the actions of the test. Pure.
//!
//! The test knows the time of an event only as a span, so the model's clocks are spans too. The early end of
//! a deadline's span says what must not happen before it, the late end what must have happened by then. If it
//! is unknown whether an event happened, the span covers both cases.

use std::time::Duration;

use super::{
    book::{Action, Activity, Book, End, Rule, Scarce},
    history::{Connection, Event, Fate, Payload},
    timeline::{Span, Timeline},
};
use crate::pace::late_ticks;

/// The maximum error of an adopted session's last activity: two ticks of the slowest kernels, doubled because
/// the age is counted in ticks too.
const LAG: Duration = Duration::from_millis(40);

/// The maximum time from payload until a later packet confirms that the socket accepted or sent it.
const UNCONFIRMED: Duration = Duration::from_millis(500);

/// The maximum error of the last activity of a session that is adopted when there is a free slot for it. The daemon may
/// take the activity to be this much later than it was.
const PICKED_UP: Duration = Duration::from_secs(1);

/// The maximum time until a FIN has left: it may be dropped and sent again.
const FIN_LEAVES: Duration = Duration::from_secs(1);

/// What the model knows about a fact: it is false, possibly true, or true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Truth {
    No,
    Perhaps,
    Yes,
}

impl Truth {
    /// The common value of all, or `Perhaps` if they differ.
    fn of_all(all: impl Iterator<Item = Self>) -> Self {
        let all: Vec<Self> = all.collect();
        match all.first() {
            Some(first) if all.iter().all(|truth| truth == first) => *first,
            _ => Self::Perhaps,
        }
    }
}

/// A limit that a session may reach next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline {
    /// The reason in the audit.
    pub(super) reason: &'static str,
    pub(super) at: Span,
    /// The shortest limit with jitter, and the full limit.
    pub(super) limit: [Duration; 2],
}

/// The clocks of one session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    end: End,
    pub(super) established: Span,
    /// The times of the last counted payload.
    pub(super) received: Span,
    pub(super) sent: Span,
    answered: Span,
    owes: Truth,
    /// Whether the end has closed its direction. From the FIN on it owes no answer.
    has_ended: bool,
    /// Whether the session is older than its tracking.
    pub(super) adopted: Truth,
    /// The times of the last payload, counted or not.
    passed: [Span; 2],
    /// The time of the last payload or forged segment that the socket may have received, counted or not.
    came: Span,
    /// If there may have been no slot for it at first, or at its adoption: a time until which the session was certainly
    /// not tracked. Otherwise `None`.
    pub(super) left_out: Option<Duration>,
}

impl Clocks {
    const fn new(end: End, opened: Span) -> Self {
        Self {
            end,
            established: opened,
            received: opened,
            sent: opened,
            answered: opened,
            owes: Truth::No,
            has_ended: false,
            adopted: Truth::No,
            passed: [opened, opened],
            came: opened,
            left_out: None,
        }
    }

    /// The clocks of a session for which there may have been no slot, and which was not tracked until this time.
    fn left_out_until(self, until: Duration) -> Self {
        Self {
            adopted: self.adopted.max(Truth::Perhaps),
            left_out: Some(until),
            ..self
        }
    }

    /// The clocks if the session may have been adopted at an unknown time: see [`Clocks::adopt`].
    fn perhaps_adopted(mut self) -> Self {
        // Payload in one direction between the daemon's two queries of the socket makes both directions count as active
        // at the second query.
        let [received, sent] = self.passed;
        let latest = received.to.max(sent.to);
        let picked_up = |stamp: Span| Span {
            from: stamp.from.saturating_sub(late_ticks()),
            to: stamp.to.max(latest).saturating_add(PICKED_UP),
        };
        self.received = picked_up(self.received);
        self.sent = picked_up(self.sent);
        self.answered = picked_up(self.answered);
        self.established.to = self.established.to.max(self.received.to.min(self.sent.to));
        if self.end == End::Server {
            self.owes = Truth::Perhaps;
        }
        self
    }

    /// Whether the session may have been reset by this time.
    pub(super) fn may_be_reset(&self, book: &Book, rule: &Rule, at: Duration) -> bool {
        let has_no_place = book.resets_untracked && self.left_out.is_some();
        has_no_place || self.due(rule).from <= at
    }

    /// The clocks if payload had counted in both directions at this time.
    pub(super) const fn active_at(self, at: Span) -> Self {
        Self {
            received: at,
            sent: at,
            passed: [at, at],
            ..self
        }
    }

    /// The limits that the session may reach next under a rule.
    pub(super) fn deadlines(&self, rule: &Rule) -> Vec<Deadline> {
        let lifetime = self.lifetime(rule);
        let [response, idle] = [self.response(rule), self.idle(rule)];
        lifetime.into_iter().chain(response).chain(idle).collect()
    }

    fn lifetime(&self, rule: &Rule) -> Option<Deadline> {
        let longest = rule.lifetime?;
        let shortest = longest - longest / 100 * rule.jitter_percent;
        Some(Deadline {
            reason: "max_lifetime",
            at: Span {
                from: self.established.after(shortest).from,
                to: self.established.after(longest).to,
            },
            limit: [shortest, longest],
        })
    }

    fn response(&self, rule: &Rule) -> Option<Deadline> {
        let limit = rule.response.filter(|_| self.owes != Truth::No)?;
        Some(Deadline::since(self.received, "response_timeout", limit))
    }

    fn idle(&self, rule: &Rule) -> Option<Deadline> {
        let stands_still = rule.response.is_some() && self.owes == Truth::Yes;
        let limit = rule.idle.filter(|_| !stands_still)?;
        let activity = match rule.activity {
            Activity::Any => self.received.later(self.sent),
            Activity::Received => self.received,
            Activity::Sent => self.sent,
        };
        let since = match rule.response {
            Some(_) => activity.later(self.answered),
            None => activity,
        };
        Some(Deadline::since(since, "idle_timeout", limit))
    }

    /// The span of the time when the session reaches a limit of the rule.
    pub(super) fn due(&self, rule: &Rule) -> Span {
        let all = self.deadlines(rule);
        let from = all.iter().map(|deadline| deadline.at.from).min();
        let to_of = |found: Option<Deadline>| found.map_or(Duration::MAX, |found| found.at.to);
        let [response, idle] = [to_of(self.response(rule)), to_of(self.idle(rule))];
        // If it is unknown which of the two clocks runs, the later one may.
        let clock = match (rule.response, self.owes) {
            (Some(_), Truth::Yes) => response,
            (Some(_), Truth::Perhaps) => response.max(idle),
            _ => idle,
        };
        let tracked_from = self.left_out.unwrap_or_default();
        Span {
            from: from.unwrap_or(Duration::MAX).max(tracked_from),
            to: to_of(self.lifetime(rule)).min(clock),
        }
    }

    /// Applies payload that passed this end within the span, as far as it passed and counted.
    fn pass(&mut self, by: End, span: Span, passed: Truth, counted: Truth) {
        let later = |stamp: Span, truth| match truth {
            Truth::Yes => stamp.later(span),
            Truth::Perhaps => stamp.perhaps_later(span),
            Truth::No => stamp,
        };
        let way = usize::from(by == self.end);
        self.passed[way] = later(self.passed[way], passed);
        let counted = counted.min(passed);
        if by == self.end {
            self.answer(span, counted);
            self.sent = later(self.sent, counted);
        } else {
            self.came = later(self.came, passed);
            self.ask(span, counted);
            self.received = later(self.received, counted);
        }
    }

    /// Applies received payload, after which the server's end owes an answer.
    fn ask(&mut self, span: Span, counted: Truth) {
        let in_order = self.sent.to < span.from;
        if self.end == End::Server && counted != Truth::No && self.owes != Truth::Yes {
            let is_certain = in_order && !self.has_ended;
            self.owes = if is_certain { counted } else { Truth::Perhaps };
        }
    }

    /// Applies the FIN of this end, which ends the wait for an answer. It may be dropped and sent again, or leave while no
    /// program sees it.
    fn finish(&mut self, span: Span) {
        self.has_ended = true;
        if self.end == End::Server && self.owes != Truth::No {
            let to = span.to + FIN_LEAVES;
            self.answered = self.answered.perhaps_later(Span { to, ..span });
            self.owes = Truth::Perhaps;
        }
    }

    /// Applies sent payload, which answers the request.
    fn answer(&mut self, span: Span, counted: Truth) {
        if self.owes == Truth::No || counted == Truth::No {
            return;
        }
        let in_order = self.received.to < span.from;
        if in_order && counted == Truth::Yes && self.owes == Truth::Yes {
            self.answered = self.answered.later(span);
        } else {
            self.answered = self.answered.perhaps_later(span);
        }
        let is_paid = in_order && counted == Truth::Yes;
        self.owes = if is_paid { Truth::No } else { Truth::Perhaps };
    }

    /// Applies a restart within this window: the session is taken over from a stopped daemon, or adopted if
    /// that daemon did not know it. The socket table provides the activity in between.
    fn resume(&mut self, window: Span) {
        let before = *self;
        self.adopt(window);
        self.adopted = Truth::Perhaps;
        self.received = before.received.perhaps_later(self.received);
        self.sent = before.sent.perhaps_later(self.sent);
        self.answered = before.answered.perhaps_later(self.answered);
    }

    /// Applies an adoption within this window from the kernel's socket table. Ages have millisecond precision
    /// and count back from the end of the listing. All payload counts. The age of the oldest activity
    /// replaces the time of establishment.
    fn adopt(&mut self, window: Span) {
        // The ages are counted in ticks, and a stalled machine has late ticks.
        let rounded = |stamp: Span| Span {
            from: stamp.from.saturating_sub(late_ticks()),
            to: stamp.to.saturating_add(window.to - window.from + LAG),
        };
        let was_open = self.established.to < window.from;
        self.adopted = if was_open { Truth::Yes } else { Truth::Perhaps };
        self.established.to = window.to;
        let [received, sent] = self.passed.map(rounded);
        if was_open {
            (self.received, self.sent, self.answered) = (received, sent, sent);
        } else {
            self.received = self.received.perhaps_later(received);
            self.sent = self.sent.perhaps_later(sent);
        }
        self.answered.to = self.answered.to.max(sent.to);
        if self.has_ended {
            // The kernel does not tell when the FIN left.
            self.answered.to = self.answered.to.max(window.to);
        }
        if self.end == End::Server {
            self.owes = Truth::Perhaps;
        }
        if self.passed.iter().any(|passed| passed.to >= window.from) {
            self.pass_during_adoption(window);
        }
    }

    /// Another socket takes over the connection, which keeps its clocks. Payload that no later packet has confirmed
    /// counts as activity.
    fn inherit(&mut self, when: Span) {
        self.received = self.received.perhaps_later(self.came);
        let is_unconfirmed = |stamp: Span| stamp.to + UNCONFIRMED >= when.from;
        if self.end == End::Server && [self.came, self.sent].into_iter().any(is_unconfirmed) {
            self.owes = Truth::Perhaps;
        }
        (self.passed, self.came) = ([when, when], when);
    }

    /// Another socket takes over the connection, and the source of its clocks is unknown. They may be those of the old
    /// socket, if the kernel programs stored them. They may be the boot time, if not. They may come from an adoption
    /// until `latest`.
    fn lose(&mut self, when: Span, latest: Duration) {
        self.inherit(when);
        for stamp in [
            &mut self.established,
            &mut self.received,
            &mut self.sent,
            &mut self.answered,
        ] {
            let to = stamp.to.max(latest);
            *stamp = Span {
                from: Duration::ZERO,
                to,
            };
        }
        self.adopted = Truth::Perhaps;
        if self.end == End::Server {
            self.owes = Truth::Perhaps;
        }
    }

    /// Applies payload that passed during an adoption. Both directions may count as active at the end of the adoption.
    fn pass_during_adoption(&mut self, window: Span) {
        for stamp in [&mut self.received, &mut self.sent, &mut self.answered] {
            stamp.to = stamp.to.max(window.to);
        }
        if self.end == End::Server {
            self.owes = Truth::Perhaps;
        }
    }
}

impl Deadline {
    fn since(stamp: Span, reason: &'static str, limit: Duration) -> Self {
        Self {
            reason,
            at: stamp.after(limit),
            limit: [limit, limit],
        }
    }
}

/// A step in the life of a connection.
enum Step<'a> {
    Payload(&'a Payload),
    Adoption(&'a Adoption),
    Forged(End, Span),
    Finished(End, Span),
    Restored(Span),
}

/// The time when a session may have been adopted or taken over.
#[derive(Clone, Copy)]
struct Adoption {
    end: End,
    window: Span,
    resumes: bool,
    /// `None` if the daemon has kept the session's record, so that it needs no slot. Otherwise the result of
    /// [`left_out`].
    left_out: Option<Option<Duration>>,
}

/// A connection with the clocks of its sessions.
pub(super) struct Replay<'a> {
    connection: &'a Connection,
    timeline: &'a Timeline,
    /// The times when its sessions may have been adopted.
    adoptions: Vec<Adoption>,
    /// For each end, its clocks in chronological order.
    states: [Vec<Clocks>; 2],
    /// Payload that passed an expired session.
    pub(super) passed_late: Vec<Payload>,
    /// The number of payloads that were refused because a session had expired.
    pub(super) refused: usize,
    /// The takeovers by another socket at which the old session may have been an adopted one. The kernel does not
    /// report the end of an adopted session, so the daemon may still track it.
    pub(super) left_behind: Vec<Span>,
}

impl<'a> Replay<'a> {
    pub(super) fn of(connection: &'a Connection, timeline: &'a Timeline) -> Self {
        let adoptions = adoptions(connection, timeline);
        let start = |end| {
            let clocks = Clocks::new(end, connection.opened);
            let left_out = left_out_at_first(connection, timeline, end, &adoptions);
            vec![left_out.map_or(clocks, |until| clocks.left_out_until(until))]
        };
        let mut replay = Self {
            connection,
            timeline,
            adoptions: adoptions.clone(),
            states: End::BOTH.map(start),
            passed_late: Vec::new(),
            refused: 0,
            left_behind: Vec::new(),
        };
        let events = connection.events.iter().filter_map(|event| match event {
            Event::Payload(payload) => Some((payload.written.from, Step::Payload(payload))),
            Event::Forged(end, when) => Some((when.from, Step::Forged(*end, *when))),
            Event::Restored(when) => Some((when.from, Step::Restored(*when))),
            Event::Finished(end, when) | Event::Closed(end, when) => {
                Some((when.from, Step::Finished(*end, *when)))
            }
            _ => None,
        });
        let adoptions = adoptions.iter().map(|a| (a.window.from, Step::Adoption(a)));
        let mut steps: Vec<_> = events.chain(adoptions).collect();
        steps.sort_by_key(|(from, _)| *from);
        for (_, step) in steps {
            match step {
                Step::Payload(payload) => replay.pass(payload),
                Step::Forged(end, when) => {
                    replay.change(end, |clocks| clocks.came = clocks.came.perhaps_later(when));
                }
                Step::Finished(end, when) => {
                    replay.change(end, |clocks| clocks.finish(when));
                }
                Step::Restored(when) => replay.restore(End::Server, when),
                Step::Adoption(adoption) => {
                    let mut locks = connection.locks(adoption.end);
                    let is_locked = locks.any(|lock| lock.meets(&adoption.window));
                    replay.change(adoption.end, |clocks| {
                        if adoption.resumes {
                            clocks.resume(adoption.window);
                        } else {
                            clocks.adopt(adoption.window);
                        }
                        if let Some(left_out) = adoption.left_out {
                            clocks.left_out = left_out;
                        }
                        if is_locked {
                            // The adoption cannot query a socket that is locked at that moment, so it counts
                            // as active.
                            clocks.pass_during_adoption(adoption.window);
                        }
                    });
                }
            }
        }
        for end in End::BOTH {
            replay.add_perhaps_adopted(end);
        }
        replay
    }

    /// Adds the clocks of a session that was perhaps adopted at an unknown time. A record of an observed termination may
    /// have any of its clocks, not only the last. Only a small table leaves out observed sessions.
    fn add_perhaps_adopted(&mut self, end: End) {
        let mut changes = self.timeline.changes.iter();
        let is_small = changes.any(|change| change.book.scarce == Scarce::Table);
        let states = &mut self.states[end as usize];
        let first = if is_small { 0 } else { states.len() - 1 };
        let left_out = states[first..].iter().filter(|c| c.left_out.is_some());
        let adopted: Vec<Clocks> = left_out.map(|clocks| clocks.perhaps_adopted()).collect();
        states.extend(adopted);
    }

    /// The first clocks of an end.
    pub(super) fn first_clocks(&self, end: End) -> Clocks {
        self.states[end as usize][0]
    }

    /// The last clocks of an end.
    pub(super) fn clocks(&self, end: End) -> Clocks {
        let states = &self.states[end as usize];
        states[states.len() - 1]
    }

    /// All clocks of an end in chronological order.
    pub(super) fn all_clocks(&self, end: End) -> impl Iterator<Item = &Clocks> {
        self.states[end as usize].iter()
    }

    fn change(&mut self, end: End, change: impl FnOnce(&mut Clocks)) {
        let mut clocks = self.clocks(end);
        change(&mut clocks);
        self.states[end as usize].push(clocks);
    }

    /// Another socket takes over an end. The kernel programs store the clocks of a session when the kernel reports its
    /// end. The kernel does not report the end of an adopted session. The stored clocks are lost when the daemon ends.
    fn restore(&mut self, end: End, when: Span) {
        let port = self.connection.port;
        let mut books = self.timeline.books(when);
        let is_untracked = books.all(|book| book.rule(port, end).is_none());
        let changes = self.timeline.changes.iter().map(|change| change.when);
        let changing = changes.filter(|change| change.meets(&when));
        let latest = changing.map(|change| change.to.max(when.to) + LAG).max();
        let is_reported = self.clocks(end).adopted == Truth::No;
        self.change(end, |clocks| match latest {
            None if is_untracked => *clocks = Clocks::new(end, when),
            None if is_reported => clocks.inherit(when),
            _ => clocks.lose(when, latest.unwrap_or_default()),
        });
        if !is_reported {
            self.left_behind.push(when);
        }
    }

    fn pass(&mut self, payload: &Payload) {
        let [by_sender, by_receiver] = [payload.from, payload.from.peer()]
            .map(|end| self.connection.inside[end as usize] && self.has_expired(end, payload));
        if by_sender || by_receiver {
            match payload.arrived {
                Some(_) => self.passed_late.push(*payload),
                None => self.refused += 1,
            }
        }
        let arrived = payload.arrived.is_some();
        for end in End::BOTH {
            let stopped = by_sender || (by_receiver && end != payload.from);
            let passed = match (arrived, stopped) {
                (true, _) => Truth::Yes,
                (false, true) => Truth::No,
                (false, false) => Truth::Perhaps,
            };
            let counted = self.counts(end, payload);
            let span = self.connection.passing(payload);
            let adoptions = self.adoptions.iter().filter(|a| a.end == end);
            let windows = adoptions.map(|adoption| adoption.window);
            let during: Vec<Span> = windows.filter(|window| window.meets(&span)).collect();
            self.change(end, |clocks| {
                clocks.pass(payload.from, span, passed, counted);
                for window in during {
                    clocks.pass_during_adoption(window);
                }
            });
        }
    }

    /// Whether a session had expired when the payload was sent, under every policy that may have been in
    /// force until it passed.
    fn has_expired(&self, end: End, payload: &Payload) -> bool {
        let clocks = self.clocks(end);
        if clocks.left_out.is_some() {
            return false;
        }
        let port = self.connection.port;
        self.timeline
            .books(self.connection.passing(payload))
            .all(|book| {
                let rule = book.rule(port, end);
                rule.is_some_and(|rule| {
                    rule.action == Action::Enforce && clocks.due(rule).to <= payload.written.from
                })
            })
    }

    fn counts(&self, end: End, payload: &Payload) -> Truth {
        let port = self.connection.port;
        let counts = |rule: Option<&Rule>| match rule {
            Some(rule) if rule.counts(payload.bytes) => Truth::Yes,
            Some(_) if payload.alone => Truth::No,
            // It may share a packet with earlier payload.
            Some(_) => Truth::Perhaps,
            None => Truth::Yes,
        };
        let books = self.timeline.books(self.connection.passing(payload));
        Truth::of_all(books.map(|book| counts(book.rule(port, end))))
    }
}

/// Whether there was no slot for a session when it was established: see [`left_out`]. Each adoption needs a slot anew, so
/// lists after the first one say nothing about the time before.
fn left_out_at_first(
    connection: &Connection,
    timeline: &Timeline,
    end: End,
    adoptions: &[Adoption],
) -> Option<Duration> {
    let mut books = timeline.books(connection.opened);
    if !books.any(|book| book.may_refuse(connection.port, end)) {
        return None;
    }
    let adoptions = adoptions.iter().filter(|a| a.end == end);
    let mut anew = adoptions.filter(|adoption| adoption.left_out.is_some());
    let until = anew.next().map(|adoption| adoption.window.from);
    let span = Span {
        from: Duration::ZERO,
        to: until.unwrap_or(Duration::MAX),
    };
    left_out(connection, timeline, end, span)
}

/// For a session for which there may have been no slot at the beginning of the span: the latest time within the span at
/// which the daemon certainly did not track it, or zero. The daemon's session lists show this. `None` if a list shows
/// that the session was tracked from its establishment.
fn left_out(
    connection: &Connection,
    timeline: &Timeline,
    end: End,
    span: Span,
) -> Option<Duration> {
    let [client, _] = connection.ports;
    let ended = match connection.fate(end) {
        Fate::Open => Duration::MAX,
        Fate::Closed(when) | Fate::Ended(when) | Fate::Broken(_, when) => when.from,
    };
    let was_open = |when: Span| connection.opened.to <= when.from && when.to <= ended;
    let is_wanted = |when: Span| {
        let mut books = timeline.books(when);
        when.to <= span.to && books.all(|book| book.rule(connection.port, end).is_some())
    };
    let mut until = Duration::ZERO;
    let lists = timeline.lists.iter();
    for list in lists.filter(|list| list.when.from >= span.from) {
        match list.sessions.get(&(client, end)) {
            Some(true) => return None,
            None if was_open(list.when) && is_wanted(list.when) => {
                until = until.max(list.when.from);
            }
            _ => {}
        }
    }
    Some(until)
}

/// The times when sessions of a connection may have been adopted: a policy that tracks them replaced a policy that did
/// not.
fn adoptions(connection: &Connection, timeline: &Timeline) -> Vec<Adoption> {
    let mut found = Vec::new();
    for end in connection.sessions() {
        let tracks = |book: &Book| book.rule(connection.port, end).is_some();
        for (number, pair) in timeline.changes.windows(2).enumerate() {
            let [before, after] = [&pair[0], &pair[1]];
            let begins = !tracks(&before.book) && tracks(&after.book);
            let lived = Span {
                from: connection.opened.from,
                to: connection.lived_until(end),
            };
            // The daemon before the stop.
            let stopped = timeline.changes[..number].last().filter(|_| after.resumes);
            let is_kept = stopped.is_some_and(|stopped| tracks(&stopped.book))
                && connection.opened.to < before.when.from;
            let may_be_left_out = after.book.may_refuse(connection.port, end);
            let since = Span {
                from: after.when.from,
                to: Duration::MAX,
            };
            if begins && after.when.meets(&lived) {
                found.push(Adoption {
                    end,
                    window: after.when,
                    resumes: after.resumes,
                    left_out: (may_be_left_out && !is_kept)
                        .then(|| left_out(connection, timeline, end, since)),
                });
            }
        }
    }
    found
}
