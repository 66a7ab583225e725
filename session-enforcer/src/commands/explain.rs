//! `session-enforcer explain`: which rule decides about a connection, and why earlier rules do not.
//!
//! As in the kernel, [`matches`](fn@matches) over the match table decides. The reasons come from the
//! conditions of the rules; tests prove that both always agree.

mod live_session;

use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use ipnet::IpNet;
use session_enforcer_common::{Address, Ancestors, Direction, Facts, PortRange, matches};

use crate::cli::{Circumstances, Ends, ExplainArgs};
use crate::commands::check::{
    action_words, condition_words, direction_words, port_list, prefix_list, word_list,
};
use crate::commands::columns::printable;
use crate::config::{Action, Config, NetworkNamespaces, Owners, Rule, User, is_below, is_pattern};
use crate::host::users;

/// The maximum number of printed values of a condition. A longer line would be hard to read.
const MAX_VALUES: usize = 8;

/// Prints which rule decides about a connection, or about a live session of the running daemon.
///
/// # Errors
///
/// Fails if the file is invalid ([`ConfigError`](crate::config::ConfigError), exit status 78), no daemon
/// answers or has the session, or `out` cannot be written.
pub fn explain(args: &ExplainArgs, out: &mut impl Write) -> anyhow::Result<()> {
    match args.session {
        Some(id) => live_session::explain(args, id, out),
        None => explain_file(
            args.config_path(),
            &args.ends()?,
            &args.circumstances(),
            out,
        ),
    }
}

/// Reads a file and prints which of its rules decides about a connection; without a direction, for both.
///
/// # Errors
///
/// Fails if the file is invalid ([`ConfigError`](crate::config::ConfigError), exit status 78), or `out`
/// cannot be written.
fn explain_file(
    path: &Path,
    ends: &Ends,
    circumstances: &Circumstances,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    describe(&config, ends, circumstances, out).context("the explanation cannot be written")
}

fn describe(
    config: &Config,
    ends: &Ends,
    circumstances: &Circumstances,
    out: &mut impl Write,
) -> io::Result<()> {
    let question = Question::new(config, ends, circumstances);
    let of = |direction| question.answer(direction);
    let (inbound, outbound) = (of(Direction::Inbound), of(Direction::Outbound));
    match circumstances.direction {
        Some(Direction::Inbound) => section(&question, Some(Direction::Inbound), &inbound, out)?,
        Some(Direction::Outbound) => section(&question, Some(Direction::Outbound), &outbound, out)?,
        None if inbound == outbound => section(&question, None, &inbound, out)?,
        None => {
            section(&question, Some(Direction::Inbound), &inbound, out)?;
            writeln!(out)?;
            section(&question, Some(Direction::Outbound), &outbound, out)?;
        }
    }
    describe_scope(config, out)
}

/// A connection, and the match table with the rule of each entry.
struct Question<'a> {
    config: &'a Config,
    ends: &'a Ends,
    user: Option<&'a User>,
    cgroup: Option<&'a str>,
    owners: Owners,
    entries: Vec<session_enforcer_common::MatchEntry>,
    rules: Vec<usize>,
}

/// The decision of the match table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    /// Rules that decide if the unknown owner matches them.
    perhaps: Vec<usize>,
    /// The rule that decides otherwise. `None` if no rule matches.
    decider: Option<usize>,
}

impl<'a> Question<'a> {
    fn new(config: &'a Config, ends: &'a Ends, circumstances: &'a Circumstances) -> Self {
        // All exempt rules share one index in the entries. Without exemptions each entry has the index of its
        // rule.
        let mut numbered = config.clone();
        for rule in &mut numbered.rules {
            rule.action = Action::Enforce;
        }
        let owners = owners(config, circumstances);
        let numbers = numbered.match_entries(&owners).into_iter();
        Self {
            config,
            ends,
            user: circumstances.user.as_ref(),
            cgroup: circumstances.cgroup.as_deref(),
            entries: config.match_entries(&owners),
            rules: numbers.map(|entry| usize::from(entry.rule)).collect(),
            owners,
        }
    }

    fn facts(&self, direction: Direction) -> Facts {
        let (local, remote) = (self.ends.local, self.ends.remote);
        let uid = self.user.and_then(|user| self.owners.uid(user));
        let cgroup = self.cgroup.map_or(0, |_| Facts::CGROUP);
        Facts {
            direction,
            local: Address::from(local.ip()),
            remote: Address::from(remote.ip()),
            local_port: local.port(),
            remote_port: remote.port(),
            uid: uid.unwrap_or_default(),
            known: cgroup | self.user.map_or(0, |_| Facts::UID),
        }
    }

    /// The IDs of the cgroup and its ancestors, as far as the rules name them.
    fn ancestors(&self) -> Ancestors {
        let Some(cgroup) = self.cgroup else {
            return Ancestors::UNKNOWN;
        };
        let named = self.owners.cgroups.iter();
        let ids = named.filter(|(above, _)| !is_pattern(above) && is_below(cgroup, above));
        let ids: Vec<u64> = ids.flat_map(|(_, ids)| ids).copied().collect();
        Ancestors::of(&ids)
    }

    fn answer(&self, direction: Direction) -> Answer {
        let (facts, ancestors) = (self.facts(direction), self.ancestors());
        let mut answer = Answer::default();
        for (entry, rule) in self.entries.iter().zip(&self.rules) {
            if !matches(&facts, &ancestors, entry) || answer.perhaps.contains(rule) {
                continue;
            }
            if !entry.needs_owner(&facts) {
                answer.decider = Some(*rule);
                break;
            }
            answer.perhaps.push(*rule);
        }
        answer
    }
}

/// Numbers for the owners that the rules and the question name. Owners that this host has get their real
/// numbers, because a user may be written by name and by number.
fn owners(config: &Config, asked: &Circumstances) -> Owners {
    let mut named = config.rules.clone();
    if let Some(rule) = named.first_mut() {
        rule.users.extend(asked.user.clone());
        // Patterns of the rules may match ancestors of the cgroup.
        let cgroup = asked.cgroup.as_deref().unwrap_or_default();
        let ends = cgroup.match_indices('/').skip(1).map(|(end, _)| end);
        let paths = ends
            .chain([cgroup.len()])
            .map(|end| cgroup[..end].to_owned());
        rule.cgroups.extend(paths.filter(|path| !path.is_empty()));
    }
    let mut owners = Owners::numbered(&named);
    for (name, uid) in &mut owners.users {
        if let Ok(Some(known)) = users::uid_of(name) {
            *uid = known;
        }
    }
    owners
}

/// The decision for one direction, or for both if they do not differ.
fn section(
    question: &Question<'_>,
    direction: Option<Direction>,
    answer: &Answer,
    out: &mut impl Write,
) -> io::Result<()> {
    let (config, ends) = (question.config, question.ends);
    let way = match direction {
        None => "accepted here or dialled from here",
        Some(Direction::Inbound) => "accepted here",
        Some(Direction::Outbound) => "dialled from here",
    };
    let user = question.user.map(|user| format!(", of user {user}"));
    let cgroup = question
        .cgroup
        .map(|cgroup| format!(", of cgroup {}", printable(cgroup)));
    let (user, cgroup) = (user.unwrap_or_default(), cgroup.unwrap_or_default());
    writeln!(
        out,
        "{} with {}, {way}{user}{cgroup}:",
        ends.local, ends.remote
    )?;
    let earlier = answer.decider.unwrap_or(config.rules.len());
    for (index, rule) in config.rules[..earlier].iter().enumerate() {
        if answer.perhaps.contains(&index) {
            writeln!(out, "  {}", rule_line(config, rule, "perhaps"))?;
        } else {
            writeln!(out, "  {}", no_line(question, rule, direction))?;
        }
    }
    let decision = match answer.decider.map(|index| &config.rules[index]) {
        Some(rule) => {
            writeln!(out, "  {}", rule_line(config, rule, "yes"))?;
            decision(config, rule)
        }
        None => "not tracked, because no rule matches".to_owned(),
    };
    match config.rules.len().saturating_sub(earlier + 1) {
        0 => {}
        1 => writeln!(out, "  1 later rule is not compared")?,
        later => writeln!(out, "  {later} later rules are not compared")?,
    }
    if answer.perhaps.is_empty() {
        return writeln!(out, "  decided: {decision}");
    }
    writeln!(
        out,
        "  undecided: give {}; if the owner is none of those above: {decision}",
        missing(question, answer)
    )
}

/// The options that would resolve an undecided question.
fn missing(question: &Question<'_>, answer: &Answer) -> String {
    let rules = || answer.perhaps.iter().map(|i| &question.config.rules[*i]);
    let user = question.user.is_none() && rules().any(|rule| !rule.users.is_empty());
    let cgroup = question.cgroup.is_none() && rules().any(|rule| !rule.cgroups.is_empty());
    match (user, cgroup) {
        (true, true) => "--user and --cgroup",
        (true, false) => "--user",
        _ => "--cgroup",
    }
    .to_owned()
}

fn no_line(question: &Question<'_>, rule: &Rule, direction: Option<Direction>) -> String {
    let refusals: Vec<String> = refusals(question, rule, direction)
        .into_iter()
        .flatten()
        .collect();
    format!("rule \"{}\": no: {}", rule.name, refusals.join("; "))
}

fn rule_line(config: &Config, rule: &Rule, word: &str) -> String {
    let mut which = direction_words(rule).to_owned();
    for condition in condition_words(rule, MAX_VALUES) {
        which = format!("{which}, {condition}");
    }
    let happens = action_words(config, rule);
    format!("rule \"{}\": {word}: {which}; they {happens}", rule.name)
}

fn decision(config: &Config, rule: &Rule) -> String {
    let (word, more) = match (config.effective_action(rule), rule.action) {
        (Action::Enforce, _) => ("enforced", ""),
        (Action::Observe, Action::Observe) => ("observed", ": recorded, not reset"),
        (Action::Observe, _) => (
            "observed",
            ": recorded, not reset, because the daemon's mode is \"observe\"",
        ),
        (Action::Exempt, _) => ("exempt", ": not tracked, never reset"),
    };
    format!("{word} by rule \"{}\"{more}", rule.name)
}

/// Describes further conditions of a connection, which do not depend on its endpoints.
fn describe_scope(config: &Config, out: &mut impl Write) -> io::Result<()> {
    if let Some(cgroup) = &config.cgroup {
        let cgroup = cgroup.display();
        writeln!(
            out,
            "\nOnly sockets of cgroup {cgroup} and those below it are tracked."
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

/// The mismatch, if any, of each condition with the connection: direction, local port, remote port, local
/// address, remote address, user, cgroup. An unknown property causes no mismatch.
fn refusals(
    question: &Question<'_>,
    rule: &Rule,
    direction: Option<Direction>,
) -> [Option<String>; 7] {
    let ends = question.ends;
    [
        direction.and_then(|direction| wrong_direction(rule, direction)),
        wrong_port("local", ends.local.port(), &rule.local_ports),
        wrong_port("remote", ends.remote.port(), &rule.remote_ports),
        wrong_address("local", ends.local.ip(), &rule.local),
        wrong_address("remote", ends.remote.ip(), &rule.remote),
        question
            .user
            .and_then(|user| wrong_user(&question.owners, rule, user)),
        question
            .cgroup
            .and_then(|cgroup| wrong_cgroup(rule, cgroup)),
    ]
}

fn wrong_user(owners: &Owners, rule: &Rule, user: &User) -> Option<String> {
    let wanted = word_list(&rule.users, MAX_VALUES)?;
    let theirs = |wanted: &User| owners.uid(wanted) == owners.uid(user);
    (!rule.users.iter().any(theirs)).then(|| format!("user {user} is not {wanted}"))
}

fn wrong_cgroup(rule: &Rule, cgroup: &str) -> Option<String> {
    let wanted = word_list(&rule.cgroups, MAX_VALUES)?;
    let within = rule.cgroups.iter().any(|above| is_below(cgroup, above));
    (!within).then(|| format!("cgroup {} is not {wanted}, nor below", printable(cgroup)))
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
