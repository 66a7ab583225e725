//! Session map, schedule and sockets compared while the daemon runs: after events were lost, after
//! sessions could not be tracked, and at a slow interval. What was missed is adopted, what has ended
//! is dropped, each is counted.
//!
//! A [`survey`](crate::survey) lists the sockets on a thread of its own. What it found is taken in
//! here bit by bit, so that no session waits for its deadline meanwhile.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
use session_enforcer_common::{ErrorKind, Session};

use super::{
    adoption::Adopting,
    enforcer::{Enforcer, Look, group_of},
    pace::Need,
};
use crate::{
    adopt::Listeners,
    bpf::{Adoption, BpfError},
    cgroup::{Cgroup, Scope},
    clock::monotonic_ns,
    health::Trouble,
    metrics::Repair,
    sock_diag::{MAX_BATCH, Socket, Target},
    survey::{Found, Reach},
};

/// A comparison that is under way.
pub(super) struct Comparison {
    /// Sessions that the kernel programs had refused when it began.
    refused: u64,
    adopting: Adopting,
    /// By namespace, sessions that were scheduled when it began and whose sockets were not listed
    /// so far.
    unseen: HashMap<u64, HashSet<u64>>,
    /// The namespace whose sockets come now.
    netns_cookie: u64,
    listeners: Listeners,
    /// Sessions whose sockets a whole list does not have.
    missing: Vec<u64>,
    is_full: bool,
}

/// What the daemon knows to have missed, and what became of it.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// Whether events were lost since a comparison began.
    pub(super) events: bool,
    /// Sessions that the kernel programs refused since they were loaded.
    refused: u64,
    /// As many of them as a comparison has dealt with.
    dealt_with: u64,
    /// Sessions that the last adoption or comparison found no room for.
    pub(super) left_out: usize,
    /// Namespaces, or sockets of one, that the last adoption or comparison could not ask about.
    pub(super) unreached: usize,
}

impl Missed {
    fn sessions(&self) -> bool {
        self.refused != self.dealt_with || self.left_out > 0
    }

    /// An adoption begins, which finds what is not tracked. How many sessions the kernel programs have
    /// refused so far.
    pub(super) fn begin_adoption(&mut self) -> u64 {
        (self.left_out, self.unreached) = (0, 0);
        self.refused
    }

    /// A comparison begins, which also finds what has ended.
    fn begin_comparison(&mut self) -> u64 {
        self.events = false;
        self.begin_adoption()
    }

    /// It has ended. It began when the kernel programs had refused so many sessions.
    pub(super) fn end(&mut self, refused: u64) {
        self.dealt_with = refused;
    }

    /// Why there is to be a comparison, where the session map has room for another session or not.
    fn need(&self, has_room: bool) -> Need {
        if self.events || self.sessions() && has_room {
            Need::Mend
        } else if self.sessions() || self.unreached > 0 {
            Need::TryAgain
        } else {
            Need::Routine
        }
    }

    fn is_nothing_left(&self) -> bool {
        self.left_out == 0 && self.unreached == 0
    }
}

/// When.
impl Enforcer {
    /// When the next comparison begins; none while one is under way.
    pub fn next_comparison_ns(&self) -> Option<u64> {
        match self.comparison {
            Some(_) => None,
            None => Some(self.pace.next_ns(self.missed.need(self.has_room()))),
        }
    }

    /// How far a comparison goes that begins now: where nothing is known to be wrong, not to every
    /// thread and descriptor of the host.
    pub fn reach(&self, all_namespaces: bool) -> Reach {
        match (all_namespaces, self.missed.need(self.has_room())) {
            (false, _) => Reach::Own,
            (true, Need::Routine) => Reach::Usual,
            (true, Need::Mend | Need::TryAgain) => Reach::Every,
        }
    }

    fn has_room(&self) -> bool {
        self.schedule.len() < self.capacity
    }

    /// Notes what the kernel programs could not track.
    ///
    /// # Errors
    ///
    /// Where their counters cannot be read.
    pub(super) fn note_refusals(&mut self) -> Result<(), BpfError> {
        self.missed.refused = self.kernel.error_count(ErrorKind::MapFull)?;
        self.note_missed();
        Ok(())
    }

    pub(super) fn note_missed(&mut self) {
        let is_settled = self.comparison.is_none();
        let untracked = match (self.missed.sessions(), self.has_room()) {
            (false, _) => None,
            (true, true) => Some(
                "sessions that a rule matches were refused by the session map and are not tracked; \
                 they are picked up in a moment",
            ),
            (true, false) => Some(
                "sessions that a rule matches are not tracked, the session map is full: raise \
                 daemon.max_sessions; they are picked up when there is room",
            ),
        };
        // Until a comparison has ended, what the one before it left may be left by this one too.
        if is_settled || untracked.is_some() {
            self.health.set(Trouble::Untracked, untracked);
        }
        let namespace = (self.missed.unreached > 0).then_some(
            "sockets of a network namespace cannot be listed, its sessions may not be tracked; the \
             log says which and why",
        );
        if is_settled || namespace.is_some() {
            self.health.set(Trouble::Namespace, namespace);
        }
    }

    /// Notes whether the programs still see the connections that they are meant to see.
    pub fn note_attachment(&mut self, cgroup: &Cgroup) {
        let what = if cgroup.is_gone() {
            Some(
                "the cgroup of daemon.cgroup was removed: connections of one that is made anew are \
                 not tracked; restart the daemon",
            )
        } else if !self.kernel.is_attached() {
            Some(
                "the programs were detached by someone else: no session is tracked any more; \
                 restart the daemon",
            )
        } else {
            None
        };
        self.health.set(Trouble::Detached, what);
    }
}

/// The comparison.
impl Enforcer {
    /// Begins a comparison with the survey that has just been started.
    pub fn begin_comparison(&mut self) {
        let mut unseen: HashMap<u64, HashSet<u64>> = HashMap::new();
        for (cookie, group) in self.schedule.sessions() {
            unseen.entry(group.netns_cookie).or_default().insert(cookie);
        }
        self.comparison = Some(Comparison {
            refused: self.missed.begin_comparison(),
            adopting: self.adopting(Scope::Only(HashSet::new())),
            unseen,
            netns_cookie: 0,
            listeners: Listeners::default(),
            missing: Vec::new(),
            is_full: false,
        });
    }

    /// Whether a comparison is under way: it ends when all is done, and where connections are
    /// adopted, under a new policy or in a new cgroup.
    pub fn is_comparing(&self) -> bool {
        self.comparison.is_some()
    }

    /// Whether there are sessions to look at before the comparison goes on.
    pub fn has_missing(&self) -> bool {
        let comparison = self.comparison.as_ref();
        comparison.is_some_and(|comparison| !comparison.missing.is_empty())
    }

    /// Takes in what the survey found.
    ///
    /// # Errors
    ///
    /// Where the session map cannot be read or written.
    pub fn compare(&mut self, found: Found) -> Result<()> {
        let Some(mut comparison) = self.comparison.take() else {
            return Ok(());
        };
        match found {
            Found::Scope(Ok(scope)) => comparison.adopting.scope = scope,
            // Then there is only to see which sessions have ended.
            Found::Scope(Err(error)) => tracing::warn!("no connections are adopted: {error}"),
            Found::Namespace {
                cookie,
                path,
                listeners,
            } => {
                self.namespaces.note(cookie, path);
                self.note_cgroups(&mut comparison.adopting, &listeners)?;
                comparison.listeners = Listeners::among(&listeners);
                comparison.netns_cookie = cookie;
            }
            Found::Sessions(sockets) => self.compare_sockets(&mut comparison, &sockets)?,
            Found::WholeNamespace => {
                let unseen = comparison.unseen.remove(&comparison.netns_cookie);
                comparison.missing.extend(unseen.into_iter().flatten());
                self.close_if_unused(comparison.netns_cookie);
            }
            Found::Unlisted(error) => self.unlisted(&error),
            Found::End { used } => {
                self.end_comparison(&comparison, used);
                return Ok(());
            }
        }
        self.comparison = Some(comparison);
        Ok(())
    }

    /// The survey cannot be had, or ended before its time.
    pub fn break_off_comparison(&mut self, error: &str) {
        self.unlisted(error);
        match self.comparison.take() {
            Some(comparison) => self.end_comparison(&comparison, Duration::ZERO),
            None => self.pace.ended(monotonic_ns(), Duration::ZERO, false),
        }
    }

    fn unlisted(&mut self, error: &str) {
        self.unreached();
        tracing::warn!("sockets cannot be compared with the sessions: {error}");
    }

    fn end_comparison(&mut self, comparison: &Comparison, used: Duration) {
        self.missed.end(comparison.refused);
        let all_mended = self.missed.is_nothing_left();
        self.pace.ended(monotonic_ns(), used, all_mended);
        self.note_missed();
    }

    fn compare_sockets(&mut self, comparison: &mut Comparison, sockets: &[Socket]) -> Result<()> {
        if let Some(unseen) = comparison.unseen.get_mut(&comparison.netns_cookie) {
            for socket in sockets.iter().filter(|socket| !socket.is_mini) {
                unseen.remove(&socket.target.cookie);
            }
        }
        let is_unknown = |s: &&Socket| !self.schedule.contains(s.target.cookie);
        let unknown: Vec<Socket> = sockets.iter().filter(is_unknown).copied().collect();
        self.note_cgroups(&mut comparison.adopting, &unknown)?;
        let adopter = comparison.adopting.adopter();
        let wanted = unknown
            .iter()
            .filter(|socket| adopter.wants(socket, &comparison.listeners));
        let targets: Vec<Target> = wanted.map(|socket| socket.target).collect();
        let mut picked_up = Vec::new();
        for target in targets {
            if let Some(session) = self.pick_up(comparison, &target)? {
                picked_up.push((target, session));
            }
        }
        if picked_up.is_empty() {
            return Ok(());
        }
        // A packet that came before its session was there may not be counted by the socket yet.
        self.kernel.wait_for_programs();
        for (target, mut session) in picked_up {
            let now = self.seen_now(comparison, &target);
            if self.confirm(target.cookie, &mut session, now.as_ref())? {
                self.add_adopted(target.cookie, &session);
                self.metrics.repaired(Repair::Missed);
            }
        }
        Ok(())
    }

    /// Puts a connection that was missed into the session map, as it is now; the session, if it is new
    /// there.
    fn pick_up(&mut self, comparison: &mut Comparison, target: &Target) -> Result<Option<Session>> {
        if comparison.is_full {
            self.missed.left_out += 1;
            return Ok(None);
        }
        let Some(session) = self.seen_now(comparison, target) else {
            return Ok(None);
        };
        Ok(match self.kernel.adopt(target.cookie, &session)? {
            Adoption::Inserted => Some(session),
            // It opened a moment ago: its event will come.
            Adoption::Known => None,
            Adoption::Full => {
                self.missed.left_out += 1;
                // Both of its buckets may be full where the table is not.
                comparison.is_full = !self.has_room();
                None
            }
        })
    }

    /// The session of a socket as it is now; none where it has ended or cannot be asked about.
    fn seen_now(&mut self, comparison: &Comparison, target: &Target) -> Option<Session> {
        let netns_cookie = comparison.netns_cookie;
        let looked = self.namespaces.get(netns_cookie);
        let looked = looked
            .map_err(anyhow::Error::from)
            .and_then(|diag| Ok(diag.look(target)?));
        let now_ns = monotonic_ns();
        match looked {
            Ok(socket) => {
                let (adopter, listeners) = (comparison.adopting.adopter(), &comparison.listeners);
                adopter.session(&socket?, listeners, netns_cookie, now_ns)
            }
            Err(error) => {
                self.unlisted(&format!("{error:#}"));
                self.namespaces.reopen(netns_cookie);
                None
            }
        }
    }

    /// Looks at some of the sessions whose sockets were not listed. All events that the kernel had
    /// sent by the time of the list have been read.
    ///
    /// # Errors
    ///
    /// Where the session map cannot be read or written.
    pub fn look_at_missing(&mut self) -> Result<()> {
        for _ in 0..MAX_BATCH {
            let comparison = self.comparison.as_mut();
            let Some(cookie) = comparison.and_then(|comparison| comparison.missing.pop()) else {
                return Ok(());
            };
            if self.schedule.contains(cookie) {
                self.look_at(cookie)?;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, cookie: u64) -> Result<()> {
        match self.kernel.session(cookie)? {
            // A list may leave out a socket while others come and go.
            Some(session) => {
                if matches!(self.look(cookie, &session), Some(Look::Gone)) {
                    self.drop_stale(cookie, &session)?;
                }
            }
            None => {
                self.metrics.repaired(Repair::Unreported);
                self.forget(cookie);
            }
        }
        Ok(())
    }

    /// Schedules a session that was adopted.
    pub(super) fn add_adopted(&mut self, cookie: u64, session: &Session) {
        let policy = self.book.rules[usize::from(session.rule)].policy;
        let due_ns = policy.first_deadline_ns(session.established_ns);
        self.add(cookie, group_of(session), due_ns);
        self.metrics.adopted();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_was_refused_with_room_in_the_map_is_looked_for_soon() {
        let mut missed = Missed::default();
        assert_eq!(missed.need(true), Need::Routine);
        // It was full then.
        missed.refused = 1;
        assert_eq!(missed.need(true), Need::Mend);
        assert_eq!(missed.need(false), Need::TryAgain);
        let refused = missed.begin_comparison();
        // Another one, while the comparison is under way, may have come too late for it.
        missed.refused = 2;
        missed.end(refused);
        assert_eq!(missed.need(true), Need::Mend);
        let refused = missed.begin_comparison();
        missed.end(refused);
        assert_eq!(missed.need(true), Need::Routine);
    }

    #[test]
    fn what_found_no_room_is_tried_again_and_soon_where_there_is_room() {
        let mut missed = Missed::default();
        let refused = missed.begin_adoption();
        missed.left_out = 3;
        missed.end(refused);
        assert!(!missed.is_nothing_left());
        assert_eq!(missed.need(false), Need::TryAgain);
        assert_eq!(missed.need(true), Need::Mend);
    }

    #[test]
    fn lost_events_are_made_up_for_soon_and_a_namespace_is_tried_again() {
        let mut missed = Missed {
            events: true,
            ..Missed::default()
        };
        assert_eq!(missed.need(false), Need::Mend);
        // What has ended is not found by an adoption.
        let refused = missed.begin_adoption();
        missed.end(refused);
        assert_eq!(missed.need(true), Need::Mend);
        let refused = missed.begin_comparison();
        missed.unreached = 1;
        missed.end(refused);
        assert!(!missed.is_nothing_left());
        assert_eq!(missed.need(true), Need::TryAgain);
    }
}
