//! The configuration: parses TOML, or the quick form of the command line, into values that are valid when
//! other modules see them.
//!
//! A file is validated completely before any of it is used. Each error is one line with the file, the line,
//! the key, what was found and what is allowed. The only system calls here read the file.

mod document;
mod entries;
mod error;
mod impossible_conditions;
mod owners;
mod read;
mod rule;
mod shadowed_rules;
#[cfg(test)]
mod tests;
mod value;

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use session_enforcer_common::{Activity, Direction, Limits, MatchEntry, PortRange};
use sha2::{Digest as _, Sha256};

pub use error::{
    ConfigError, ConfigErrors, Doubt, EntryCount, Location, Position, Problem, Warning,
};
pub use owners::{Owners, User, fits, is_below, is_pattern, parse_cgroup, parse_user};
pub use value::{
    MAX_LIMIT, MIN_LIMIT, format_duration, parse_audit, parse_control_socket, parse_duration,
    parse_limit, parse_listen, parse_pin_dir, parse_ports, parse_prefix,
};

use document::Document;

/// The default capacity of the session table.
pub const DEFAULT_MAX_SESSIONS: u32 = 262_144;

/// The maximum capacity of the session table. At 230 bytes per session it uses nearly 4 GB of kernel
/// memory.
pub const MAX_MAX_SESSIONS: u32 = 16_777_216;

/// The default bpffs directory of the pins, through which sessions and programs outlive the daemon.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/session-enforcer";

/// The default interval of syncs between the session table and the sockets. A sync of 100,000 sessions uses a
/// processor for a quarter of a second.
pub const DEFAULT_RECONCILE_INTERVAL: Duration = Duration::from_secs(900);

/// The default port of the metrics.
pub(crate) const DEFAULT_METRICS_PORT: u16 = 9847;

/// The default address of the metrics.
pub const DEFAULT_METRICS_LISTEN: MetricsListen = MetricsListen::Tcp(SocketAddr::V4(
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, DEFAULT_METRICS_PORT),
));

/// The default control socket.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/session-enforcer/control.sock";

/// The default number of new payload bytes that count as activity: any.
pub const DEFAULT_MIN_PAYLOAD: u16 = 1;

/// The maximum of `min_payload`. With more than the payload of a packet on the wire, every session would be
/// idle.
pub const MAX_MIN_PAYLOAD: u16 = 1_400;

/// The default number of bytes of an answer: any.
pub const DEFAULT_MIN_ANSWER: u32 = 1;

/// The maximum of `min_answer`. Services send less than that before an answer.
pub const MAX_MIN_ANSWER: u32 = 1 << 20;

/// The maximum of `lifetime_jitter` in percent, so that a useful part of the lifetime remains.
pub const MAX_LIFETIME_JITTER_PERCENT: u8 = 90;

/// The name of the quick form's rule.
pub const QUICK_RULE: &str = "cli";

/// The maximum size of a file; a thousand rules with all their prefixes need a tenth of it. It prevents a
/// wrong path, such as that of a device, from filling the memory.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A valid configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The directory of the cgroup to attach to. `None` for the cgroup-v2 mount.
    pub cgroup: Option<PathBuf>,
    /// The treatment of expired sessions.
    pub mode: Mode,
    /// The capacity of the session table.
    pub max_sessions: u32,
    /// The treatment of a connection that an enforcing rule matches when the session table is full.
    pub on_full: OnFull,
    /// The bpffs directory of the pins, if sessions and programs should outlive the daemon.
    pub pin_dir: Option<PathBuf>,
    /// The network namespaces whose connections are enforced.
    pub network_namespaces: NetworkNamespaces,
    /// The interval of syncs between the session table and the sockets if no error is known.
    pub reconcile_interval: Duration,
    /// The address of the metrics, if they are served.
    pub metrics_listen: Option<MetricsListen>,
    /// The control socket and its users.
    pub control: Control,
    /// The target of the audit records.
    pub audit: AuditTarget,
    /// Whether each record must be on the disk before the next batch of resets is requested.
    pub audit_sync: bool,
    /// The rules in order: the first rule that matches a connection decides. A rule's index is its number in
    /// the match table and in the sessions.
    pub rules: Vec<Rule>,
    /// The warnings, in the order of the file.
    pub warnings: Vec<Warning>,
    /// The error of the refused file that this configuration replaces.
    pub stands_in_for: Option<String>,
    /// The file of the configuration. `None` for the quick form.
    pub file: Option<SourceFile>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The path.
    pub path: PathBuf,
    /// The SHA-256 of the text, in hexadecimal.
    pub sha256: String,
}

impl SourceFile {
    /// Describes a file with this text.
    pub fn new(path: &Path, text: &str) -> Self {
        let digest = Sha256::digest(text);
        Self {
            path: path.to_owned(),
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// The settings of the control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// The location of the socket.
    pub socket: ControlSocket,
    /// The group whose members may use it, besides root and the daemon's user.
    pub group: Option<String>,
}

/// The location of the control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ControlSocket {
    /// [`DEFAULT_CONTROL_SOCKET`], if it can be created.
    #[default]
    Default,
    /// This path.
    At(PathBuf),
    /// No control socket.
    Nowhere,
}

impl ControlSocket {
    /// The path, if there is to be a socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Default => Some(Path::new(DEFAULT_CONTROL_SOCKET)),
            Self::At(path) => Some(path),
            Self::Nowhere => None,
        }
    }
}

/// The treatment of expired sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Reset the session.
    #[default]
    Enforce,
    /// Record the session, but do not reset it.
    Observe,
}

/// The network namespaces whose connections are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkNamespaces {
    /// All network namespaces of the host.
    #[default]
    All,
    /// The daemon's own network namespace.
    Own,
}

/// The treatment of a connection that an enforcing rule matches when the session table is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// Do not track the connection, so it has no limit.
    #[default]
    Leave,
    /// Reset the connection.
    Reset,
}

/// The address of the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsListen {
    /// This address and port.
    Tcp(SocketAddr),
    /// A Unix socket with this path.
    Unix(PathBuf),
}

impl MetricsListen {
    /// The warning, if any: every host that reaches a non-loopback address can read the metrics.
    pub(crate) fn doubt(&self) -> Option<Doubt> {
        match self {
            Self::Tcp(address) if !address.ip().to_canonical().is_loopback() => {
                Some(Doubt::Exposed { address: *address })
            }
            _ => None,
        }
    }
}

/// Formats the address as in a file.
impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The value of `audit.path` for the journal.
const JOURNALD: &str = "journald";

/// The target of the audit records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AuditTarget {
    /// Standard output.
    #[default]
    Stdout,
    /// systemd's journal, one entry per record.
    Journald,
    /// This file, to which records are appended.
    File(PathBuf),
}

/// Formats the target as in a file.
impl fmt::Display for AuditTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("-"),
            Self::Journald => f.write_str(JOURNALD),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// A rule: its conditions, and the treatment of the connections that match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The name, unique in the configuration.
    pub name: String,
    /// The direction of the connection. `None` for both.
    pub direction: Option<Direction>,
    /// Ports of this host. Empty for every port.
    pub local_ports: Vec<PortRange>,
    /// Ports of the peer. Empty for every port.
    pub remote_ports: Vec<PortRange>,
    /// Addresses of this host. Empty for every address.
    pub local: Vec<IpNet>,
    /// Addresses of the peer. Empty for every address.
    pub remote: Vec<IpNet>,
    /// Cgroups, as paths from the root. Each also covers the cgroups below it. Empty for every cgroup.
    pub cgroups: Vec<String>,
    /// Users who own the socket. Empty for every user.
    pub users: Vec<User>,
    /// The location of the users in the file, for an error about a user that the host does not have.
    pub users_at: Option<Location>,
    /// The treatment of sessions that exceed a limit.
    pub action: Action,
    /// The maximum time without new payload.
    pub idle_timeout: Option<Duration>,
    /// The maximum time since establishment.
    pub max_lifetime: Option<Duration>,
    /// The lifetime of each session is shortened by up to this percentage.
    pub lifetime_jitter_percent: u8,
    /// The direction whose new payload counts as activity.
    pub activity: Activity,
    /// The maximum time that this host owes an answer. `idle_timeout` does not run during that time.
    pub response_timeout: Option<Duration>,
    /// Replaces `idle_timeout` after either side has sent its FIN.
    pub half_closed_timeout: Option<Duration>,
    /// The minimum number of new payload bytes in a packet that counts.
    pub min_payload: u16,
    /// The number of bytes that this host must send after a request for its answer to count.
    pub min_answer: u32,
    /// The maximum number of tracked sessions of the rule. 0 means only the session table limits them.
    pub max_sessions: u32,
}

/// The treatment of a rule's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Reset sessions that exceed a limit.
    #[default]
    Enforce,
    /// Record sessions that exceed a limit, but do not reset them.
    Observe,
    /// Do not track the connections.
    Exempt,
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    ///
    /// The first error, if the file cannot be read or is invalid.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::load_all(path).map_err(ConfigErrors::into_first)
    }

    /// Reads and validates a file.
    ///
    /// # Errors
    ///
    /// All errors, if the file cannot be read or is invalid.
    pub fn load_all(path: impl AsRef<Path>) -> Result<Self, ConfigErrors> {
        let path = path.as_ref();
        let whole = |problem| file_error(path, None, problem);
        let bytes = read_file(path).map_err(|error| match error.kind() {
            io::ErrorKind::IsADirectory => whole(Problem::Directory),
            _ => whole(Problem::Unreadable(error)),
        })?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(whole(Problem::TooLarge(MAX_FILE_BYTES)).into());
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            let position = document::position(&bytes, error.valid_up_to());
            file_error(path, Some(position), Problem::NotUtf8)
        })?;
        Self::parse_all(path, text)
    }

    /// Validates a text. The file name appears in messages.
    ///
    /// # Errors
    ///
    /// The first error, if the text is invalid.
    pub fn parse(file: impl AsRef<Path>, text: &str) -> Result<Self, ConfigError> {
        Self::parse_all(file, text).map_err(ConfigErrors::into_first)
    }

    /// Validates a text.
    ///
    /// # Errors
    ///
    /// All errors, if the text is invalid.
    pub fn parse_all(file: impl AsRef<Path>, text: &str) -> Result<Self, ConfigErrors> {
        let document = Document::new(file.as_ref(), text);
        let config = read::config(&document);
        match ConfigErrors::new(document.into_errors()) {
            Some(errors) => Err(errors),
            None => Ok(Self {
                file: Some(SourceFile::new(file.as_ref(), text)),
                ..config
            }),
        }
    }

    /// Builds the configuration of the quick form: one rule, [`QUICK_RULE`], for connections that are
    /// accepted on these ports.
    ///
    /// # Errors
    ///
    /// Fails if there is no limit, or if there are more ports than the match table can hold.
    pub fn from_quick(
        ports: Vec<PortRange>,
        idle_timeout: Option<Duration>,
        max_lifetime: Option<Duration>,
    ) -> Result<Self, Problem> {
        let rule = Rule {
            direction: Some(Direction::Inbound),
            local_ports: ports,
            idle_timeout,
            max_lifetime,
            ..Rule::named(QUICK_RULE)
        };
        rule.check_limits()?;
        let rules = vec![rule];
        match entries::check_count(&rules) {
            Err((_, problem)) => Err(problem),
            Ok(()) => Ok(Self::with_rules(rules)),
        }
    }

    fn with_rules(rules: Vec<Rule>) -> Self {
        Self {
            cgroup: None,
            mode: Mode::default(),
            max_sessions: DEFAULT_MAX_SESSIONS,
            on_full: OnFull::default(),
            pin_dir: Some(DEFAULT_PIN_DIR.into()),
            network_namespaces: NetworkNamespaces::default(),
            reconcile_interval: DEFAULT_RECONCILE_INTERVAL,
            metrics_listen: Some(DEFAULT_METRICS_LISTEN),
            control: Control::default(),
            audit: AuditTarget::default(),
            audit_sync: false,
            rules,
            warnings: Vec::new(),
            stands_in_for: None,
            file: None,
        }
    }

    /// The match table: the entries of all rules, in the order of the rules. The first entry that matches a
    /// connection determines its rule. An owner that does not exist gets no entry.
    pub fn match_entries(&self, owners: &Owners) -> Vec<MatchEntry> {
        let numbered = (0u16..).zip(&self.rules);
        numbered
            .flat_map(|(index, rule)| entries::of_rule(rule, index, owners))
            .collect()
    }

    /// The number of match entries that each cgroup pattern takes per matching cgroup, and the number of free
    /// entries for all patterns.
    pub fn pattern_room(&self) -> (Vec<(String, usize)>, usize) {
        entries::pattern_room(&self.rules)
    }

    /// Whether any rule has an owner condition.
    pub fn asks_owner(&self) -> bool {
        let asks = |rule: &Rule| !rule.cgroups.is_empty() || !rule.users.is_empty();
        self.rules.iter().any(asks)
    }

    /// Whether the rule's sessions are reset or only recorded, given its action and the daemon's mode.
    /// Meaningless for an exempt rule.
    pub fn mode_of(&self, rule: &Rule) -> Mode {
        match self.effective_action(rule) {
            Action::Enforce => Mode::Enforce,
            Action::Observe | Action::Exempt => Mode::Observe,
        }
    }

    /// The treatment of the rule's connections, given its action and the daemon's mode.
    pub fn effective_action(&self, rule: &Rule) -> Action {
        match (self.mode, rule.action) {
            (Mode::Observe, Action::Enforce) => Action::Observe,
            (_, action) => action,
        }
    }
}

impl Rule {
    /// A rule without conditions and limits.
    fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            direction: None,
            local_ports: Vec::new(),
            remote_ports: Vec::new(),
            local: Vec::new(),
            remote: Vec::new(),
            cgroups: Vec::new(),
            users: Vec::new(),
            users_at: None,
            action: Action::default(),
            idle_timeout: None,
            max_lifetime: None,
            lifetime_jitter_percent: 0,
            activity: Activity::default(),
            response_timeout: None,
            half_closed_timeout: None,
            min_payload: DEFAULT_MIN_PAYLOAD,
            min_answer: DEFAULT_MIN_ANSWER,
            max_sessions: 0,
        }
    }

    /// The limits in the form that the kernel and the daemon compare. Generation and key are not set yet. The
    /// gate is not set either, because it also depends on the daemon's mode. An exempt rule has no limits.
    pub fn limits(&self) -> Limits {
        let max_lifetime_ns = nanoseconds(self.max_lifetime);
        Limits {
            idle_timeout_ns: nanoseconds(self.idle_timeout),
            max_lifetime_ns,
            lifetime_jitter_ns: max_lifetime_ns / 100 * u64::from(self.lifetime_jitter_percent),
            response_timeout_ns: nanoseconds(self.response_timeout),
            half_closed_timeout_ns: nanoseconds(self.half_closed_timeout),
            generation: 0,
            min_payload: self.min_payload,
            min_answer: self.min_answer,
            max_sessions: self.max_sessions,
            activity: self.activity as u8,
            gate: 0,
            jitter_key: 0,
        }
    }

    /// Refuses a rule that tracks connections without a limit.
    fn check_limits(&self) -> Result<(), Problem> {
        let limits = [
            self.idle_timeout,
            self.max_lifetime,
            self.response_timeout,
            self.half_closed_timeout,
        ];
        if self.action != Action::Exempt && limits == [None; 4] {
            return Err(Problem::NoLimit);
        }
        Ok(())
    }
}

/// A limit in nanoseconds; 0 means no limit.
fn nanoseconds(limit: Option<Duration>) -> u64 {
    limit.map_or(0, |limit| {
        u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// Reads the file, up to one byte more than the maximum.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn file_error(file: &Path, position: Option<Position>, problem: Problem) -> ConfigError {
    let location = Location {
        file: file.to_owned(),
        position,
        key: None,
    };
    ConfigError { location, problem }
}
