//! Network namespaces whose resets take much processor time. Root of a namespace can make its resets slow: by many packet
//! filter rules, or by a socket hash table with one bucket. Such a namespace has one batch at a time, beside the regular
//! batches, so that other namespaces do not wait for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
};

/// How long a namespace counts as slow after a batch that took long.
const SLOW_FOR_NS: u64 = 10_000_000_000;

/// Maximum number of namespaces that are remembered.
const MAX_NAMESPACES: usize = 4_096;

/// Maximum number of slow namespaces that have a batch at the same time. More would leave others no processor.
const MAX_TURNS: usize = 4;

#[derive(Debug, Default)]
pub(super) struct SlowNamespaces {
    /// The batches that took long, by namespace.
    noted: HashMap<u64, Noted>,
    /// The namespaces that have their turn.
    busy: HashSet<u64>,
    /// Cookies of the sessions that wait for a turn, by namespace. They have no due time.
    waiting: BTreeMap<u64, BTreeSet<u64>>,
    /// The namespace whose sessions were released last.
    last: u64,
}

#[derive(Debug)]
struct Noted {
    until_ns: u64,
    /// The first batch may have taken long because the machine's host held up the processor.
    is_second: bool,
}

impl SlowNamespaces {
    /// Notes that a batch of the namespace took long. Returns whether the namespace counts as slow from now on.
    pub(super) fn note(&mut self, netns_cookie: u64, now_ns: u64) -> bool {
        if self.noted.len() >= MAX_NAMESPACES {
            self.noted.retain(|_, noted| noted.until_ns > now_ns);
        }
        let (was_noted, was_slow) = match self.noted.get(&netns_cookie) {
            Some(noted) if noted.until_ns > now_ns => (true, noted.is_second),
            _ => (false, false),
        };
        if self.noted.len() < MAX_NAMESPACES {
            let noted = Noted {
                until_ns: now_ns + SLOW_FOR_NS,
                is_second: was_noted,
            };
            self.noted.insert(netns_cookie, noted);
        }
        was_noted && !was_slow
    }

    /// Forgets a namespace whose batch did not take long.
    pub(super) fn forget(&mut self, netns_cookie: u64) {
        self.noted.remove(&netns_cookie);
    }

    pub(super) fn contains(&self, netns_cookie: u64, now_ns: u64) -> bool {
        let noted = self.noted.get(&netns_cookie);
        noted.is_some_and(|noted| noted.is_second && noted.until_ns > now_ns)
    }

    /// Begins the turn of a namespace. Returns whether it has one.
    pub(super) fn begin_turn(&mut self, netns_cookie: u64) -> bool {
        self.busy.len() < MAX_TURNS && self.busy.insert(netns_cookie)
    }

    /// Has sessions wait until their namespace can have a turn.
    pub(super) fn wait(&mut self, netns_cookie: u64, cookies: impl Iterator<Item = u64>) {
        self.waiting
            .entry(netns_cookie)
            .or_default()
            .extend(cookies);
    }

    /// Ends the turn.
    pub(super) fn end_turn(&mut self, netns_cookie: u64) {
        self.busy.remove(&netns_cookie);
    }

    /// Returns up to `count` waiting sessions of one namespace that can have a turn; empty if there is none. Round robin
    /// over the namespaces. A caller that does not begin a turn may call again.
    pub(super) fn next(&mut self, count: usize) -> Vec<u64> {
        if self.busy.len() == MAX_TURNS {
            return Vec::new();
        }
        let after = (Bound::Excluded(self.last), Bound::Unbounded);
        let in_turn = self.waiting.range(after).chain(&self.waiting);
        let mut in_turn = in_turn.map(|(netns, _)| *netns);
        let Some(netns) = in_turn.find(|netns| !self.busy.contains(netns)) else {
            return Vec::new();
        };
        self.last = netns;
        let waiting = self.waiting.entry(netns).or_default();
        let next = std::iter::from_fn(|| waiting.pop_first())
            .take(count)
            .collect();
        if waiting.is_empty() {
            self.waiting.remove(&netns);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_slow_for_a_while_after_the_second_batch_that_took_long() {
        let mut slow = SlowNamespaces::default();
        assert!(!slow.note(1, 5));
        assert!(!slow.contains(1, 5));
        assert!(slow.note(1, 6));
        assert!(!slow.note(1, 7));
        assert!(slow.contains(1, 6 + SLOW_FOR_NS));
        assert!(!slow.contains(1, 7 + SLOW_FOR_NS));
        assert!(!slow.note(1, 7 + SLOW_FOR_NS));
        assert!(slow.note(1, 8 + SLOW_FOR_NS));
        slow.forget(1);
        assert!(!slow.contains(1, 8 + SLOW_FOR_NS));
    }

    #[test]
    fn not_very_many_namespaces_are_remembered() {
        let mut slow = SlowNamespaces::default();
        for netns in 0..2 * MAX_NAMESPACES as u64 {
            slow.note(netns, 0);
        }
        assert_eq!(slow.noted.len(), MAX_NAMESPACES);
        slow.note(0, SLOW_FOR_NS);
        assert_eq!(slow.noted.len(), 1);
    }

    #[test]
    fn a_namespace_has_one_turn_and_not_too_many_have_one() {
        let mut slow = SlowNamespaces::default();
        assert!(slow.begin_turn(1));
        assert!(!slow.begin_turn(1));
        for other in 2..=MAX_TURNS as u64 {
            assert!(slow.begin_turn(other));
        }
        assert!(!slow.begin_turn(100));
        slow.wait(100, [1].into_iter());
        assert!(slow.next(2).is_empty());
        slow.end_turn(1);
        assert_eq!(slow.next(2), [1]);
        assert!(slow.begin_turn(100));
    }

    /// Whether those that go on begin a turn or not.
    #[test]
    fn every_waiting_session_goes_on_once_and_no_namespace_keeps_another_waiting() {
        let mut slow = SlowNamespaces::default();
        assert!(slow.begin_turn(7));
        slow.wait(7, [71].into_iter());
        slow.wait(8, [81, 82, 83].into_iter());
        slow.wait(8, [83].into_iter());
        slow.wait(9, [91].into_iter());
        assert_eq!(slow.next(2), [81, 82]);
        assert_eq!(slow.next(2), [91]);
        assert_eq!(slow.next(2), [83]);
        assert!(slow.next(2).is_empty());
        slow.end_turn(7);
        assert_eq!(slow.next(2), [71]);
        assert!(slow.next(2).is_empty() && slow.waiting.is_empty());
    }
}
