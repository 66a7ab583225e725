//! Reads one rule from its table of the document.

use std::collections::HashMap;
use std::time::Duration;

use ipnet::IpNet;
use session_enforcer_common::{Activity, Direction, MAX_RULE_NAME, MAX_RULES, PortRange};

use super::document::{Field, Keys, Section};
use super::error::ALLOWED_RULES;
use super::owners::{ALLOWED_CGROUP_PATH, ALLOWED_USER, parse_rule_cgroup, parse_user, uid};
use super::value::{
    ALLOWED_PORT, ALLOWED_PREFIX, ALLOWED_TIME, NO_LIMIT, parse_ports, parse_prefix, parse_time,
};
use super::{
    Action, ConfigError, DEFAULT_MIN_ANSWER, DEFAULT_MIN_PAYLOAD, Location,
    MAX_LIFETIME_JITTER_PERCENT, MAX_MAX_SESSIONS, MAX_MIN_ANSWER, MAX_MIN_PAYLOAD, MIN_LIMIT,
    Problem, Rule, User, entries,
};

const ALLOWED_NAME: &str = "1 to 64 characters of a-z, 0-9, _ and -";
const ALLOWED_DIRECTION: &str = "\"inbound\", \"outbound\" or \"any\"";
const ALLOWED_PORTS: &str = "a list such as [5432, \"6000-6010\"]";
const ALLOWED_PREFIXES: &str = "a list such as [\"10.0.0.0/8\", \"2001:db8::/32\"]";
const ALLOWED_CGROUPS: &str = "a list such as [\"/system.slice/postgresql.service\"]";
const ALLOWED_USERS: &str = "a list such as [\"postgres\", 1000]";
const ALLOWED_ACTIVITY: &str = "\"any\", \"received\" or \"sent\"";
const ALLOWED_MIN_PAYLOAD: &str = "a number of bytes from 1 to 1400";
const ALLOWED_RULE_SESSIONS: &str = "a number from 1 to 16777216, or 0 for no limit";
const ALLOWED_MIN_ANSWER: &str = "a number of bytes from 1 to 1048576";
const ALLOWED_JITTER: &str = "a share such as \"10%\", from \"0%\" to \"90%\"";
const ALLOWED_ACTION: &str = "\"enforce\", \"observe\" or \"exempt\"";

/// The elements of the list of rules.
pub(super) fn sources<'a>(list: &Field<'a>) -> Result<Vec<Field<'a>>, ConfigError> {
    let elements = list.elements(ALLOWED_RULES)?;
    let found = elements.len();
    if found == 0 {
        return Err(list.error(Problem::NoRule));
    }
    match elements.get(MAX_RULES as usize) {
        Some(first_too_many) => Err(first_too_many.error(Problem::ManyRules { found })),
        None => Ok(elements),
    }
}

/// Reads the rules with their tables. If none has an error, both lists have the same length.
pub(super) fn read_all<'a>(
    elements: &[Field<'a>],
    keys: &Keys,
    others: &'static [Keys],
) -> (Vec<Rule>, Vec<Section<'a>>) {
    let mut lines = HashMap::new();
    let mut read_one = |(number, element): (usize, &Field<'a>)| {
        let document = element.document;
        let before = document.error_count();
        let numbered = element.section(format!("rule {number}: "), ALLOWED_RULES);
        let numbered = document.keep(numbered)?;
        let name = read_name(&numbered, &mut lines);
        let section = match name {
            Some(name) => Section {
                label: format!("rule \"{name}\": "),
                ..numbered
            },
            None => numbered,
        };
        section.check_keys(keys, others);
        // A misspelt key may be the name.
        if !section.has("name") && document.error_count() == before {
            let key = Some(format!("{}name", section.label));
            let missing = document.error(Some(section.offset), key, Problem::NoName);
            document.keep::<()>(Err(missing));
        }
        Some((read(&section, name.unwrap_or_default(), before), section))
    };
    (1..).zip(elements).filter_map(&mut read_one).unzip()
}

/// The name of a rule, if it is valid and unique. `lines` maps the names so far to their lines.
fn read_name<'a>(section: &Section<'a>, lines: &mut HashMap<&'a str, u32>) -> Option<&'a str> {
    section.read("name", |field| {
        let name = checked_name(field)?;
        if let Some(line) = lines.get(name) {
            let (name, line) = (name.to_owned(), *line);
            return Err(field.error(Problem::DuplicateName { name, line }));
        }
        lines.insert(name, field.line());
        Ok(name)
    })
}

fn checked_name<'a>(field: &Field<'a>) -> Result<&'a str, ConfigError> {
    let name = field.text(ALLOWED_NAME)?;
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if name.is_empty() || name.len() > MAX_RULE_NAME || !name.bytes().all(allowed) {
        return Err(field.not_allowed(ALLOWED_NAME));
    }
    Ok(name)
}

/// Reads a rule from its table. `before` is the number of errors before this rule: an error about the whole
/// rule is reported only if none of its keys can be the cause.
fn read(section: &Section<'_>, name: &str, before: usize) -> Rule {
    let document = section.document;
    let mut rule = Rule::named(name);
    rule.direction = section.read("direction", read_direction).flatten();
    rule.action = section.read("action", read_action).unwrap_or_default();
    read_limits(section, &mut rule);
    if document.error_count() == before {
        section.keep(
            rule.check_limits()
                .map_err(|problem| section.error(problem)),
        );
    }
    rule.local_ports = list(section, "local_ports", ALLOWED_PORTS, read_ports);
    rule.remote_ports = list(section, "remote_ports", ALLOWED_PORTS, read_ports);
    let before = document.error_count();
    rule.local = list(section, "local", ALLOWED_PREFIXES, read_prefix);
    rule.remote = list(section, "remote", ALLOWED_PREFIXES, read_prefix);
    if document.error_count() == before {
        section.keep(entries::check_families(&rule).map_err(|problem| section.error(problem)));
    }
    rule.cgroups = list(section, "cgroups", ALLOWED_CGROUPS, |field| {
        field.check_path_is_literal()?;
        field.parse(ALLOWED_CGROUP_PATH, parse_rule_cgroup)
    });
    rule.users = list(section, "users", ALLOWED_USERS, read_user);
    rule.users_at = users_at(section);
    rule
}

/// The location of the rule's users.
fn users_at(section: &Section<'_>) -> Option<Location> {
    let field = section.field("users")?;
    let location = section
        .document
        .location(Some(field.offset), Some(field.key));
    Some(location)
}

fn read_direction(field: &Field<'_>) -> Result<Option<Direction>, ConfigError> {
    let choices = [
        ("inbound", Some(Direction::Inbound)),
        ("outbound", Some(Direction::Outbound)),
        ("any", None),
    ];
    field.choice(ALLOWED_DIRECTION, &choices)
}

fn read_action(field: &Field<'_>) -> Result<Action, ConfigError> {
    let choices = [
        ("enforce", Action::Enforce),
        ("observe", Action::Observe),
        ("exempt", Action::Exempt),
    ];
    field.choice(ALLOWED_ACTION, &choices)
}

/// Reads each element of a list. A missing list is empty.
fn list<T>(
    section: &Section<'_>,
    key: &str,
    allowed: &'static str,
    read: impl Fn(&Field<'_>) -> Result<T, ConfigError>,
) -> Vec<T> {
    let elements = section.read(key, |field| field.elements(allowed));
    let elements = elements.unwrap_or_default();
    elements
        .iter()
        .filter_map(|element| section.keep(read(element)))
        .collect()
}

fn read_ports(field: &Field<'_>) -> Result<PortRange, ConfigError> {
    let Some(number) = field.integer() else {
        return field.parse(ALLOWED_PORT, parse_ports);
    };
    let port = u16::try_from(number).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| field.not_allowed(ALLOWED_PORT))?;
    Ok(PortRange {
        first: port,
        last: port,
    })
}

fn read_prefix(field: &Field<'_>) -> Result<IpNet, ConfigError> {
    field.parse(ALLOWED_PREFIX, parse_prefix)
}

fn read_user(field: &Field<'_>) -> Result<User, ConfigError> {
    let Some(number) = field.integer() else {
        return field.parse(ALLOWED_USER, parse_user);
    };
    uid(number).ok_or_else(|| field.not_allowed(ALLOWED_USER))
}

/// Reads the limits and the keys that modify them.
fn read_limits(section: &Section<'_>, rule: &mut Rule) {
    rule.idle_timeout = read_limit(section, "idle_timeout", rule.action);
    rule.max_lifetime = read_limit(section, "max_lifetime", rule.action);
    rule.response_timeout = read_limit(section, "response_timeout", rule.action);
    rule.half_closed_timeout = read_limit(section, "half_closed_timeout", rule.action);
    if let Some(field) = section.field("response_timeout")
        && rule.direction == Some(Direction::Outbound)
    {
        section.keep::<()>(Err(field.error(Problem::ResponseOutbound)));
    }
    let lifetime = rule.max_lifetime;
    let jitter = section.read("lifetime_jitter", |field| {
        require_limit(field, section, &["max_lifetime"], "max_lifetime")?;
        read_jitter(field, lifetime)
    });
    rule.lifetime_jitter_percent = jitter.unwrap_or_default();
    let activity = section.read("activity", |field| {
        let clocks = ["idle_timeout", "half_closed_timeout"];
        require_limit(
            field,
            section,
            &clocks,
            "idle_timeout or half_closed_timeout",
        )?;
        read_activity(field)
    });
    rule.activity = activity.unwrap_or_default();
    let min_payload = section.read("min_payload", |field| {
        let clocks = ["idle_timeout", "response_timeout", "half_closed_timeout"];
        let any = "idle_timeout, response_timeout or half_closed_timeout";
        require_limit(field, section, &clocks, any)?;
        read_bytes(field, MAX_MIN_PAYLOAD, ALLOWED_MIN_PAYLOAD)
    });
    rule.min_payload = min_payload.unwrap_or(DEFAULT_MIN_PAYLOAD);
    let min_answer = section.read("min_answer", |field| {
        require_limit(field, section, &["response_timeout"], "response_timeout")?;
        read_bytes(field, MAX_MIN_ANSWER, ALLOWED_MIN_ANSWER)
    });
    rule.min_answer = min_answer.unwrap_or(DEFAULT_MIN_ANSWER);
    let max_sessions = section.read("max_sessions", |field| {
        if rule.action == Action::Exempt {
            return Err(field.error(Problem::LimitOnExempt));
        }
        let number = field.integer();
        let number = number.and_then(|number| u32::try_from(number).ok());
        number
            .filter(|number| *number <= MAX_MAX_SESSIONS)
            .ok_or_else(|| field.not_allowed(ALLOWED_RULE_SESSIONS))
    });
    rule.max_sessions = max_sessions.unwrap_or_default();
}

/// Refuses a key that modifies a limit if none of these limits is present, valid or not.
fn require_limit(
    field: &Field<'_>,
    section: &Section<'_>,
    limits: &[&str],
    limit: &'static str,
) -> Result<(), ConfigError> {
    match limits.iter().any(|name| section.has(name)) {
        true => Ok(()),
        false => Err(field.error(Problem::WithoutLimit { limit })),
    }
}

fn read_activity(field: &Field<'_>) -> Result<Activity, ConfigError> {
    let choices = [
        ("any", Activity::Any),
        ("received", Activity::Received),
        ("sent", Activity::Sent),
    ];
    field.choice(ALLOWED_ACTIVITY, &choices)
}

fn read_bytes<N>(field: &Field<'_>, most: N, allowed: &'static str) -> Result<N, ConfigError>
where
    N: TryFrom<i128> + From<u8> + PartialOrd + Copy,
{
    let number = field.integer().and_then(|number| N::try_from(number).ok());
    number
        .filter(|bytes| *bytes >= N::from(1) && *bytes <= most)
        .ok_or_else(|| field.not_allowed(allowed))
}

/// Reads `"10%"`. The remaining lifetime must be a valid limit.
fn read_jitter(field: &Field<'_>, lifetime: Option<Duration>) -> Result<u8, ConfigError> {
    let percent = field
        .text(ALLOWED_JITTER)?
        .strip_suffix('%')
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .filter(|percent| *percent <= MAX_LIFETIME_JITTER_PERCENT)
        .ok_or_else(|| field.not_allowed(ALLOWED_JITTER))?;
    let left = lifetime.map(|lifetime| lifetime - lifetime / 100 * u32::from(percent));
    if left.is_some_and(|left| left < MIN_LIMIT) {
        return Err(field.error(Problem::JitterTooLarge));
    }
    Ok(percent)
}

/// Reads a time of at least the shortest limit. `otherwise` says what to do for less.
pub(super) fn read_time(
    field: &Field<'_>,
    otherwise: &'static str,
) -> Result<Duration, ConfigError> {
    match field.integer() {
        Some(0) => Err(field.error(Problem::ShortLimit {
            found: "0".to_owned(),
            otherwise,
        })),
        Some(number) if number > 0 => Err(field.error(Problem::NoUnit {
            number: number.to_string(),
        })),
        _ => field.parse(ALLOWED_TIME, |text| parse_time(text, otherwise)),
    }
}

fn read_limit(section: &Section<'_>, key: &str, action: Action) -> Option<Duration> {
    section.read(key, |field| {
        if action == Action::Exempt {
            return Err(field.error(Problem::LimitOnExempt));
        }
        read_time(field, NO_LIMIT)
    })
}
