//! The network namespaces that have sessions: a descriptor that keeps each one reachable, and the path where it was
//! found. Reapers search for namespaces and enter them; the engine does neither.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    path::PathBuf,
    rc::Rc,
};

use crate::reaper::protocol::{Netns, Search};

/// Maximum number of descriptors. A namespace without one is opened at its known path.
const MAX_HANDLES: usize = 4_096;

/// Maximum number of known paths.
const MAX_PLACES: usize = 65_536;

/// How long a failed search of the whole host is not repeated.
const SEARCH_AGAIN_NS: u64 = 10_000_000_000;

/// Maximum number of namespaces noted as not found among the processes.
const MAX_MISSED: usize = 4_096;

/// The known namespaces. A handle keeps its namespace alive, so it is dropped with the last session.
#[derive(Debug)]
pub(super) struct Handles {
    own: u64,
    held: HashMap<u64, Rc<OwnedFd>>,
    seen_at: HashMap<u64, PathBuf>,
    /// Namespaces that were not found among the processes.
    missed: HashSet<u64>,
    /// When the last search of the whole host without result began.
    searched_ns: Option<u64>,
    /// Number of searches in progress, by [`Search`].
    pub(super) searches: [usize; 3],
}

/// Whether a reset needs a search for its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SearchNeed {
    /// It needs none.
    None,
    /// It starts this search.
    Start(Search),
    /// It waits until the search in progress has ended, which may find its namespace too.
    Wait,
    /// A recent search has found nothing.
    FoundNothing,
}

impl Handles {
    pub(super) fn new(own: u64) -> Self {
        Self {
            own,
            held: HashMap::new(),
            seen_at: HashMap::new(),
            missed: HashSet::new(),
            searched_ns: None,
            searches: [0; 3],
        }
    }

    /// The daemon's own namespace.
    pub(super) fn own(&self) -> u64 {
        self.own
    }

    /// Describes a namespace for a reaper, with its descriptor if there is one. The reaper searches for it at most
    /// among the processes.
    pub(super) fn netns(&self, cookie: u64) -> (Netns, Option<Rc<OwnedFd>>) {
        let is_found_there = cookie != self.own && !self.missed.contains(&cookie);
        let netns = Netns {
            cookie,
            seen_at: self.seen_at.get(&cookie).cloned(),
            search: if is_found_there {
                Search::Processes
            } else {
                Search::Nowhere
            },
        };
        (netns, self.held.get(&cookie).cloned())
    }

    /// Whether a namespace must be searched for, among the processes or on the whole host. Any user can create
    /// namespaces, also such that cannot be found. So there is only one search of each kind at a time, and it notes all
    /// that it meets. After a search of the host without result, namespaces that existed at its beginning (`existed_ns`)
    /// are not searched for again for [`SEARCH_AGAIN_NS`].
    pub(super) fn search(&self, cookie: u64, existed_ns: u64, now_ns: u64) -> SearchNeed {
        let was_missed = self.searched_ns.is_some_and(|began_ns| {
            existed_ns < began_ns && now_ns.saturating_sub(began_ns) < SEARCH_AGAIN_NS
        });
        let is_known = cookie == self.own || self.seen_at.contains_key(&cookie);
        let wanted = match self.is_missed(cookie) {
            _ if self.held.contains_key(&cookie) => return SearchNeed::None,
            true if was_missed => return SearchNeed::FoundNothing,
            true => Search::Everywhere,
            false if is_known => return SearchNeed::None,
            false => Search::Processes,
        };
        match self.searches[wanted as usize] {
            0 => SearchNeed::Start(wanted),
            _ => SearchNeed::Wait,
        }
    }

    /// Whether the namespace was not found among the processes.
    pub(super) fn is_missed(&self, cookie: u64) -> bool {
        self.missed.contains(&cookie)
    }

    /// Names a namespace in a message.
    pub(super) fn name(&self, cookie: u64) -> String {
        match self.seen_at.get(&cookie) {
            Some(path) => format!("network namespace {}", path.display()),
            None if cookie == self.own => "the daemon's own network namespace".to_owned(),
            None => format!("the network namespace with cookie {cookie}"),
        }
    }

    /// Notes the path of a namespace.
    pub(super) fn note(&mut self, cookie: u64, path: PathBuf) {
        if self.seen_at.len() >= MAX_PLACES {
            self.seen_at.clear();
        }
        self.missed.remove(&cookie);
        self.seen_at.insert(cookie, path);
    }

    /// Notes the path of a namespace and keeps its descriptor.
    pub(super) fn keep(&mut self, cookie: u64, path: PathBuf, handle: Option<OwnedFd>) {
        if cookie == self.own {
            return;
        }
        self.note(cookie, path);
        if let Some(handle) = handle.filter(|_| self.held.len() < MAX_HANDLES) {
            self.held.insert(cookie, Rc::new(handle));
        }
    }

    /// Drops the descriptor of a namespace without sessions.
    pub(super) fn give_up(&mut self, cookie: u64) {
        self.held.remove(&cookie);
    }

    /// Notes that a search that began at `began_ns` did not find the namespace.
    pub(super) fn note_missed(&mut self, cookie: u64, searched: Search, began_ns: u64) {
        if self.missed.len() >= MAX_MISSED {
            self.missed.clear();
        }
        match searched {
            Search::Nowhere => {}
            Search::Processes => drop(self.missed.insert(cookie)),
            Search::Everywhere => self.searched_ns = Some(began_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn the_whole_host_is_searched_after_the_processes_once_at_a_time_and_not_again_for_a_while() {
        let mut handles = Handles::new(3);
        assert_eq!(handles.netns(7).0.search, Search::Processes);
        assert_eq!(handles.netns(3).0.search, Search::Nowhere);
        assert_eq!(handles.search(3, S, 2 * S), SearchNeed::None);
        let (of_processes, of_all) = (
            SearchNeed::Start(Search::Processes),
            SearchNeed::Start(Search::Everywhere),
        );
        assert_eq!(handles.search(7, S, 2 * S), of_processes);
        handles.searches[Search::Everywhere as usize] = 1;
        assert_eq!(handles.search(7, S, 2 * S), of_processes);
        handles.note_missed(7, Search::Processes, S);
        assert_eq!(handles.netns(7).0.search, Search::Nowhere);
        assert_eq!(handles.search(7, S, 2 * S), SearchNeed::Wait);
        handles.searches[Search::Everywhere as usize] = 0;
        assert_eq!(handles.search(7, S, 2 * S), of_all);
        handles.searches[Search::Processes as usize] = 1;
        assert_eq!(handles.search(8, S, 2 * S), SearchNeed::Wait);
        assert_eq!(handles.search(7, S, 2 * S), of_all);
        handles.note_missed(7, Search::Everywhere, 2 * S);
        assert_eq!(handles.search(7, S, 3 * S), SearchNeed::FoundNothing);
        assert_eq!(handles.search(7, S, 12 * S), of_all);
        // The namespace was created after the search.
        assert_eq!(handles.search(7, 3 * S, 3 * S), of_all);
        // Found during a search for another namespace.
        assert_eq!(handles.name(7), "the network namespace with cookie 7");
        handles.note(7, "/x".into());
        assert_eq!(handles.name(7), "network namespace /x");
        assert_eq!(handles.name(3), "the daemon's own network namespace");
        assert_eq!(handles.search(7, S, 12 * S), SearchNeed::None);
        assert_eq!(handles.netns(7).0.search, Search::Processes);
    }

    #[test]
    fn a_search_counts_for_what_was_there_before_it_and_for_ten_seconds() {
        let mut handles = Handles::new(3);
        assert_eq!(handles.own(), 3);
        handles.note_missed(7, Search::Processes, S);
        handles.note_missed(7, Search::Everywhere, 2 * S);
        assert_eq!(handles.netns(7).0.cookie, 7);
        let search = |existed_ns, now_ns| handles.search(7, existed_ns, now_ns);
        let of_all = SearchNeed::Start(Search::Everywhere);
        assert_eq!(search(2 * S, 2 * S), of_all);
        assert_eq!(search(2 * S - 1, 12 * S - 1), SearchNeed::FoundNothing);
        assert_eq!(search(2 * S - 1, 12 * S), of_all);
    }

    #[test]
    fn places_and_descriptors_are_bounded() {
        let mut handles = Handles::new(0);
        for cookie in 1..=MAX_PLACES as u64 {
            handles.keep(cookie, "/x".into(), None);
        }
        assert_eq!(handles.seen_at.len(), MAX_PLACES);
        handles.keep(u64::MAX, "/x".into(), None);
        assert_eq!(handles.seen_at.len(), 1);
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let shared = Rc::new(file());
        for cookie in 1..MAX_HANDLES as u64 {
            handles.held.insert(cookie, Rc::clone(&shared));
        }
        handles.keep(u64::MAX, "/x".into(), Some(file()));
        handles.keep(u64::MAX - 1, "/y".into(), Some(file()));
        assert_eq!(handles.held.len(), MAX_HANDLES);
        assert!(handles.netns(u64::MAX).1.is_some());
        let (netns, handle) = handles.netns(u64::MAX - 1);
        assert!(netns.seen_at == Some("/y".into()) && handle.is_none());
    }

    #[test]
    fn a_namespace_is_held_until_it_is_given_up_and_its_place_is_remembered() {
        let mut handles = Handles::new(3);
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        handles.note_missed(7, Search::Processes, 0);
        handles.keep(7, "/x".into(), Some(file()));
        handles.keep(3, "/own".into(), Some(file()));
        assert!(handles.netns(7).1.is_some() && handles.netns(3).1.is_none());
        assert_eq!(handles.search(7, 0, 0), SearchNeed::None);
        handles.give_up(7);
        let (netns, handle) = handles.netns(7);
        assert_eq!((netns.seen_at, handle.is_none()), (Some("/x".into()), true));
    }
}
