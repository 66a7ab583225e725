//! The owners that rules ask for: users and cgroups, as people name them and as the kernel numbers
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use session_enforcer_common::MAX_CGROUP_LEVELS;

use super::error::quoted;
use super::{Problem, Rule};

pub(super) const ALLOWED_USER: &str = "the name of a user such as \"postgres\", or a uid";
pub(super) const ALLOWED_CGROUP_PATH: &str = "a cgroup's path from the root of the hierarchy, as in /proc/PID/cgroup, such as \
     \"/system.slice/postgresql.service\"";

/// Where the hierarchy is mounted by custom. A path below it is that of the file system, and not of
/// the cgroup.
const USUAL_MOUNT: &str = "/sys/fs/cgroup";

/// Where it is in a hybrid hierarchy, beside those of cgroup v1.
const HYBRID_MOUNT: &str = "/sys/fs/cgroup/unified";

/// Longest name of a user (`LOGIN_NAME_MAX` of Linux).
const MAX_USER_CHARS: usize = 256;

/// A user that a rule names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// By number.
    Uid(u32),
    /// By name.
    Name(String),
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => uid.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// A user's name, or a number as text.
///
/// # Errors
///
/// Where the text cannot be either.
pub fn parse_user(text: &str) -> Result<User, Problem> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let uid = text.parse().ok().and_then(uid);
        return uid.ok_or_else(|| not_a_user(text));
    }
    let strange = |c: char| c.is_control() || c.is_whitespace() || matches!(c, ':' | '/' | ',');
    if text.is_empty() || text.len() > MAX_USER_CHARS || text.contains(strange) {
        return Err(not_a_user(text));
    }
    Ok(User::Name(text.to_owned()))
}

fn not_a_user(text: &str) -> Problem {
    let found = quoted(text);
    Problem::NotAllowed {
        found,
        allowed: ALLOWED_USER,
    }
}

/// The user of a number; the highest number stands for "no user" (POSIX).
pub(super) fn uid(number: i128) -> Option<User> {
    let uid = u32::try_from(number).ok()?;
    (uid != u32::MAX).then_some(User::Uid(uid))
}

/// A cgroup's path from the root of the hierarchy, without a slash at its end; the root is `/`.
///
/// # Errors
///
/// Where the text is no such path.
pub fn parse_cgroup(text: &str) -> Result<String, Problem> {
    let not_allowed = || Problem::NotAllowed {
        found: quoted(text),
        allowed: ALLOWED_CGROUP_PATH,
    };
    let below = text.strip_prefix('/').ok_or_else(not_allowed)?;
    let below = below.strip_suffix('/').unwrap_or(below);
    if below.is_empty() {
        return Ok("/".to_owned());
    }
    let strange = |name: &str| matches!(name, "" | "." | "..") || name.contains(char::is_control);
    let levels = below.split('/').filter(|name| !strange(name)).count();
    if levels != below.split('/').count() {
        return Err(not_allowed());
    }
    let path = format!("/{below}");
    if is_below(&path, USUAL_MOUNT) {
        return Err(not_allowed());
    }
    Ok(path)
}

/// The path of a cgroup that a rule may name. Sockets may lie deeper: those above them decide.
pub(super) fn parse_rule_cgroup(text: &str) -> Result<String, Problem> {
    let path = parse_cgroup(text)?;
    let levels = path.split('/').skip(1).count();
    if levels > MAX_CGROUP_LEVELS {
        return Err(Problem::DeepCgroup { levels });
    }
    Ok(path)
}

/// Whether a path has `*` in it, and stands for every cgroup that it fits.
pub fn is_pattern(path: &str) -> bool {
    path.contains('*')
}

/// Whether the name of a cgroup fits one in which `*` stands for any characters, or none.
pub fn fits(name: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return name == pattern;
    };
    let (between, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let mut left = name.strip_prefix(start);
    // Each part as early as it can be: what is left for the next is the longest.
    for part in between.split('*') {
        left = left
            .and_then(|left| left.split_at_checked(left.find(part)? + part.len()))
            .map(|(_, left)| left);
    }
    left.is_some_and(|left| left.ends_with(end))
}

/// Whether the cgroup is `above`, which may be a pattern, or one below that. Of two patterns: whether each
/// cgroup that fits the one is or lies below one that fits the other.
pub fn is_below(cgroup: &str, above: &str) -> bool {
    let mut names = cgroup.split('/');
    let is_name_below = |wanted| names.next().is_some_and(|name| fits(name, wanted));
    above == "/" || cgroup != "/" && above.split('/').all(is_name_below)
}

/// Whether one of two paths, which may be patterns, can lie below the other.
fn may_meet(one: &str, other: &str) -> bool {
    let mut pairs = one.split('/').zip(other.split('/'));
    one == "/" || other == "/" || pairs.all(|(a, b)| fits(a, b) || fits(b, a))
}

/// Whether no socket of the rule's cgroups is in the watched directory or below, wherever of the usual
/// places the hierarchy is mounted.
pub(super) fn all_beside(rule: &Rule, watched: &Path) -> bool {
    let watched = watched.to_string_lossy();
    let watched = watched.trim_end_matches('/');
    let names: Vec<&str> = [USUAL_MOUNT, HYBRID_MOUNT]
        .iter()
        .filter(|mount| is_below(watched, mount))
        .filter_map(|mount| watched.strip_prefix(mount))
        .collect();
    let is_beside = |path: &String| {
        let related = |name: &&str| name.is_empty() || may_meet(path, name);
        !names.iter().any(related)
    };
    !names.is_empty() && !rule.cgroups.is_empty() && rule.cgroups.iter().all(is_beside)
}

/// The numbers by which the kernel knows the users and cgroups that rules name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// Of each cgroup the identities: none where it is not there, several where it was removed and
    /// made again, as the sockets of the former one may live on. Those that fit a pattern are here under
    /// their own paths.
    pub cgroups: BTreeMap<String, Vec<u64>>,
    /// Of each user that is named by name.
    pub users: BTreeMap<String, u32>,
}

impl Owners {
    /// Numbers that stand for themselves: one for each path, and one for each name that is no uid
    /// of the rules. For everything that only compares rules with each other.
    pub fn numbered(rules: &[Rule]) -> Self {
        let paths: BTreeSet<&String> = rules.iter().flat_map(|rule| &rule.cgroups).collect();
        let ids = (1..).map(|id| vec![id]);
        let users = || rules.iter().flat_map(|rule| &rule.users);
        let taken: BTreeSet<u32> = users()
            .filter_map(|user| match user {
                User::Uid(uid) => Some(*uid),
                User::Name(_) => None,
            })
            .collect();
        let names: BTreeSet<&String> = users()
            .filter_map(|user| match user {
                User::Name(name) => Some(name),
                User::Uid(_) => None,
            })
            .collect();
        let free = (0..u32::MAX).rev().filter(|uid| !taken.contains(uid));
        Self {
            cgroups: paths.into_iter().cloned().zip(ids).collect(),
            users: names.into_iter().cloned().zip(free).collect(),
        }
    }

    /// The same with the last identity of each cgroup alone.
    #[must_use]
    pub fn without_former(&self) -> Self {
        let last = |(path, ids): (&String, &Vec<u64>)| {
            let id = ids.last().copied().into_iter().collect();
            (path.clone(), id)
        };
        Self {
            cgroups: self.cgroups.iter().map(last).collect(),
            users: self.users.clone(),
        }
    }

    /// The number of a user; none where the name is not known.
    pub fn uid(&self, user: &User) -> Option<u32> {
        match user {
            User::Uid(uid) => Some(*uid),
            User::Name(name) => self.users.get(name).copied(),
        }
    }

    /// The identities of a cgroup, or of all that fit a pattern.
    fn cgroup_ids(&self, path: &str) -> Vec<u64> {
        if !is_pattern(path) {
            return self.cgroups.get(path).cloned().unwrap_or_default();
        }
        let levels = |path: &str| path.matches('/').count();
        let fits = |known: &str| levels(known) == levels(path) && is_below(known, path);
        let fitting = self.cgroups.iter().filter(|(known, _)| fits(known));
        fitting.flat_map(|(_, ids)| ids).copied().collect()
    }
}

/// What a rule asks of the user: one choice of none where any will do.
pub(super) fn uids(rule: &Rule, owners: &Owners) -> Vec<Option<u32>> {
    if rule.users.is_empty() {
        return vec![None];
    }
    let uids: BTreeSet<u32> = rule.users.iter().filter_map(|u| owners.uid(u)).collect();
    uids.into_iter().map(Some).collect()
}

/// What a rule asks of the cgroup: one choice of 0 where any will do.
pub(super) fn cgroup_ids(rule: &Rule, owners: &Owners) -> Vec<u64> {
    let Some(paths) = outermost(&rule.cgroups) else {
        return vec![0];
    };
    let ids = paths.into_iter().flat_map(|path| owners.cgroup_ids(path));
    let ids: BTreeSet<u64> = ids.collect();
    ids.into_iter().collect()
}

/// The cgroups of a rule without those that lie below others; nothing where they are all that there
/// are.
pub(super) fn outermost(paths: &[String]) -> Option<Vec<&str>> {
    if paths.is_empty() || paths.iter().any(|path| path == "/") {
        return None;
    }
    let inner = |path: &String| {
        paths
            .iter()
            .any(|above| above != path && is_below(path, above))
    };
    let outer: BTreeSet<&str> = paths
        .iter()
        .filter(|path| !inner(path))
        .map(String::as_str)
        .collect();
    Some(outer.into_iter().collect())
}
