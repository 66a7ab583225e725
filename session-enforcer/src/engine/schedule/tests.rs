//! Tests of the schedule, with examples and against a simple model.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn group(netns_cookie: u64) -> Group {
    Group {
        netns_cookie,
        rule: 0,
    }
}

fn all_due(schedule: &mut Schedule, now_ns: u64) -> Vec<u64> {
    std::iter::from_fn(|| schedule.take_due(now_ns)).collect()
}

#[test]
fn sessions_come_in_the_order_of_their_time_and_not_before_it() {
    let mut s = Schedule::default();
    for (cookie, due) in [(1, 30), (2, 10), (3, 20)] {
        assert_eq!(s.insert(cookie, group(1), due), None);
    }
    assert_eq!(s.next_due_ns(), Some(10));
    assert!(all_due(&mut s, 9).is_empty());
    assert_eq!(all_due(&mut s, 20), [2, 3]);
    assert_eq!(s.next_due_ns(), Some(30));
}

#[test]
fn a_session_that_was_moved_or_removed_is_not_due_at_its_old_time() {
    let mut s = Schedule::default();
    s.insert(1, group(7), 10);
    s.insert(2, group(8), 10);
    s.rearm(1, 50);
    assert_eq!(s.remove(2), Some(group(8)));
    assert_eq!(s.remove(2), None);
    assert!(all_due(&mut s, 49).is_empty());
    assert_eq!(all_due(&mut s, 50), [1]);
}

#[test]
fn a_session_is_hastened_and_never_delayed() {
    let mut s = Schedule::default();
    s.insert(1, group(7), 10);
    s.hasten(1, 20);
    s.hasten(2, 5);
    assert_eq!(s.next_due_ns(), Some(10));
    s.hasten(1, 5);
    assert_eq!(all_due(&mut s, 5), [1]);
}

#[test]
fn a_cookie_that_comes_again_has_the_new_time_only() {
    let mut s = Schedule::default();
    s.insert(1, group(7), 10);
    assert_eq!(s.insert(1, group(8), 20), Some(group(7)));
    assert_eq!(s.insert(1, group(8), 20), Some(group(8)));
    assert_eq!(all_due(&mut s, 100), [1]);
    assert_eq!(s.len(), 1);
}

#[test]
fn a_session_that_was_taken_has_no_time_until_it_is_given_one() {
    let mut s = Schedule::default();
    for cookie in 1..=3 {
        s.insert(cookie, group(7), 10);
    }
    assert_eq!(all_due(&mut s, 10).len(), 3);
    assert_eq!((s.len(), s.next_due_ns()), (3, None));
    s.hasten(1, 90);
    s.rearm(2, 80);
    s.hasten(3, u64::MAX);
    assert_eq!(all_due(&mut s, u64::MAX), [2, 1]);
    assert!(s.contains(3));
}

#[test]
fn a_session_that_is_due_at_the_end_of_time_is_never_due() {
    let mut s = Schedule::default();
    s.insert(1, group(7), u64::MAX);
    assert_eq!(s.next_due_ns(), None);
    assert_eq!(s.take_due(u64::MAX), None);
    s.rearm(1, 10);
    s.rearm(1, u64::MAX);
    assert_eq!(s.take_due(u64::MAX), None);
    assert_eq!(s.group(1), Some(group(7)));
}

#[test]
fn a_namespace_is_known_while_it_has_sessions() {
    let mut s = Schedule::default();
    for netns in 1..=3 {
        s.insert(netns, group(netns), 10);
        s.insert(netns + 10, group(netns), 10);
    }
    s.remove(2);
    assert!(s.has_sessions_in(2));
    s.remove(12);
    assert!(!s.has_sessions_in(2));
    s.insert(4, group(4), 10);
    // A session that is scheduled again in another namespace has left the first one.
    s.insert(4, group(1), 10);
    assert!(!s.has_sessions_in(4));
    assert_eq!(s.group(4), Some(group(1)));
    assert_eq!(s.group(13), Some(group(3)));
}

#[test]
fn many_short_sessions_leave_nothing_behind() {
    let mut s = Schedule::default();
    for cookie in 0..1_000_000 {
        s.insert(cookie, group(1), 1_000 + cookie);
        s.remove(cookie);
    }
    assert_eq!(s.len(), 0);
    assert_eq!(s.queue.waiting(), 0);
    assert!(allocated(&s) < 1024, "{}", allocated(&s));
}

#[test]
fn a_session_that_is_moved_away_and_back_is_due_once() {
    let mut s = Schedule::default();
    for cookie in 0..100 {
        s.insert(cookie, group(1), 1_000 + cookie);
        s.insert(cookie, group(1), u64::MAX);
        s.rearm(cookie, 1_000 + cookie);
    }
    assert_eq!(s.queue.waiting(), 100);
    assert_eq!(s.take_due(1_000), Some(0));
    assert_eq!(s.take_due(1_000), None);
}

/// A schedule of many sessions with unordered times.
fn crowd(count: u64) -> Schedule {
    let mut s = Schedule::default();
    for cookie in 0..count {
        s.insert(cookie, group(1), cookie * 7919 % count);
    }
    s
}

fn allocated(schedule: &Schedule) -> usize {
    schedule.sessions.allocated() + schedule.queue.allocated()
}

#[test]
fn a_session_takes_at_most_48_bytes() {
    for count in [100_000, 500_000] {
        let mut s = crowd(count);
        // Sessions that are closed, opened or checked must leave no stale data.
        for cookie in 0..count {
            s.remove(cookie);
            s.insert(cookie + count, group(1), cookie);
            s.rearm(cookie + count, count + cookie);
        }
        let each = allocated(&s) as f64 / count as f64;
        assert!(each <= 48.0, "{count} sessions: {each} B each");
    }
}

#[test]
fn the_memory_of_a_crowd_comes_back_when_it_has_gone() {
    let mut s = crowd(100_000);
    let before = allocated(&s);
    for cookie in 0..100_000 {
        if cookie % 100 != 0 {
            s.remove(cookie);
        }
    }
    assert!(allocated(&s) < before / 10, "{} of {before}", allocated(&s));
    assert_sound(&s);
    assert_eq!(all_due(&mut s, 100_000).len(), 1_000);
}

/// Checks that the parts of a schedule agree.
fn assert_sound(schedule: &Schedule) {
    schedule.sessions.assert_sound();
    schedule.queue.assert_sound(schedule.len());
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Insert(u64, Group, u64),
    Rearm(u64, u64),
    Hasten(u64, u64),
    Remove(u64),
    TakeDue(u64),
    RemoveDue(u64),
}

fn operations() -> impl Strategy<Value = Operation> {
    let cookie = || 0u64..20;
    let group = (0u64..3, 0u16..3).prop_map(|(netns_cookie, rule)| Group { netns_cookie, rule });
    let due_ns = || prop_oneof![9 => 0u64..100, 1 => Just(u64::MAX)];
    prop_oneof![
        4 => (cookie(), group, due_ns()).prop_map(|(c, g, t)| Operation::Insert(c, g, t)),
        2 => (cookie(), due_ns()).prop_map(|(c, t)| Operation::Rearm(c, t)),
        2 => (cookie(), due_ns()).prop_map(|(c, t)| Operation::Hasten(c, t)),
        2 => cookie().prop_map(Operation::Remove),
        2 => due_ns().prop_map(Operation::TakeDue),
        1 => (0u64..40).prop_map(Operation::RemoveDue),
    ]
}

/// A model of the schedule: group and time by session.
#[derive(Debug, Default)]
struct Model(BTreeMap<u64, (Group, u64)>);

impl Model {
    fn next_due_ns(&self) -> Option<u64> {
        let times = self.0.values().map(|(_, due_ns)| *due_ns);
        times.filter(|due_ns| *due_ns != u64::MAX).min()
    }

    fn rearm(&mut self, cookie: u64, due_ns: u64) {
        self.0.entry(cookie).and_modify(|(_, due)| *due = due_ns);
    }

    /// Checks that the schedule took one of the sessions that are due first, and takes it from the model.
    fn take(&mut self, taken: Option<u64>, now_ns: u64) {
        let due_ns = self.next_due_ns().filter(|due_ns| *due_ns <= now_ns);
        assert_eq!(taken.map(|cookie| self.0[&cookie].1), due_ns);
        if let Some(cookie) = taken {
            self.rearm(cookie, u64::MAX);
        }
    }
}

fn apply(operation: Operation, schedule: &mut Schedule, model: &mut Model) {
    match operation {
        Operation::Insert(cookie, group, due_ns) => {
            let before = model.0.insert(cookie, (group, due_ns));
            let returned = schedule.insert(cookie, group, due_ns);
            assert_eq!(returned, before.map(|(group, _)| group));
        }
        Operation::Rearm(cookie, due_ns) => {
            schedule.rearm(cookie, due_ns);
            model.rearm(cookie, due_ns);
        }
        Operation::Hasten(cookie, due_ns) => {
            schedule.hasten(cookie, due_ns);
            let moved = model.0.entry(cookie);
            moved.and_modify(|(_, due)| *due = due_ns.min(*due));
        }
        Operation::Remove(cookie) => {
            let before = model.0.remove(&cookie);
            assert_eq!(schedule.remove(cookie), before.map(|(group, _)| group));
        }
        Operation::TakeDue(now_ns) => model.take(schedule.take_due(now_ns), now_ns),
        Operation::RemoveDue(now_ns) => {
            while let Some(cookie) = schedule.take_due(now_ns) {
                model.take(Some(cookie), now_ns);
                assert!(schedule.remove(cookie).is_some());
                model.0.remove(&cookie);
            }
            model.take(None, now_ns);
        }
    }
}

fn assert_same(schedule: &Schedule, model: &Model) {
    assert_eq!(schedule.len(), model.0.len());
    assert_eq!(schedule.next_due_ns(), model.next_due_ns());
    for cookie in 0..20 {
        let group = model.0.get(&cookie).map(|(group, _)| *group);
        assert_eq!(schedule.group(cookie), group);
        assert_eq!(schedule.contains(cookie), group.is_some());
    }
    for netns_cookie in 0..4 {
        let mut groups = model.0.values().map(|(group, _)| group.netns_cookie);
        let expected = groups.any(|netns| netns == netns_cookie);
        assert_eq!(schedule.has_sessions_in(netns_cookie), expected);
    }
    let sessions: BTreeMap<u64, Group> = schedule.sessions().collect();
    let expected = model.0.iter().map(|(cookie, (group, _))| (*cookie, *group));
    assert!(sessions.into_iter().eq(expected));
}

proptest! {
    #[test]
    fn behaves_as_a_plain_map_does(operations in prop::collection::vec(operations(), 1..200)) {
        let mut schedule = Schedule::default();
        let mut model = Model::default();
        for operation in operations {
            apply(operation, &mut schedule, &mut model);
            assert_sound(&schedule);
            assert_same(&schedule, &model);
        }
    }
}
