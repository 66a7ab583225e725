//! Resolves session owners (users, cgroups): the ids that the rules' names stand for on this host, and the names for
//! the ids of sessions. Reapers query them; this keeps the results.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    path::PathBuf,
};

use session_enforcer_common::Ancestors;
use thiserror::Error;

use crate::{
    config::{Config, Location, Owners, User, is_pattern},
    host::users::Names,
    reaper::protocol::{Cgroup, FoundUser},
};

/// Maximum number of former ids of a cgroup. A service that was restarted more often has hardly a connection left from
/// before.
const MAX_FORMER: usize = 8;

/// Maximum number of remembered cgroups. Beyond it, those noted first are forgotten.
const MAX_CGROUPS: usize = 16_384;

/// Maximum number of cgroups that wait to be looked up. Cgroups beyond it stay unknown.
const MAX_UNKNOWN: usize = 16_384;

/// The cgroups that a reaper has found for the names in the rules.
#[derive(Debug, Default)]
pub struct FoundCgroups {
    /// By path or pattern: the paths and ids of the cgroups that match it.
    pub matching: HashMap<String, Vec<(String, u64)>>,
    /// The directories where a cgroup that matches may appear.
    pub watch_directories: Vec<PathBuf>,
}

/// Query results by user name.
pub type Users = HashMap<String, FoundUser>;

/// A user in a rule cannot be resolved.
#[derive(Debug, Error)]
pub enum UserError {
    /// No user has the name.
    #[error("{at}: there is no user \"{user}\" on this host; create it, or give the uid")]
    Unknown {
        /// File, line and key.
        at: Location,
        /// The name.
        user: String,
    },
    /// The user database could not be queried.
    #[error("{at}: looking for the user \"{user}\": {what}; give the uid")]
    Database {
        /// File, line and key.
        at: Location,
        /// The name.
        user: String,
        /// What went wrong.
        what: String,
    },
}

/// What is known about owners on this host.
#[derive(Debug, Default)]
pub struct OwnerResolver {
    names: Names,
    /// Cgroups by id. A session may outlive its cgroup.
    cgroups: HashMap<u64, Cgroup>,
    /// Cgroup ids in the order in which they were noted.
    noted: VecDeque<u64>,
    /// Ids that were not looked up yet.
    unknown: HashSet<u64>,
    is_asking: bool,
    owners: Owners,
    named: NamedCgroups,
}

/// The cgroups that rules name.
#[derive(Clone, Debug, Default)]
struct NamedCgroups {
    /// Paths.
    paths: BTreeSet<String>,
    /// Patterns, each with the number of match entries that a matching cgroup takes.
    patterns: Vec<(String, usize)>,
    /// Number of match entries available for cgroups that match patterns.
    free_entries: usize,
    /// Number of matching cgroups without room at the last lookup.
    left_out: usize,
}

impl NamedCgroups {
    fn of(config: &Config) -> Self {
        let named = config.rules.iter().flat_map(|rule| &rule.cgroups);
        let (patterns, free_entries) = config.pattern_room();
        Self {
            paths: named.filter(|path| !is_pattern(path)).cloned().collect(),
            patterns,
            free_entries,
            left_out: 0,
        }
    }

    /// The paths and patterns.
    fn names(&self) -> Vec<String> {
        let patterns = self.patterns.iter().map(|(pattern, _)| pattern);
        self.paths.iter().chain(patterns).cloned().collect()
    }

    /// The paths of all cgroups that exist or may be created, with the ids of those that exist. Known cgroups come
    /// first; those that exceed the available match entries are left out.
    fn wanted(&mut self, found: &FoundCgroups, known: &Owners) -> BTreeMap<String, Option<u64>> {
        let of = |name: &str| found.matching.get(name).into_iter().flatten();
        let matching = self.patterns.iter().flat_map(|(pattern, cost)| {
            let costly = |(path, id): &(String, u64)| (path.clone(), *id, *cost);
            of(pattern).map(costly)
        });
        let mut matching: Vec<_> = matching.collect();
        matching.sort_by_key(|(path, ..)| !known.cgroups.contains_key(path));
        let named = |path: &String| (path.clone(), of(path).next().map(|(_, id)| *id));
        let mut wanted: BTreeMap<_, _> = self.paths.iter().map(named).collect();
        let (mut free, mut left_out) = (self.free_entries, 0);
        for (path, id, cost) in matching {
            match free.checked_sub(cost) {
                Some(left) => {
                    free = left;
                    wanted.insert(path, Some(id));
                }
                None => left_out += 1,
            }
        }
        if left_out > self.left_out {
            tracing::warn!(
                "{left_out} cgroups that match a pattern are ignored, because the match table is full: name a cgroup \
                 above them, or use fewer prefixes and ports in the rules"
            );
        }
        self.left_out = left_out;
        wanted
    }
}

impl OwnerResolver {
    /// Resolves the owners that the rules name, and the names of all users. Nothing changes before the result is
    /// [kept](Self::keep). Without `cgroups` those that are known stay.
    ///
    /// # Errors
    ///
    /// Fails if a user does not exist. A cgroup may be missing, since services come and go.
    pub fn resolve(
        &self,
        config: &Config,
        users: &Users,
        cgroups: Option<&FoundCgroups>,
    ) -> Result<Resolved, UserError> {
        let mut names = Names::read();
        let mut owners = Owners::default();
        for rule in &config.rules {
            for user in &rule.users {
                let (User::Name(name), Some(at)) = (user, &rule.users_at) else {
                    continue;
                };
                let uid = uid_of(users.get(name), name, at)?;
                names.add(uid, name);
                owners.users.insert(name.clone(), uid);
            }
        }
        owners.cgroups.clone_from(&self.owners.cgroups);
        let mut named = NamedCgroups::of(config);
        if let Some(found) = cgroups {
            update_cgroups(found, &mut named, &mut owners);
        }
        Ok(Resolved {
            names,
            owners,
            named,
        })
    }

    /// Keeps the result for a configuration that is now active.
    pub fn keep(&mut self, found: Resolved) {
        (self.names, self.owners, self.named) = (found.names, found.owners, found.named);
    }

    /// Takes in what was found of the cgroups that the rules name; returns the ids of new ones.
    pub fn refresh(&mut self, found: &FoundCgroups) -> Vec<u64> {
        update_cgroups(found, &mut self.named, &mut self.owners)
    }

    /// The owners of the last lookup.
    pub fn owners(&self) -> &Owners {
        &self.owners
    }

    /// The paths and patterns by which the active rules name cgroups.
    pub fn cgroup_names(&self) -> Vec<String> {
        self.named.names()
    }

    /// Whether cgroups that match patterns have no room in the match table.
    pub fn has_left_out(&self) -> bool {
        self.named.left_out > 0
    }

    /// The ids of a cgroup and its ancestors, if known.
    pub fn ancestors(&self, cgroup_id: u64) -> Option<Ancestors> {
        let cgroup = self.cgroups.get(&cgroup_id)?;
        (!cgroup.ancestors.is_empty()).then(|| Ancestors::of(&cgroup.ancestors))
    }

    /// Queues a cgroup for lookup, if it is not known.
    pub fn remember(&mut self, cgroup_id: u64) {
        let is_new = cgroup_id != 0 && !self.cgroups.contains_key(&cgroup_id);
        if is_new && self.unknown.len() < MAX_UNKNOWN {
            self.unknown.insert(cgroup_id);
        }
    }

    /// Takes the queued cgroups; `None` if a lookup is in progress or the queue is empty.
    pub fn take_unknown(&mut self) -> Option<HashSet<u64>> {
        if self.is_asking || self.unknown.is_empty() {
            return None;
        }
        self.is_asking = true;
        Some(std::mem::take(&mut self.unknown))
    }

    /// Whether cgroups are queued or being looked up.
    pub fn is_asking(&self) -> bool {
        self.is_asking || !self.unknown.is_empty()
    }

    /// Notes the end of a lookup.
    pub fn has_asked(&mut self) {
        self.is_asking = false;
    }

    /// The ids of those cgroups that are not known.
    pub fn unknown_among(&self, ids: HashSet<u64>) -> Vec<u64> {
        let is_unknown = |id: &u64| *id != 0 && !self.cgroups.contains_key(id);
        ids.into_iter().filter(is_unknown).collect()
    }

    /// Stores a cgroup, so that its path is known after its removal.
    pub fn note(&mut self, cgroup: Cgroup) {
        if self.noted.len() >= MAX_CGROUPS
            && let Some(first) = self.noted.pop_front()
        {
            self.cgroups.remove(&first);
        }
        let id = cgroup.id;
        self.unknown.remove(&id);
        if self.cgroups.insert(id, cgroup).is_none() {
            self.noted.push_back(id);
        }
    }

    /// The current or last path of a cgroup. A long one is cut.
    pub fn path(&self, cgroup_id: u64) -> Option<&str> {
        self.cgroups.get(&cgroup_id)?.path.as_deref()
    }

    /// The name of a user.
    pub fn user_name(&self, uid: u32) -> Option<&str> {
        self.names.name(uid)
    }
}

/// The paths and patterns by which the rules of a configuration name cgroups.
pub fn cgroup_names(config: &Config) -> Vec<String> {
    NamedCgroups::of(config).names()
}

/// The owners that a configuration names, resolved on this host.
#[derive(Debug)]
pub struct Resolved {
    names: Names,
    /// Ids of users and cgroups.
    pub owners: Owners,
    named: NamedCgroups,
}

/// Adds the ids of cgroups that have appeared; returns the new ids. Cgroups that matched a pattern and are gone, and
/// those that no rule names, are forgotten.
fn update_cgroups(found: &FoundCgroups, named: &mut NamedCgroups, owners: &mut Owners) -> Vec<u64> {
    let wanted = named.wanted(found, owners);
    owners.cgroups.retain(|path, _| wanted.contains_key(path));
    let mut come = Vec::new();
    for (path, id) in wanted {
        let ids = owners.cgroups.entry(path).or_default();
        let Some(id) = id.filter(|id| ids.last() != Some(id)) else {
            continue;
        };
        ids.retain(|former| *former != id);
        ids.push(id);
        let too_many = ids.len().saturating_sub(MAX_FORMER + 1);
        ids.drain(..too_many);
        come.push(id);
    }
    come
}

/// The uid of a user that a rule names at this location.
///
/// # Errors
///
/// Fails if the host has no such user.
pub(crate) fn uid_of(
    found: Option<&FoundUser>,
    name: &str,
    at: &Location,
) -> Result<u32, UserError> {
    let (at, user) = (at.clone(), name.to_owned());
    match found {
        Some(FoundUser::Uid(uid)) => Ok(*uid),
        Some(FoundUser::Unknown) => Err(UserError::Unknown { at, user }),
        Some(FoundUser::Failed(source)) => {
            let what = source.clone();
            Err(UserError::Database { at, user, what })
        }
        None => {
            let what = "nobody was asked".to_owned();
            Err(UserError::Database { at, user, what })
        }
    }
}
