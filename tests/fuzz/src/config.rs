//! A configuration: it is refused with an error of one line, or all that is made of it can be made.

use session_enforcer::{
    commands::check,
    config::{Action, Config, Owners},
    engine::RuleSet,
};
use session_enforcer_common::{MAX_MATCH_ENTRIES, MAX_RULES, RULE_EXEMPT};

/// Reads the input as a configuration file.
///
/// # Panics
///
/// Where a valid configuration has no valid match table or description.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        // Refused when the file is read.
        return;
    };
    match Config::parse("fuzz.toml", text) {
        Ok(config) => use_it(&config),
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with("fuzz.toml"), "{line:?}");
            assert!(!line.contains('\n'), "{line:?}");
        }
    }
}

fn use_it(config: &Config) {
    let owners = Owners::numbered(&config.rules);
    let entries = config.match_entries(&owners);
    assert!(entries.len() <= MAX_MATCH_ENTRIES as usize);
    for entry in &entries {
        let rule = config.rules.get(usize::from(entry.rule));
        let is_exempt = rule.is_none_or(|rule| rule.action == Action::Exempt);
        assert_eq!(is_exempt, entry.rule == RULE_EXEMPT);
        assert!(entry.local_ports.first <= entry.local_ports.last);
        assert!(entry.remote_ports.first <= entry.remote_ports.last);
    }
    let mut text = Vec::new();
    check::describe(config, &mut text).expect("a vector takes everything");
    let text = String::from_utf8(text).expect("a description is text");
    for rule in &config.rules {
        assert!(text.contains(&rule.name), "{text}");
        let limits = rule.limits();
        assert!(limits.lifetime_jitter_ns <= limits.max_lifetime_ns);
        let first = limits.first_deadline_ns(1);
        let has_limit = rule.idle_timeout.is_some()
            || rule.max_lifetime.is_some()
            || rule.response_timeout.is_some()
            || rule.half_closed_timeout.is_some();
        assert_eq!(has_limit, first != u64::MAX, "{rule:?}");
    }
    let book = RuleSet::default().next(config, &owners);
    assert!(book.is_ok() || config.rules.len() > MAX_RULES as usize);
}
