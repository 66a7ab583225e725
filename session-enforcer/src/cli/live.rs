//! The arguments of the commands that query a running daemon.

use std::path::PathBuf;

use clap::Args;

use crate::{
    config::DEFAULT_CONTROL_SOCKET,
    report::control::{FILTER_KEYS, Filter, SortKey},
};

/// The socket of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct SocketArgs {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL_SOCKET)]
    pub socket: PathBuf,
}

/// Arguments of `status` and `events`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = super::EXIT_STATUS_HELP)]
pub struct WatchArgs {
    /// The socket of the daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `list`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{LIST_EXAMPLES}\n\n{}", super::EXIT_STATUS_HELP))]
pub struct ListArgs {
    /// The socket of the daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Sort by time left, idle time, age, bytes, rule or ID
    #[arg(long, value_name = "KEY", value_enum, default_value_t = SortKey::Left)]
    pub sort: SortKey,

    /// Print at most N sessions
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,

    /// Print JSON, one object per line
    #[arg(long)]
    pub json: bool,

    /// The filters. They come last, because their heading covers the options that follow.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Arguments of `kill`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{KILL_EXAMPLES}\n\n{}", super::EXIT_STATUS_HELP))]
#[command(group = clap::ArgGroup::new("which").multiple(true).required(true).arg("ids").args(FILTER_KEYS))]
pub struct KillArgs {
    /// Session IDs, as list prints them
    #[arg(value_name = "ID")]
    pub ids: Vec<u64>,

    /// The socket of the daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Reset nothing; print the sessions that would be reset
    #[arg(long)]
    pub dry_run: bool,

    /// Do not ask for confirmation before several sessions are reset from a terminal
    #[arg(long)]
    pub yes: bool,

    /// Print JSON, one object per line
    #[arg(long)]
    pub json: bool,

    /// The filters. They come last, because their heading covers the options that follow.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Arguments of `top`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = super::EXIT_STATUS_HELP)]
pub struct TopArgs {
    /// The socket of the daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Sort by time left, idle time, age, bytes, rule or ID
    #[arg(long, value_name = "KEY", value_enum, default_value_t = SortKey::Left)]
    pub sort: SortKey,

    /// The filters. They come last, because their heading covers the options that follow.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Conditions on sessions. A session must match all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Filters (a session must match all)")]
pub struct FilterArgs {
    /// Rule that limits the session
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,

    /// Prefix of the remote address
    #[arg(long, value_name = "CIDR", value_parser = of("remote"))]
    remote: Option<String>,

    /// Local port
    #[arg(long, value_name = "PORT", value_parser = of("local_port"))]
    local_port: Option<String>,

    /// Owner of the socket: user name or uid
    #[arg(long, value_name = "USER", value_parser = of("user"))]
    user: Option<String>,

    /// The socket's cgroup, or one above it
    #[arg(long, value_name = "PATH", value_parser = of("cgroup"))]
    cgroup: Option<String>,

    /// Shortest idle time
    #[arg(long, value_name = "DUR", value_parser = of("idle_over"))]
    idle_over: Option<String>,

    /// Shortest time since the session was established
    #[arg(long, value_name = "DUR", value_parser = of("older_than"))]
    older_than: Option<String>,

    /// Longest time until the session ends, if no payload passes
    #[arg(long, value_name = "DUR", value_parser = of("ends_within"))]
    ends_within: Option<String>,

    /// Text in the rule, an address, the user or the cgroup; case is ignored
    #[arg(long, value_name = "TEXT", value_parser = of("text"))]
    text: Option<String>,
}

/// Accepts the values of this filter.
fn of(key: &'static str) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync {
    move |text| {
        let read = Filter::default().add(key, text);
        // clap prints the name of the flag, so the message need not begin with the key.
        let prefix = format!("{key}: ");
        read.map(|_| text.to_owned())
            .map_err(|error| error.trim_start_matches(&prefix).to_owned())
    }
}

impl FilterArgs {
    /// The conditions as parameters of a query.
    pub fn pairs(&self) -> Vec<(&'static str, &str)> {
        let all = [
            ("rule", &self.rule),
            ("remote", &self.remote),
            ("local_port", &self.local_port),
            ("user", &self.user),
            ("cgroup", &self.cgroup),
            ("idle_over", &self.idle_over),
            ("older_than", &self.older_than),
            ("ends_within", &self.ends_within),
            ("text", &self.text),
        ];
        all.into_iter()
            .filter_map(|(key, value)| Some((key, value.as_deref()?)))
            .collect()
    }
}

pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  Sessions that end within a minute:
    session-enforcer list --ends-within 1m
  Sessions with peers in one network, as JSON for a script:
    session-enforcer list --remote 10.0.0.0/8 --json";

pub(super) const KILL_EXAMPLES: &str = "\
The peer gets a reset, as at a limit. The audit record has the reason admin and the
user who asked. An MPTCP connection is reset as a whole. Exit status 75 means that
some sessions were not reset.

Examples:
  session-enforcer kill 4711
  session-enforcer kill --rule ssh --idle-over 10m --dry-run";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_filter_of_a_query_is_a_flag() {
        let text = || Some("x".to_owned());
        let all = FilterArgs {
            rule: text(),
            remote: text(),
            local_port: text(),
            user: text(),
            cgroup: text(),
            idle_over: text(),
            older_than: text(),
            ends_within: text(),
            text: text(),
        };
        let keys: Vec<&str> = all.pairs().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, FILTER_KEYS);
    }
}
