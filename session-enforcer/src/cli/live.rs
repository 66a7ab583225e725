//! The arguments of the commands that ask a running daemon.

use std::path::PathBuf;

use clap::Args;

use crate::{
    config::DEFAULT_CONTROL_SOCKET,
    report::control::{FILTER_KEYS, Filter, SortKey},
};

/// Which daemon is asked.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct SocketArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL_SOCKET)]
    pub socket: PathBuf,
}

/// Arguments of `status` and `events`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = super::EXIT_STATUS_HELP)]
pub struct WatchArgs {
    #[command(flatten)]
    /// Which daemon.
    pub daemon: SocketArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `list`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{LIST_EXAMPLES}\n\n{}", super::EXIT_STATUS_HELP))]
pub struct ListArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Which sessions.
    #[command(flatten)]
    pub filter: FilterArgs,

    /// What comes first: the session that ends next (left), the one that is idle for longest, the oldest
    /// (age), the one that has carried most; by rule; by number
    #[arg(long, value_name = "KEY", value_enum, default_value_t = SortKey::Left)]
    pub sort: SortKey,

    /// Print at most so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `kill`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = format!("{KILL_EXAMPLES}\n\n{}", super::EXIT_STATUS_HELP))]
#[command(group = clap::ArgGroup::new("which").multiple(true).required(true).arg("ids").args(FILTER_KEYS))]
pub struct KillArgs {
    /// Numbers of sessions, as list prints them
    #[arg(value_name = "ID")]
    pub ids: Vec<u64>,

    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Which sessions.
    #[command(flatten)]
    pub filter: FilterArgs,

    /// Reset nothing; print what would be reset
    #[arg(long)]
    pub dry_run: bool,

    /// Do not ask on a terminal before more than one session is reset
    #[arg(long)]
    pub yes: bool,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `top`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(after_help = super::EXIT_STATUS_HELP)]
pub struct TopArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,

    /// Which sessions.
    #[command(flatten)]
    pub filter: FilterArgs,

    /// What comes first
    #[arg(long, value_name = "KEY", value_enum, default_value_t = SortKey::Left)]
    pub sort: SortKey,
}

/// Conditions, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Filters, all of which must hold")]
pub struct FilterArgs {
    /// Of this rule
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,

    /// Whose peer is in this prefix
    #[arg(long, value_name = "CIDR", value_parser = of("remote"))]
    remote: Option<String>,

    /// With this port on this host
    #[arg(long, value_name = "PORT", value_parser = of("local_port"))]
    local_port: Option<String>,

    /// Of this user, by name or uid
    #[arg(long, value_name = "USER", value_parser = of("user"))]
    user: Option<String>,

    /// Of this control group, or of one below it
    #[arg(long, value_name = "PATH", value_parser = of("cgroup"))]
    cgroup: Option<String>,

    /// Idle for so long, or longer
    #[arg(long, value_name = "DUR", value_parser = of("idle_over"))]
    idle_over: Option<String>,

    /// Established so long ago, or longer
    #[arg(long, value_name = "DUR", value_parser = of("older_than"))]
    older_than: Option<String>,

    /// Whose limit is reached by then, if nothing passes
    #[arg(long, value_name = "DUR", value_parser = of("ends_within"))]
    ends_within: Option<String>,

    /// Whose rule, ends, user or control group have this text in them, in whichever case
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
}

/// What is a value of this filter.
fn of(key: &'static str) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync {
    move |text| {
        let read = Filter::default().add(key, text);
        // The message begins with the name of the flag already.
        let prefix = format!("{key}: ");
        read.map(|_| text.to_owned())
            .map_err(|error| error.trim_start_matches(&prefix).to_owned())
    }
}

impl FilterArgs {
    /// The conditions, as in a query.
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
  Who ends within a minute:
    session-enforcer list --ends-within 1m
  Numbers of the sessions from a network, for a script:
    session-enforcer list --remote 10.0.0.0/8 --json";

pub(super) const KILL_EXAMPLES: &str = "\
The client gets a reset, as at a limit; the record of it has the reason admin and
who asked. Status 75: some were not reset. An MPTCP connection ends as a whole.

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
