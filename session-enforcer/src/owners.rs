//! Whom the rules mean on this host: the numbers of users and cgroups, and the names of those that
//! own sessions.

use std::collections::HashMap;

use session_enforcer_common::Ancestors;
use thiserror::Error;

use crate::{
    cgroup::{CgroupError, Tree},
    config::{Config, Location, Owners, User},
    users::{self, Names},
};

/// Former identities of a cgroup that are kept: a service that was restarted so often has hardly a
/// connection left from before.
const MAX_FORMER: usize = 8;

/// Paths of cgroups that are remembered before those that are no more are forgotten.
const MAX_PATHS: usize = 16_384;

/// A rule names a user that the host does not have.
#[derive(Debug, Error)]
pub enum UserError {
    /// Nobody has the name.
    #[error("{at}: there is no user \"{user}\" on this host; create it, or give the uid")]
    Unknown {
        /// File, line and key.
        at: Location,
        /// The name.
        user: String,
    },
    /// The user database could not be asked.
    #[error("{at}: looking for the user \"{user}\": {source}; give the uid")]
    Database {
        /// File, line and key.
        at: Location,
        /// The name.
        user: String,
        /// What went wrong.
        source: std::io::Error,
    },
}

/// What the host tells about owners.
#[derive(Debug)]
pub struct Directory {
    tree: Tree,
    names: Names,
    /// Paths of cgroups by identity. A session may live longer than its cgroup.
    paths: HashMap<u64, String>,
    owners: Owners,
}

impl Directory {
    /// A directory of no owners yet.
    ///
    /// # Errors
    ///
    /// Where cgroup v2 is not mounted.
    pub fn new() -> Result<Self, CgroupError> {
        Ok(Self {
            tree: Tree::open()?,
            names: Names::default(),
            paths: HashMap::new(),
            owners: Owners::default(),
        })
    }

    /// Looks for the owners that the rules name, and for the names of all users. Nothing changes
    /// before they are [kept](Self::keep).
    ///
    /// # Errors
    ///
    /// Where a user is not there. A cgroup need not be: services come and go.
    pub fn look_up(&self, config: &Config) -> Result<Found, UserError> {
        let mut names = Names::read();
        let mut owners = Owners::default();
        for (rule, at) in config.rules.iter().zip(&config.users_at) {
            for user in &rule.users {
                let (User::Name(name), Some(at)) = (user, at) else {
                    continue;
                };
                let uid = uid_of(name, at)?;
                names.add(uid, name);
                owners.users.insert(name.clone(), uid);
            }
        }
        for path in config.rules.iter().flat_map(|rule| &rule.cgroups) {
            let before = self.owners.cgroups.get(path).cloned();
            let ids = before.unwrap_or_default();
            owners.cgroups.insert(path.clone(), ids);
        }
        look_for_cgroups(&self.tree, &mut owners);
        Ok(Found { names, owners })
    }

    /// Keeps what was found for a configuration that is in force now.
    pub fn keep(&mut self, found: Found) {
        (self.names, self.owners) = (found.names, found.owners);
    }

    /// Looks again for the cgroups that the rules name; the identities of those that have come.
    pub fn look_again(&mut self) -> Vec<u64> {
        look_for_cgroups(&self.tree, &mut self.owners)
    }

    /// The owners as they were found last.
    pub fn owners(&self) -> &Owners {
        &self.owners
    }

    /// The directories of the cgroups that the rules name, whether they are there or not.
    pub fn directories(&self) -> Vec<std::path::PathBuf> {
        let paths = self.owners.cgroups.keys();
        paths.map(|path| self.tree.directory(path)).collect()
    }

    /// The identities of a cgroup and of those above it. Of one that is no more, its own.
    pub fn ancestors(&self, cgroup_id: u64) -> Ancestors {
        self.tree.ancestors(cgroup_id)
    }

    /// Remembers where a cgroup is, for the time when it is no more.
    pub fn remember(&mut self, cgroup_id: u64) {
        if cgroup_id == 0 || self.paths.contains_key(&cgroup_id) {
            return;
        }
        if self.paths.len() >= MAX_PATHS {
            let tree = &self.tree;
            self.paths.retain(|id, path| tree.id(path) == Some(*id));
        }
        if let Some(path) = self.tree.path(cgroup_id) {
            self.paths.insert(cgroup_id, path);
        }
    }

    /// Where a cgroup is, or was.
    pub fn path(&self, cgroup_id: u64) -> Option<&str> {
        self.paths.get(&cgroup_id).map(String::as_str)
    }

    /// The name of a user.
    pub fn user_name(&self, uid: u32) -> Option<&str> {
        self.names.name(uid)
    }
}

/// What the host has of the owners that a configuration names.
#[derive(Debug)]
pub struct Found {
    names: Names,
    /// Their numbers.
    pub owners: Owners,
}

/// Adds the identities of the cgroups that are there and were not before; which.
fn look_for_cgroups(tree: &Tree, owners: &mut Owners) -> Vec<u64> {
    let mut come = Vec::new();
    for (path, ids) in &mut owners.cgroups {
        let Some(id) = tree.id(path).filter(|id| ids.last() != Some(id)) else {
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

fn uid_of(name: &str, at: &Location) -> Result<u32, UserError> {
    let (at, user) = (at.clone(), name.to_owned());
    match users::uid_of(name) {
        Ok(Some(uid)) => Ok(uid),
        Ok(None) => Err(UserError::Unknown { at, user }),
        Err(source) => Err(UserError::Database { at, user, source }),
    }
}
