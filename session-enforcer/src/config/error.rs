//! The errors of a configuration. Each has its location, what was found and what is allowed, in one line.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use session_enforcer_common::{MAX_CGROUP_LEVELS, MAX_MATCH_ENTRIES, MAX_RULES};

use super::DEFAULT_METRICS_PORT;
use super::value::{MAX_SOCKET_PATH, format_duration};

/// A position in the text of a file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: u32,
    /// The character within the line.
    pub column: u32,
}

/// The location of an error or a warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub file: PathBuf,
    /// The position in the file. `None` for the whole file.
    pub position: Option<Position>,
    /// The key, such as `daemon.mode` or `rule "postgres": idle_timeout`.
    pub key: Option<String>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.file.to_string_lossy()))?;
        if let Some(Position { line, column }) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ": {}", printable(key))?;
        }
        Ok(())
    }
}

/// An error of a configuration. It prints as one line.
#[derive(Debug, thiserror::Error)]
#[error("{location}: {problem}")]
pub struct ConfigError {
    /// The location.
    pub location: Location,
    /// The error, and what is allowed.
    pub problem: Problem,
}

/// All errors of a configuration, in the order of its text. There is at least one.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors {
    first: Box<ConfigError>,
    others: Vec<ConfigError>,
}

impl ConfigErrors {
    /// `None` if there is no error.
    pub(super) fn new(errors: Vec<ConfigError>) -> Option<Self> {
        let mut errors = errors.into_iter();
        Some(Self {
            first: Box::new(errors.next()?),
            others: errors.collect(),
        })
    }

    /// The first error.
    pub fn into_first(self) -> ConfigError {
        *self.first
    }

    /// All errors.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        std::iter::once(&*self.first).chain(&self.others)
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(only: ConfigError) -> Self {
        Self {
            first: Box::new(only),
            others: Vec::new(),
        }
    }
}

/// One line per error.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.others
            .iter()
            .try_for_each(|error| write!(f, "\n{error}"))
    }
}

/// A valid but doubtful setting. It prints as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The location.
    pub location: Location,
    /// The doubt.
    pub doubt: Doubt,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.doubt)
    }
}

/// The doubt of a [`Warning`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Earlier rules match each connection that this rule would match.
    Hidden {
        /// The names of the earlier rules.
        by: Vec<String>,
    },
    /// The rule's cgroups are neither below the watched cgroup nor above it.
    OutsideDaemonCgroup {
        /// The directory of the watched cgroup.
        watched: PathBuf,
    },
    /// Other hosts can read the metrics.
    Exposed {
        /// The address of the metrics.
        address: SocketAddr,
    },
    /// No connection can have this address.
    NoEnd {
        /// The key with the address.
        key: &'static str,
        /// The prefix.
        net: IpNet,
    },
    /// No session lives long enough for this limit.
    BeyondLifetime {
        /// The key of the limit.
        key: &'static str,
        /// The rule's `max_lifetime`.
        lifetime: Duration,
    },
    /// A cgroup name contains a character of other pattern languages, which is literal here.
    NoPattern {
        /// The path.
        path: String,
    },
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hidden { by } => {
                let (plural, matches) = if by.len() == 1 { ("", "es") } else { ("s", "") };
                write!(
                    f,
                    "never decides, because the earlier rule{plural} {} match{matches} every connection \
                     that it would; move it up or remove it",
                    list(by)
                )
            }
            Self::OutsideDaemonCgroup { watched } => write!(
                f,
                "never decides, because its cgroups are neither below daemon.cgroup, {}, nor above it; \
                 name others, or remove it",
                printable(&watched.display().to_string())
            ),
            Self::Exposed { address } => write!(
                f,
                "whoever reaches {address} reads the metrics and may keep the daemon busy with them: there is \
                 no authentication; listen on 127.0.0.1 or a Unix socket, or let a firewall guard the port"
            ),
            Self::NoEnd { key, net } => {
                let length = net.prefix_len() < net.max_prefix_len();
                let text = if length {
                    net.to_string()
                } else {
                    net.addr().to_string()
                };
                write!(f, "{key}: \"{text}\" matches nothing: ")?;
                match net.addr() {
                    address if address.is_unspecified() => write!(
                        f,
                        "no connection has this address; for all of its kind write \"{address}/0\", or \
                         leave it out"
                    ),
                    _ => write!(
                        f,
                        "no TCP connection has a multicast or broadcast address; remove it"
                    ),
                }
            }
            Self::BeyondLifetime { key, lifetime } => write!(
                f,
                "{key} is never reached, because no session lives longer than max_lifetime, {}; shorten it, \
                 lengthen max_lifetime, or remove one of them",
                format_duration(*lifetime)
            ),
            Self::NoPattern { path } => write!(
                f,
                "cgroups: {} hardly matches what it is meant to: only a single * within one name is a \
                 pattern, other characters stand for themselves",
                quoted(path)
            ),
        }
    }
}

/// The error in a file, a key or a value.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system refused the file.
    #[error("cannot be read: {0}; give a file that exists and that this user may read")]
    Unreadable(io::Error),
    /// The path is a directory.
    #[error("is a directory; give the path of a file")]
    Directory,
    /// The file is larger than any configuration.
    #[error("is larger than {0} bytes, which no configuration is; give another file")]
    TooLarge(u64),
    /// The file contains bytes that are not UTF-8.
    #[error("is not UTF-8 text from here on; save the file as UTF-8")]
    NotUtf8,
    /// The text is not TOML.
    #[error("is not TOML: {message}; found {found}")]
    Syntax {
        /// The parser's message.
        message: String,
        /// The text at the position.
        found: String,
    },
    /// A key or table occurs twice.
    #[error("is here for the second time; keep one")]
    DuplicateKey,
    /// `[rule]` instead of `[[rule]]`.
    #[error("found [rule]; allowed: {ALLOWED_RULES}")]
    SingleRule,

    /// The key is unknown.
    #[error("is not a known key; {}", suggestion(.nearest, .known))]
    UnknownKey {
        /// The most similar known key.
        nearest: Option<&'static str>,
        /// All known keys of the table.
        known: &'static [&'static str],
    },
    /// The key belongs to another table.
    #[error("is not a known key here; it belongs under {under}")]
    MisplacedKey {
        /// The header of the key's table.
        under: &'static str,
    },
    /// `audit.sync` together with `audit.path = "journald"`.
    #[error(
        "found true beside path = \"journald\", which itself decides when records are on the disk \
         (SyncIntervalSec= in journald.conf); remove it, or name a file as path"
    )]
    SyncedJournal,
    /// The kernel takes no Unix socket with such a path.
    #[error(
        "the path has {length} bytes, and that of a Unix socket at most {MAX_SOCKET_PATH}; choose a shorter one"
    )]
    LongSocketPath {
        /// The length of the path.
        length: usize,
    },
    /// The value of this other key has the same path.
    #[error("{0} has the same path; choose another one")]
    SharedPath(&'static str),

    /// The value has the wrong type, is out of range, or is not one of the choices.
    #[error("found {found}; allowed: {allowed}")]
    NotAllowed {
        /// The value.
        found: String,
        /// The allowed values.
        allowed: &'static str,
    },
    /// The list has more elements than the match table can hold.
    #[error("has {found} elements; at most {MAX_MATCH_ENTRIES} are allowed")]
    LongList {
        /// The number of elements.
        found: usize,
    },
    /// The first port of a range exceeds the last.
    #[error("the range \"{first}-{last}\" runs backwards; write \"{last}-{first}\"")]
    BackwardRange {
        /// The first, higher, port.
        first: u16,
        /// The last, lower, port.
        last: u16,
    },
    /// The prefix has bits set after its length.
    #[error(
        "\"{0}\" has bits set after its prefix; write \"{trunc}\", or \"{addr}\" alone",
        trunc = .0.trunc(),
        addr = .0.addr()
    )]
    HostBits(IpNet),
    /// The listen address has no port.
    #[error(
        "\"{0}\" has no port; write \"{example}\"",
        example = SocketAddr::new(*.0, DEFAULT_METRICS_PORT)
    )]
    NoPort(IpAddr),
    /// An IPv6 address without brackets before its port.
    #[error("an IPv6 address needs brackets before its port; write \"[{0}]:{1}\"")]
    NoBrackets(Ipv6Addr, u16),
    /// The path in double quotes has an escape that systemd uses literally in names.
    #[error(
        "TOML replaces \\x within double quotes, and names of systemd contain it: write the path in single quotes"
    )]
    ByteEscape,
    /// The cgroup is deeper than the kernel programs can compare.
    #[error(
        "has {levels} levels, and rules can name at most {MAX_CGROUP_LEVELS}; name a cgroup above it"
    )]
    DeepCgroup {
        /// The number of levels.
        levels: usize,
    },
    /// A duration without a unit.
    #[error("{number} has no unit; write \"{number}s\" for seconds, or m, h or d after it")]
    NoUnit {
        /// The number.
        number: String,
    },
    /// The limit is too short to be enforced precisely.
    #[error("{found} is shorter than 1s, the shortest limit; {otherwise}")]
    ShortLimit {
        /// The value.
        found: String,
        /// What to do for less.
        otherwise: &'static str,
    },
    /// The limit is so long that no connection reaches it.
    #[error("{found} is longer than 36500d, the longest limit; for no limit, leave it out")]
    LongLimit {
        /// The value.
        found: String,
    },

    /// The file has no rule.
    #[error("there is none, so nothing would be enforced; add a rule, headed by [[rule]]")]
    NoRule,
    /// There are more rules than the daemon has counters for.
    #[error("there are {found}; at most {MAX_RULES} are allowed")]
    ManyRules {
        /// The number of rules.
        found: usize,
    },
    /// The rule has no name.
    #[error("is missing; every rule has a name of its own")]
    NoName,
    /// Two rules have the same name.
    #[error("\"{name}\" is the name of the rule in line {line}; every rule has a name of its own")]
    DuplicateName {
        /// The name.
        name: String,
        /// The line of the other rule's name.
        line: u32,
    },
    /// The rule would enforce nothing.
    #[error(
        "has no limit; add idle_timeout, max_lifetime, response_timeout or half_closed_timeout, or action = \
         \"exempt\""
    )]
    NoLimit,
    /// The limit would not be enforced.
    #[error("is a limit, and an exempt rule has none; remove it, or action = \"exempt\"")]
    LimitOnExempt,
    /// The key modifies a limit that the rule does not have.
    #[error("has no effect without {limit}; add it, or remove this")]
    WithoutLimit {
        /// The keys of which the rule needs one.
        limit: &'static str,
    },
    /// A response timeout on a rule for outbound connections, where this host never owes an answer.
    #[error(
        "is for inbound connections, where this host owes the answer; remove it, or \
         direction = \"outbound\""
    )]
    ResponseOutbound,
    /// The jitter could shorten the lifetime below the shortest limit.
    #[error("could shorten max_lifetime to less than 1s, the shortest limit; use a smaller share")]
    JitterTooLarge,
    /// No connection can have both addresses.
    #[error(
        "can never match: a connection has IPv4 addresses at both ends or IPv6 addresses at both, \
         and local and remote here have none of the same kind; make them agree"
    )]
    MixedFamilies,
    /// The rules produce more entries than the match table holds.
    #[error(
        "the rules up to this one come to more than {MAX_MATCH_ENTRIES} combinations of \
         prefixes, port ranges and owners, the most allowed (this one: {rule}, those before it: \
         {before}); use wider prefixes and ranges"
    )]
    ManyEntries {
        /// The entries of the earlier rules.
        before: usize,
        /// The entries of this rule.
        rule: EntryCount,
    },
}

/// The number of match entries of a rule. Counting stops one above the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryCount(pub usize);

impl fmt::Display for EntryCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let most = MAX_MATCH_ENTRIES as usize;
        if self.0 > most {
            write!(f, "more than {most}")
        } else {
            write!(f, "{}", self.0)
        }
    }
}

/// The allowed form of rules.
pub(super) const ALLOWED_RULES: &str = "each rule under a header of its own, [[rule]]";

fn suggestion(nearest: &Option<&str>, known: &[&str]) -> String {
    match nearest {
        Some(key) => format!("did you mean \"{key}\"?"),
        None => format!("allowed here: {}", list(known)),
    }
}

fn list(names: &[impl fmt::Display]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    quoted.join(", ")
}

/// The text in one line without terminal control characters, because a file's content is not trusted.
fn printable(text: &str) -> String {
    let escape = |c: char| -> String {
        if c.is_control() {
            c.escape_default().collect()
        } else {
            c.into()
        }
    };
    text.chars().map(escape).collect()
}

/// The text in quotes and in one line, cut if it is too long.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST {
        return format!("{text:?}");
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{start:?}...")
}
