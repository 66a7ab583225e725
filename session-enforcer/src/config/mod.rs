//! The configuration: from TOML, or from the quick form of the command line, to values that are
//! valid by the time anything else sees them.
//!
//! A file is validated whole before any of it is used. What is wrong is said in one line with the
//! file, the line, the key, what was found and what is allowed. No syscall but the reading of the
//! file happens here.

mod document;
mod entries;
mod error;
mod never;
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

/// Capacity of the session map where the file does not say.
pub const DEFAULT_MAX_SESSIONS: u32 = 262_144;

/// Largest capacity of the session map: at 200 bytes a session, more than 3 GB of kernel memory.
pub const MAX_MAX_SESSIONS: u32 = 16_777_216;

/// Where sessions and programs outlive the daemon where the file does not say.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/session-enforcer";

/// How often sessions and sockets are compared where the file does not say: a comparison of 100,000
/// sessions uses a processor for a quarter of a second.
pub const DEFAULT_RECONCILE_INTERVAL: Duration = Duration::from_secs(900);

/// The port of the metrics where the file does not say.
pub(crate) const DEFAULT_METRICS_PORT: u16 = 9847;

/// Where the metrics are served where the file does not say.
pub const DEFAULT_METRICS_LISTEN: MetricsListen = MetricsListen::Tcp(SocketAddr::V4(
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, DEFAULT_METRICS_PORT),
));

/// The control socket where the file does not say.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/session-enforcer/control.sock";

/// Bytes of new payload that count where the file does not say: any.
pub const DEFAULT_MIN_PAYLOAD: u16 = 1;

/// Largest `min_payload`: more than a packet on the wire ever carries would make every session idle.
pub const MAX_MIN_PAYLOAD: u16 = 1_400;

/// Bytes of an answer where the file does not say: any.
pub const DEFAULT_MIN_ANSWER: u32 = 1;

/// Largest `min_answer`: what a service always sends before its answer is less.
pub const MAX_MIN_ANSWER: u32 = 1 << 20;

/// Largest `lifetime_jitter`, in percent: what is left of the lifetime is still a lifetime.
pub const MAX_LIFETIME_JITTER_PERCENT: u8 = 90;

/// Name of the rule of the quick form.
pub const QUICK_RULE: &str = "cli";

/// Largest file that is read: a thousand rules with all their prefixes are a tenth of it. It keeps
/// a wrong path, such as that of a device, from filling the memory.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A valid configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the control group to attach to; none: the mount of cgroup2.
    pub cgroup: Option<PathBuf>,
    /// What the daemon does to an expired session.
    pub mode: Mode,
    /// Capacity of the session map.
    pub max_sessions: u32,
    /// What happens to a connection that a rule enforces and no place can be had for.
    pub on_full: OnFull,
    /// Directory on bpffs where sessions and programs outlive the daemon, if they do.
    pub pin_dir: Option<PathBuf>,
    /// Whose connections are looked at.
    pub network_namespaces: NetworkNamespaces,
    /// How often sessions and sockets are compared where nothing is known to be wrong.
    pub reconcile_interval: Duration,
    /// Where the metrics are served, if at all.
    pub metrics_listen: Option<MetricsListen>,
    /// Where commands and programs ask the daemon, and who may.
    pub control: Control,
    /// Where the audit records go.
    pub audit: AuditTarget,
    /// Whether each record is to be on the disk before the next batch of resets is asked for.
    pub audit_sync: bool,
    /// In order: the first that matches a connection decides. A rule's index is its number in the
    /// match table and in the sessions.
    pub rules: Vec<Rule>,
    /// What is doubtful, in the order of the file.
    pub warnings: Vec<Warning>,
    /// Whether it stands in for a file that was refused.
    pub is_stand_in: bool,
    /// The file that it was read from; none of the quick form.
    pub file: Option<SourceFile>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it was.
    pub path: PathBuf,
    /// The SHA-256 of its text, in hexadecimal.
    pub sha256: String,
}

impl SourceFile {
    /// A file with this text.
    pub fn new(path: &Path, text: &str) -> Self {
        let digest = Sha256::digest(text);
        Self {
            path: path.to_owned(),
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

/// The control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Where it is.
    pub socket: ControlSocket,
    /// The group whose members may use it, besides root and the daemon's user.
    pub group: Option<String>,
}

/// Where the control socket is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ControlSocket {
    /// At [`DEFAULT_CONTROL_SOCKET`], if that can be had.
    #[default]
    Default,
    /// On this path.
    At(PathBuf),
    /// There is none.
    Nowhere,
}

impl ControlSocket {
    /// The path, where there is to be a socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Default => Some(Path::new(DEFAULT_CONTROL_SOCKET)),
            Self::At(path) => Some(path),
            Self::Nowhere => None,
        }
    }
}

/// What the daemon does to an expired session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It resets it.
    #[default]
    Enforce,
    /// It records it, and leaves it alone.
    Observe,
}

/// Whose connections are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkNamespaces {
    /// Those of every network namespace of the host.
    #[default]
    All,
    /// Those of the daemon's own network namespace.
    Own,
}

/// What happens to a connection that a rule enforces and no place in the session map can be had for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// It is not tracked, and lives.
    #[default]
    Leave,
    /// It is reset.
    Reset,
}

/// Where the metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsListen {
    /// On this address and port.
    Tcp(SocketAddr),
    /// On a Unix socket of this path.
    Unix(PathBuf),
}

impl MetricsListen {
    /// Why this is doubtful, if it is: whoever reaches another address than loopback reads the metrics.
    pub(crate) fn doubt(&self) -> Option<Doubt> {
        match self {
            Self::Tcp(address) if !address.ip().to_canonical().is_loopback() => {
                Some(Doubt::Exposed { address: *address })
            }
            _ => None,
        }
    }
}

/// As the file has it.
impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The journal's name as a place for the audit.
const JOURNALD: &str = "journald";

/// Where the audit records go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AuditTarget {
    /// Standard output.
    #[default]
    Stdout,
    /// systemd's journal, an entry each.
    Journald,
    /// A file, to whose end they are added.
    File(PathBuf),
}

/// As the file has it.
impl fmt::Display for AuditTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("-"),
            Self::Journald => f.write_str(JOURNALD),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Which connections, and what happens to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique in the configuration.
    pub name: String,
    /// Who opened the connection; none: either.
    pub direction: Option<Direction>,
    /// Ports on this host; none: every port.
    pub local_ports: Vec<PortRange>,
    /// Ports of the peer; none: every port.
    pub remote_ports: Vec<PortRange>,
    /// Addresses of this host; none: every address.
    pub local: Vec<IpNet>,
    /// Addresses of the peer; none: every address.
    pub remote: Vec<IpNet>,
    /// Cgroups that the socket's is or lies below, as paths from the root; none: every cgroup.
    pub cgroups: Vec<String>,
    /// Users that the socket may belong to; none: every user.
    pub users: Vec<User>,
    /// Where the file names them, for a message about a user whom the host does not know.
    pub users_at: Option<Location>,
    /// What happens to a connection that is past a limit.
    pub action: Action,
    /// Longest time without new payload.
    pub idle_timeout: Option<Duration>,
    /// Longest time since establishment.
    pub max_lifetime: Option<Duration>,
    /// Each session's lifetime is up to this share of it shorter, in percent.
    pub lifetime_jitter_percent: u8,
    /// Whose new payload is activity.
    pub activity: Activity,
    /// Longest time that this host owes an answer; meanwhile `idle_timeout` does not run.
    pub response_timeout: Option<Duration>,
    /// Takes the place of `idle_timeout` once either end has sent its FIN.
    pub half_closed_timeout: Option<Duration>,
    /// Bytes of new payload that a packet must have to count.
    pub min_payload: u16,
    /// Bytes that this host must send after a request until it has answered.
    pub min_answer: u32,
    /// Sessions that are tracked at a time; 0 for no limit but the session map's.
    pub max_sessions: u32,
}

/// What happens to the connections of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Past a limit they are reset.
    #[default]
    Enforce,
    /// Past a limit they are recorded, and left alone.
    Observe,
    /// They are not tracked at all.
    Exempt,
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read or anything in it is wrong: the first such thing.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::load_all(path).map_err(ConfigErrors::into_first)
    }

    /// Reads and validates a file.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read, or anything in it is wrong: all that is.
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

    /// Validates a text. The name of its file is for the messages.
    ///
    /// # Errors
    ///
    /// Where anything in it is wrong: the first such thing.
    pub fn parse(file: impl AsRef<Path>, text: &str) -> Result<Self, ConfigError> {
        Self::parse_all(file, text).map_err(ConfigErrors::into_first)
    }

    /// Validates a text.
    ///
    /// # Errors
    ///
    /// Where anything in it is wrong: all that is.
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

    /// The configuration of the quick form: one rule, [`QUICK_RULE`], for the connections that are
    /// accepted on these ports.
    ///
    /// # Errors
    ///
    /// Where there is neither limit, or there are more ports than the match table can hold.
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
            is_stand_in: false,
            file: None,
        }
    }

    /// The match table: the entries of every rule, in the order of the rules. The first that
    /// matches a connection is of the rule that decides. A rule of an owner who is not there has no
    /// entry.
    pub fn match_entries(&self, owners: &Owners) -> Vec<MatchEntry> {
        let numbered = (0u16..).zip(&self.rules);
        numbered
            .flat_map(|(index, rule)| entries::of_rule(rule, index, owners))
            .collect()
    }

    /// What the match table has room for beside what the rules come to: for each pattern of cgroups the
    /// entries that one cgroup takes which fits it, and how many entries are free for all of them.
    pub fn pattern_room(&self) -> (Vec<(String, usize)>, usize) {
        entries::pattern_room(&self.rules)
    }

    /// Whether a rule asks for an owner.
    pub fn asks_owner(&self) -> bool {
        let asks = |rule: &Rule| !rule.cgroups.is_empty() || !rule.users.is_empty();
        self.rules.iter().any(asks)
    }

    /// Whether the connections of a rule are reset or only recorded, its action and the daemon's
    /// mode considered. Those of an exempt rule are neither.
    pub fn mode_of(&self, rule: &Rule) -> Mode {
        match self.effective_action(rule) {
            Action::Enforce => Mode::Enforce,
            Action::Observe | Action::Exempt => Mode::Observe,
        }
    }

    /// What happens to the connections of a rule of this configuration, its mode considered.
    pub fn effective_action(&self, rule: &Rule) -> Action {
        match (self.mode, rule.action) {
            (Mode::Observe, Action::Enforce) => Action::Observe,
            (_, action) => action,
        }
    }
}

impl Rule {
    /// A rule without any condition or limit.
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

    /// The limits as the kernel and the daemon compare them, of no generation and without a key yet, and without
    /// the gate, which takes the daemon's mode too. No limits for an exempt rule.
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

    /// Refuses a rule that would track connections for nothing.
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

/// A limit as the kernel knows it: 0 is none.
fn nanoseconds(limit: Option<Duration>) -> u64 {
    limit.map_or(0, |limit| {
        u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// The bytes of the file, and one more than is allowed where there are more.
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
