//! The random but known rules of a run. Pure.

use std::{fmt::Write as _, time::Duration};

use crate::random::Random;

/// The number of ports that the rules distinguish. Each port is a pair of listeners, one inside the cgroup
/// and one outside.
pub(super) const PORTS: usize = 12;

/// The longest limit that a run reaches.
pub(super) const LONGEST_LIMIT: Duration = Duration::from_secs(4);

/// A limit that no run reaches. A later policy may still end such sessions.
pub(super) const ENDLESS: Duration = Duration::from_secs(3_600);

/// The port whose connections have the rule [`FEW`] with a small `max_sessions`, in runs that test a full rule.
pub(super) const FEW_PORT: usize = 2;

/// The name of the rule with a small `max_sessions`, and this maximum.
pub(super) const FEW: &str = "few";
pub(super) const MOST: usize = 8;

/// The capacity of the session table in runs that test a full table.
const SMALL_TABLE: usize = 32;

/// The number of ports in such a run, and the maximum number of rules. So few rules each have a share of the table.
pub(super) const FEW_PORTS: usize = 3;
const FEW_RULES: usize = 4;

const _: () = assert!(SMALL_TABLE / 8 >= FEW_RULES, "a share is at least one slot");

/// What has fewer slots than sessions in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Scarce {
    #[default]
    Nothing,
    /// The rule [`FEW`], by its `max_sessions`.
    Rule,
    /// The session table, by `daemon.max_sessions`.
    Table,
}

impl Scarce {
    pub(super) const fn of(seed: u64) -> Self {
        match seed % 4 {
            0 => Self::Table,
            2 => Self::Nothing,
            _ => Self::Rule,
        }
    }

    /// The `cause` of `session_enforcer_sessions_untracked_total`.
    pub(super) const fn cause(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Rule => Some("rule_full"),
            Self::Table => Some("map_full"),
        }
    }
}

/// One end of a connection. An end inside the cgroup is a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum End {
    /// The end that connected.
    Client,
    /// The end that accepted.
    Server,
}

impl End {
    pub(super) const BOTH: [Self; 2] = [Self::Client, Self::Server];

    pub(super) const fn peer(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Enforce,
    Observe,
    Exempt,
}

/// The direction whose payload the idle clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    Any,
    Received,
    Sent,
}

/// A rule with its documented keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) action: Action,
    pub(super) idle: Option<Duration>,
    pub(super) lifetime: Option<Duration>,
    /// The lifetime is shortened by up to this percentage.
    pub(super) jitter_percent: u32,
    pub(super) response: Option<Duration>,
    pub(super) activity: Activity,
    pub(super) min_payload: u64,
    /// `max_sessions`: the maximum number of sessions that the rule tracks at once. `None` if unlimited.
    pub(super) most: Option<usize>,
}

impl Rule {
    /// A rule without limits.
    pub(super) fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            action: Action::Enforce,
            idle: None,
            lifetime: None,
            jitter_percent: 0,
            response: None,
            activity: Activity::Any,
            min_payload: 1,
            most: None,
        }
    }

    /// A random rule of a port for one end. `None` if no rule matches it.
    fn random(random: &mut Random, port: usize, end: End) -> Option<Self> {
        if random.once_in(10) {
            return None;
        }
        // Two names per port and end make sessions change their rule from time to time.
        let letter = random.one_of(&["a", "b"]);
        let mut rule = Self::named(&format!("p{port}-{}-{letter}", end.direction()));
        if random.once_in(12) {
            rule.action = Action::Exempt;
            return Some(rule);
        }
        if random.once_in(7) {
            rule.action = Action::Observe;
        }
        rule.set_limits(random, end);
        Some(rule)
    }

    fn set_limits(&mut self, random: &mut Random, end: End) {
        let ms = |ms: u64| Some(Duration::from_millis(ms));
        if random.once_in(3) {
            self.lifetime = random.one_of(&[ms(2_000), ms(3_000), ms(4_000)]);
            self.jitter_percent = random.one_of(&[0, 20]);
        }
        if end == End::Server && random.once_in(4) {
            self.response = random.one_of(&[ms(1_000), ms(2_000), ms(3_000)]);
        }
        let limited = self.lifetime.or(self.response).is_some();
        if !limited || !random.once_in(4) {
            let longer = [ms(1_500), ms(2_000), ms(3_000), Some(ENDLESS)];
            self.idle = match random.once_in(3) {
                true => ms(1_000),
                false => random.one_of(&longer),
            };
            let kinds = [Activity::Any, Activity::Received, Activity::Sent];
            self.activity = match random.once_in(2) {
                true => Activity::Any,
                false => random.one_of(&kinds),
            };
        }
        if self.idle.or(self.response).is_some() && random.once_in(4) {
            self.min_payload = 100;
        }
    }

    /// Whether a packet with this number of payload bytes counts.
    pub(super) const fn counts(&self, bytes: u64) -> bool {
        bytes >= self.min_payload
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let limits = [
            ("idle_timeout", self.idle),
            ("max_lifetime", self.lifetime),
            ("response_timeout", self.response),
        ];
        for (key, limit) in limits {
            if let Some(limit) = limit {
                writeln!(text, "{key} = \"{}ms\"", limit.as_millis())?;
            }
        }
        if self.jitter_percent > 0 {
            writeln!(text, "lifetime_jitter = \"{}%\"", self.jitter_percent)?;
        }
        match self.action {
            Action::Enforce => {}
            Action::Observe => writeln!(text, "action = \"observe\"")?,
            Action::Exempt => writeln!(text, "action = \"exempt\"")?,
        }
        match self.activity {
            Activity::Any => {}
            Activity::Received => writeln!(text, "activity = \"received\"")?,
            Activity::Sent => writeln!(text, "activity = \"sent\"")?,
        }
        if self.min_payload > 1 {
            writeln!(text, "min_payload = {}", self.min_payload)?;
        }
        if let Some(most) = self.most {
            writeln!(text, "max_sessions = {most}")?;
        }
        Ok(())
    }
}

impl End {
    const fn direction(self) -> &'static str {
        match self {
            Self::Client => "outbound",
            Self::Server => "inbound",
        }
    }

    /// The configuration key of the port, as seen from this end.
    const fn ports_key(self) -> &'static str {
        match self {
            Self::Client => "remote_ports",
            Self::Server => "local_ports",
        }
    }
}

/// One policy: a rule or none for each end of the connections to each port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Book {
    pub(super) rules: Vec<[Option<Rule>; 2]>,
    pub(super) scarce: Scarce,
    /// Whether the daemon resets a session for which there is no slot (`on_full = "reset"`).
    pub(super) resets_untracked: bool,
}

impl Book {
    pub(super) fn random(random: &mut Random) -> Self {
        let both = |port| End::BOTH.map(|end| Rule::random(random, port, end));
        let book = Self {
            rules: (0..PORTS).map(both).collect(),
            ..Self::default()
        };
        book.with_constant_rules()
    }

    /// Returns this policy with few slots.
    pub(super) fn with(mut self, scarce: Scarce) -> Self {
        self.scarce = scarce;
        self.with_constant_rules()
    }

    /// Returns this policy with a slot for every session.
    pub(super) fn with_ample_slots(&self) -> Self {
        Self {
            rules: self.rules.clone(),
            ..Self::default()
        }
    }

    /// Adds the rules that every policy of the run has, so that each run tests them.
    fn with_constant_rules(mut self) -> Self {
        let idle = Some(Duration::from_secs(1));
        let constant = [("short", Action::Enforce), ("watched", Action::Observe)];
        for (rules, (name, action)) in self.rules.iter_mut().zip(constant) {
            rules[End::Server as usize] = Some(Rule {
                action,
                idle,
                ..Rule::named(name)
            });
        }
        match self.scarce {
            Scarce::Nothing => {}
            Scarce::Rule => {
                self.rules[FEW_PORT][End::Server as usize] = Some(Rule {
                    idle: Some(Duration::from_secs(2)),
                    most: Some(MOST),
                    ..Rule::named(FEW)
                });
            }
            Scarce::Table => {
                for port in [0, 2] {
                    self.rules[port][End::Client as usize] = None;
                }
                self.rules[FEW_PORTS..].fill([None, None]);
            }
        }
        self
    }

    /// A copy with about a third of the rules replaced.
    pub(super) fn changed(&self, random: &mut Random) -> Self {
        let mut book = self.clone();
        book.resets_untracked = self.scarce != Scarce::Nothing && !self.resets_untracked;
        for (port, rules) in book.rules.iter_mut().enumerate() {
            for (rule, end) in rules.iter_mut().zip(End::BOTH) {
                if random.once_in(3) {
                    *rule = Rule::random(random, port, end);
                }
            }
        }
        book.with_constant_rules()
    }

    /// The rule that tracks the sessions at this end of a port's connections. `None` if they are not tracked.
    pub(super) fn rule(&self, port: usize, end: End) -> Option<&Rule> {
        let rule = self.rules.get(port)?[end as usize].as_ref();
        rule.filter(|rule| rule.action != Action::Exempt)
    }

    /// Whether there may be no slot for a session that a rule tracks.
    pub(super) fn may_refuse(&self, port: usize, end: End) -> bool {
        let is_small = self.scarce == Scarce::Table;
        let rule = self.rule(port, end);
        rule.is_some_and(|rule| is_small || rule.most.is_some())
    }

    /// The maximum number of sessions that the daemon lists of what is scarce. `None` if nothing is.
    pub(super) const fn slots(&self) -> Option<usize> {
        match self.scarce {
            Scarce::Nothing => None,
            Scarce::Rule => Some(MOST),
            Scarce::Table => Some(SMALL_TABLE),
        }
    }

    /// The number of slots that a rule can use if it has more sessions than its share: the other rules' shares of the
    /// small table are reserved for them.
    pub(super) fn common_slots(&self) -> Option<usize> {
        let slots = self.slots()?;
        let rules = self.rules.iter().flatten().flatten();
        let rules = rules.filter(|rule| rule.action != Action::Exempt).count();
        let is_small = self.scarce == Scarce::Table;
        let share = (slots / 8).checked_div(rules).filter(|_| is_small);
        let reserve = share.map_or(0, |share| share * (rules - 1));
        Some(slots - reserve)
    }

    /// The configuration. `numbers` returns the port numbers of a port.
    pub(super) fn toml(&self, numbers: impl Fn(usize) -> [u16; 2]) -> String {
        let mut text = String::new();
        if self.scarce != Scarce::Nothing {
            let on_full = if self.resets_untracked {
                "reset"
            } else {
                "leave"
            };
            // The daemon adopts an untracked session at a comparison. While nothing makes room they come at growing
            // intervals, so the longest is short.
            text = format!("[daemon]\nreconcile_interval = \"2s\"\non_full = \"{on_full}\"\n");
        }
        if self.scarce == Scarce::Table {
            let _ = writeln!(text, "max_sessions = {SMALL_TABLE}");
        }
        for (port, rules) in self.rules.iter().enumerate() {
            for (rule, end) in rules.iter().zip(End::BOTH) {
                let Some(rule) = rule else { continue };
                let (name, direction, key) = (&rule.name, end.direction(), end.ports_key());
                let numbers = numbers(port);
                // Writing to a string never fails.
                let _ = writeln!(
                    text,
                    "[[rule]]\nname = \"{name}\"\ndirection = \"{direction}\"\n{key} = {numbers:?}"
                );
                let _ = rule.write(&mut text);
            }
        }
        text
    }
}
