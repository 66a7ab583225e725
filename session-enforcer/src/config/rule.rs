//! One rule, from its table in the document.

use std::collections::HashMap;
use std::time::Duration;

use ipnet::IpNet;
use session_enforcer_common::{Activity, Direction, MAX_RULES, PortRange};

use super::document::{Field, Keys, Section};
use super::error::ALLOWED_RULES;
use super::owners::{ALLOWED_CGROUP_PATH, ALLOWED_USER, parse_rule_cgroup, parse_user, uid};
use super::value::{
    ALLOWED_PORT, ALLOWED_PREFIX, ALLOWED_TIME, parse_limit, parse_ports, parse_prefix,
};
use super::{
    Action, ConfigError, Location, MAX_LIFETIME_JITTER_PERCENT, MAX_MIN_PAYLOAD, MIN_LIMIT,
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
const ALLOWED_JITTER: &str = "a share such as \"10%\", from \"0%\" to \"90%\"";
const ALLOWED_ACTION: &str = "\"enforce\", \"observe\" or \"exempt\"";

/// Longest name of a rule. It is a label of every metric and stands in every audit record.
const MAX_NAME_CHARS: usize = 64;

/// The tables of the rules, under their names, without unknown keys and of different names.
pub(super) fn sources<'a>(
    list: &Field<'a>,
    keys: &Keys,
    others: &'static [Keys],
) -> Result<Vec<Section<'a>>, ConfigError> {
    let elements = list.elements(ALLOWED_RULES)?;
    let found = elements.len();
    if let Some(first_too_many) = elements.get(MAX_RULES as usize) {
        return Err(first_too_many.error(Problem::ManyRules { found }));
    }
    let mut lines = HashMap::new();
    let numbered = elements.iter().enumerate();
    numbered
        .map(|(index, element)| source(element, index + 1, &mut lines, keys, others))
        .collect()
}

/// The table of the rule of this number. `lines` has the names so far and where they stand.
fn source<'a>(
    element: &Field<'a>,
    number: usize,
    lines: &mut HashMap<&'a str, u32>,
    keys: &Keys,
    others: &'static [Keys],
) -> Result<Section<'a>, ConfigError> {
    let numbered = element.section(format!("rule {number}: "), ALLOWED_RULES)?;
    // A misspelt key may be the very name: it is looked at first.
    let name = numbered.field("name");
    let label = match name.as_ref().map(checked_name) {
        Some(Ok(name)) => format!("rule \"{name}\": "),
        _ => numbered.label,
    };
    let section = element.section(label, ALLOWED_RULES)?;
    section.check_keys(keys, others)?;
    let field = name.ok_or_else(|| {
        let key = Some(format!("{}name", section.label));
        let start = Some(section.offset);
        section.document.error(start, key, Problem::NoName)
    })?;
    let name = checked_name(&field)?;
    if let Some(line) = lines.insert(name, field.line()) {
        let name = name.to_owned();
        return Err(field.error(Problem::DuplicateName { name, line }));
    }
    Ok(section)
}

fn checked_name<'a>(field: &Field<'a>) -> Result<&'a str, ConfigError> {
    let name = field.text(ALLOWED_NAME)?;
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if name.is_empty() || name.len() > MAX_NAME_CHARS || !name.bytes().all(allowed) {
        return Err(field.not_allowed(ALLOWED_NAME));
    }
    Ok(name)
}

/// The rule that a table describes.
pub(super) fn read(section: &Section<'_>) -> Result<Rule, ConfigError> {
    let name = section.field("name").map(|field| checked_name(&field));
    let mut rule = Rule::named(name.transpose()?.unwrap_or_default());
    rule.direction = match section.field("direction") {
        Some(field) => read_direction(&field)?,
        None => None,
    };
    rule.local_ports = list(section, "local_ports", ALLOWED_PORTS, read_ports)?;
    rule.remote_ports = list(section, "remote_ports", ALLOWED_PORTS, read_ports)?;
    rule.local = list(section, "local", ALLOWED_PREFIXES, read_prefix)?;
    rule.remote = list(section, "remote", ALLOWED_PREFIXES, read_prefix)?;
    rule.cgroups = list(section, "cgroups", ALLOWED_CGROUPS, |field| {
        field.check_path_is_literal()?;
        field.parse(ALLOWED_CGROUP_PATH, parse_rule_cgroup)
    })?;
    rule.users = list(section, "users", ALLOWED_USERS, read_user)?;
    if let Some(field) = section.field("action") {
        rule.action = read_action(&field)?;
    }
    read_limits(section, &mut rule)?;
    let at_rule = |problem| section.error(problem);
    rule.check_limits().map_err(at_rule)?;
    entries::check_families(&rule).map_err(at_rule)?;
    Ok(rule)
}

/// Where a table names the users of its rule.
pub(super) fn users_at(section: &Section<'_>) -> Option<Location> {
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

/// The elements of a list, each through `read`; an absent list is an empty one.
fn list<T>(
    section: &Section<'_>,
    key: &str,
    allowed: &'static str,
    read: impl Fn(&Field<'_>) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    let Some(field) = section.field(key) else {
        return Ok(Vec::new());
    };
    field.elements(allowed)?.iter().map(read).collect()
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

/// The limits, and the keys that say how they are meant.
fn read_limits(section: &Section<'_>, rule: &mut Rule) -> Result<(), ConfigError> {
    rule.idle_timeout = read_limit(section, "idle_timeout", rule.action)?;
    rule.max_lifetime = read_limit(section, "max_lifetime", rule.action)?;
    rule.response_timeout = read_limit(section, "response_timeout", rule.action)?;
    if let Some(field) = section.field("response_timeout")
        && rule.direction == Some(Direction::Outbound)
    {
        return Err(field.error(Problem::ResponseOutbound));
    }
    if let Some(field) = section.field("lifetime_jitter") {
        rule.lifetime_jitter_percent = read_jitter(&field, rule)?;
    }
    let clocks = rule.idle_timeout.or(rule.response_timeout);
    if let Some(field) = section.field("activity") {
        require_limit(&field, rule.idle_timeout, "idle_timeout")?;
        rule.activity = read_activity(&field)?;
    }
    if let Some(field) = section.field("min_payload") {
        require_limit(&field, clocks, "idle_timeout or response_timeout")?;
        rule.min_payload = read_min_payload(&field)?;
    }
    Ok(())
}

fn require_limit(
    field: &Field<'_>,
    limit: Option<Duration>,
    name: &'static str,
) -> Result<(), ConfigError> {
    match limit {
        Some(_) => Ok(()),
        None => Err(field.error(Problem::WithoutLimit { limit: name })),
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

fn read_min_payload(field: &Field<'_>) -> Result<u16, ConfigError> {
    let number = field
        .integer()
        .and_then(|number| u16::try_from(number).ok());
    number
        .filter(|bytes| (1..=MAX_MIN_PAYLOAD).contains(bytes))
        .ok_or_else(|| field.not_allowed(ALLOWED_MIN_PAYLOAD))
}

/// Reads `"10%"`. What it leaves of the lifetime is a limit like any other.
fn read_jitter(field: &Field<'_>, rule: &Rule) -> Result<u8, ConfigError> {
    require_limit(field, rule.max_lifetime, "max_lifetime")?;
    let percent = field
        .text(ALLOWED_JITTER)?
        .strip_suffix('%')
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .filter(|percent| *percent <= MAX_LIFETIME_JITTER_PERCENT)
        .ok_or_else(|| field.not_allowed(ALLOWED_JITTER))?;
    let lifetime = rule.max_lifetime.unwrap_or_default();
    if lifetime - lifetime / 100 * u32::from(percent) < MIN_LIMIT {
        return Err(field.error(Problem::JitterTooLarge));
    }
    Ok(percent)
}

fn read_limit(
    section: &Section<'_>,
    key: &str,
    action: Action,
) -> Result<Option<Duration>, ConfigError> {
    let Some(field) = section.field(key) else {
        return Ok(None);
    };
    if action == Action::Exempt {
        return Err(field.error(Problem::LimitOnExempt));
    }
    if let Some(number) = field.integer().filter(|number| *number >= 0) {
        let number = number.to_string();
        return Err(field.error(Problem::NoUnit { number }));
    }
    field.parse(ALLOWED_TIME, parse_limit).map(Some)
}
