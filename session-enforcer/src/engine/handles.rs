//! The network namespaces in which there are sessions: a descriptor that keeps each reachable, and where each
//! was seen. Reapers find them; nothing is entered here.

use std::{collections::HashMap, os::fd::OwnedFd, path::PathBuf, rc::Rc};

use crate::reaper::protocol::Netns;

/// Descriptors that are kept at most. A namespace beyond is searched for where it was seen.
const MAX_HANDLES: usize = 4_096;

/// Places that are remembered at most.
const MAX_PLACES: usize = 65_536;

/// For how long a namespace that was not found is not searched for again.
const SEARCH_AGAIN_NS: u64 = 10_000_000_000;

/// The namespaces. A handle keeps its namespace alive, so it is given up with its last session.
#[derive(Debug)]
pub(super) struct Handles {
    own: u64,
    held: HashMap<u64, Rc<OwnedFd>>,
    seen_at: HashMap<u64, PathBuf>,
    /// When the last search of the whole host that found nothing began.
    searched_ns: Option<u64>,
}

impl Handles {
    pub(super) fn new(own: u64) -> Self {
        Self {
            own,
            held: HashMap::new(),
            seen_at: HashMap::new(),
            searched_ns: None,
        }
    }

    /// The daemon's own namespace.
    pub(super) fn own(&self) -> u64 {
        self.own
    }

    /// A namespace as a reaper is told it, and the descriptor that goes with it. A search of the whole
    /// host is expensive, and anybody can make namespaces that none finds: one that was there, at
    /// `existed_ns`, when a search found nothing is not searched for again for a while.
    pub(super) fn netns(
        &self,
        cookie: u64,
        existed_ns: u64,
        now_ns: u64,
    ) -> (Netns, Option<Rc<OwnedFd>>) {
        let was_missed = self.searched_ns.is_some_and(|began_ns| {
            existed_ns < began_ns && now_ns.saturating_sub(began_ns) < SEARCH_AGAIN_NS
        });
        let netns = Netns {
            cookie,
            seen_at: self.seen_at.get(&cookie).cloned(),
            may_search: cookie != self.own && !was_missed,
        };
        (netns, self.held.get(&cookie).cloned())
    }

    /// Notes where a namespace is, and keeps it reachable.
    pub(super) fn keep(&mut self, cookie: u64, path: PathBuf, handle: Option<OwnedFd>) {
        if cookie == self.own {
            return;
        }
        if self.seen_at.len() >= MAX_PLACES {
            self.seen_at.clear();
        }
        self.seen_at.insert(cookie, path);
        if let Some(handle) = handle.filter(|_| self.held.len() < MAX_HANDLES) {
            self.held.insert(cookie, Rc::new(handle));
        }
    }

    /// Lets a namespace end that has no sessions any more.
    pub(super) fn give_up(&mut self, cookie: u64) {
        self.held.remove(&cookie);
    }

    /// A search of the whole host that began at this time did not find a namespace.
    pub(super) fn note_missed(&mut self, began_ns: u64) {
        self.searched_ns = Some(began_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_search_that_found_nothing_is_not_repeated_for_what_was_there_then() {
        let mut handles = Handles::new(3);
        let may_search = |handles: &Handles, existed_ns, now_ns| {
            handles.netns(7, existed_ns, now_ns).0.may_search
        };
        assert!(may_search(&handles, S, 2 * S));
        handles.note_missed(2 * S);
        assert!(!may_search(&handles, S, 3 * S));
        assert!(may_search(&handles, S, 12 * S));
        // What came after it.
        assert!(may_search(&handles, 3 * S, 3 * S));
        assert!(!handles.netns(3, 0, 0).0.may_search);
    }

    #[test]
    fn a_namespace_is_held_until_it_is_given_up_and_its_place_is_remembered() {
        let mut handles = Handles::new(3);
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        handles.keep(7, "/x".into(), Some(file()));
        handles.keep(3, "/own".into(), Some(file()));
        assert!(handles.netns(7, 0, 0).1.is_some() && handles.netns(3, 0, 0).1.is_none());
        handles.give_up(7);
        let (netns, handle) = handles.netns(7, 0, 0);
        assert_eq!((netns.seen_at, handle.is_none()), (Some("/x".into()), true));
    }
}
