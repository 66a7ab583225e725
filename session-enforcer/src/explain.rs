//! `session-enforcer explain`: which rule decides about a connection, and why the earlier ones do
//! not.
//!
//! The decision is that of [`matches`] over the match table, as in the kernel. The reasons come from
//! the conditions of the rules; the tests show that the two never disagree.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Context as _;
use ipnet::IpNet;
use session_enforcer_common::{Address, Direction, Facts, PortRange, matches};

use crate::check::{action_words, condition_words, direction_words, port_list, prefix_list};
use crate::config::{Action, Config, NetworkNamespaces, Rule};
use crate::exit::{ExitStatus, Failure};

/// Values of a condition that are named. More make a line that nobody reads.
const MAX_VALUES: usize = 8;

/// The two ends of a connection: both IPv4 or both IPv6, an IPv4-mapped address being its IPv4
/// address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    local: SocketAddr,
    remote: SocketAddr,
}

impl Ends {
    /// The ends of a connection.
    ///
    /// # Errors
    ///
    /// Where one is IPv4 and the other IPv6.
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Result<Self, Failure> {
        let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
        let (local, remote) = (canonical(local), canonical(remote));
        if local.is_ipv4() != remote.is_ipv4() {
            let words = |end: SocketAddr| {
                let family = if end.is_ipv4() { "IPv4" } else { "IPv6" };
                format!("{} is an {family} address", end.ip())
            };
            let (local, remote) = (words(local), words(remote));
            let message =
                format!("{local} and {remote}; both ends of a connection are of one family");
            return Err(Failure::new(ExitStatus::Usage, message));
        }
        Ok(Self { local, remote })
    }

    fn facts(&self, direction: Direction) -> Facts {
        Facts {
            direction,
            local: address(self.local.ip()),
            remote: address(self.remote.ip()),
            local_port: self.local.port(),
            remote_port: self.remote.port(),
        }
    }
}

fn address(ip: IpAddr) -> Address {
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    Address::from_octets(v6.octets())
}

/// Reads a file and prints which of its rules decides about a connection; without a direction, for
/// both directions.
///
/// # Errors
///
/// Where the file is wrong ([`ConfigError`](crate::config::ConfigError), exit status 78), or `out`
/// does not take the text.
pub fn explain(
    path: &Path,
    ends: &Ends,
    direction: Option<Direction>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    describe(&config, ends, direction, out).context("the explanation cannot be written")
}

fn describe(
    config: &Config,
    ends: &Ends,
    direction: Option<Direction>,
    out: &mut impl Write,
) -> io::Result<()> {
    let deciders = Deciders::new(config);
    let of = |direction| deciders.of(&ends.facts(direction));
    let (inbound, outbound) = (of(Direction::Inbound), of(Direction::Outbound));
    match direction {
        Some(Direction::Inbound) => section(config, ends, direction, inbound, out)?,
        Some(Direction::Outbound) => section(config, ends, direction, outbound, out)?,
        None if inbound == outbound => section(config, ends, None, inbound, out)?,
        None => {
            section(config, ends, Some(Direction::Inbound), inbound, out)?;
            writeln!(out)?;
            section(config, ends, Some(Direction::Outbound), outbound, out)?;
        }
    }
    describe_scope(config, out)
}

/// The match table, and the rule that each of its entries is of.
struct Deciders {
    entries: Vec<session_enforcer_common::MatchEntry>,
    rules: Vec<usize>,
}

impl Deciders {
    fn new(config: &Config) -> Self {
        // The entries of all exempt rules have one number. The same table without exemptions has
        // the number of each rule.
        let mut numbered = config.clone();
        for rule in &mut numbered.rules {
            rule.action = Action::Enforce;
        }
        let numbers = numbered.match_entries().into_iter();
        Self {
            entries: config.match_entries(),
            rules: numbers.map(|entry| usize::from(entry.rule)).collect(),
        }
    }

    /// The index of the rule that decides about the connection.
    fn of(&self, facts: &Facts) -> Option<usize> {
        let first = self.entries.iter().position(|e| matches(facts, e))?;
        Some(self.rules[first])
    }
}

/// What is decided for one direction, or for both where they do not differ.
fn section(
    config: &Config,
    ends: &Ends,
    direction: Option<Direction>,
    decider: Option<usize>,
    out: &mut impl Write,
) -> io::Result<()> {
    let way = match direction {
        None => "accepted here or dialled from here",
        Some(Direction::Inbound) => "accepted here",
        Some(Direction::Outbound) => "dialled from here",
    };
    writeln!(out, "{} with {}, {way}:", ends.local, ends.remote)?;
    let earlier = decider.unwrap_or(config.rules.len());
    for rule in &config.rules[..earlier] {
        writeln!(out, "  {}", no_line(rule, ends, direction))?;
    }
    let Some(decider) = decider else {
        return writeln!(out, "  decided: not tracked, as no rule matches");
    };
    let rule = &config.rules[decider];
    writeln!(out, "  {}", yes_line(config, rule))?;
    match config.rules.len() - decider - 1 {
        0 => {}
        1 => writeln!(out, "  1 later rule is not looked at")?,
        later => writeln!(out, "  {later} later rules are not looked at")?,
    }
    writeln!(out, "  decided: {}", decision(config, rule))
}

fn no_line(rule: &Rule, ends: &Ends, direction: Option<Direction>) -> String {
    let refusals: Vec<String> = refusals(rule, ends, direction)
        .into_iter()
        .flatten()
        .collect();
    format!("rule \"{}\": no: {}", rule.name, refusals.join("; "))
}

fn yes_line(config: &Config, rule: &Rule) -> String {
    let mut which = direction_words(rule).to_owned();
    for condition in condition_words(rule, MAX_VALUES) {
        which = format!("{which}, {condition}");
    }
    let happens = action_words(config, rule);
    format!("rule \"{}\": yes: {which}; they {happens}", rule.name)
}

fn decision(config: &Config, rule: &Rule) -> String {
    let (word, more) = match (config.effective_action(rule), rule.action) {
        (Action::Enforce, _) => ("enforced", ""),
        (Action::Observe, Action::Observe) => ("observed", ": recorded, not reset"),
        (Action::Observe, _) => (
            "observed",
            ": recorded, not reset, as the daemon's mode is \"observe\"",
        ),
        (Action::Exempt, _) => ("exempt", ": not tracked, never reset"),
    };
    format!("{word} by rule \"{}\"{more}", rule.name)
}

/// Says what else must hold of a connection, which its ends do not tell.
fn describe_scope(config: &Config, out: &mut impl Write) -> io::Result<()> {
    if let Some(cgroup) = &config.cgroup {
        let cgroup = cgroup.display();
        writeln!(
            out,
            "\nOnly sockets of the control group {cgroup} and those below it are tracked."
        )?;
    }
    if config.network_namespaces == NetworkNamespaces::Own {
        writeln!(
            out,
            "\nOnly sockets of the daemon's own network namespace are tracked."
        )?;
    }
    Ok(())
}

/// What each condition has against the connection: direction, local port, remote port, local
/// address, remote address. Without a direction, it has nothing against it.
fn refusals(rule: &Rule, ends: &Ends, direction: Option<Direction>) -> [Option<String>; 5] {
    [
        direction.and_then(|direction| wrong_direction(rule, direction)),
        wrong_port("local", ends.local.port(), &rule.local_ports),
        wrong_port("remote", ends.remote.port(), &rule.remote_ports),
        wrong_address("local", ends.local.ip(), &rule.local),
        wrong_address("remote", ends.remote.ip(), &rule.remote),
    ]
}

fn wrong_direction(rule: &Rule, direction: Direction) -> Option<String> {
    let wanted = rule.direction.filter(|wanted| *wanted != direction)?;
    let words = match wanted {
        Direction::Inbound => "dialled from here, not accepted here",
        Direction::Outbound => "accepted here, not dialled from here",
    };
    Some(words.to_owned())
}

fn wrong_port(end: &str, port: u16, ranges: &[PortRange]) -> Option<String> {
    let wanted = port_list(ranges, MAX_VALUES)?;
    let within = ranges.iter().any(|range| range.contains(port));
    (!within).then(|| format!("{end} port {port} is not {wanted}"))
}

fn wrong_address(end: &str, ip: IpAddr, nets: &[IpNet]) -> Option<String> {
    let wanted = prefix_list(nets, MAX_VALUES)?;
    let within = nets.iter().any(|net| net.contains(&ip));
    (!within).then(|| format!("{end} address {ip} is not in {wanted}"))
}

#[cfg(test)]
mod tests;
