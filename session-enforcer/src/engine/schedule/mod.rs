//! When to look at which session: cookies by the time that they are due. Pure: no clock, no I/O.
//!
//! A session's entry is at the earliest moment at which the session can have expired. Activity
//! moves the true deadline and not the entry: when the entry is due, the engine reads the session
//! and re-arms it. So a busy session costs one look per timeout, and a packet costs nothing here.

mod groups;
mod queue;
mod sessions;
#[cfg(test)]
mod tests;

use self::{groups::Groups, queue::Queue, sessions::Sessions};

/// Sessions by due time. The end of time, `u64::MAX`, stands for "never".
///
/// A session takes 28 bytes in the vectors, and 6 to 12 in the hash table: a bucket of 5 bytes, of
/// which 7/16 to 7/8 are full. Vectors and table grow by doubling. What a large vector has and does
/// not use is address space only, since pages are the process's when they are written to; the
/// table is written to everywhere.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    sessions: Sessions,
    queue: Queue,
    groups: Groups,
}

/// What a session belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Group {
    /// Cookie of its network namespace.
    pub(super) netns_cookie: u64,
    /// Place of its rule.
    pub(super) rule: u16,
}

impl Schedule {
    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether the session is scheduled.
    pub(super) fn contains(&self, cookie: u64) -> bool {
        self.sessions.slot(cookie).is_some()
    }

    /// Every session with what it belongs to.
    pub(super) fn sessions(&self) -> impl Iterator<Item = (u64, Group)> {
        let sessions = self.sessions.iter();
        sessions.map(|(cookie, number)| (cookie, self.groups.group(number)))
    }

    /// What a scheduled session belongs to.
    pub(super) fn group(&self, cookie: u64) -> Option<Group> {
        let slot = self.sessions.slot(cookie)?;
        Some(self.groups.group(self.sessions.group(slot)))
    }

    /// Whether a session of this network namespace is scheduled.
    pub(super) fn has_sessions_in(&self, netns_cookie: u64) -> bool {
        self.groups.has_namespace(netns_cookie)
    }

    /// Schedules a session, in place of what was scheduled for the same cookie; what that belonged
    /// to.
    pub(super) fn insert(&mut self, cookie: u64, group: Group, due_ns: u64) -> Option<Group> {
        // Before it leaves the old group, which may be the same.
        let number = self.groups.enter(group);
        let Some(slot) = self.sessions.slot(cookie) else {
            self.sessions.push(cookie, number);
            self.queue.push(due_ns);
            return None;
        };
        self.queue.set(slot, due_ns);
        let before = self.sessions.regroup(slot, number);
        Some(self.groups.leave(before))
    }

    /// Moves a session to another time; a session that is not scheduled stays so.
    pub(super) fn rearm(&mut self, cookie: u64, due_ns: u64) {
        if let Some(slot) = self.sessions.slot(cookie) {
            self.queue.set(slot, due_ns);
        }
    }

    /// Moves a session to an earlier time; one that is due before that stays as it is.
    pub(super) fn hasten(&mut self, cookie: u64, due_ns: u64) {
        if let Some(slot) = self.sessions.slot(cookie)
            && due_ns < self.queue.due_ns(slot)
        {
            self.queue.set(slot, due_ns);
        }
    }

    /// Forgets a session, and returns what it belonged to.
    pub(super) fn remove(&mut self, cookie: u64) -> Option<Group> {
        let (slot, number) = self.sessions.swap_remove(cookie)?;
        self.queue.swap_remove(slot);
        self.give_back();
        Some(self.groups.leave(number))
    }

    /// When the next session is due; none where none ever is.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        Some(self.queue.first()?.0)
    }

    /// Takes one session that is due at `now_ns`. It stays scheduled, without a time, until it is
    /// re-armed or removed: the caller must do one of both.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<u64> {
        let (due_ns, slot) = self.queue.first()?;
        if due_ns > now_ns {
            return None;
        }
        self.queue.set(slot, u64::MAX);
        Some(self.sessions.cookie(slot))
    }

    /// Gives memory back where a great crowd has gone. The pages of what was, once written to, would
    /// stay. Room for as many again is left, so that a number that changes little costs nothing.
    fn give_back(&mut self) {
        const SLACK: usize = 1024;
        if self.sessions.capacity() > 4 * self.len() + 4 * SLACK {
            let capacity = 2 * self.len() + SLACK;
            self.sessions.shrink_to(capacity);
            self.queue.shrink_to(capacity);
        }
    }
}
