//! The schedule: cookies by due time. Pure: no clock, no I/O.
//!
//! An entry has the earliest time at which its session can have expired. Activity moves the deadline but not the entry:
//! when the entry is due, the engine reads the session and reschedules it. So a busy session costs one check per
//! timeout, and a packet costs nothing here.

mod queue;
mod session_groups;
mod sessions;
#[cfg(test)]
mod tests;

use self::{queue::Queue, session_groups::Groups, sessions::Sessions};

/// Sessions by due time. `u64::MAX` means never.
///
/// A session takes 28 bytes in the vectors and 6 to 12 bytes in the hash table (buckets of 5 bytes, 7/16 to 7/8 of them
/// full). Vectors and table grow by doubling. Unused capacity of a large vector is only address space, since a page is
/// allocated when it is first written. The table is written everywhere.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    sessions: Sessions,
    queue: Queue,
    groups: Groups,
}

/// Namespace and rule of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Group {
    /// Cookie of its network namespace.
    pub(super) netns_cookie: u64,
    /// Rule id.
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

    /// All sessions with their groups.
    pub(super) fn sessions(&self) -> impl Iterator<Item = (u64, Group)> {
        let sessions = self.sessions.iter();
        sessions.map(|(cookie, number)| (cookie, self.groups.group(number)))
    }

    /// The group of a scheduled session.
    pub(super) fn group(&self, cookie: u64) -> Option<Group> {
        let slot = self.sessions.slot(cookie)?;
        Some(self.groups.group(self.sessions.group(slot)))
    }

    /// Whether the namespace has scheduled sessions.
    pub(super) fn has_sessions_in(&self, netns_cookie: u64) -> bool {
        self.groups.has_namespace(netns_cookie)
    }

    /// Schedules a session. Replaces an earlier schedule of the same cookie and returns its group.
    pub(super) fn insert(&mut self, cookie: u64, group: Group, due_ns: u64) -> Option<Group> {
        // Must come before leaving the old group, which may be the same.
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

    /// Sets the due time of a session, if it is scheduled.
    pub(super) fn rearm(&mut self, cookie: u64, due_ns: u64) {
        if let Some(slot) = self.sessions.slot(cookie) {
            self.queue.set(slot, due_ns);
        }
    }

    /// Moves the due time of a session forward, if `due_ns` is earlier.
    pub(super) fn hasten(&mut self, cookie: u64, due_ns: u64) {
        if let Some(slot) = self.sessions.slot(cookie)
            && due_ns < self.queue.due_ns(slot)
        {
            self.queue.set(slot, due_ns);
        }
    }

    /// Removes a session; returns its group.
    pub(super) fn remove(&mut self, cookie: u64) -> Option<Group> {
        let (slot, number) = self.sessions.swap_remove(cookie)?;
        self.queue.swap_remove(slot);
        self.give_back();
        Some(self.groups.leave(number))
    }

    /// Due time of the next session; `None` if no session has one.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        Some(self.queue.first()?.0)
    }

    /// Takes one session that is due at `now_ns`. It stays scheduled without a due time; the caller must reschedule or
    /// remove it.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<u64> {
        let (due_ns, slot) = self.queue.first()?;
        if due_ns > now_ns {
            return None;
        }
        self.queue.set(slot, u64::MAX);
        Some(self.sessions.cookie(slot))
    }

    /// Releases memory when many sessions have gone, because pages that were written stay allocated. Twice the needed
    /// capacity is kept, so small changes cost nothing.
    fn give_back(&mut self) {
        const SLACK: usize = 1024;
        if self.sessions.capacity() > 4 * self.len() + 4 * SLACK {
            let capacity = 2 * self.len() + SLACK;
            self.sessions.shrink_to(capacity);
            self.queue.shrink_to(capacity);
        }
    }
}
