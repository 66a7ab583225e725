//! Late sessions that wait until others give something up: room for a reset that may hang, or a turn. They are not due
//! meanwhile, so that very many of them cost nothing. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
};

/// The waiting sessions by what they wait for.
#[derive(Debug)]
pub(super) struct Waiting<K> {
    /// Deadline and cookie of each. No queue is empty.
    queues: BTreeMap<K, BTreeSet<(u64, u64)>>,
    /// Those sessions and the released ones, by cookie, until they are removed.
    sessions: HashMap<u64, Session<K>>,
    /// The queue that released sessions last.
    last: Option<K>,
}

#[derive(Debug)]
struct Session<K> {
    queue: K,
    deadline_ns: u64,
    /// When it had to wait first.
    since_ns: u64,
}

impl<K> Default for Waiting<K> {
    fn default() -> Self {
        Self {
            queues: BTreeMap::new(),
            sessions: HashMap::new(),
            last: None,
        }
    }
}

impl<K: Clone + Ord> Waiting<K> {
    /// Has a session wait. Returns when it had to wait first.
    pub(super) fn add(&mut self, queue: K, cookie: u64, deadline_ns: u64, now_ns: u64) -> u64 {
        let since_ns = self.remove(cookie).unwrap_or(now_ns);
        // Sessions of a queue share its key.
        let known = self.queues.get_key_value(&queue);
        let queue = known.map_or(queue, |(known, _)| known.clone());
        let sessions = self.queues.entry(queue.clone()).or_default();
        sessions.insert((deadline_ns, cookie));
        let session = Session {
            queue,
            deadline_ns,
            since_ns,
        };
        self.sessions.insert(cookie, session);
        since_ns
    }

    /// Removes a session. Returns when it had to wait first, if it had to.
    pub(super) fn remove(&mut self, cookie: u64) -> Option<u64> {
        // Skips the hash: the map is usually empty when a session ends.
        if self.sessions.is_empty() {
            return None;
        }
        let session = self.sessions.remove(&cookie)?;
        if let Some(sessions) = self.queues.get_mut(&session.queue) {
            sessions.remove(&(session.deadline_ns, cookie));
            if sessions.is_empty() {
                self.queues.remove(&session.queue);
            }
        }
        Some(session.since_ns)
    }

    /// What a session waits for, or waited for last.
    pub(super) fn queue_of(&self, cookie: u64) -> Option<&K> {
        if self.sessions.is_empty() {
            return None;
        }
        Some(&self.sessions.get(&cookie)?.queue)
    }

    /// Releases up to `count` sessions of a queue that may go on, those with the earliest deadlines. Round robin over the
    /// queues.
    pub(super) fn release(&mut self, count: usize, may_go_on: impl Fn(&K) -> bool) -> Vec<u64> {
        let after = self.last.take().map_or(Bound::Unbounded, Bound::Excluded);
        let in_turn = self.queues.range((after, Bound::Unbounded));
        let mut in_turn = in_turn.chain(&self.queues).map(|(queue, _)| queue);
        let Some(queue) = in_turn.find(|queue| may_go_on(queue)).cloned() else {
            return Vec::new();
        };
        let mut released = Vec::new();
        if let Some(sessions) = self.queues.get_mut(&queue) {
            let first = std::iter::from_fn(|| sessions.pop_first());
            released.extend(first.take(count).map(|(_, cookie)| cookie));
            if sessions.is_empty() {
                self.queues.remove(&queue);
            }
        }
        self.last = Some(queue);
        released
    }

    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.sessions.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_go_on_by_their_deadlines_and_no_queue_keeps_another_waiting() {
        let mut waiting = Waiting::default();
        for (queue, cookie, deadline_ns) in
            [(8, 81, 3), (8, 82, 1), (8, 83, 2), (9, 91, 5), (7, 71, 9)]
        {
            assert_eq!(waiting.add(queue, cookie, deadline_ns, 10), 10);
        }
        let may_go_on = |queue: &u64| *queue != 7;
        assert_eq!(waiting.release(2, may_go_on), [82, 83]);
        assert_eq!(waiting.release(2, may_go_on), [91]);
        assert_eq!(waiting.release(2, may_go_on), [81]);
        assert!(waiting.release(2, may_go_on).is_empty());
        assert_eq!(waiting.release(2, |_| true), [71]);
        assert!(waiting.release(2, |_| true).is_empty() && waiting.queues.is_empty());
    }

    #[test]
    fn a_session_that_waits_again_has_waited_since_the_first_time() {
        let mut waiting = Waiting::default();
        waiting.add(1, 7, 3, 10);
        // For something else.
        assert_eq!(waiting.add(2, 7, 3, 20), 10);
        assert!(waiting.release(1, |queue| *queue == 1).is_empty());
        assert_eq!(waiting.release(1, |_| true), [7]);
        assert_eq!(waiting.queue_of(7), Some(&2));
        assert_eq!(waiting.add(2, 7, 3, 30), 10);
        assert_eq!(waiting.len(), 1);
        assert_eq!(waiting.remove(7), Some(10));
        assert_eq!(waiting.remove(7), None);
        assert!(waiting.queues.is_empty() && waiting.len() == 0);
    }
}
