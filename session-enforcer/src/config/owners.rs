//! The owners in rules: users and cgroups, by name and by the kernel's numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use session_enforcer_common::MAX_CGROUP_LEVELS;

use super::error::quoted;
use super::{Problem, Rule};

pub(super) const ALLOWED_USER: &str = "the name of a user such as \"postgres\", or a uid";
pub(super) const ALLOWED_CGROUP_PATH: &str = "a cgroup's path from the root of the hierarchy, as in /proc/PID/cgroup, such as \
     \"/system.slice/postgresql.service\"";

/// The usual mount point of the cgroup hierarchy. A path below it is a file-system path and not a cgroup
/// path.
const USUAL_MOUNT: &str = "/sys/fs/cgroup";

/// The mount point in a hybrid hierarchy, beside those of cgroup v1.
const HYBRID_MOUNT: &str = "/sys/fs/cgroup/unified";

/// The maximum length of a user name (`LOGIN_NAME_MAX` of Linux).
const MAX_USER_CHARS: usize = 256;

/// A user in a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// A UID.
    Uid(u32),
    /// A user name.
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

/// Parses a user name or a UID.
///
/// # Errors
///
/// Fails if the text is neither.
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

/// The user with this UID. The highest number means "no user" (POSIX).
pub(super) fn uid(number: i128) -> Option<User> {
    let uid = u32::try_from(number).ok()?;
    (uid != u32::MAX).then_some(User::Uid(uid))
}

/// Parses a cgroup's path from the root of the hierarchy, without a trailing slash. The root is `/`.
///
/// # Errors
///
/// Fails if the text is no such path.
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

/// Parses the path of a cgroup in a rule. Its depth is limited, but sockets may be in deeper cgroups, because
/// ancestors match too.
pub(super) fn parse_rule_cgroup(text: &str) -> Result<String, Problem> {
    let path = parse_cgroup(text)?;
    let levels = path.split('/').skip(1).count();
    if levels > MAX_CGROUP_LEVELS {
        return Err(Problem::DeepCgroup { levels });
    }
    Ok(path)
}

/// Whether a path contains `*`, so that it names all matching cgroups.
pub fn is_pattern(path: &str) -> bool {
    path.contains('*')
}

/// Whether a cgroup name matches a pattern, in which `*` stands for any number of characters.
pub fn fits(name: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return name == pattern;
    };
    let (between, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let mut left = name.strip_prefix(start);
    // Match each part as early as possible, which leaves the most text for the next one.
    for part in between.split('*') {
        left = left
            .and_then(|left| left.split_at_checked(left.find(part)? + part.len()))
            .map(|(_, left)| left);
    }
    left.is_some_and(|left| left.ends_with(end))
}

/// Whether the cgroup matches `above` or is below a cgroup that matches it. If both are patterns: whether
/// that holds for each cgroup that matches the first one.
pub fn is_below(cgroup: &str, above: &str) -> bool {
    let mut names = cgroup.split('/');
    let is_name_below = |wanted| names.next().is_some_and(|name| fits(name, wanted));
    above == "/" || cgroup != "/" && above.split('/').all(is_name_below)
}

/// Whether one of two paths or patterns can be below the other.
fn may_meet(one: &str, other: &str) -> bool {
    let mut pairs = one.split('/').zip(other.split('/'));
    one == "/" || other == "/" || pairs.all(|(a, b)| fits(a, b) || fits(b, a))
}

/// Whether no socket of the rule's cgroups can be in the watched directory or below it, at either usual mount
/// point of the hierarchy.
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

/// The kernel's numbers of the users and cgroups in rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// The IDs of each cgroup: none if it does not exist, and several if it was removed and created again,
    /// because sockets of the former one may still exist. Cgroups that match a pattern are listed under their
    /// own paths.
    pub cgroups: BTreeMap<String, Vec<u64>>,
    /// The UID of each user that is given by name.
    pub users: BTreeMap<String, u32>,
}

impl Owners {
    /// Assigns distinct placeholder numbers: one to each path, and one to each name, different from the UIDs
    /// in the rules. They suffice to compare rules with each other.
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

    /// A copy with only the last ID of each cgroup.
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

    /// The UID of a user. `None` if the name is unknown.
    pub fn uid(&self, user: &User) -> Option<u32> {
        match user {
            User::Uid(uid) => Some(*uid),
            User::Name(name) => self.users.get(name).copied(),
        }
    }

    /// The IDs of a cgroup, or of all cgroups that match a pattern.
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

/// The UIDs that a rule allows. A single `None` if it allows any.
pub(super) fn uids(rule: &Rule, owners: &Owners) -> Vec<Option<u32>> {
    if rule.users.is_empty() {
        return vec![None];
    }
    let uids: BTreeSet<u32> = rule.users.iter().filter_map(|u| owners.uid(u)).collect();
    uids.into_iter().map(Some).collect()
}

/// The cgroup IDs that a rule allows. A single 0 if it allows any.
pub(super) fn cgroup_ids(rule: &Rule, owners: &Owners) -> Vec<u64> {
    let Some(paths) = outermost(&rule.cgroups) else {
        return vec![0];
    };
    let ids = paths.into_iter().flat_map(|path| owners.cgroup_ids(path));
    let ids: BTreeSet<u64> = ids.collect();
    ids.into_iter().collect()
}

/// The cgroups of a rule without those below another one. `None` if the rule allows any cgroup.
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
