//! The searches for the processes that hold connections: what waits, for which scope, and which scope rests. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use session_enforcer_common::{Limits, Owner};
use tokio::time::Instant;

use super::phase::Expired;
use crate::{
    reaper::protocol::{Holder, MAX_SOUGHT, SocketKey},
    report::audit::Process,
};

/// Maximum time before its deadline at which the holder of a session is searched for.
const MAX_AHEAD_NS: u64 = 2_000_000_000;

/// The rest of a cgroup after its search is this multiple of the search's processor time.
const REST: u32 = 9;

/// The same for the whole host, or a part of it.
const REST_OF_ALL: u32 = 19;

/// The id of the whole host among those of cgroups; the kernel has no cgroup with it.
pub(super) const HOST: u64 = 0;

/// The holder of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holding {
    pub(super) established_ns: u64,
    pub(super) owner: Owner,
    pub(super) process: Option<Process>,
    /// The holder, for the next reset through its descriptor.
    pub(super) holder: Option<Holder>,
}

/// A session whose holder is searched for: its cookie and its time of establishment.
pub(super) type Name = (u64, u64);

/// What is searched for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sought {
    pub(super) key: SocketKey,
    /// The session that the holder is needed to reset. Otherwise it is for the audit.
    pub(super) to_reset: Option<Expired>,
    /// Whether a search of the host for it has begun at the first process.
    pub(super) has_begun: bool,
}

/// The processes that a search of the host has scanned.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScanRange {
    /// The PID at which it began.
    pub(super) from: u32,
    /// The PID at which the next search goes on; `None` if this one has seen the last process.
    pub(super) next: Option<u32>,
}

/// The searches for holders. Pure.
#[derive(Debug, Default)]
pub(super) struct HolderSearches {
    /// The sessions that wait for a search of their cgroup's processes, or of those of the [`HOST`].
    waiting: BTreeMap<u64, HashMap<Name, Sought>>,
    /// Until when cgroups, and their ancestors of the second level, rest.
    rests: HashMap<u64, Instant>,
    /// The PID at which the search of the host goes on.
    pub(super) from: u32,
    /// Whether the task for cgroups and the one for the host run.
    pub(super) is_running: [bool; 2],
}

impl HolderSearches {
    pub(super) fn add(&mut self, scope: u64, name: Name, sought: Sought) {
        let waiting = self.waiting.entry(scope).or_default();
        let before = waiting.get(&name);
        // A reset waits for the answer.
        if before.is_none_or(|before| before.to_reset.is_none()) {
            waiting.insert(name, sought);
        }
    }

    /// Whether sessions wait for one of the two tasks.
    pub(super) fn has(&self, of_host: bool) -> bool {
        self.waiting.keys().any(|scope| (*scope == HOST) == of_host)
    }

    /// The next scope to search that does not rest. `slice_of` returns the second-level ancestor of a cgroup, a user's
    /// slice or a service. Those whose searches took little come first, so that nobody delays others by many cgroups.
    pub(super) fn next(
        &mut self,
        of_host: bool,
        now: Instant,
        slice_of: impl Fn(u64) -> u64,
    ) -> Option<u64> {
        self.rests.retain(|_, until| *until > now);
        let places = self.waiting.keys().copied();
        places
            .filter(|scope| (*scope == HOST) == of_host && !self.rests.contains_key(scope))
            .min_by_key(|scope| self.rests.get(&slice_of(*scope)))
    }

    /// Takes sessions that wait for a search of this scope.
    pub(super) fn take(&mut self, scope: u64) -> Vec<(Name, Sought)> {
        let mut waiting = self.waiting.remove(&scope).unwrap_or_default();
        let names: Vec<Name> = waiting.keys().copied().take(MAX_SOUGHT).collect();
        let names = names.into_iter();
        let taken = names
            .filter_map(|name| waiting.remove_entry(&name))
            .collect();
        if !waiting.is_empty() {
            self.waiting.insert(scope, waiting);
        }
        taken
    }

    /// Has a scope, and the slice that it is in, rest after a search.
    pub(super) fn rest(&mut self, scope: u64, slice: u64, used: Duration, now: Instant) {
        let rest = if scope == HOST { REST_OF_ALL } else { REST };
        for id in [scope, slice] {
            let until = self.rests.entry(id).or_insert(now);
            *until = (*until).max(now + used * rest);
        }
    }

    /// Handles the sessions that a search has not found. Returns those to reset that no process of the host holds.
    pub(super) fn note_missing(
        &mut self,
        scope: u64,
        sought: &[(Name, Sought)],
        found: &HashMap<SocketKey, Holder>,
        scanned: ScanRange,
    ) -> Vec<Expired> {
        let is_missing = |sought: &Sought| !found.contains_key(&sought.key);
        // If the search ended because it found everything, the next one starts at the same process, which may hold other
        // sockets.
        if scope == HOST && sought.iter().any(|(_, sought)| is_missing(sought)) {
            self.from = scanned.next.unwrap_or(0);
        }
        let mut not_held = Vec::new();
        for (name, sought) in sought {
            if is_missing(sought) && self.missed(scope, *name, *sought, scanned) {
                not_held.extend(sought.to_reset);
            }
        }
        not_held
    }

    /// Handles a session that a search has not found; the host is searched next. Returns whether all of the host was
    /// searched.
    fn missed(&mut self, scope: u64, name: Name, sought: Sought, scanned: ScanRange) -> bool {
        let has_begun = scope == HOST && (sought.has_begun || scanned.from == 0);
        let is_over = has_begun && scanned.next.is_none();
        if !is_over {
            self.add(
                HOST,
                name,
                Sought {
                    has_begun,
                    ..sought
                },
            );
        }
        is_over
    }
}

/// When the holder of a session must be searched for, if the session can be due at `due_ns`: half of the shortest limit
/// earlier. By then a new connection has usually reached the process that will hold it.
pub(super) fn ahead_of(due_ns: u64, limits: &Limits) -> u64 {
    let limits = [
        limits.idle_timeout_ns,
        limits.max_lifetime_ns,
        limits.response_timeout_ns,
        limits.half_closed_timeout_ns,
    ];
    let shortest_ns = limits.into_iter().filter(|limit| *limit != 0).min();
    due_ns.saturating_sub((shortest_ns.unwrap_or(0) / 2).min(MAX_AHEAD_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(100);

    const S: u64 = 1_000_000_000;

    #[test]
    fn the_holder_is_searched_half_of_the_shortest_limit_ahead() {
        let mut limits = Limits {
            idle_timeout_ns: 60 * S,
            ..Limits::default()
        };
        assert_eq!(ahead_of(100 * S, &limits), 98 * S);
        limits.half_closed_timeout_ns = S;
        assert_eq!(ahead_of(100 * S, &limits), 100 * S - S / 2);
    }

    const SOUGHT: Sought = Sought {
        key: SocketKey::Inode(4711),
        to_reset: None,
        has_begun: false,
    };

    #[test]
    fn cgroups_whose_searches_took_long_rest_and_those_of_their_slice_come_last() {
        let mut searches = HolderSearches::default();
        let now = Instant::now();
        // Cgroups 11 to 13 are of one user's slice.
        let slice_of = |scope| if scope > 10 && scope < 20 { 10 } else { scope };
        for scope in [11, 12, 13, 20, HOST] {
            searches.add(scope, (scope, 1), SOUGHT);
        }
        assert_eq!(searches.next(false, now, slice_of), Some(11));
        assert_eq!(searches.take(11).len(), 1);
        searches.rest(11, 10, BUDGET, now);
        searches.add(11, (11, 1), SOUGHT);
        assert_eq!(searches.next(false, now, slice_of), Some(20));
        searches.take(20);
        assert_eq!(searches.next(false, now, slice_of), Some(12));
        searches.take(12);
        searches.take(13);
        // The first one rests.
        assert!(searches.has(false));
        assert_eq!(searches.next(false, now, slice_of), None);
        let rested = now + BUDGET * REST;
        assert_eq!(searches.next(false, rested, slice_of), Some(11));
        assert_eq!(searches.next(true, now, slice_of), Some(HOST));
        searches.rest(HOST, HOST, BUDGET, now);
        assert_eq!(searches.next(true, rested, slice_of), None);
        let rested = now + BUDGET * REST_OF_ALL;
        assert_eq!(searches.next(true, rested, slice_of), Some(HOST));
    }

    #[test]
    fn a_holder_is_missed_when_each_process_of_the_host_was_scanned() {
        let mut searches = HolderSearches::default();
        let name = (7, 1);
        let taken = |searches: &mut HolderSearches| searches.take(HOST)[0].1;
        let scanned = |from, next| ScanRange { from, next };
        // It is not in its cgroup.
        assert!(!searches.missed(11, name, SOUGHT, scanned(0, None)));
        let sought = taken(&mut searches);
        // The search of the host was under way.
        assert!(!searches.missed(HOST, name, sought, scanned(400, None)));
        let sought = taken(&mut searches);
        assert!(!searches.missed(HOST, name, sought, scanned(0, Some(300))));
        let sought = taken(&mut searches);
        assert!(!searches.missed(HOST, name, sought, scanned(300, Some(400))));
        let sought = taken(&mut searches);
        assert!(searches.missed(HOST, name, sought, scanned(400, None)));
        assert!(!searches.has(true));
        // In one part.
        assert!(searches.missed(HOST, name, SOUGHT, scanned(0, None)));
    }

    #[test]
    fn no_more_sockets_are_searched_for_than_fit_into_a_message() {
        let mut searches = HolderSearches::default();
        for cookie in 0..MAX_SOUGHT as u64 + 1 {
            searches.add(11, (cookie, 1), SOUGHT);
        }
        assert_eq!(searches.take(11).len(), MAX_SOUGHT);
        assert_eq!(searches.take(11).len(), 1);
        assert!(!searches.has(false) && searches.take(11).is_empty());
    }
}
