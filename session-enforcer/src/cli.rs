//! The command line.

use std::ffi::OsString;
use std::net::SocketAddr;
mod ends;
mod live;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser, TypedValueParser as _};
use clap::error::ErrorKind;
use clap::{ArgGroup, Args, Parser, Subcommand};
use session_enforcer_common::{Direction, PortRange};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::config::{
    AuditTarget, Config, ControlSocket, DEFAULT_PIN_DIR, Doubt, Location, MetricsListen, Mode,
    NetworkNamespaces, Problem, User, Warning, parse_audit, parse_cgroup, parse_control_socket,
    parse_limit, parse_listen, parse_pin_dir, parse_ports, parse_user,
};
use crate::exit::{ExitStatus, Failure, OrExit as _};
use crate::host::trust::{self, Untrusted};

pub use ends::{Circumstances, Ends};
pub use live::{FilterArgs, KillArgs, ListArgs, SocketArgs, TopArgs, WatchArgs};

/// The configuration file if the command line names none.
pub const DEFAULT_CONFIG: &str = "/etc/session-enforcer/config.toml";

/// The log level without `--log-level` and `RUST_LOG`.
const DEFAULT_LOG_LEVEL: &str = "info";

const LOG_LEVEL_HELP: &str = "\
Log level: error, warn, info, debug, trace or off; or a filter such as
info,session_enforcer::engine=debug [default: RUST_LOG, else info]";

const EXIT_STATUS_HELP: &str = "\
Exit status:
  0   success
  1   any other error
  2   wrong usage
  69  the kernel lacks a required feature, or no daemon answers
  75  part of the request failed
  77  privileges are missing
  78  the configuration is invalid";

const EXAMPLES: &str = "\
Examples:
  Reset connections to PostgreSQL that are idle for 15 minutes or older than 12 hours:
    session-enforcer run --port 5432 --idle-timeout 15m --max-lifetime 12h

  Validate a configuration file, then run with it without resetting anything:
    session-enforcer check --config config.toml
    session-enforcer run --config config.toml --observe";

const RUN_EXAMPLES: &str = "\
A configuration file with one rule:
  [[rule]]
  name = \"postgres\"
  direction = \"inbound\"
  local_ports = [5432]
  idle_timeout = \"15m\"
  max_lifetime = \"12h\"

The same limits without a file:
  session-enforcer run --port 5432 --idle-timeout 15m --max-lifetime 12h

Durations are written as 90s, 15m, 12h, 7d or 1h30m. The shortest is 1s.";

const DETACH_HELP: &str = "\
A killed daemon leaves its programs attached. A stopped daemon leaves its sessions
for the next start. detach removes both, whichever version of the daemon left them.
It fails while a daemon runs.";

const EXPLAIN_EXAMPLE: &str = "\
Example: a client at 10.0.0.9 is connected to PostgreSQL on this host, 10.0.0.5:
  session-enforcer explain 10.0.0.5:5432 10.0.0.9:50000 --direction inbound --user postgres";

/// Reset TCP connections that are idle or open for too long.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(name = "session-enforcer", version)]
#[command(after_help = format!("{EXAMPLES}\n\n{EXIT_STATUS_HELP}"))]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,

    // The help is not the doc comment: `doc_markdown` wants backticks in that.
    #[arg(long, global = true, value_name = "LEVEL", help = LOG_LEVEL_HELP)]
    #[arg(display_order = 900)]
    log_level: Option<LogLevel>,
}

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground; it logs to stderr
    Run(RunArgs),
    /// Validate a configuration, print its rules, and report what `run` would refuse on this host
    Check(CheckArgs),
    /// Print the state of the running daemon: readiness, configuration, sessions of each rule
    Status(WatchArgs),
    /// List live sessions: rule, addresses, owner, age, idle time, next limit and time left
    List(ListArgs),
    /// Reset sessions now
    Kill(KillArgs),
    /// Show live sessions in the terminal and update them continuously
    Top(TopArgs),
    /// Make the running daemon reload its configuration, wait for it, and print the result
    Reload(WatchArgs),
    /// Print audit records as the daemon writes them
    Events(WatchArgs),
    /// Print which rule applies to a connection, and why the rules before it do not match
    Explain(ExplainArgs),
    /// Remove the programs and sessions that a killed or stopped daemon left in the kernel
    Detach(DetachArgs),
    /// Check the kernel and the privileges, and print a remedy for each problem
    Doctor(DoctorArgs),
}

/// Arguments of `run`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(after_help = format!("{RUN_EXAMPLES}\n\n{EXIT_STATUS_HELP}"))]
#[command(group = ArgGroup::new("limits").multiple(true).requires("port"))]
pub struct RunArgs {
    /// Configuration file, in TOML [default: /etc/session-enforcer/config.toml]
    #[arg(long, value_name = "FILE", conflicts_with = "port")]
    config: Option<PathBuf>,

    /// Copy of the last valid configuration, used if the file is invalid at a start
    #[arg(long, value_name = "FILE", conflicts_with = "port")]
    pub last_good: Option<PathBuf>,

    /// Track only sockets of this cgroup2 directory and those below it [default: the whole host]
    #[arg(long, value_name = "DIR", value_parser = NonEmptyStringValueParser::new())]
    cgroup: Option<String>,

    /// Reset nothing; record the sessions that would be reset
    #[arg(long)]
    observe: bool,

    /// Instead of a file, use one rule named cli, for connections accepted on these ports
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_ports)]
    #[arg(requires = "limits")]
    port: Vec<PortRange>,

    /// With --port: reset a connection after this time without new payload
    // clap does not require `port` beside arguments that conflict with it, so each limit names them too.
    #[arg(long, value_name = "DUR", value_parser = parse_limit, group = "limits")]
    #[arg(conflicts_with_all = ["config", "last_good"])]
    idle_timeout: Option<Duration>,

    /// With --port: reset a connection this long after it was established
    #[arg(long, value_name = "DUR", value_parser = parse_limit, group = "limits")]
    #[arg(conflicts_with_all = ["config", "last_good"])]
    max_lifetime: Option<Duration>,

    /// Serve metrics at ADDR:PORT or unix:PATH, or nowhere ("") [default: 127.0.0.1:9847]
    #[arg(long, value_name = "LISTEN")]
    metrics_listen: Option<Listen>,

    /// Path of the control socket, "" for none [default: /run/session-enforcer/control.sock]
    #[arg(long, value_name = "PATH", value_parser = parse_control_socket)]
    control_socket: Option<ControlSocket>,

    /// Write audit records to a file, to journald, or to standard output (-) [default: -]
    #[arg(long, value_name = "PATH", value_parser = audit)]
    audit: Option<AuditTarget>,

    /// Directory on bpffs that keeps sessions and programs between two runs, "" for none
    /// [default: /sys/fs/bpf/session-enforcer]
    #[arg(long, value_name = "DIR")]
    pin_dir: Option<PinDir>,

    /// Start even if another daemon's programs are attached to the same cgroup
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `check`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = EXIT_STATUS_HELP)]
pub struct CheckArgs {
    /// Configuration file, in TOML
    #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    pub config: PathBuf,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{EXPLAIN_EXAMPLE}\n\n{EXIT_STATUS_HELP}"))]
pub struct ExplainArgs {
    /// Local address and port, such as 10.0.0.5:5432, or as ss -tn prints it; IPv6 in brackets
    #[arg(value_name = "LOCAL", value_parser = end, required_unless_present = "session")]
    local: Option<SocketAddr>,

    /// Remote address and port
    #[arg(value_name = "REMOTE", value_parser = end, required_unless_present = "session")]
    remote: Option<SocketAddr>,

    /// Explain a live session of the running daemon, by its ID in list, instead of addresses
    #[arg(long, value_name = "ID", conflicts_with_all = ["local", "remote", "direction", "user", "cgroup"])]
    pub session: Option<u64>,

    /// The socket of the daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Accepted by this host (inbound) or dialled by it (outbound) [default: explain both]
    #[arg(long, value_parser = direction())]
    direction: Option<Direction>,

    /// Owner of the socket: user name or uid [default: unspecified]
    #[arg(long, value_name = "USER", value_parser = parse_user)]
    user: Option<User>,

    /// The socket's cgroup, such as /system.slice/postgresql.service [default: unspecified]
    #[arg(long, value_name = "PATH", value_parser = parse_cgroup)]
    cgroup: Option<String>,

    /// Configuration file, in TOML [default: /etc/session-enforcer/config.toml; with --session, the
    /// daemon's file]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ExplainArgs {
    /// Both ends of the connection.
    ///
    /// # Errors
    ///
    /// Fails with a usage error if one end is IPv4 and the other IPv6, or if the ends are missing.
    pub fn ends(&self) -> Result<Ends, Failure> {
        match (self.local, self.remote) {
            (Some(local), Some(remote)) => Ends::new(local, remote),
            _ => Err(Failure::new(
                ExitStatus::Usage,
                "give LOCAL and REMOTE, or --session ID",
            )),
        }
    }

    /// The configuration file to explain, unless `--session` is given.
    pub fn config_path(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(DEFAULT_CONFIG))
    }

    /// The known properties of the connection besides its ends.
    pub fn circumstances(&self) -> Circumstances {
        Circumstances {
            direction: self.direction,
            user: self.user.clone(),
            cgroup: self.cgroup.clone(),
        }
    }
}

/// Arguments of `detach`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{DETACH_HELP}\n\n{EXIT_STATUS_HELP}"))]
pub struct DetachArgs {
    /// Configuration file that names the pin directory [default: /etc/session-enforcer/config.toml]
    #[arg(long, value_name = "FILE", conflicts_with = "pin_dir")]
    config: Option<PathBuf>,

    /// Pin directory [default: the one in the configuration]
    #[arg(long, value_name = "DIR")]
    pin_dir: Option<PinDir>,
}

impl DetachArgs {
    /// The pin directory. `None` if the configuration turns pinning off.
    ///
    /// # Errors
    ///
    /// Fails if the configuration is invalid, or if the named file does not exist.
    pub fn pin_dir(&self) -> anyhow::Result<Option<PathBuf>> {
        if let Some(PinDir(path)) = &self.pin_dir {
            return Ok(path.clone());
        }
        let default = Path::new(DEFAULT_CONFIG);
        match &self.config {
            Some(path) => Ok(Config::load(path)?.pin_dir),
            None if default.exists() => Ok(Config::load(default)?.pin_dir),
            None => Ok(Some(DEFAULT_PIN_DIR.into())),
        }
    }
}

/// Arguments of `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = EXIT_STATUS_HELP)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Network namespaces to enforce: all, or only the daemon's own (needs three capabilities)
    #[arg(long, value_name = "WHICH", default_value = "all", value_parser = namespaces())]
    pub network_namespaces: NetworkNamespaces,
}

fn namespaces() -> impl clap::builder::TypedValueParser<Value = NetworkNamespaces> {
    PossibleValuesParser::new(["all", "own"]).map(|name| match name.as_str() {
        "own" => NetworkNamespaces::Own,
        _ => NetworkNamespaces::All,
    })
}

/// A filter of log events.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LogLevel(String);

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // `Targets` takes any word for the name of a module, and with it a misspelt level.
        let plain = LevelFilter::from_str(text).is_ok();
        let filter = text.contains('=') && Targets::from_str(text).is_ok();
        if text.is_empty() || !(plain || filter) {
            return Err(
                "allowed: error, warn, info, debug, trace, off, or a filter such as \
                 info,session_enforcer::engine=debug"
                    .to_owned(),
            );
        }
        Ok(Self(text.to_owned()))
    }
}

/// The address that serves the metrics, if any.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listen(Option<MetricsListen>);

impl FromStr for Listen {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        parse_listen(text).map(Self)
    }
}

/// The pin directory, if any.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PinDir(Option<PathBuf>);

impl FromStr for PinDir {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        parse_pin_dir(text).map(Self)
    }
}

/// Parses one end of a connection, as people and ss(8) write it. No connection has port 0. The interface (zone) that ss
/// adds to link-local addresses and bound sockets is ignored, because no rule names interfaces.
fn end(text: &str) -> Result<SocketAddr, &'static str> {
    let without_zone = text.split_once('%').and_then(|(address, rest)| {
        // The zone is within the brackets, or behind them as ss prints it.
        let is_within = address.starts_with('[') && !address.ends_with(']');
        let end = if is_within { ']' } else { ':' };
        // Split at the last one: interface names may contain it.
        let (zone, port) = rest.split_at(rest.rfind(end)?);
        (!zone.is_empty()).then(|| format!("{address}{port}"))
    });
    let text = without_zone.as_deref().unwrap_or(text);
    let parsed = text.parse().ok().filter(|end: &SocketAddr| end.port() > 0);
    parsed.ok_or("allowed: an address and a port, such as 10.0.0.5:5432 or [2001:db8::5]:5432")
}

fn direction() -> impl clap::builder::TypedValueParser<Value = Direction> {
    PossibleValuesParser::new(["inbound", "outbound"]).map(|name| match name.as_str() {
        "inbound" => Direction::Inbound,
        _ => Direction::Outbound,
    })
}

/// Parses an audit target as in the file; a path may also be relative to the working directory.
fn audit(text: &str) -> Result<AuditTarget, Problem> {
    match parse_audit(text) {
        Err(Problem::NotAllowed { .. }) if !text.is_empty() => {
            let absolute = std::path::absolute(text).map_err(Problem::Unreadable)?;
            Ok(AuditTarget::File(absolute))
        }
        parsed => parsed,
    }
}

impl Cli {
    /// Reads the command line. For `--help`, `--version` and usage errors, prints the message and returns the exit code.
    ///
    /// # Errors
    ///
    /// The exit code, 0 or 2.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, ExitCode> {
        Self::try_parse_from(args).map_err(|error| {
            if is_help(&error) {
                // A failure to print the help cannot be reported.
                let _ = error.print();
            } else {
                eprintln!("session-enforcer: {}", usage_line(&error));
            }
            u8::try_from(error.exit_code()).map_or(ExitStatus::Usage.into(), ExitCode::from)
        })
    }

    /// The log filter: `--log-level`, or `RUST_LOG`, or `info`.
    ///
    /// # Errors
    ///
    /// Fails if `RUST_LOG` is not a filter.
    pub fn log_filter(&self) -> Result<Targets, Failure> {
        self.log_filter_or(std::env::var("RUST_LOG").ok())
    }

    fn log_filter_or(&self, environment: Option<String>) -> Result<Targets, Failure> {
        let flag = self.log_level.as_ref().map(|level| level.0.clone());
        let text = flag.or(environment).filter(|text| !text.is_empty());
        let text = text.as_deref().unwrap_or(DEFAULT_LOG_LEVEL);
        // clap has validated the flag, so only `RUST_LOG` can be invalid.
        Targets::from_str(text).map_err(|error| {
            let message = format!("RUST_LOG={text:?} is not a filter: {error}; try RUST_LOG=info");
            Failure::new(ExitStatus::Usage, message)
        })
    }
}

impl RunArgs {
    /// The configuration file; `None` if `--port` replaces it.
    /// Absolute, because clients of the daemon read it from other directories.
    pub fn config_path(&self) -> Option<PathBuf> {
        if !self.port.is_empty() {
            return None;
        }
        let path = self.config.as_deref();
        let path = path.unwrap_or(Path::new(DEFAULT_CONFIG));
        // Fails only for an empty path, which no file has.
        Some(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
    }

    /// The configuration of these arguments: a flag overrides the key of the file.
    ///
    /// # Errors
    ///
    /// Fails if the file is invalid, if others could change it, or if there are too many ports.
    pub fn to_config(&self) -> anyhow::Result<Config> {
        self.config_from(self.config_path().as_deref())
    }

    /// The same with another file, or none.
    ///
    /// # Errors
    ///
    /// As [`RunArgs::to_config`].
    pub fn config_from(&self, path: Option<&Path>) -> anyhow::Result<Config> {
        let mut config = match path {
            Some(path) => load_trusted(path)?,
            None => Config::from_quick(self.port.clone(), self.idle_timeout, self.max_lifetime)
                .or_exit(ExitStatus::Usage)?,
        };
        if let Some(cgroup) = &self.cgroup {
            config.cgroup = Some(cgroup.into());
            // `--cgroup` replaces the file's cgroup, so its warning does not apply.
            let is_outside = |doubt: &Doubt| matches!(doubt, Doubt::OutsideDaemonCgroup { .. });
            config
                .warnings
                .retain(|warning| !is_outside(&warning.doubt));
        }
        if self.observe {
            config.mode = Mode::Observe;
        }
        if let Some(Listen(listen)) = &self.metrics_listen {
            config.metrics_listen.clone_from(listen);
            let exposed = |doubt: &Doubt| matches!(doubt, Doubt::Exposed { .. });
            config.warnings.retain(|warning| !exposed(&warning.doubt));
            let doubt = listen.as_ref().and_then(MetricsListen::doubt);
            config.warnings.extend(doubt.map(|doubt| Warning {
                location: Location {
                    file: "--metrics-listen".into(),
                    position: None,
                    key: None,
                },
                doubt,
            }));
        }
        if let Some(socket) = &self.control_socket {
            config.control.socket = socket.clone();
        }
        if let Some(audit) = &self.audit {
            config.audit = audit.clone();
        }
        if let Some(PinDir(path)) = &self.pin_dir {
            config.pin_dir.clone_from(path);
        }
        Ok(config)
    }
}

/// Reads a configuration file and refuses one that others could change. Only trusted users can change a trusted path, so
/// the check may follow the read.
fn load_trusted(path: &Path) -> anyhow::Result<Config> {
    let config = Config::load(path)?;
    let refused = |error: Untrusted| Failure::new(ExitStatus::Configuration, error.to_string());
    trust::check(path).map_err(refused)?;
    Ok(config)
}

/// Whether clap's message is the requested output and not an error.
fn is_help(error: &clap::Error) -> bool {
    use ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand as NothingAsked, DisplayVersion,
    };
    matches!(error.kind(), DisplayHelp | DisplayVersion | NothingAsked)
}

/// clap's message and tips in one line, without the usage.
fn usage_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let one_line = |paragraph: &str| {
        let words: Vec<&str> = paragraph.split_whitespace().collect();
        words.join(" ")
    };
    let added = |paragraph: &&str| {
        paragraph.starts_with("Usage:") || paragraph.starts_with("For more information")
    };
    let paragraphs = text.split("\n\n").take_while(|paragraph| !added(paragraph));
    let mut parts: Vec<String> = paragraphs.map(one_line).collect();
    parts.push("see session-enforcer --help".to_owned());
    parts.join("; ")
}

#[cfg(test)]
mod tests;
