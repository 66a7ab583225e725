//! When to look at which session: cookies by the time that they are due. Pure: no clock, no I/O.
//!
//! A session's entry is at the earliest moment at which the session can have expired. Activity
//! moves the true deadline and not the entry: when the entry is due, the engine reads the session
//! and re-arms it. So a busy session costs one look per timeout, and a packet costs nothing here.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

/// Sessions by due time.
///
/// A removed or re-armed session leaves its old entry in the heap, where it is recognised by its
/// time and skipped. The heap is rebuilt when such entries outnumber the live ones.
#[derive(Debug, Default)]
pub struct Schedule {
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    live: HashMap<u64, Entry>,
    namespaces: Namespaces,
}

/// What a session belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Place of its rule.
    pub rule: u16,
}

/// There is one for each session of the host, so it is small: a namespace is known by its slot.
#[derive(Clone, Copy, Debug)]
struct Entry {
    due_ns: u64,
    slot: u32,
    rule: u16,
}

const _: () = assert!(size_of::<Entry>() == 16);

/// The namespaces that have sessions, each in a slot that is used again when it has none.
#[derive(Debug, Default)]
struct Namespaces {
    /// Cookie of the namespace, and how many sessions it has.
    slots: Vec<(u64, u32)>,
    free: Vec<u32>,
    by_cookie: HashMap<u64, u32>,
}

impl Namespaces {
    /// Counts a session in; the slot of its namespace.
    fn enter(&mut self, netns_cookie: u64) -> u32 {
        let Self {
            slots,
            free,
            by_cookie,
        } = self;
        let slot = *by_cookie.entry(netns_cookie).or_insert_with(|| {
            free.pop().unwrap_or_else(|| {
                slots.push((0, 0));
                slots.len() as u32 - 1
            })
        });
        let (cookie, sessions) = &mut slots[slot as usize];
        *cookie = netns_cookie;
        *sessions += 1;
        slot
    }

    /// Counts a session out.
    fn leave(&mut self, slot: u32) {
        let (cookie, sessions) = &mut self.slots[slot as usize];
        *sessions -= 1;
        if *sessions == 0 {
            self.by_cookie.remove(cookie);
            self.free.push(slot);
        }
    }

    fn cookie(&self, slot: u32) -> u64 {
        self.slots[slot as usize].0
    }
}

impl Schedule {
    /// An empty schedule.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there is no session.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Whether the session is scheduled.
    pub fn contains(&self, cookie: u64) -> bool {
        self.live.contains_key(&cookie)
    }

    /// Every session with what it belongs to.
    pub fn sessions(&self) -> impl Iterator<Item = (u64, Group)> {
        self.live
            .iter()
            .map(|(cookie, entry)| (*cookie, self.group_of(entry)))
    }

    /// What a scheduled session belongs to.
    pub fn group(&self, cookie: u64) -> Option<Group> {
        self.live.get(&cookie).map(|entry| self.group_of(entry))
    }

    fn group_of(&self, entry: &Entry) -> Group {
        Group {
            netns_cookie: self.namespaces.cookie(entry.slot),
            rule: entry.rule,
        }
    }

    /// Whether a session of this network namespace is scheduled.
    pub fn has_sessions_in(&self, netns_cookie: u64) -> bool {
        self.namespaces.by_cookie.contains_key(&netns_cookie)
    }

    /// Schedules a session, in place of what was scheduled for the same cookie; what that belonged
    /// to.
    pub fn insert(&mut self, cookie: u64, group: Group, due_ns: u64) -> Option<Group> {
        let slot = self.namespaces.enter(group.netns_cookie);
        let rule = group.rule;
        let before = self.live.insert(cookie, Entry { due_ns, slot, rule });
        if before.is_none_or(|entry| entry.due_ns != due_ns) {
            self.heap.push(Reverse((due_ns, cookie)));
            self.compact();
        }
        before.map(|entry| self.leave(&entry))
    }

    /// Takes the entry out of its namespace; what it belonged to.
    fn leave(&mut self, entry: &Entry) -> Group {
        let group = self.group_of(entry);
        self.namespaces.leave(entry.slot);
        group
    }

    /// Moves a session to another time; a session that is not scheduled stays so.
    pub fn rearm(&mut self, cookie: u64, due_ns: u64) {
        let Some(entry) = self.live.get_mut(&cookie) else {
            return;
        };
        // The entry that was taken as due has left the heap, so the new one is always pushed.
        entry.due_ns = due_ns;
        self.heap.push(Reverse((due_ns, cookie)));
        self.compact();
    }

    /// Moves a session to an earlier time; one that is due before that stays as it is.
    pub fn hasten(&mut self, cookie: u64, due_ns: u64) {
        if self
            .live
            .get(&cookie)
            .is_some_and(|entry| due_ns < entry.due_ns)
        {
            self.rearm(cookie, due_ns);
        }
    }

    /// Forgets a session, and returns what it belonged to.
    pub fn remove(&mut self, cookie: u64) -> Option<Group> {
        let entry = self.live.remove(&cookie)?;
        self.compact();
        Some(self.leave(&entry))
    }

    /// When the next session is due.
    pub fn next_due_ns(&mut self) -> Option<u64> {
        while let Some(&Reverse((due_ns, cookie))) = self.heap.peek() {
            if self.is_current(cookie, due_ns) {
                return Some(due_ns);
            }
            self.heap.pop();
        }
        None
    }

    /// Takes one session that is due at `now_ns`. It stays scheduled, without a time, until it is
    /// re-armed or removed: the caller must do one of both.
    pub fn take_due(&mut self, now_ns: u64) -> Option<u64> {
        if self.next_due_ns()? > now_ns {
            return None;
        }
        let Reverse((_, cookie)) = self.heap.pop()?;
        if let Some(entry) = self.live.get_mut(&cookie) {
            entry.due_ns = u64::MAX;
        }
        Some(cookie)
    }

    fn is_current(&self, cookie: u64, due_ns: u64) -> bool {
        self.live.get(&cookie).is_some_and(|e| e.due_ns == due_ns)
    }

    fn compact(&mut self) {
        const SLACK: usize = 1024;
        if self.heap.len() > 2 * self.live.len() + SLACK {
            self.rebuild();
        }
    }

    /// Leaves one entry for each session. Sorting out what is not current would not do: a session
    /// that was moved and moved back, as by a reload, has current entries twice, and the next
    /// removal would find the heap as full again.
    fn rebuild(&mut self) {
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        let live = self.live.iter();
        entries.extend(live.map(|(cookie, entry)| Reverse((entry.due_ns, *cookie))));
        self.heap = entries.into();
    }
}

#[cfg(test)]
mod tests {
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
        let mut s = Schedule::new();
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
        let mut s = Schedule::new();
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
        let mut s = Schedule::new();
        s.insert(1, group(7), 10);
        s.hasten(1, 20);
        s.hasten(2, 5);
        assert_eq!(s.next_due_ns(), Some(10));
        s.hasten(1, 5);
        assert_eq!(all_due(&mut s, 5), [1]);
    }

    #[test]
    fn a_cookie_that_comes_again_has_the_new_time_only() {
        let mut s = Schedule::new();
        s.insert(1, group(7), 10);
        assert_eq!(s.insert(1, group(8), 20), Some(group(7)));
        assert_eq!(s.insert(1, group(8), 20), Some(group(8)));
        assert_eq!(all_due(&mut s, 100), [1]);
        assert_eq!(s.len(), 1);
    }

    #[test]
    fn a_namespace_is_known_while_it_has_sessions_and_its_slot_is_used_again() {
        let mut s = Schedule::new();
        for netns in 1..=3 {
            s.insert(netns, group(netns), 10);
            s.insert(netns + 10, group(netns), 10);
        }
        s.remove(2);
        assert!(s.has_sessions_in(2));
        s.remove(12);
        assert!(!s.has_sessions_in(2));
        s.insert(4, group(4), 10);
        assert_eq!(s.namespaces.slots.len(), 3);
        // A session that comes again in another namespace has left the first.
        s.insert(4, group(1), 10);
        assert!(!s.has_sessions_in(4));
        assert_eq!(s.group(4), Some(group(1)));
        assert_eq!(s.group(13), Some(group(3)));
    }

    #[test]
    fn many_short_sessions_leave_no_heap_behind() {
        let mut s = Schedule::new();
        for cookie in 0..1_000_000 {
            s.insert(cookie, group(1), 1_000 + cookie);
            s.remove(cookie);
        }
        assert!(s.is_empty());
        assert!(s.heap.len() <= 1024);
    }

    #[test]
    fn a_session_that_is_moved_away_and_back_has_one_entry_after_the_rebuilding() {
        let mut s = Schedule::new();
        for cookie in 0..100 {
            s.insert(cookie, group(1), 1_000 + cookie);
            s.insert(cookie, group(1), u64::MAX);
            s.rearm(cookie, 1_000 + cookie);
        }
        s.rebuild();
        assert_eq!(s.heap.len(), 100);
        assert_eq!(s.take_due(1_000), Some(0));
        assert_eq!(s.take_due(1_000), None);
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_map_does(
            operations in prop::collection::vec((0u8..4, 0u64..20, 0u64..100), 1..200),
        ) {
            let mut schedule = Schedule::new();
            let mut model = BTreeMap::new();
            for (operation, cookie, time) in operations {
                match operation {
                    0 => {
                        schedule.insert(cookie, group(1), time);
                        model.insert(cookie, time);
                    }
                    1 => {
                        schedule.rearm(cookie, time);
                        model.entry(cookie).and_modify(|t| *t = time);
                    }
                    2 => {
                        prop_assert_eq!(schedule.remove(cookie).is_some(), model.remove(&cookie).is_some());
                    }
                    _ => {
                        let mut due = all_due(&mut schedule, time);
                        due.sort_unstable();
                        let expected: Vec<u64> =
                            model.iter().filter(|(_, t)| **t <= time).map(|(c, _)| *c).collect();
                        prop_assert_eq!(&due, &expected);
                        for cookie in due {
                            schedule.remove(cookie);
                            model.remove(&cookie);
                        }
                    }
                }
                prop_assert_eq!(schedule.next_due_ns(), model.values().min().copied());
                prop_assert_eq!(schedule.len(), model.len());
            }
        }
    }
}
