//! Filters and sort orders of sessions: parsing them and applying them.

use std::{fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;
use session_enforcer_common::Session;

use super::session_row::{End, Listed, deadline};
use crate::config::{
    User, format_duration, is_below, parse_cgroup, parse_duration, parse_prefix, parse_user,
};

/// The filter keys of a query.
pub const FILTER_KEYS: [&str; 9] = [
    "rule",
    "remote",
    "local_port",
    "user",
    "cgroup",
    "idle_over",
    "older_than",
    "ends_within",
    "text",
];

/// The maximum number of sessions in a sorted list, which is kept in memory.
pub const MAX_SORTED: usize = 10_000;

/// Conditions that must all hold. An empty filter matches all sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    rule: Option<String>,
    remote: Option<IpNet>,
    local_port: Option<u16>,
    user: Option<User>,
    cgroup: Option<String>,
    idle_over: Option<Duration>,
    older_than: Option<Duration>,
    ends_within: Option<Duration>,
    text: Option<String>,
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value: &Option<String>| Some(value.as_ref()?.escape_debug().to_string());
        let time = |value: Option<Duration>| value.map(format_duration);
        let values = [
            text(&self.rule),
            self.remote.map(|net| net.to_string()),
            self.local_port.map(|port| port.to_string()),
            self.user.as_ref().map(ToString::to_string),
            text(&self.cgroup),
            time(self.idle_over),
            time(self.older_than),
            time(self.ends_within),
            text(&self.text),
        ];
        let pairs = FILTER_KEYS.iter().zip(values);
        let pairs = pairs.filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        f.write_str(&pairs.collect::<Vec<_>>().join(", "))
    }
}

impl Filter {
    /// Adds a condition. Returns whether the key is a filter key.
    ///
    /// # Errors
    ///
    /// Fails if the value is invalid for the key, or if the filter has the key already.
    pub fn add(&mut self, key: &str, value: &str) -> Result<bool, String> {
        let wrong = |what: String| format!("{key}: {what}");
        let is_there = match key {
            "rule" => self.rule.replace(value.to_owned()).is_some(),
            "remote" => {
                let remote = parse_prefix(value).map_err(|e| wrong(e.to_string()))?;
                self.remote.replace(remote).is_some()
            }
            "local_port" => {
                let port = value.parse().ok().filter(|port| *port != 0);
                let port =
                    port.ok_or_else(|| wrong("allowed: a port from 1 to 65535".to_owned()))?;
                self.local_port.replace(port).is_some()
            }
            "user" => {
                let user = parse_user(value).map_err(|e| wrong(e.to_string()))?;
                self.user.replace(user).is_some()
            }
            "cgroup" => {
                let cgroup = parse_cgroup(value).map_err(|e| wrong(e.to_string()))?;
                self.cgroup.replace(cgroup).is_some()
            }
            "idle_over" => self
                .idle_over
                .replace(time(value).map_err(wrong)?)
                .is_some(),
            "older_than" => self
                .older_than
                .replace(time(value).map_err(wrong)?)
                .is_some(),
            "ends_within" => self
                .ends_within
                .replace(time(value).map_err(wrong)?)
                .is_some(),
            // Every session has an empty text: `kill --text "$UNSET"` would reset all of them.
            "text" if value.is_empty() => return Err(wrong("at least one character".to_owned())),
            "text" => self.text.replace(value.to_lowercase()).is_some(),
            _ => return Ok(false),
        };
        if is_there {
            return Err(wrong("is given twice".to_owned()));
        }
        Ok(true)
    }

    /// Whether the filter has no condition.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the filter names an owner.
    pub fn names_owner(&self) -> bool {
        self.user.is_some() || self.cgroup.is_some()
    }

    /// The rule that the filter names.
    pub fn rule(&self) -> Option<&str> {
        self.rule.as_deref()
    }

    /// Whether the filter matches a session.
    pub(super) fn matches(&self, found: &Listed<'_>, now_ns: u64) -> bool {
        let (session, limits) = (found.session, found.rule.limits);
        let longer = |since_ns: u64, limit: &Duration| {
            u128::from(now_ns.saturating_sub(since_ns)) >= limit.as_nanos()
        };
        let rule = self.rule.as_ref();
        let user = self.user.as_ref();
        let text = self.text.as_ref();
        rule.is_none_or(|rule| rule == found.rule.name)
            && text.is_none_or(|text| shows(found, text))
            && self
                .remote
                .is_none_or(|net| net.contains(&IpAddr::from(session.remote)))
            && self
                .local_port
                .is_none_or(|port| port == session.local_port)
            && user.is_none_or(|user| is_of(user, session, found.user))
            && self
                .cgroup
                .as_ref()
                .is_none_or(|above| found.cgroup.is_some_and(|cgroup| is_below(cgroup, above)))
            && self.idle_over.as_ref().is_none_or(|limit| {
                !limits.waits_for_answer(session) && longer(limits.idle_since(session), limit)
            })
            && self
                .older_than
                .as_ref()
                .is_none_or(|limit| longer(session.established_ns, limit))
            && self.ends_within.as_ref().is_none_or(|limit| {
                deadline(session, limits).is_some_and(|(_, ns)| {
                    u128::from(ns.saturating_sub(now_ns)) <= limit.as_nanos()
                })
            })
    }
}

/// Whether the text appears in a column that a list shows for the session.
fn shows(found: &Listed<'_>, text: &str) -> bool {
    let session = found.session;
    let has = |shown: &str| shown.to_lowercase().contains(text);
    has(found.rule.name)
        || found.user.is_some_and(has)
        || found.cgroup.is_some_and(has)
        || has(&End::of(session.local, session.local_port).to_string())
        || has(&End::of(session.remote, session.remote_port).to_string())
}

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

fn is_of(user: &User, session: &Session, name: Option<&str>) -> bool {
    session.owner.is_known()
        && match user {
            User::Uid(uid) => *uid == session.owner.uid,
            User::Name(wanted) => name == Some(wanted),
        }
}

/// The sort key of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SortKey {
    /// Time left, shortest first.
    #[default]
    Left,
    /// Idle time, longest first.
    Idle,
    /// Age, oldest first.
    Age,
    /// Bytes in both directions, most first.
    Bytes,
    /// Rule name, then time left.
    Rule,
    /// Session ID.
    Id,
}

impl SortKey {
    const ALL: [(&'static str, Self); 6] = [
        ("left", Self::Left),
        ("idle", Self::Idle),
        ("age", Self::Age),
        ("bytes", Self::Bytes),
        ("rule", Self::Rule),
        ("id", Self::Id),
    ];

    /// The name in a query and on the command line.
    pub fn name(self) -> &'static str {
        let mut all = Self::ALL.iter();
        all.find(|(_, key)| *key == self)
            .map_or("", |(name, _)| name)
    }

    /// The next sort key in the cycle.
    #[must_use]
    pub fn next(self) -> Self {
        let after = Self::ALL.iter().skip_while(|(_, key)| *key != self).nth(1);
        after.map_or(Self::Left, |(_, key)| *key)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut all = Self::ALL.iter();
        let found = all.find(|(name, _)| *name == text).map(|(_, key)| *key);
        found.ok_or_else(|| "sort: allowed: left, idle, age, bytes, rule, id".to_owned())
    }

    /// The numbers that sort sessions in this order.
    pub(super) fn rank(self, found: &Listed<'_>) -> (u64, u64) {
        let (session, limits) = (found.session, found.rule.limits);
        let ends_ns = deadline(session, limits).map_or(u64::MAX, |(_, ns)| ns);
        match self {
            Self::Left => (ends_ns, found.id),
            Self::Idle => (limits.idle_since(session), found.id),
            Self::Age => (session.established_ns, found.id),
            Self::Bytes => {
                let bytes = session.bytes_received.saturating_add(session.bytes_sent);
                (u64::MAX - bytes, found.id)
            }
            Self::Rule => (u64::from(found.rule.name_rank), ends_ns),
            Self::Id => (found.id, 0),
        }
    }
}

/// The selection of a query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// The filter.
    pub filter: Filter,
    /// The sort key, and the number of sessions to return. `None` returns all sessions, unsorted.
    pub first: Option<(SortKey, usize)>,
    /// Whether to change nothing.
    pub dry_run: bool,
}

impl Selection {
    /// Parses a query.
    ///
    /// # Errors
    ///
    /// Fails if a key is unknown or a value is invalid for its key.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut selection = Self::default();
        let (mut sort, mut limit) = (None, None);
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "sort" => sort = Some(SortKey::parse(&value)?),
                "limit" => {
                    let number = value.parse().ok().filter(|n| (1..=MAX_SORTED).contains(n));
                    limit = Some(number.ok_or_else(|| {
                        format!("limit: a number from 1 to {MAX_SORTED} is allowed")
                    })?);
                }
                "dry_run" => {
                    selection.dry_run = value
                        .parse()
                        .map_err(|_| "dry_run: true or false is allowed")?;
                }
                _ => {
                    if !selection.filter.add(&key, &value)? {
                        let known = FILTER_KEYS.join(", ");
                        return Err(format!(
                            "{key}: there is no such parameter; allowed: {known}, sort, limit, dry_run"
                        ));
                    }
                }
            }
        }
        selection.first = match (sort, limit) {
            (sort, Some(limit)) => Some((sort.unwrap_or_default(), limit)),
            (Some(_), None) => {
                return Err(format!("sort: needs a limit, at most {MAX_SORTED}"));
            }
            (None, None) => None,
        };
        Ok(selection)
    }
}

#[cfg(test)]
mod tests {
    use session_enforcer_common::{Limits, Owner};

    use super::*;
    use crate::{
        config::Mode,
        report::{audit::tests::session, control::RuleInForce},
    };

    const S: u64 = 1_000_000_000;

    fn limits() -> Limits {
        Limits {
            idle_timeout_ns: 60 * S,
            ..Limits::default()
        }
    }

    fn is_meant(query: &str, session: &Session) -> bool {
        is_meant_with(query, session, limits())
    }

    fn is_meant_with(query: &str, session: &Session, limits: Limits) -> bool {
        let found = Listed {
            id: 7,
            session,
            rule: RuleInForce {
                name_rank: 0,
                name: "postgres",
                mode: Mode::Enforce,
                limits: &limits,
            },
            user: Some("postgres"),
            cgroup: Some("/system.slice/postgresql.service"),
        };
        let selection = Selection::parse(query).unwrap();
        // The session's last activity was at 1.003 s.
        selection.filter.matches(&found, 31 * S)
    }

    #[test]
    fn each_filter_holds_or_does_not() {
        let session = session();
        for query in [
            "",
            "rule=postgres",
            "remote=10.0.0.0%2F8",
            "remote=10.0.0.7",
            "local_port=5432",
            "user=postgres",
            "user=113",
            "cgroup=%2Fsystem.slice",
            "cgroup=/system.slice/postgresql.service",
            "cgroup=/system.slice/postgresql*",
            "idle_over=29s",
            "older_than=30s",
            "ends_within=31s",
            "text=Post",
            "text=0.0.7:51",
            "text=:5432",
            "text=SYSTEM.slice",
            "rule=postgres&user=113&idle_over=1s",
        ] {
            assert!(is_meant(query, &session), "{query}");
        }
        for query in [
            "rule=ssh",
            "remote=10.0.0.8",
            "remote=2001:db8::/32",
            "local_port=5433",
            "user=root",
            "user=0",
            "cgroup=/user.slice",
            "idle_over=30s",
            "older_than=31s",
            "ends_within=29s",
            "text=5433",
            "rule=postgres&user=0",
        ] {
            assert!(!is_meant(query, &session), "{query}");
        }
    }

    #[test]
    fn a_session_that_owes_an_answer_is_not_idle() {
        let session = Session {
            answered_ns: 0,
            ..session()
        };
        let limits = limits();
        assert!(is_meant_with("idle_over=29s", &session, limits));
        let limits = Limits {
            response_timeout_ns: 3_600 * S,
            ..limits
        };
        assert!(!is_meant_with("idle_over=29s", &session, limits));
    }

    #[test]
    fn a_session_of_unknown_owner_matches_no_user_or_cgroup() {
        let unknown = Session {
            owner: Owner::UNKNOWN,
            ..session()
        };
        for query in ["user=postgres", "user=113", "user=0"] {
            assert!(!is_meant(query, &unknown), "{query}");
        }
    }

    #[test]
    fn an_invalid_filter_is_refused_with_the_allowed_values() {
        for (query, message) in [
            (
                "ruel=a",
                "ruel: there is no such parameter; allowed: rule, ",
            ),
            ("remote=x", "remote: "),
            ("remote=10.0.0.1/8", "remote: "),
            (
                "local_port=1-2",
                "local_port: allowed: a port from 1 to 65535",
            ),
            (
                "local_port=0",
                "local_port: allowed: a port from 1 to 65535",
            ),
            ("cgroup=a", "cgroup: "),
            ("idle_over=5", "idle_over: "),
            ("older_than=", "older_than: "),
            ("sort=x&limit=1", "sort: allowed: left, "),
            ("sort=left", "sort: needs a limit"),
            ("limit=0", "limit: a number from 1 to 10000"),
            ("limit=10001", "limit: a number from 1 to 10000"),
            ("dry_run=yes", "dry_run: true or false"),
        ] {
            let error = Selection::parse(query).unwrap_err();
            assert!(error.starts_with(message), "{query}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_limit_alone_means_those_that_end_next() {
        let first = |query| Selection::parse(query).unwrap().first;
        assert_eq!(first("limit=3"), Some((SortKey::Left, 3)));
        assert_eq!(first("sort=bytes&limit=3"), Some((SortKey::Bytes, 3)));
        assert_eq!(first("rule=a"), None);
        for (name, key) in SortKey::ALL {
            assert_eq!((key.name(), SortKey::parse(name)), (name, Ok(key)));
        }
    }
}
