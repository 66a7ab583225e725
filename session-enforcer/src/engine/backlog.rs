//! What a sync has to repair, and when the next sync begins. Pure.

use std::{collections::HashSet, time::Duration};

use super::backoff::{Backoff, Need};
use crate::report::health::DegradedCause;

/// The health message while a rule has its maximum of sessions.
pub(super) const FULL_RULE: &str = "a rule has reached its max_sessions, so further sessions of it are not tracked until one ends: raise its \
     max_sessions";

/// The health message while new cgroups are not reported.
const UNWATCHED: &str = "the kernel allows no further inotify watch, so connections of a new cgroup that a rule names are tracked up to a \
     second late: raise fs.inotify.max_user_instances or fs.inotify.max_user_watches";

/// Known gaps in the tracking, and the state of their repair.
#[derive(Debug)]
pub(super) struct Backlog {
    /// Whether events were lost since the last sync began.
    pub(super) events: bool,
    /// Sessions that the kernel programs have refused since they were loaded, because the table had no slot.
    pub(super) refused: u64,
    /// Sessions that they have refused because the rule had reached its maximum.
    pub(super) refused_by_rules: u64,
    /// The values of both counters for which a sync was done.
    dealt_with: [u64; 2],
    /// Sessions for which the last sync found no slot.
    pub(super) left_out: usize,
    /// Rules of which the last sync left sessions out because they had reached their maximum.
    full_rules: HashSet<u16>,
    /// Whether a session of such a rule has ended since.
    has_room_in_rules: bool,
    /// Whether sessions without a slot are reset (`daemon.on_full`).
    pub(super) resets: bool,
    /// Whether cgroups that match patterns have no room in the match table, so that their sessions match no rule.
    pub(super) has_left_out_cgroups: bool,
    /// Whether cgroups of the rules that come are not reported, and only found by lookups.
    pub(super) is_unwatched: bool,
    /// Sessions without a slot that the last sync gave to reapers; the next sync shows whether they are gone.
    pub(super) to_reset: usize,
    /// Namespaces, or groups of sockets, that the last sync could not query.
    pub(super) unreached: usize,
    /// While a sync is in progress: the values of both counters at its beginning.
    under_way: Option<[u64; 2]>,
    backoff: Backoff,
}

impl Backlog {
    /// A backlog with nothing to repair.
    pub(super) fn from(now_ns: u64) -> Self {
        Self {
            events: false,
            refused: 0,
            refused_by_rules: 0,
            dealt_with: [0; 2],
            left_out: 0,
            full_rules: HashSet::new(),
            has_room_in_rules: false,
            resets: false,
            has_left_out_cgroups: false,
            is_unwatched: false,
            to_reset: 0,
            unreached: 0,
            under_way: None,
            backoff: Backoff::from(now_ns),
        }
    }

    /// Sets the interval between routine syncs.
    pub(super) fn set_interval(&mut self, interval: Duration) {
        self.backoff.set_interval(interval);
    }

    fn has_sessions(&self) -> bool {
        !self.resets && self.refused != self.dealt_with[0] || self.left_out > 0
    }

    fn has_sessions_of_full_rules(&self) -> bool {
        !self.resets && self.refused_by_rules != self.dealt_with[1] || !self.full_rules.is_empty()
    }

    /// Whether sessions were refused that must be reset and that no sync has found yet.
    fn has_sessions_to_reset(&self) -> bool {
        self.resets && self.dealt_with != [self.refused, self.refused_by_rules]
    }

    /// Notes the beginning of a sync, which finds all untracked connections and ended sessions.
    pub(super) fn begin(&mut self) {
        (self.left_out, self.to_reset, self.unreached) = (0, 0, 0);
        self.full_rules.clear();
        (self.has_room_in_rules, self.events) = (false, false);
        self.under_way = Some([self.refused, self.refused_by_rules]);
    }

    /// Notes the end of a sync and the processor time that it used.
    pub(super) fn end(&mut self, now_ns: u64, used: Duration) {
        if let Some(refused) = self.under_way.take() {
            self.dealt_with = refused;
        }
        let left = [
            self.left_out,
            self.full_rules.len(),
            self.to_reset,
            self.unreached,
        ];
        let is_nothing_left = left == [0; 4];
        self.backoff.ended(now_ns, used, is_nothing_left);
    }

    /// Notes a session that a sync left out because its rule had reached its maximum.
    pub(super) fn left_out_by_rule(&mut self, rule: u16) {
        self.full_rules.insert(rule);
    }

    /// The rules of which the last sync left sessions out.
    pub(super) fn full_rules(&self) -> impl Iterator<Item = u16> {
        self.full_rules.iter().copied()
    }

    /// Notes that a session of a rule has ended.
    pub(super) fn closed(&mut self, rule: u16) {
        self.has_room_in_rules |= self.full_rules.contains(&rule);
    }

    /// The need for a sync; `has_room` is whether the session table has a free slot.
    pub(super) fn need(&self, has_room: bool) -> Need {
        let has_sessions_with_room = self.has_sessions() && has_room || self.has_room_in_rules;
        if self.events || has_sessions_with_room || self.has_sessions_to_reset() {
            Need::Mend
        } else if self.has_sessions()
            || self.has_sessions_of_full_rules()
            || self.to_reset > 0
            || self.unreached > 0
        {
            Need::TryAgain
        } else {
            Need::Routine
        }
    }

    /// When the next sync begins; `None` while one is in progress.
    pub(super) fn next_sync_ns(&self, has_room: bool) -> Option<u64> {
        let need = self.need(has_room);
        self.under_way.is_none().then(|| self.backoff.next_ns(need))
    }

    /// The health messages for what is known to be missing.
    pub(super) fn problems(
        &self,
        has_room: bool,
    ) -> impl Iterator<Item = (DegradedCause, Option<&'static str>)> + use<> {
        let untracked = match (self.has_sessions(), has_room) {
            (false, _) if self.has_sessions_of_full_rules() => Some(FULL_RULE),
            (false, _) if self.has_left_out_cgroups => Some(
                "the match table is full, so sessions of some cgroups that match a pattern are not tracked: name a cgroup \
                 above them, or use fewer prefixes and ports in the rules; the log has the number of cgroups",
            ),
            (false, _) if self.is_unwatched => Some(UNWATCHED),
            (false, _) => None,
            (true, true) => Some(
                "some sessions had no slot in the session table and are not tracked; the daemon adopts them in a moment",
            ),
            (true, false) => Some(
                "the session table is full, so some sessions are not tracked until there is room: raise \
                 daemon.max_sessions",
            ),
        };
        let namespace = (self.unreached > 0).then_some(
            "the sockets of a network namespace cannot be listed, so its sessions may not be tracked; the log has \
             the namespace and the reason",
        );
        // While a sync is in progress, the messages of the previous one stay: the new sync may find the same problems.
        let is_over = self.under_way.is_none();
        let both = [
            (DegradedCause::Untracked, untracked),
            (DegradedCause::Namespace, namespace),
        ];
        both.into_iter()
            .filter(move |(_, what)| is_over || what.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(backlog: &mut Backlog) {
        backlog.end(0, Duration::ZERO);
    }

    #[test]
    fn a_session_that_was_refused_with_room_in_the_map_is_looked_for_soon() {
        let mut backlog = Backlog::from(0);
        assert_eq!(backlog.need(true), Need::Routine);
        // The table was full at that time.
        backlog.refused = 1;
        assert_eq!(backlog.need(true), Need::Mend);
        assert_eq!(backlog.need(false), Need::TryAgain);
        backlog.begin();
        assert_eq!(backlog.next_sync_ns(true), None);
        // The sync in progress may have missed a session that is refused now.
        backlog.refused = 2;
        end(&mut backlog);
        assert_eq!(backlog.need(true), Need::Mend);
        backlog.begin();
        end(&mut backlog);
        assert_eq!(backlog.need(true), Need::Routine);
        assert!(backlog.next_sync_ns(true).is_some());
    }

    #[test]
    fn a_sync_comes_at_the_interval_and_sooner_the_more_is_wrong() {
        const S: u64 = 1_000_000_000;
        let mut backlog = Backlog::from(100 * S);
        backlog.set_interval(Duration::from_secs(600));
        assert_eq!(backlog.next_sync_ns(true), Some(700 * S));
        backlog.events = true;
        assert_eq!(backlog.next_sync_ns(true), Some(101 * S));
        // Unrepaired problems are retried at growing intervals.
        for (unreached, left_out) in [(1, 0), (0, 1)] {
            let mut backlog = Backlog::from(100 * S);
            backlog.set_interval(Duration::from_secs(600));
            backlog.begin();
            (backlog.unreached, backlog.left_out) = (unreached, left_out);
            backlog.end(200 * S, Duration::ZERO);
            assert_eq!(backlog.need(false), Need::TryAgain);
            assert_eq!(backlog.next_sync_ns(false), Some(202 * S));
        }
        backlog.begin();
        backlog.end(200 * S, Duration::ZERO);
        assert_eq!(backlog.next_sync_ns(true), Some(800 * S));
    }

    #[test]
    fn problems_are_reported_until_a_sync_has_ended_without_them() {
        let mut backlog = Backlog::from(0);
        let none = [
            (DegradedCause::Untracked, None),
            (DegradedCause::Namespace, None),
        ];
        assert!(backlog.problems(true).eq(none));
        backlog.refused = 1;
        let said: Vec<_> = backlog.problems(true).collect();
        assert!(said[0].1.is_some_and(|what| what.contains("in a moment")));
        backlog.unreached = 1;
        let said: Vec<_> = backlog.problems(false).collect();
        assert!(said[0].1.is_some_and(|what| what.contains("is full")));
        assert!(said[1].1.is_some_and(|what| what.contains("namespace")));
        // During a sync only problems that still exist are reported.
        backlog.begin();
        let said: Vec<_> = backlog.problems(true).collect();
        assert!(said.len() == 1 && said[0].0 == DegradedCause::Untracked);
        end(&mut backlog);
        assert!(backlog.problems(true).eq(none));
    }

    #[test]
    fn sessions_left_out_are_tried_again_soon_if_there_is_room() {
        let mut backlog = Backlog::from(0);
        backlog.begin();
        backlog.left_out = 3;
        end(&mut backlog);
        assert_eq!(backlog.need(false), Need::TryAgain);
        assert_eq!(backlog.need(true), Need::Mend);
        let said: Vec<_> = backlog.problems(false).collect();
        assert!(said[0].1.is_some_and(|what| what.contains("max_sessions")));
        assert_eq!(said[1], (DegradedCause::Namespace, None));
    }

    #[test]
    fn sessions_of_a_full_rule_are_tried_again_and_said() {
        let mut backlog = Backlog::from(0);
        backlog.refused_by_rules = 2;
        assert_eq!(backlog.need(true), Need::TryAgain);
        let said: Vec<_> = backlog.problems(true).collect();
        assert!(
            said[0]
                .1
                .is_some_and(|what| what.contains("its max_sessions"))
        );
        backlog.begin();
        backlog.left_out_by_rule(3);
        end(&mut backlog);
        assert_eq!(backlog.need(true), Need::TryAgain);
        // A closing makes room in its own rule.
        backlog.closed(4);
        assert_eq!(backlog.need(true), Need::TryAgain);
        backlog.closed(3);
        assert_eq!(backlog.need(true), Need::Mend);
        backlog.begin();
        end(&mut backlog);
        assert_eq!(backlog.need(true), Need::Routine);
    }

    #[test]
    fn cgroups_without_room_in_the_match_table_are_said_until_there_are_none() {
        let mut backlog = Backlog::from(0);
        backlog.has_left_out_cgroups = true;
        for _ in 0..2 {
            let said: Vec<_> = backlog.problems(true).collect();
            let (cause, what) = said[0];
            assert_eq!(cause, DegradedCause::Untracked);
            assert!(what.is_some_and(|what| what.contains("match table is full")));
            // A sync does not find their sessions.
            assert_eq!(backlog.need(true), Need::Routine);
            backlog.begin();
        }
        end(&mut backlog);
        backlog.has_left_out_cgroups = false;
        assert_eq!(
            backlog.problems(true).next(),
            Some((DegradedCause::Untracked, None))
        );
    }

    #[test]
    fn refused_sessions_to_reset_are_searched_for_soon_and_are_no_problem() {
        for count in [Backlog::refused_of, Backlog::refused_by_rules_of] {
            let mut backlog = Backlog::from(0);
            backlog.resets = true;
            *count(&mut backlog) = 1;
            assert_eq!(backlog.need(false), Need::Mend);
            assert!(backlog.problems(false).all(|(_, what)| what.is_none()));
            backlog.begin();
            end(&mut backlog);
            assert_eq!(backlog.need(false), Need::Routine);
            // The reset may not have succeeded yet.
            backlog.begin();
            backlog.to_reset = 1;
            end(&mut backlog);
            assert_eq!(backlog.need(false), Need::TryAgain);
            assert!(backlog.problems(false).all(|(_, what)| what.is_none()));
            // Sessions of observing rules are left out and not reset.
            backlog.begin();
            backlog.left_out = 1;
            end(&mut backlog);
            assert_eq!(backlog.need(false), Need::TryAgain);
        }
    }

    impl Backlog {
        fn refused_of(&mut self) -> &mut u64 {
            &mut self.refused
        }

        fn refused_by_rules_of(&mut self) -> &mut u64 {
            &mut self.refused_by_rules
        }
    }

    #[test]
    fn lost_events_are_made_up_for_soon_and_a_namespace_is_tried_again() {
        let mut backlog = Backlog::from(0);
        backlog.events = true;
        assert_eq!(backlog.need(false), Need::Mend);
        backlog.begin();
        assert_eq!(backlog.need(true), Need::Routine);
        backlog.unreached = 1;
        end(&mut backlog);
        assert_eq!(backlog.need(true), Need::TryAgain);
        // The earlier message stays until the next sync has ended.
        backlog.begin();
        assert_eq!(backlog.problems(true).count(), 0);
    }
}
