//! The tracked sessions, when each is due, and the phase of those in an exceptional state. Pure: no clock, no I/O.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use session_enforcer_common::{Event, Session};

use super::phase::{Expired, Phase, Tried};
use crate::{
    datapath::JournalSlot,
    engine::schedule::{Group, Schedule},
};

/// A phase belongs to a session and not to a cookie, because a socket that is connected again keeps its cookie.
#[derive(Clone, Debug)]
struct Entry {
    established_ns: u64,
    phase: Phase,
}

/// The tracked sessions.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    schedule: Schedule,
    /// Number of scheduled sessions by rule id.
    sessions_of: Vec<u64>,
    phases: HashMap<u64, Entry>,
}

impl Tracker {
    /// Schedules a session; replaces an earlier schedule of the same cookie.
    pub(super) fn add(&mut self, cookie: u64, group: Group, due_ns: u64) {
        let rule_id = usize::from(group.rule);
        if self.sessions_of.len() <= rule_id {
            self.sessions_of.resize(rule_id + 1, 0);
        }
        self.sessions_of[rule_id] += 1;
        if let Some(before) = self.schedule.insert(cookie, group, due_ns) {
            self.sessions_of[usize::from(before.rule)] -= 1;
        }
    }

    /// Removes a session. If an answer of a reaper is outstanding, the phase is kept so that the answer can be
    /// recorded.
    pub(super) fn forget(&mut self, cookie: u64) {
        if let Some(group) = self.schedule.remove(cookie) {
            self.sessions_of[usize::from(group.rule)] -= 1;
        }
        let is_asked = |phase: &Phase| matches!(phase, Phase::Tried(tried) if tried.asked > 0);
        if !self.phase_of_cookie(cookie).is_some_and(is_asked) {
            self.clear_phase(cookie);
        }
    }

    /// The decision about a session whose reset had no answer or was recorded as failed. Its end must be recorded.
    pub(super) fn unrecorded(&self, cookie: u64) -> Option<Expired> {
        match self.phase_of_cookie(cookie)? {
            Phase::Tried(tried) if tried.asked > 0 => None,
            Phase::Tried(tried) if tried.unanswered > 0 || tried.error.is_some() => {
                Some(tried.expired)
            }
            _ => None,
        }
    }

    /// The phase of a session.
    pub(super) fn phase(&self, cookie: u64, session: &Session) -> Option<&Phase> {
        let entry = self.phases.get(&cookie)?;
        (entry.established_ns == session.established_ns).then_some(&entry.phase)
    }

    /// The phase of any session with this cookie.
    pub(super) fn phase_of_cookie(&self, cookie: u64) -> Option<&Phase> {
        // Skips the hash: the map is usually empty when a session ends.
        if self.phases.is_empty() {
            return None;
        }
        self.phases.get(&cookie).map(|entry| &entry.phase)
    }

    /// Sets the phase of a session.
    pub(super) fn set_phase(&mut self, cookie: u64, session: &Session, phase: Phase) {
        let established_ns = session.established_ns;
        let entry = Entry {
            established_ns,
            phase,
        };
        self.phases.insert(cookie, entry);
    }

    /// Clears the phase of a cookie.
    pub(super) fn clear_phase(&mut self, cookie: u64) {
        if !self.phases.is_empty() {
            self.phases.remove(&cookie);
        }
    }

    /// Notes that an observed session is late; returns whether this deadline is new. Returns `None` if a later decision
    /// is noted already or a reaper or sync has the session: the answer of a slow reaper is then out of date.
    pub(super) fn observe(&mut self, expired: &Expired) -> Option<bool> {
        let (reached_ns, decided_ns) = (expired.reached_ns, expired.decided_ns);
        let before = match self.phase(expired.cookie, &expired.session) {
            Some(Phase::Observed {
                reached_ns,
                decided_ns,
            }) => Some((*reached_ns, *decided_ns)),
            Some(phase) if phase.is_in_other_hands() => return None,
            _ => None,
        };
        if before.is_some_and(|(_, later_ns)| later_ns > decided_ns) {
            return None;
        }
        let phase = Phase::Observed {
            reached_ns,
            decided_ns,
        };
        self.set_phase(expired.cookie, &expired.session, phase);
        Some(before.is_none_or(|(before_ns, _)| before_ns != reached_ns))
    }

    /// Notes that a reaper is being asked to reset a session.
    pub(super) fn begin_reset(&mut self, expired: &Expired) {
        let (cookie, session) = (expired.cookie, &expired.session);
        if self.tried(cookie, session).is_none() {
            let tried = Phase::Tried(Box::new(Tried::new(*expired)));
            self.set_phase(cookie, session, tried);
        }
        if let Some(tried) = self.tried(cookie, session) {
            tried.expired = *expired;
            tried.asked += 1;
        }
    }

    /// The attempts to reset a session, if any.
    pub(super) fn tried(&mut self, cookie: u64, session: &Session) -> Option<&mut Tried> {
        let entry = self.phases.get_mut(&cookie)?;
        match &mut entry.phase {
            Phase::Tried(tried) if entry.established_ns == session.established_ns => Some(tried),
            _ => None,
        }
    }

    /// Takes the journal slot of a session for its audit record, so that nothing else frees it.
    pub(super) fn take_journal_slot(&mut self, expired: &Expired) -> Option<Arc<JournalSlot>> {
        self.tried(expired.cookie, &expired.session)?
            .journal_slot
            .take()
    }

    /// Whether an answer is outstanding, except from resets that hang.
    pub(super) fn is_resetting(&self) -> bool {
        let is_it = |entry: &Entry| matches!(&entry.phase, Phase::Tried(t) if t.asked > 0 && !t.is_quarantined);
        self.phases.values().any(is_it)
    }

    /// Number of sessions whose reset hangs.
    pub(super) fn quarantined(&self) -> usize {
        let hangs = |entry: &&Entry| matches!(&entry.phase, Phase::Tried(t) if t.is_quarantined && t.asked > 0);
        self.phases.values().filter(hangs).count()
    }

    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.schedule.len()
    }

    /// Number of sessions by rule id.
    pub(super) fn sessions_of(&self) -> &[u64] {
        &self.sessions_of
    }

    /// Whether the session is scheduled.
    pub(super) fn contains(&self, cookie: u64) -> bool {
        self.schedule.contains(cookie)
    }

    /// The group of a scheduled session.
    pub(super) fn group(&self, cookie: u64) -> Option<Group> {
        self.schedule.group(cookie)
    }

    /// All sessions with their groups.
    pub(super) fn sessions(&self) -> impl Iterator<Item = (u64, Group)> {
        self.schedule.sessions()
    }

    /// Whether the namespace has scheduled sessions.
    pub(super) fn has_sessions_in(&self, netns_cookie: u64) -> bool {
        self.schedule.has_sessions_in(netns_cookie)
    }

    /// Sets the due time of a session.
    pub(super) fn rearm(&mut self, cookie: u64, due_ns: u64) {
        self.schedule.rearm(cookie, due_ns);
    }

    /// A FIN or RST has passed on a session whose end is not reported; its socket is checked at `due_ns`.
    pub(super) fn may_end(&mut self, cookie: u64, due_ns: u64) {
        self.hasten(cookie, due_ns);
        if let Some(Entry {
            phase: Phase::Adopting { may_have_ended },
            ..
        }) = self.phases.get_mut(&cookie)
        {
            *may_have_ended = true;
        }
    }

    /// Moves the due time of a session forward, if `due_ns` is earlier.
    pub(super) fn hasten(&mut self, cookie: u64, due_ns: u64) {
        self.schedule.hasten(cookie, due_ns);
    }

    /// Due time of the next session.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        self.schedule.next_due_ns()
    }

    /// Takes up to `count` sessions that are due at `now_ns`. They stay scheduled without a due time.
    pub(super) fn take_due(&mut self, now_ns: u64, count: usize) -> Vec<u64> {
        let due = std::iter::from_fn(|| self.schedule.take_due(now_ns));
        due.take(count).collect()
    }
}

/// The group of a session, from its record.
pub(super) fn group_of(session: &Session) -> Group {
    Group {
        netns_cookie: session.netns_cookie,
        rule: session.rule,
    }
}

/// Groups sessions by network namespace.
pub(super) fn by_namespace<T>(
    sessions: impl IntoIterator<Item = T>,
    record: impl Fn(&T) -> &Session,
) -> BTreeMap<u64, Vec<T>> {
    let mut groups: BTreeMap<u64, Vec<T>> = BTreeMap::new();
    for session in sessions {
        let netns_cookie = record(&session).netns_cookie;
        groups.entry(netns_cookie).or_default().push(session);
    }
    groups
}

/// The group of a session, from its event.
pub(super) fn group_of_event(event: &Event) -> Group {
    Group {
        netns_cookie: event.netns_cookie,
        rule: event.rule,
    }
}

#[cfg(test)]
mod tests {
    use session_enforcer_common::Reason;

    use super::*;
    use crate::engine::fixtures::session;

    fn expired(established_ns: u64) -> Expired {
        let session = Session {
            rule: 2,
            established_ns,
            ..session()
        };
        Expired {
            cookie: 7,
            session,
            reason: Reason::IdleTimeout,
            deadline_ns: 1,
            reached_ns: 1,
            decided_ns: 1,
            limit_ns: 1,
            idle_since_ns: 0,
        }
    }

    #[test]
    fn sessions_are_counted_by_their_rule_also_where_one_takes_another_s_cookie() {
        let mut tracker = Tracker::default();
        let group = |rule| Group {
            netns_cookie: 3,
            rule,
        };
        tracker.add(7, group(2), 10);
        tracker.add(8, group(2), 20);
        assert_eq!(tracker.sessions_of(), [0, 0, 2]);
        tracker.add(7, group(0), 30);
        assert_eq!((tracker.sessions_of(), tracker.len()), (&[1, 0, 1][..], 2));
        assert_eq!(tracker.take_due(20, 9), [8]);
        tracker.forget(7);
        tracker.forget(7);
        assert_eq!(tracker.sessions_of(), [0, 0, 1]);
        assert!(tracker.has_sessions_in(3) && !tracker.contains(7));
    }

    #[test]
    fn a_phase_belongs_to_one_session_of_a_cookie() {
        let (first, second) = (expired(100), expired(200));
        let mut tracker = Tracker::default();
        tracker.begin_reset(&first);
        assert!(tracker.phase(7, &first.session).is_some());
        assert!(tracker.phase(7, &second.session).is_none());
        assert!(tracker.tried(7, &second.session).is_none());
        tracker.begin_reset(&second);
        assert!(tracker.phase(7, &first.session).is_none());
        assert!(
            tracker
                .phase_of_cookie(7)
                .is_some_and(Phase::is_in_other_hands)
        );
    }

    #[test]
    fn a_session_is_in_other_hands_while_it_is_adopted_or_a_reaper_was_asked() {
        let mut tracker = Tracker::default();
        let asked = expired(100);
        let mut is_in_other_hands = |phase| {
            tracker.set_phase(7, &asked.session, phase);
            tracker.phase_of_cookie(7).unwrap().is_in_other_hands()
        };
        assert!(is_in_other_hands(Phase::Adopting {
            may_have_ended: false
        }));
        assert!(!is_in_other_hands(Phase::Reset));
        let mut tried = Tried::new(asked);
        assert!(!is_in_other_hands(Phase::Tried(Box::new(tried.clone()))));
        tried.asked = 1;
        assert!(is_in_other_hands(Phase::Tried(Box::new(tried))));
    }

    #[test]
    fn the_group_and_the_due_time_of_a_session_are_known() {
        let mut tracker = Tracker::default();
        assert_eq!((tracker.next_due_ns(), tracker.len()), (None, 0));
        let group = group_of(&expired(100).session);
        let rule_and_netns = (group.rule, group.netns_cookie);
        assert_eq!(rule_and_netns, (2, 3));
        tracker.add(7, group, 50);
        tracker.add(8, group, 60);
        assert!(tracker.contains(7) && !tracker.contains(9));
        assert_eq!(tracker.group(7), Some(group));
        assert!(tracker.group(9).is_none());
        let mut sessions: Vec<_> = tracker.sessions().collect();
        sessions.sort_unstable_by_key(|(cookie, _)| *cookie);
        assert_eq!(sessions, [(7, group), (8, group)]);
        assert!(tracker.has_sessions_in(3) && !tracker.has_sessions_in(4));
        assert_eq!(tracker.next_due_ns(), Some(50));
        tracker.rearm(7, 70);
        assert_eq!(tracker.next_due_ns(), Some(60));
        // `hasten` only moves a session to an earlier time.
        tracker.hasten(7, 40);
        tracker.hasten(8, 90);
        assert_eq!(tracker.take_due(60, 1), [7]);
        assert_eq!(tracker.take_due(60, 1), [8]);
        tracker.may_end(8, 65);
        assert_eq!(tracker.next_due_ns(), Some(65));
        // The counts by rule grow as needed.
        let first = Group { rule: 0, ..group };
        let mut tracker = Tracker::default();
        tracker.add(1, first, 1);
        assert_eq!(tracker.sessions_of(), [1]);
        tracker.add(2, group, 1);
        tracker.add(3, first, 1);
        assert_eq!(tracker.sessions_of(), [2, 0, 1]);
    }

    #[test]
    fn each_namespace_has_its_sessions_in_the_order_in_which_they_came() {
        let of = |netns_cookie, established_ns| Session {
            netns_cookie,
            ..expired(established_ns).session
        };
        let (first, second, third) = (of(4, 9), of(3, 8), of(4, 7));
        let groups = by_namespace([first, second, third], |session| session);
        let expected = [(3, vec![second]), (4, vec![first, third])];
        assert_eq!(groups, BTreeMap::from(expected));
    }

    #[test]
    fn an_attempt_that_is_under_way_outlives_the_session() {
        let asked = expired(100);
        let mut tracker = Tracker::default();
        tracker.begin_reset(&asked);
        // The event of the session's end comes before the reaper's answer.
        assert_eq!(tracker.unrecorded(7), None);
        tracker.forget(7);
        let tried = tracker.tried(7, &asked.session).unwrap();
        assert_eq!(tried.asked, 1);
        (tried.asked, tried.unanswered) = (0, 1);
        // No answer is outstanding any more.
        assert_eq!(tracker.unrecorded(7), Some(asked));
        tracker.forget(7);
        assert!(tracker.phase_of_cookie(7).is_none());
    }

    #[test]
    fn a_session_that_was_recorded_as_failed_and_ends_by_itself_is_recorded_as_gone() {
        let refused = expired(100);
        let mut tracker = Tracker::default();
        tracker.begin_reset(&refused);
        let tried = tracker.tried(7, &refused.session).unwrap();
        (tried.asked, tried.error) = (0, Some("refused".to_owned()));
        assert_eq!(tracker.unrecorded(7), Some(refused));
        tracker.forget(7);
        assert!(tracker.phase_of_cookie(7).is_none());
    }

    #[test]
    fn a_reset_is_unrecorded_if_its_answer_was_lost_or_an_error_was_recorded() {
        let mut tracker = Tracker::default();
        let late = expired(100);
        for (asked, unanswered, error, is_unrecorded) in [
            (0, 0, None, false),
            (0, 1, None, true),
            (0, 0, Some("refused"), true),
            // The answer to the last attempt is to come.
            (1, 1, None, false),
            (1, 0, Some("refused"), false),
        ] {
            let tried = Tried {
                asked,
                unanswered,
                error: error.map(str::to_owned),
                ..Tried::new(late)
            };
            tracker.set_phase(7, &late.session, Phase::Tried(Box::new(tried)));
            assert_eq!(tracker.unrecorded(7), is_unrecorded.then_some(late));
        }
    }

    #[test]
    fn a_reset_of_an_earlier_daemon_has_lost_its_answer_and_keeps_its_slot() {
        let mut tracker = Tracker::default();
        let left = expired(100);
        let tried = Tried::unanswered(left, JournalSlot::in_file());
        tracker.set_phase(7, &left.session, Phase::Tried(Box::new(tried)));
        assert_eq!(tracker.unrecorded(7), Some(left));
        assert!(tracker.take_journal_slot(&expired(200)).is_none());
        assert!(tracker.take_journal_slot(&left).is_some());
        assert!(tracker.take_journal_slot(&left).is_none());
    }

    #[test]
    fn only_a_reset_that_hangs_is_quarantined() {
        let hung = expired(100);
        let mut tracker = Tracker::default();
        tracker.begin_reset(&hung);
        assert_eq!((tracker.quarantined(), tracker.is_resetting()), (0, true));
        let tried = tracker.tried(7, &hung.session).unwrap();
        tried.is_quarantined = true;
        assert_eq!((tracker.quarantined(), tracker.is_resetting()), (1, false));
        tracker.tried(7, &hung.session).unwrap().asked = 0;
        assert_eq!(tracker.quarantined(), 0);
    }

    #[test]
    fn a_deadline_is_observed_once_and_what_was_decided_earlier_comes_too_late() {
        let at = |reached_ns, decided_ns| Expired {
            reached_ns,
            decided_ns,
            ..expired(100)
        };
        let mut tracker = Tracker::default();
        assert_eq!(tracker.observe(&at(10, 10)), Some(true));
        assert_eq!(tracker.observe(&at(10, 20)), Some(false));
        assert_eq!(tracker.observe(&at(30, 30)), Some(true));
        // A late answer of a slow reaper.
        assert_eq!(tracker.observe(&at(10, 25)), None);
        assert_eq!(tracker.observe(&at(30, 30)), Some(false));
        // Under another policy it may have reached its limit earlier.
        assert_eq!(tracker.observe(&at(5, 40)), Some(true));
        // Another phase of the session does not prevent the observation.
        let late = Phase::LateByPolicy {
            changed_ns: 45,
            reached_ns: 5,
        };
        tracker.set_phase(7, &expired(100).session, late);
        assert_eq!(tracker.observe(&at(5, 46)), Some(true));
        // Another policy enforces, and the session is being reset.
        tracker.begin_reset(&at(5, 50));
        assert_eq!(tracker.observe(&at(5, 45)), None);
        assert!(tracker.is_resetting());
        // A later session of the same socket.
        assert_eq!(
            tracker.observe(&Expired {
                session: expired(200).session,
                ..at(5, 1)
            }),
            Some(true)
        );
    }

    #[test]
    fn a_session_that_is_adopted_remembers_that_it_may_have_ended() {
        let adopted = expired(100).session;
        let mut tracker = Tracker::default();
        tracker.set_phase(
            7,
            &adopted,
            Phase::Adopting {
                may_have_ended: false,
            },
        );
        tracker.may_end(7, 5);
        let phase = tracker.phase(7, &adopted);
        assert!(matches!(
            phase,
            Some(Phase::Adopting {
                may_have_ended: true
            })
        ));
        tracker.clear_phase(7);
        tracker.may_end(7, 5);
        assert!(tracker.phase_of_cookie(7).is_none());
    }
}
