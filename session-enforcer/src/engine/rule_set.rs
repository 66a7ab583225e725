//! The active policy: the rules by their ids, and the match table. Pure.

use session_enforcer_common::{
    Ancestors, Expiry, Facts, Limits, MAX_MATCH_ENTRIES, MAX_RULES, MatchEntry, RULE_EXEMPT,
    Session, expiry, first_possible,
};
use thiserror::Error;

use crate::config::{Config, Mode, Owners, Rule};

/// There are more rule names than rule ids.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "more than {MAX_RULES} names of rules since the daemon started, each of which keeps its \
     counters; restart the daemon"
)]
pub struct TooManyRules;

/// A rule with its computed limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ActiveRule {
    pub(super) name: String,
    pub(super) mode: Mode,
    pub(super) limits: Limits,
}

impl ActiveRule {
    fn new(config: &Config, rule: &Rule, generation: u32) -> Self {
        let mode = config.mode_of(rule);
        Self {
            name: rule.name.clone(),
            mode,
            limits: Limits {
                generation,
                gate: u8::from(mode == Mode::Enforce),
                ..rule.limits()
            },
        }
    }
}

/// One policy. A rule keeps its id, by which kernel, sessions and counters identify it, as long as its name stays the
/// same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    /// By rule id. Removed rules keep their ids for their counters.
    pub(super) rules: Vec<ActiveRule>,
    /// The match table.
    pub(super) entries: Vec<MatchEntry>,
    /// Whether any rule names owners, including owners that do not exist.
    pub(super) asks_owner: bool,
    /// The ids of the configured rules, in the order of the configuration.
    rule_ids: Vec<u16>,
    /// By rule id: its place in the order of names.
    pub(super) name_ranks: Vec<u16>,
    /// Number of the policy.
    pub(super) generation: u32,
    /// Key of the hash for the jitter.
    jitter_key: u64,
}

fn name_ranks(rules: &[ActiveRule]) -> Vec<u16> {
    let mut by_name: Vec<usize> = (0..rules.len()).collect();
    by_name.sort_by_key(|rule_id| &rules[*rule_id].name);
    let mut ranks = vec![0; rules.len()];
    for (rank, rule_id) in (0..).zip(by_name) {
        ranks[rule_id] = rank;
    }
    ranks
}

impl RuleSet {
    /// An empty policy; the first real policy gets the generation after this one.
    pub(super) fn after(generation: u32, jitter_key: u64) -> Self {
        Self {
            generation,
            jitter_key,
            ..Self::default()
        }
    }

    /// The policy that follows this one.
    ///
    /// # Errors
    ///
    /// Fails if there are more rule names, including those of removed rules, than ids.
    pub fn next(&self, config: &Config, owners: &Owners) -> Result<Self, TooManyRules> {
        let generation = self.generation.wrapping_add(1).max(1);
        let mut rules = self.rules.clone();
        for rule in &mut rules {
            rule.limits.generation = generation;
        }
        let mut rule_ids = Vec::new();
        for rule in &config.rules {
            let mut active = ActiveRule::new(config, rule, generation);
            active.limits.jitter_key = self.jitter_key;
            let rule_id = rules.iter().position(|known| known.name == rule.name);
            let rule_id = rule_id.unwrap_or(rules.len());
            match rules.get_mut(rule_id) {
                Some(known) => *known = active,
                None => rules.push(active),
            }
            rule_ids.push(u16::try_from(rule_id).map_err(|_| TooManyRules)?);
        }
        if rules.len() > MAX_RULES as usize {
            return Err(TooManyRules);
        }
        let mut next = Self {
            name_ranks: name_ranks(&rules),
            rules,
            entries: Vec::new(),
            asks_owner: config.asks_owner(),
            rule_ids,
            generation,
            jitter_key: self.jitter_key,
        };
        next.set_owners(config, owners);
        Ok(next)
    }

    /// Rebuilds the match table for the same rules with new owner ids.
    pub(super) fn set_owners(&mut self, config: &Config, owners: &Owners) {
        let with_rule_id = |entry: MatchEntry| MatchEntry {
            rule: self
                .rule_ids
                .get(usize::from(entry.rule))
                .copied()
                .unwrap_or(RULE_EXEMPT),
            ..entry
        };
        let mut entries = config.match_entries(owners);
        if entries.len() > MAX_MATCH_ENTRIES as usize {
            // The configuration was accepted only because it fits without former ids.
            entries = config.match_entries(&owners.without_former());
        }
        self.entries = entries.into_iter().map(with_rule_id).collect();
    }

    /// The rule of a session; `None` if no rule, or an exempting entry, matches it. `ancestors` looks up the ancestors
    /// of a cgroup. If they are not known any more, the earlier decision stays.
    pub fn rule_of(
        &self,
        session: &Session,
        ancestors: impl Fn(u64) -> Option<Ancestors>,
    ) -> Option<u16> {
        // A corrupt record may have an invalid rule id; it is matched again.
        if session.generation == self.generation && self.rule(session.rule).is_some() {
            return Some(session.rule);
        }
        let mut facts = Facts::of(session);
        let mut above = Ancestors::UNKNOWN;
        if self.asks_owner && session.owner.is_known() {
            match ancestors(session.owner.cgroup_id) {
                Some(known) => {
                    facts.known |= Facts::CGROUP;
                    above = known;
                }
                None if session.generation != 0 && self.rule_ids.contains(&session.rule) => {
                    return Some(session.rule);
                }
                None => {}
            }
        }
        let entry = first_possible(&self.entries, &facts, &above)?;
        (entry.rule != RULE_EXEMPT).then_some(entry.rule)
    }

    /// Whether the session's owner must be resolved to find its rule. This is always the case for a session that is
    /// still undecided, even if no rule names owners any more.
    pub(super) fn needs_owner_of(&self, session: &Session) -> bool {
        let is_unknown = self.asks_owner && !session.owner.is_known();
        session.generation == 0 || is_unknown && session.generation != self.generation
    }

    /// Whether the session is within its limits under this policy.
    pub fn lets_live(
        &self,
        session: &Session,
        now_ns: u64,
        ancestors: impl Fn(u64) -> Option<Ancestors>,
    ) -> bool {
        let rule = self.rule_of(session, ancestors);
        let rule = rule.and_then(|rule| self.rule(rule));
        rule.is_none_or(|rule| {
            matches!(expiry(session, &rule.limits, now_ns), Expiry::Alive { .. })
        })
    }

    /// Whether the session's rule only observes under this policy.
    pub(super) fn only_observes(
        &self,
        session: &Session,
        ancestors: impl Fn(u64) -> Option<Ancestors>,
    ) -> bool {
        let rule = self.rule_of(session, ancestors);
        rule.and_then(|rule| self.rule(rule))
            .is_some_and(|rule| rule.mode == Mode::Observe)
    }

    /// The rule with this id.
    pub(super) fn rule(&self, rule_id: u16) -> Option<&ActiveRule> {
        self.rules.get(usize::from(rule_id))
    }

    /// The limits of all rules, by rule id.
    pub(super) fn limits_of_rules(&self) -> Vec<Limits> {
        self.rules.iter().map(|rule| rule.limits).collect()
    }

    /// The names and modes of all rules, by rule id.
    pub(super) fn names(&self) -> Vec<(String, Mode)> {
        let name = |rule: &ActiveRule| (rule.name.clone(), rule.mode);
        self.rules.iter().map(name).collect()
    }
}

#[cfg(test)]
mod tests {
    use session_enforcer_common::Owner;

    use super::*;
    use crate::engine::fixtures;

    fn config(rules: &[(&str, u16, &str)]) -> Config {
        let rule = |(name, port, limits): &(&str, u16, &str)| {
            format!("[[rule]]\nname = '{name}'\nlocal_ports = [{port}]\n{limits}\n")
        };
        let text: String = rules.iter().map(rule).collect();
        Config::parse("x.toml", &text).unwrap()
    }

    fn session(port: u16, rule: u16, generation: u32) -> Session {
        Session {
            local_port: port,
            rule,
            generation,
            ..fixtures::session()
        }
    }

    fn no_ancestors(_: u64) -> Option<Ancestors> {
        Some(Ancestors::UNKNOWN)
    }

    fn next(book: &RuleSet, config: &Config) -> Result<RuleSet, TooManyRules> {
        book.next(config, &Owners::numbered(&config.rules))
    }

    const IDLE: &str = "idle_timeout = '5s'";

    #[test]
    fn a_record_with_a_rule_that_there_is_none_of_is_matched_again() {
        let limits = "idle_timeout = '5s'";
        let rules = config(&[("a", 22, limits), ("b", 23, limits)]);
        let book = next(&RuleSet::default(), &rules).unwrap();
        let rule_of = |session| book.rule_of(&session, no_ancestors);
        assert_eq!(rule_of(session(23, 1, book.generation)), Some(1));
        assert_eq!(rule_of(session(23, 2, book.generation)), Some(1));
        assert_eq!(rule_of(session(24, 2, book.generation)), None);
    }

    #[test]
    fn without_an_owner_the_first_rule_that_could_be_meant_limits_and_none_exempts() {
        let rule = |name, conditions| format!("[[rule]]\nname = '{name}'\n{conditions}\n");
        let text = [
            rule("free", "users = [1000]\naction = 'exempt'"),
            rule(
                "ours",
                "users = [1001]\nlocal_ports = [22]\nidle_timeout = '5s'",
            ),
            rule("rest", "local_ports = [22, 23]\nidle_timeout = '9s'"),
            rule("free-port", "local_ports = [24]\naction = 'exempt'"),
        ];
        let rules = Config::parse("x.toml", &text.concat()).unwrap();
        let book = next(&RuleSet::default(), &rules).unwrap();
        let rule_of = |port, owner| {
            let session = Session {
                owner,
                ..session(port, 0, 0)
            };
            book.rule_of(&session, no_ancestors)
        };
        let of = |uid| Owner {
            uid,
            cgroup_id: 7,
            ..Owner::UNKNOWN
        };
        let rule_ids =
            |port| [Owner::UNKNOWN, of(1000), of(1002)].map(|owner| rule_of(port, owner));
        let rule_id = |name: &str| {
            let names = book.names();
            let at = names.iter().position(|(known, _)| known == name);
            at.and_then(|at| u16::try_from(at).ok())
        };
        assert_eq!(rule_ids(22), [rule_id("ours"), None, rule_id("rest")]);
        assert_eq!(rule_ids(23), [rule_id("rest"), None, rule_id("rest")]);
        assert_eq!(rule_ids(24), [None; 3]);
    }

    #[test]
    fn a_session_keeps_its_rule_if_its_cgroup_is_forgotten() {
        let rules = |name| {
            let text = format!(
                "[[rule]]\nname = 'free'\ncgroups = ['/b']\naction = 'exempt'\n[[rule]]\nname = \
                 '{name}'\ncgroups = ['/a']\nidle_timeout = '5s'\n"
            );
            Config::parse("x.toml", &text).unwrap()
        };
        let first = next(&RuleSet::default(), &rules("one")).unwrap();
        let rule_id = first.rule_ids[1];
        let owner = Owner {
            cgroup_id: 4711,
            ..Owner::UNKNOWN
        };
        let of = |generation| Session {
            owner,
            ..session(22, rule_id, generation)
        };
        let nobody = |_| None;
        let same = next(&first, &rules("one")).unwrap();
        assert_eq!(same.rule_of(&of(1), nobody), Some(rule_id));
        assert_eq!(same.rule_of(&of(1), no_ancestors), None);
        // Without an earlier decision, or if its rule was removed: the first rule that could match.
        assert_eq!(same.rule_of(&of(0), nobody), Some(rule_id));
        let other = next(&first, &rules("other")).unwrap();
        assert_eq!(other.rule_of(&of(1), nobody), Some(other.rule_ids[1]));
    }

    #[test]
    fn a_rule_keeps_its_id_under_its_name() {
        let first = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let first = next(&RuleSet::default(), &first).unwrap();
        let second = config(&[("c", 3, IDLE), ("b", 2, "idle_timeout = '7s'")]);
        let second = next(&first, &second).unwrap();
        let names: Vec<String> = second.names().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let rule_ids: Vec<u16> = second.entries.iter().map(|entry| entry.rule).collect();
        assert_eq!(rule_ids, [2, 1]);
        assert_eq!(
            second.rule(1).unwrap().limits.idle_timeout_ns,
            7_000_000_000
        );
        assert!(
            second
                .limits_of_rules()
                .iter()
                .all(|limits| limits.generation == 2)
        );
    }

    #[test]
    fn a_session_of_an_earlier_policy_is_matched_again() {
        let first = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let first = next(&RuleSet::default(), &first).unwrap();
        let second = config(&[("all", 1, IDLE), ("b", 2, "action = 'exempt'")]);
        let second = next(&first, &second).unwrap();
        assert_eq!(first.rule_of(&session(1, 0, 1), no_ancestors), Some(0));
        assert_eq!(second.rule_of(&session(1, 0, 1), no_ancestors), Some(2));
        assert_eq!(second.rule_of(&session(2, 1, 1), no_ancestors), None);
        assert_eq!(second.rule_of(&session(3, 0, 1), no_ancestors), None);
        // A rule that the kernel chose under the active policy is kept.
        assert_eq!(second.rule_of(&session(1, 1, 2), no_ancestors), Some(1));
    }

    #[test]
    fn the_gate_stands_where_a_rule_enforces_and_falls_with_the_mode() {
        let gates = |text: &str| {
            let book = next(&RuleSet::default(), &Config::parse("x.toml", text).unwrap());
            let limits_of_rules = book.unwrap().limits_of_rules();
            limits_of_rules
                .iter()
                .map(|limits| limits.gate)
                .collect::<Vec<_>>()
        };
        let rules = "[[rule]]\nname = 'a'\nlocal_ports = [1]\nidle_timeout = '5s'\n\
                     [[rule]]\nname = 'b'\nidle_timeout = '5s'\naction = 'observe'\n";
        assert_eq!(gates(rules), [1, 0]);
        assert_eq!(
            gates(&format!("[daemon]\nmode = 'observe'\n{rules}")),
            [0, 0]
        );
    }

    #[test]
    fn former_cgroups_have_no_room_where_the_table_is_full_without_them() {
        let ports: Vec<String> = (1..=3_000).map(|n| (2 * n).to_string()).collect();
        let text = format!(
            "[[rule]]\nname = 'a'\ncgroups = ['/a']\nlocal_ports = [{}]\n{IDLE}\n",
            ports.join(",")
        );
        let config = Config::parse("x.toml", &text).unwrap();
        let count = |ids: Vec<u64>| {
            let owners = Owners {
                cgroups: [("/a".to_owned(), ids)].into(),
                ..Owners::default()
            };
            let book = RuleSet::default().next(&config, &owners).unwrap();
            let last = book.entries.last().unwrap().cgroup_id;
            (book.entries.len(), last)
        };
        assert_eq!(count(vec![5]), (3_000, 5));
        assert_eq!(count(vec![5, 6]), (3_000, 6));
    }

    #[test]
    fn the_rule_ids_of_an_earlier_daemon_s_rules_mean_nothing() {
        let rules = config(&[("a", 1, IDLE), ("b", 2, IDLE)]);
        let book = next(&RuleSet::after(7, 3), &rules).unwrap();
        assert!(
            book.limits_of_rules()
                .iter()
                .all(|limits| limits.jitter_key == 3)
        );
        assert_eq!(book.generation, 8);
        for (rule_id, generation) in [(0, 7), (999, 7), (0, 3)] {
            assert_eq!(
                book.rule_of(&session(2, rule_id, generation), no_ancestors),
                Some(1)
            );
        }
        assert_eq!(book.rule_of(&session(2, 0, 8), no_ancestors), Some(0));
    }

    #[test]
    fn names_that_are_no_more_take_rule_ids_until_there_are_none() {
        let mut book = RuleSet::default();
        for n in 0..MAX_RULES {
            book = next(&book, &config(&[(&format!("r{n}"), 1, IDLE)])).unwrap();
        }
        assert_eq!(
            next(&book, &config(&[("more", 1, IDLE)])),
            Err(TooManyRules)
        );
        assert!(next(&book, &config(&[("r7", 1, IDLE)])).is_ok());
    }
}
