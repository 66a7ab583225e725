//! The policy in force: the rules in their places, and the match table. Pure.

use std::time::Duration;

use session_enforcer_common::{
    Facts, MAX_RULES, MatchEntry, Policy, RULE_EXEMPT, Reason, Session, Verdict, matches, verdict,
};
use thiserror::Error;

use crate::config::{Config, Mode, Rule};

/// More names of rules than there are places for them.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "more than {MAX_RULES} names of rules since the daemon started, each of which keeps its \
     counters; restart the daemon"
)]
pub struct TooManyRules;

/// A rule with what is worked out from it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ActiveRule {
    pub(super) name: String,
    pub(super) mode: Mode,
    pub(super) policy: Policy,
}

impl ActiveRule {
    fn new(config: &Config, rule: &Rule, lag_ns: u64, generation: u32) -> Self {
        Self {
            name: rule.name.clone(),
            mode: config.mode_of(rule),
            policy: Policy {
                generation,
                ..rule.policy(lag_ns)
            },
        }
    }

    /// The limit of this session that the reason speaks of; none for a change of the policy.
    pub(super) fn limit(&self, reason: Reason, session: &Session) -> Option<Duration> {
        let limit_ns = match reason {
            Reason::IdleTimeout => self.policy.idle_timeout_ns,
            Reason::MaxLifetime => self.policy.lifetime_ns(session),
            Reason::ResponseTimeout => self.policy.response_timeout_ns,
            Reason::Policy => return None,
        };
        Some(Duration::from_nanos(limit_ns))
    }
}

/// One policy. A rule keeps its place, the number by which kernel, sessions and counters know it,
/// under its name: from one policy to the next it is the same rule, whatever changes in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleBook {
    /// By place. Rules that are no more keep theirs, for their counters.
    pub(super) rules: Vec<ActiveRule>,
    /// The match table.
    pub(super) entries: Vec<MatchEntry>,
    /// Counts the policies.
    pub(super) generation: u32,
}

impl RuleBook {
    /// No policy yet; the first one follows this generation.
    pub(super) fn after(generation: u32) -> Self {
        Self {
            generation,
            ..Self::default()
        }
    }

    /// The policy that follows this one.
    ///
    /// # Errors
    ///
    /// Where there are more rules, with those that are no more, than places.
    pub(super) fn next(&self, config: &Config, lag_ns: u64) -> Result<Self, TooManyRules> {
        let generation = self.generation.wrapping_add(1).max(1);
        let mut rules = self.rules.clone();
        for rule in &mut rules {
            rule.policy.generation = generation;
        }
        let mut places = Vec::new();
        for rule in &config.rules {
            let active = ActiveRule::new(config, rule, lag_ns, generation);
            let place = rules.iter().position(|known| known.name == rule.name);
            let place = place.unwrap_or(rules.len());
            match rules.get_mut(place) {
                Some(known) => *known = active,
                None => rules.push(active),
            }
            places.push(u16::try_from(place).map_err(|_| TooManyRules)?);
        }
        if rules.len() > MAX_RULES as usize {
            return Err(TooManyRules);
        }
        let in_place = |entry: MatchEntry| MatchEntry {
            rule: places
                .get(usize::from(entry.rule))
                .copied()
                .unwrap_or(RULE_EXEMPT),
            ..entry
        };
        Ok(Self {
            rules,
            entries: config.match_entries().into_iter().map(in_place).collect(),
            generation,
        })
    }

    /// The rule of a session; none where no rule matches it any more, or an exempting one does.
    pub(super) fn rule_of(&self, session: &Session) -> Option<u16> {
        if session.generation == self.generation {
            return Some(session.rule);
        }
        let facts = Facts::of(session);
        let entry = self.entries.iter().find(|entry| matches(&facts, entry))?;
        (entry.rule != RULE_EXEMPT).then_some(entry.rule)
    }

    /// Whether the session is within its limits under this policy.
    pub(super) fn lets_live(&self, session: &Session, now_ns: u64) -> bool {
        let rule = self.rule_of(session).and_then(|rule| self.rule(rule));
        rule.is_none_or(|rule| {
            matches!(
                verdict(session, &rule.policy, now_ns),
                Verdict::Alive { .. }
            )
        })
    }

    /// The rule in a place.
    pub(super) fn rule(&self, place: u16) -> Option<&ActiveRule> {
        self.rules.get(usize::from(place))
    }

    /// The limits by place.
    pub(super) fn policies(&self) -> Vec<Policy> {
        self.rules.iter().map(|rule| rule.policy).collect()
    }

    /// The names and modes by place.
    pub(super) fn names(&self) -> Vec<(String, Mode)> {
        let name = |rule: &ActiveRule| (rule.name.clone(), rule.mode);
        self.rules.iter().map(name).collect()
    }
}

#[cfg(test)]
mod tests {
    use session_enforcer_common::{Address, Direction};

    use super::*;

    fn config(rules: &[(&str, u16, &str)]) -> Config {
        let rule = |(name, port, limits): &(&str, u16, &str)| {
            format!("[[rule]]\nname = '{name}'\nlocal_ports = [{port}]\n{limits}\n")
        };
        let text: String = rules.iter().map(rule).collect();
        Config::parse("x.toml", &text).unwrap()
    }

    fn session(port: u16, rule: u16, generation: u32) -> Session {
        Session {
            last_received_ns: 0,
            last_sent_ns: 0,
            answered_ns: 0,
            bytes_received: 0,
            bytes_sent: 0,
            established_ns: 0,
            netns_cookie: 1,
            local: Address::from_ipv4(0),
            remote: Address::from_ipv4(0),
            local_port: port,
            remote_port: 1,
            ifindex: 0,
            generation,
            rule,
            direction: Direction::Inbound as u8,
            flags: 0,
            jitter_seed: 0,
            owes_answer: 0,
            reserved: [0; 3],
        }
    }

    const IDLE: &str = "idle_timeout = '5s'";

    #[test]
    fn a_rule_keeps_its_place_under_its_name() {
        let first = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let first = RuleBook::default().next(&first, 4).unwrap();
        let second = config(&[("c", 3, IDLE), ("b", 2, "idle_timeout = '7s'")]);
        let second = first.next(&second, 4).unwrap();
        let names: Vec<String> = second.names().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let places: Vec<u16> = second.entries.iter().map(|entry| entry.rule).collect();
        assert_eq!(places, [2, 1]);
        assert_eq!(
            second.rule(1).unwrap().policy.idle_timeout_ns,
            7_000_000_000
        );
        assert!(
            second
                .policies()
                .iter()
                .all(|policy| policy.generation == 2)
        );
    }

    #[test]
    fn a_session_of_an_earlier_policy_is_matched_again() {
        let first = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let first = RuleBook::default().next(&first, 4).unwrap();
        let second = config(&[("all", 1, IDLE), ("b", 2, "action = 'exempt'")]);
        let second = first.next(&second, 4).unwrap();
        assert_eq!(first.rule_of(&session(1, 0, 1)), Some(0));
        assert_eq!(second.rule_of(&session(1, 0, 1)), Some(2));
        assert_eq!(second.rule_of(&session(2, 1, 1)), None);
        assert_eq!(second.rule_of(&session(3, 0, 1)), None);
        // Of the policy in force the kernel's word stands.
        assert_eq!(second.rule_of(&session(1, 1, 2)), Some(1));
    }

    #[test]
    fn the_places_of_an_earlier_daemon_s_rules_mean_nothing() {
        let rules = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let book = RuleBook::after(7).next(&rules, 4).unwrap();
        assert_eq!(book.generation, 8);
        for (place, generation) in [(0, 7), (999, 7), (0, 3)] {
            assert_eq!(book.rule_of(&session(2, place, generation)), Some(1));
        }
        assert_eq!(book.rule_of(&session(2, 0, 8)), Some(0));
    }

    #[test]
    fn names_that_are_no_more_take_places_until_there_are_none() {
        let mut book = RuleBook::default();
        for n in 0..MAX_RULES {
            book = book
                .next(&config(&[(&format!("r{n}"), 1, IDLE)]), 4)
                .unwrap();
        }
        assert_eq!(
            book.next(&config(&[("more", 1, IDLE)]), 4),
            Err(TooManyRules)
        );
        assert!(book.next(&config(&[("r7", 1, IDLE)]), 4).is_ok());
    }
}
