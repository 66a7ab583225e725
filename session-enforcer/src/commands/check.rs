//! `session-enforcer check`: reports all errors of a configuration, or describes its effect, as text or JSON.

mod json;
mod on_host;

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context as _;
use ipnet::IpNet;
use session_enforcer_common::{Activity, Direction, MAX_MATCH_ENTRIES, PortRange};

use crate::config::{
    Action, AuditTarget, Config, MetricsListen, Mode, NetworkNamespaces, OnFull, Owners, Rule,
    format_duration,
};

/// Validates a file. Prints a description of it and what `run` would refuse on this host.
///
/// # Errors
///
/// Fails if the file is invalid ([`ConfigErrors`](crate::config::ConfigErrors), exit status 78), or if `out`
/// cannot be written. A missing prerequisite of this host is no error, because the file may be for another
/// host.
pub fn check(path: &Path, as_json: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let loaded = Config::load_all(path);
    let refused = loaded
        .as_ref()
        .map_or_else(|_| Vec::new(), |config| on_host::refusals(path, config));
    let written = match (as_json, &loaded) {
        (true, loaded) => writeln!(out, "{:#}", json::report(path, loaded, &refused)),
        (false, Ok(config)) => writeln!(out, "{} is valid.\n", path.display())
            .and_then(|()| describe(config, out))
            .and_then(|()| describe_refusals(&refused, out)),
        (false, Err(_)) => Ok(()),
    };
    written.context("the description of the configuration cannot be written")?;
    loaded?;
    Ok(())
}

fn describe_refusals(refused: &[String], out: &mut impl Write) -> io::Result<()> {
    let mut refused = refused.iter();
    refused.try_for_each(|why| writeln!(out, "warning: run refuses this on this host: {why}"))
}

/// Describes a configuration: the daemon's settings, each rule in order, the warnings.
///
/// # Errors
///
/// Fails if `out` cannot be written.
pub fn describe(config: &Config, out: &mut impl Write) -> io::Result<()> {
    describe_daemon(config, out)?;
    writeln!(out, "\nRules, the first that matches a connection decides:")?;
    for (index, rule) in config.rules.iter().enumerate() {
        describe_rule(config, rule, index + 1, out)?;
    }
    writeln!(out, "\nA connection that no rule matches is not tracked.")?;
    let (rules, entries) = (
        config.rules.len(),
        config.match_entries(&Owners::numbered(&config.rules)).len(),
    );
    writeln!(
        out,
        "{rules} rule{}, {entries} of {MAX_MATCH_ENTRIES} match entries.",
        if rules == 1 { "" } else { "s" }
    )?;
    for warning in &config.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}

fn describe_daemon(config: &Config, out: &mut impl Write) -> io::Result<()> {
    let cgroup = match &config.cgroup {
        Some(path) => path.display().to_string(),
        None => "the mount of cgroup2".to_owned(),
    };
    let mode = match config.mode {
        Mode::Enforce => "enforce",
        Mode::Observe => "observe: nothing is reset, even if a rule enforces",
    };
    let namespaces = match config.network_namespaces {
        NetworkNamespaces::All => "all of this host",
        NetworkNamespaces::Own => "the daemon's own",
    };
    let metrics = match &config.metrics_listen {
        Some(MetricsListen::Tcp(address)) => format!("http://{address}/metrics"),
        Some(socket) => socket.to_string(),
        None => "not served".to_owned(),
    };
    let audit = match &config.audit {
        AuditTarget::Stdout => "standard output".to_owned(),
        AuditTarget::Journald => "the journal (journald)".to_owned(),
        AuditTarget::File(path) => path.display().to_string(),
    };
    let control = match (config.control.socket.path(), &config.control.group) {
        (Some(path), None) => format!("{}, for root", path.display()),
        (Some(path), Some(group)) => format!("{}, for root and the group {group}", path.display()),
        (None, _) => "none".to_owned(),
    };
    let pins = match &config.pin_dir {
        Some(path) => path.display().to_string(),
        None => "none: sessions are adopted anew at each start".to_owned(),
    };
    writeln!(out, "Daemon:")?;
    writeln!(out, "  cgroup              {cgroup}")?;
    writeln!(out, "  mode                {mode}")?;
    let on_full = match config.on_full {
        OnFull::Leave => "",
        OnFull::Reset => "; without room, a connection that a rule enforces is reset",
    };
    let most = config.max_sessions;
    writeln!(out, "  sessions, at most   {most}{on_full}")?;
    writeln!(out, "  pins                {pins}")?;
    writeln!(out, "  network namespaces  {namespaces}")?;
    let interval = format_duration(config.reconcile_interval);
    writeln!(out, "  reconciled every    {interval}")?;
    writeln!(out, "  metrics             {metrics}")?;
    writeln!(out, "  control socket      {control}")?;
    let synced = if config.audit_sync {
        ", on the disk before the next resets"
    } else {
        ""
    };
    writeln!(out, "  audit               {audit}{synced}")
}

fn describe_rule(
    config: &Config,
    rule: &Rule,
    number: usize,
    out: &mut impl Write,
) -> io::Result<()> {
    writeln!(out, "  {number}. {}: {}", rule.name, direction_words(rule))?;
    for condition in condition_words(rule, usize::MAX) {
        writeln!(out, "       {condition}")?;
    }
    if rule.max_sessions != 0 {
        writeln!(
            out,
            "       at most {} of them at a time",
            rule.max_sessions
        )?;
    }
    writeln!(out, "       {}", action_words(config, rule))
}

/// Describes the rule's direction.
pub(crate) fn direction_words(rule: &Rule) -> &'static str {
    match rule.direction {
        None => "connections accepted here or dialled from here",
        Some(Direction::Inbound) => "connections accepted here",
        Some(Direction::Outbound) => "connections dialled from here",
    }
}

/// Describes the rule's other conditions, each with at most `most` values.
pub(crate) fn condition_words(rule: &Rule, most: usize) -> Vec<String> {
    let conditions = [
        ("with local port", port_list(&rule.local_ports, most)),
        ("with remote port", port_list(&rule.remote_ports, most)),
        ("with local address in", prefix_list(&rule.local, most)),
        ("with remote address in", prefix_list(&rule.remote, most)),
        ("of user", word_list(&rule.users, most)),
        ("of cgroup", word_list(&rule.cgroups, most)),
    ];
    let words = |(what, values): (&str, Option<String>)| Some(format!("{what} {}", values?));
    conditions.into_iter().filter_map(words).collect()
}

/// Describes what happens to the connections of a rule, and when.
pub(crate) fn action_words(config: &Config, rule: &Rule) -> String {
    let happens = match config.effective_action(rule) {
        Action::Enforce => "are reset",
        Action::Observe => "are recorded, not reset,",
        Action::Exempt => return "are exempt: not tracked, never reset".to_owned(),
    };
    let limits: Vec<String> = [idle_words(rule), response_words(rule), lifetime_words(rule)]
        .into_iter()
        .flatten()
        .collect();
    format!("{happens} {}", limits.join(", and at the latest "))
}

fn idle_words(rule: &Rule) -> Option<String> {
    let half_closed = rule.half_closed_timeout.map(format_duration);
    let (time, once) = match (rule.idle_timeout.map(format_duration), half_closed) {
        (Some(time), Some(half_closed)) => (time, format!(" ({half_closed} {HALF_CLOSED})")),
        (Some(time), None) => (time, String::new()),
        (None, half_closed) => (half_closed?, format!(" {HALF_CLOSED}")),
    };
    let way = match rule.activity {
        Activity::Any => "",
        Activity::Received => " received here",
        Activity::Sent => " sent from here",
    };
    let least = match rule.min_payload {
        1 => String::new(),
        bytes => format!(" of {bytes} bytes or more"),
    };
    Some(format!(
        "{time} after their last new payload{least}{way}{once}"
    ))
}

const HALF_CLOSED: &str = "once either end has sent its FIN";

fn response_words(rule: &Rule) -> Option<String> {
    let time = format_duration(rule.response_timeout?);
    // This host owes no answer on an outbound connection.
    let which = match rule.direction {
        None => ", if they are inbound,",
        Some(_) => "",
    };
    let least = match rule.min_answer {
        1 => String::new(),
        bytes => format!(" with {bytes} bytes or more"),
    };
    Some(format!(
        "{time}{which} after a request that this host has not answered{least} (until then they \
         are not idle)"
    ))
}

fn lifetime_words(rule: &Rule) -> Option<String> {
    let time = format_duration(rule.max_lifetime?);
    let jitter = match rule.lifetime_jitter_percent {
        0 => String::new(),
        percent => format!(", or up to {percent}% sooner,"),
    };
    Some(format!("{time}{jitter} after they were established"))
}

/// Joins the ports and ranges of a condition, at most `most`. `None` if there is no condition.
pub(crate) fn port_list(ranges: &[PortRange], most: usize) -> Option<String> {
    let text = |range: &PortRange| match (range.first, range.last) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    or_list(ranges.iter().map(text).collect(), most)
}

/// Joins the prefixes of a condition, at most `most`. `None` if there is no condition.
pub(crate) fn prefix_list(nets: &[IpNet], most: usize) -> Option<String> {
    let text = |net: &IpNet| {
        if net.prefix_len() == net.max_prefix_len() {
            net.addr().to_string()
        } else {
            net.to_string()
        }
    };
    or_list(nets.iter().map(text).collect(), most)
}

/// Joins the users or cgroups of a condition, at most `most`. `None` if there is no condition.
pub(crate) fn word_list(words: &[impl ToString], most: usize) -> Option<String> {
    or_list(words.iter().map(ToString::to_string).collect(), most)
}

/// Returns `a, b or c`, or `a, b or 7 others`. `None` for an empty list.
fn or_list(mut texts: Vec<String>, most: usize) -> Option<String> {
    if texts.len() > most {
        let others = texts.len() - most;
        texts.truncate(most);
        texts.push(format!(
            "{others} other{}",
            if others == 1 { "" } else { "s" }
        ));
    }
    let (last, others) = texts.split_last()?;
    if others.is_empty() {
        return Some(last.clone());
    }
    Some(format!("{} or {last}", others.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(text: &str) -> String {
        let config = Config::parse("x.toml", text).unwrap();
        let mut out = Vec::new();
        describe(&config, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_clock_is_said_in_plain_words() {
        let text = "[[rule]]\nname = 'a'\nidle_timeout = '5s'\nactivity = 'received'\n\
                    min_payload = 16\nresponse_timeout = '1m'\nmin_answer = 100\nmax_lifetime = '12h'\n\
                    lifetime_jitter = '10%'\n";
        let words = "are reset 5s after their last new payload of 16 bytes or more received here, \
                     and at the latest 1m, if they are inbound, after a request that this host has \
                     not answered with 100 bytes or more (until then they are not idle), and at the \
                     latest 12h, or up to 10% sooner, after they were established";
        let text = described(text);
        assert!(text.contains(words), "{text}");
    }

    #[test]
    fn the_limit_of_half_closed_sessions_is_said_beside_the_other_or_alone() {
        let limits = |limits: &str| described(&format!("[[rule]]\nname = 'a'\n{limits}\n"));
        for (text, words) in [
            (
                "idle_timeout = '15m'\nhalf_closed_timeout = '1m'\nmax_lifetime = '12h'",
                "are reset 15m after their last new payload (1m once either end has sent its FIN), \
                 and at the latest 12h after they were established\n",
            ),
            (
                "half_closed_timeout = '1m'\nactivity = 'sent'",
                "are reset 1m after their last new payload sent from here once either end has sent \
                 its FIN\n",
            ),
        ] {
            let said = limits(text);
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn every_setting_and_rule_is_said_in_plain_words() {
        let text = r#"
[daemon]
cgroup = "/sys/fs/cgroup/web"
max_sessions = 1000
pin_dir = ""
network_namespaces = "own"
[metrics]
listen = ""
[audit]
path = "/var/log/sessions.json"
[[rule]]
name = "pubsub"
remote = ["10.1.0.0/16", "10.2.0.1"]
action = "exempt"
[[rule]]
name = "redis"
direction = "inbound"
local_ports = [6379, "7000-7005", 8000]
local = ["10.0.0.0/8", "fd00::/8"]
idle_timeout = "90m"
max_lifetime = "12h"
[[rule]]
name = "web"
direction = "outbound"
remote_ports = [443]
action = "observe"
max_lifetime = "1d"
"#;
        let expected = "\
Daemon:
  cgroup              /sys/fs/cgroup/web
  mode                enforce
  sessions, at most   1000
  pins                none: sessions are adopted anew at each start
  network namespaces  the daemon's own
  reconciled every    15m
  metrics             not served
  control socket      /run/session-enforcer/control.sock, for root
  audit               /var/log/sessions.json

Rules, the first that matches a connection decides:
  1. pubsub: connections accepted here or dialled from here
       with remote address in 10.1.0.0/16 or 10.2.0.1
       are exempt: not tracked, never reset
  2. redis: connections accepted here
       with local port 6379, 7000-7005 or 8000
       with local address in 10.0.0.0/8 or fd00::/8
       are reset 1h30m after their last new payload, and at the latest 12h after they were \
established
  3. web: connections dialled from here
       with remote port 443
       are recorded, not reset, 1d after they were established

A connection that no rule matches is not tracked.
3 rules, 9 of 4096 match entries.
";
        assert_eq!(described(text), expected);
    }

    #[test]
    fn defaults_observe_mode_and_warnings_are_said() {
        let text = r#"
[daemon]
mode = "observe"
[[rule]]
name = "all"
idle_timeout = "15m"
[[rule]]
name = "late"
local_ports = [22]
idle_timeout = "5m"
"#;
        let printed = described(text);
        for part in [
            "  cgroup              the mount of cgroup2\n",
            "  mode                observe: nothing is reset, even if a rule enforces\n",
            "  sessions, at most   262144\n",
            "  pins                /sys/fs/bpf/session-enforcer\n",
            "  network namespaces  all of this host\n",
            "  metrics             http://127.0.0.1:9847/metrics\n",
            "  audit               standard output\n",
            "       are recorded, not reset, 15m after their last new payload\n",
            "\n2 rules, 2 of 4096 match entries.\n",
            "warning: x.toml:7:1: rule \"late\": never decides, because the earlier rule \"all\" \
             matches every connection that it would; move it up or remove it\n",
        ] {
            assert!(printed.contains(part), "{part:?} is not in:\n{printed}");
        }
    }

    #[test]
    fn a_wrong_file_prints_nothing_and_is_an_error_of_the_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wrong.toml");
        std::fs::write(&path, "[[rule]]\n").unwrap();
        let mut out = Vec::new();
        let error = check(&path, false, &mut out).unwrap_err();
        assert!(out.is_empty());
        let status = crate::exit::ExitStatus::of(&error);
        assert_eq!(status, crate::exit::ExitStatus::Configuration);
    }
}
