//! Owners of sockets whose resets take much processor time. A user can make his resets slow: by very many waiters on each
//! socket (epoll), or as root of a network namespace by packet filter rules or a socket hash table with one bucket. The
//! sessions of such an owner have one batch at a time, beside the regular batches, so that others do not wait for them.
//! Pure.

use std::collections::{HashMap, HashSet};

use super::waiting::Waiting;
use crate::reaper::diag::SocketOwner;

/// How long an owner counts as slow after resets that took long.
const SLOW_FOR_NS: u64 = 10_000_000_000;

/// Maximum number of owners that are remembered.
const MAX_OWNERS: usize = 4_096;

/// Maximum number of slow owners that have a batch at the same time. More would leave others no processor.
const MAX_TURNS: usize = 4;

/// The sockets of an owner in a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SlowKey {
    pub(super) netns_cookie: u64,
    pub(super) owner: SocketOwner,
}

#[derive(Debug, Default)]
pub(super) struct SlowOwners {
    /// Whose resets took long.
    noted: HashMap<SlowKey, Noted>,
    /// Who has a turn.
    busy: HashSet<SlowKey>,
    /// The sessions that wait for a turn.
    pub(super) waiting: Waiting<SlowKey>,
}

#[derive(Debug)]
struct Noted {
    until_ns: u64,
    /// The first time they may have taken long because the machine's host held up the processor.
    is_second: bool,
}

impl SlowOwners {
    /// Notes that resets took long. Returns whether their owner counts as slow from now on.
    pub(super) fn note(&mut self, key: SlowKey, now_ns: u64) -> bool {
        if self.noted.len() >= MAX_OWNERS {
            self.noted.retain(|_, noted| noted.until_ns > now_ns);
        }
        let (was_noted, was_slow) = match self.noted.get(&key) {
            Some(noted) if noted.until_ns > now_ns => (true, noted.is_second),
            _ => (false, false),
        };
        if was_noted || self.noted.len() < MAX_OWNERS {
            let noted = Noted {
                until_ns: now_ns + SLOW_FOR_NS,
                is_second: was_noted,
            };
            self.noted.insert(key, noted);
        }
        was_noted && !was_slow
    }

    /// Forgets an owner whose resets did not take long.
    pub(super) fn forget(&mut self, key: SlowKey) {
        self.noted.remove(&key);
    }

    fn contains(&self, key: &SlowKey, now_ns: u64) -> bool {
        let noted = self.noted.get(key);
        noted.is_some_and(|noted| noted.is_second && noted.until_ns > now_ns)
    }

    /// The slow owners in a namespace.
    pub(super) fn owners_in(&self, netns_cookie: u64, now_ns: u64) -> Vec<SocketOwner> {
        let keys = self.noted.keys();
        let slow =
            keys.filter(|key| key.netns_cookie == netns_cookie && self.contains(key, now_ns));
        slow.map(|key| key.owner).collect()
    }

    /// The slow owner of a session; `None` if it is not known to have one.
    pub(super) fn owner_of(&self, cookie: u64, now_ns: u64) -> Option<SlowKey> {
        let key = *self.waiting.queue_of(cookie)?;
        self.contains(&key, now_ns).then_some(key)
    }

    /// Whether an owner can have a turn.
    fn has_turn(&self, key: &SlowKey) -> bool {
        self.busy.len() < MAX_TURNS && !self.busy.contains(key)
    }

    /// Begins the turn of an owner. Returns whether it has one.
    pub(super) fn begin_turn(&mut self, key: SlowKey) -> bool {
        self.has_turn(&key) && self.busy.insert(key)
    }

    /// Ends the turn.
    pub(super) fn end_turn(&mut self, key: SlowKey) {
        self.busy.remove(&key);
    }

    /// Returns up to `count` waiting sessions of an owner that can have a turn.
    pub(super) fn release(&mut self, count: usize) -> Vec<u64> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let released = waiting.release(count, |key| self.has_turn(key));
        self.waiting = waiting;
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(netns_cookie: u64, cgroup_id: u64) -> SlowKey {
        let owner = SocketOwner { cgroup_id, uid: 5 };
        SlowKey {
            netns_cookie,
            owner,
        }
    }

    #[test]
    fn an_owner_is_slow_for_a_while_after_resets_took_long_twice() {
        let mut slow = SlowOwners::default();
        let (one, other) = (key(3, 1), key(3, 2));
        assert!(!slow.note(one, 5));
        assert!(slow.owners_in(3, 5).is_empty());
        assert!(slow.note(one, 6));
        assert!(!slow.note(one, 7));
        // Nobody else is, neither in this namespace nor in another one.
        assert!(!slow.note(other, 7) && !slow.note(key(4, 1), 7));
        assert_eq!(slow.owners_in(3, 6 + SLOW_FOR_NS), [one.owner]);
        assert!(slow.owners_in(4, 7).is_empty());
        assert!(slow.owners_in(3, 7 + SLOW_FOR_NS).is_empty());
        assert!(!slow.note(one, 7 + SLOW_FOR_NS));
        assert!(slow.note(one, 8 + SLOW_FOR_NS));
        slow.forget(one);
        assert!(slow.owners_in(3, 8 + SLOW_FOR_NS).is_empty());
    }

    #[test]
    fn not_very_many_owners_are_remembered() {
        let mut slow = SlowOwners::default();
        for cgroup_id in 0..2 * MAX_OWNERS as u64 {
            slow.note(key(3, cgroup_id), 0);
        }
        assert_eq!(slow.noted.len(), MAX_OWNERS);
        assert!(slow.note(key(3, 0), 1));
        slow.note(key(3, 0), SLOW_FOR_NS);
        assert_eq!(slow.noted.len(), 1);
    }

    #[test]
    fn an_owner_has_one_turn_and_not_too_many_have_one() {
        let mut slow = SlowOwners::default();
        assert!(slow.begin_turn(key(3, 1)));
        assert!(!slow.begin_turn(key(3, 1)));
        for other in 2..=MAX_TURNS as u64 {
            assert!(slow.begin_turn(key(3, other)));
        }
        assert!(!slow.begin_turn(key(3, 100)));
        slow.waiting.add(key(3, 100), 7, 0, 0);
        assert!(slow.release(2).is_empty());
        slow.end_turn(key(3, 1));
        assert_eq!(slow.release(2), [7]);
        assert_eq!(slow.owner_of(7, 0), None);
        slow.note(key(3, 100), 0);
        slow.note(key(3, 100), 0);
        assert_eq!(slow.owner_of(7, 0), Some(key(3, 100)));
        assert!(slow.begin_turn(key(3, 100)));
    }
}
