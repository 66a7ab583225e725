//! What can be wrong in a configuration: each with its place, what was found and what is allowed,
//! in one line.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use session_enforcer_common::{MAX_CGROUP_LEVELS, MAX_MATCH_ENTRIES, MAX_RULES};

use super::DEFAULT_METRICS_PORT;

/// A place in the text of a file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: u32,
    /// The character in the line.
    pub column: u32,
}

/// Where in a configuration something was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub file: PathBuf,
    /// The place in the file; none where the whole file is meant.
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

/// A configuration that cannot be used. It is printed as one line.
#[derive(Debug, thiserror::Error)]
#[error("{location}: {problem}")]
pub struct ConfigError {
    /// Where.
    pub location: Location,
    /// What is wrong, and what is allowed.
    pub problem: Problem,
}

/// All that is wrong in a configuration, in the order of its text: one thing at least.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors {
    first: Box<ConfigError>,
    others: Vec<ConfigError>,
}

impl ConfigErrors {
    /// Nothing where nothing is wrong.
    pub(super) fn new(errors: Vec<ConfigError>) -> Option<Self> {
        let mut errors = errors.into_iter();
        Some(Self {
            first: Box::new(errors.next()?),
            others: errors.collect(),
        })
    }

    /// The first of them.
    pub fn into_first(self) -> ConfigError {
        *self.first
    }

    /// Each of them.
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

/// One line for each.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.others
            .iter()
            .try_for_each(|error| write!(f, "\n{error}"))
    }
}

/// A configuration that can be used, but hardly says what its author means. One line, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Where.
    pub location: Location,
    /// What is doubtful.
    pub doubt: Doubt,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.doubt)
    }
}

/// What a [`Warning`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Each connection that the rule would match is matched by one of these rules before.
    Hidden {
        /// Names of the earlier rules.
        by: Vec<String>,
    },
    /// The cgroups of the rule are neither below the one that is watched nor above it.
    Beside {
        /// Directory of the one that is watched.
        watched: PathBuf,
    },
    /// Others than this host's can read the metrics.
    Exposed {
        /// Where they are served.
        address: SocketAddr,
    },
    /// No connection has such an address.
    NoEnd {
        /// The key that has it.
        key: &'static str,
        /// The prefix.
        net: IpNet,
    },
    /// The name of a cgroup has what is a pattern elsewhere, and is none here.
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
            Self::Beside { watched } => write!(
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
            Self::NoPattern { path } => write!(
                f,
                "cgroups: {} hardly matches what it is meant to: only a single * within one name is a \
                 pattern, other characters stand for themselves",
                quoted(path)
            ),
        }
    }
}

/// What is wrong with a file, a key or a value.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system refused the file.
    #[error("cannot be read: {0}; give a file that exists and that this user may read")]
    Unreadable(io::Error),
    /// The path is that of a directory.
    #[error("is a directory; give the path of a file")]
    Directory,
    /// The file is larger than any configuration.
    #[error("is larger than {0} bytes, which no configuration is; give another file")]
    TooLarge(u64),
    /// The file has bytes that are not text.
    #[error("is not UTF-8 text from here on; save the file as UTF-8")]
    NotUtf8,
    /// The text is not TOML.
    #[error("is not TOML: {message}; found {found}")]
    Syntax {
        /// The parser's words.
        message: String,
        /// The text at the place.
        found: String,
    },
    /// A key or table is there twice.
    #[error("is here for the second time; keep one")]
    DuplicateKey,
    /// `[rule]` beside `[[rule]]`.
    #[error("found [rule]; allowed: {ALLOWED_RULES}")]
    SingleRule,

    /// Nothing has this name.
    #[error("is not a known key; {}", suggestion(.nearest, .known))]
    UnknownKey {
        /// The known key that looks most like it.
        nearest: Option<&'static str>,
        /// All that are known here.
        known: &'static [&'static str],
    },
    /// Something has this name, but elsewhere.
    #[error("is not a known key here; it belongs under {under}")]
    MisplacedKey {
        /// The header of the table where it is known.
        under: &'static str,
    },
    /// A later version knows this key.
    #[error("is not supported yet by this version; remove it")]
    KeyNotSupportedYet,
    /// `audit.sync` beside `audit.path = "journald"`.
    #[error(
        "found true beside path = \"journald\", which itself decides when records are on the disk \
         (SyncIntervalSec= in journald.conf); remove it, or name a file as path"
    )]
    SyncedJournal,

    /// A value of the wrong type, or out of its range, or none of the choices.
    #[error("found {found}; allowed: {allowed}")]
    NotAllowed {
        /// The value.
        found: String,
        /// What may stand there.
        allowed: &'static str,
    },
    /// A list with more elements than the match table can hold.
    #[error("has {found} elements; at most {MAX_MATCH_ENTRIES} are allowed")]
    LongList {
        /// Elements of the list.
        found: usize,
    },
    /// The first port of a range is above the last.
    #[error("the range \"{first}-{last}\" runs backwards; write \"{last}-{first}\"")]
    BackwardRange {
        /// The first, higher, port.
        first: u16,
        /// The last, lower, port.
        last: u16,
    },
    /// A prefix with bits beyond its length.
    #[error(
        "\"{0}\" has bits set after its prefix; write \"{trunc}\", or \"{addr}\" alone",
        trunc = .0.trunc(),
        addr = .0.addr()
    )]
    HostBits(IpNet),
    /// An address to listen on without a port.
    #[error(
        "\"{0}\" has no port; write \"{example}\"",
        example = SocketAddr::new(*.0, DEFAULT_METRICS_PORT)
    )]
    NoPort(IpAddr),
    /// A path in double quotes with an escape that systemd has in names themselves.
    #[error(
        "has \\x within double quotes, where it stands for another character; names of systemd have it \
         as it is: write the path in single quotes"
    )]
    ByteEscape,
    /// A cgroup further down the tree than the kernel programs look.
    #[error("has {levels} levels; at most {MAX_CGROUP_LEVELS} are looked at, name one above it")]
    DeepCgroup {
        /// Levels of the path.
        levels: usize,
    },
    /// A number where a time must be.
    #[error("{number} has no unit; write \"{number}s\" for seconds, or m, h or d after it")]
    NoUnit {
        /// The number.
        number: String,
    },
    /// A limit that is too short to be enforced in time.
    #[error("{found} is shorter than 1s, the shortest limit; for no limit, leave it out")]
    ShortLimit {
        /// The value.
        found: String,
    },
    /// A limit that no connection will reach.
    #[error("{found} is longer than 36500d, the longest limit; for no limit, leave it out")]
    LongLimit {
        /// The value.
        found: String,
    },

    /// A file without a rule.
    #[error("there is none, so nothing would be enforced; add a rule, headed by [[rule]]")]
    NoRule,
    /// More rules than the daemon keeps counters for.
    #[error("there are {found}; at most {MAX_RULES} are allowed")]
    ManyRules {
        /// Rules in the file.
        found: usize,
    },
    /// A rule without a name.
    #[error("is missing; every rule has a name of its own")]
    NoName,
    /// Two rules of one name.
    #[error("\"{name}\" is the name of the rule in line {line}; every rule has a name of its own")]
    DuplicateName {
        /// The name.
        name: String,
        /// Where the other rule has its name.
        line: u32,
    },
    /// A rule that would enforce nothing.
    #[error(
        "has no limit; add idle_timeout, max_lifetime, response_timeout or half_closed_timeout, or action = \
         \"exempt\""
    )]
    NoLimit,
    /// A limit that would not be enforced.
    #[error("is a limit, and an exempt rule has none; remove it, or action = \"exempt\"")]
    LimitOnExempt,
    /// A key that says how a limit is meant that is not there.
    #[error("has no effect without {limit}; add it, or remove this")]
    WithoutLimit {
        /// The keys of which one must be there.
        limit: &'static str,
    },
    /// A response timeout where this host never owes an answer.
    #[error(
        "is for inbound connections, where this host owes the answer; remove it, or \
         direction = \"outbound\""
    )]
    ResponseOutbound,
    /// A jitter that could leave less than the shortest limit.
    #[error("could shorten max_lifetime to less than 1s, the shortest limit; use a smaller share")]
    JitterTooLarge,
    /// Addresses that no connection has at once.
    #[error(
        "can never match: a connection has IPv4 addresses at both ends or IPv6 addresses at both, \
         and local and remote here have none of the same kind; make them agree"
    )]
    MixedFamilies,
    /// The table that the kernel walks would be too long.
    #[error(
        "the rules up to this one come to more than {MAX_MATCH_ENTRIES} combinations of \
         prefixes, port ranges and owners, the most allowed (this one: {rule}, those before it: \
         {before}); use wider prefixes and ranges"
    )]
    ManyEntries {
        /// Entries of the rules before.
        before: usize,
        /// Entries of this rule.
        rule: EntryCount,
    },
}

/// How many match entries a rule comes to, counted no further than one above the most allowed.
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

/// How rules are written.
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

/// The text in one line and without terminal control: what stands in a file is not trusted.
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

/// The text in quotes, in one line, cut where it is too long to be read there.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST {
        return format!("{text:?}");
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{start:?}...")
}
