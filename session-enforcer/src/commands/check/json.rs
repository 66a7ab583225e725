//! The report of `check` as JSON: the keys and values of the file, including defaults.

use std::path::Path;

use serde_json::{Value, json};
use session_enforcer_common::{Activity, Direction, MAX_MATCH_ENTRIES, PortRange};

use super::action_words;
use crate::config::{
    Action, Config, ConfigError, ConfigErrors, Location, Mode, NetworkNamespaces, OnFull, Owners,
    Rule, User, format_duration,
};

/// Builds the whole report. For an invalid file, only what is wrong with it.
pub(super) fn report(
    file: &Path,
    loaded: &Result<Config, ConfigErrors>,
    refused: &[String],
) -> Value {
    let file = file.display().to_string();
    let config = match loaded {
        Ok(config) => config,
        Err(errors) => {
            let error = |error: &ConfigError| {
                let ConfigError { location, problem } = error;
                finding(location, problem)
            };
            let errors: Vec<_> = errors.iter().map(error).collect();
            return json!({
                "file": file,
                "valid": false,
                "errors": errors,
                "warnings": [],
                "refused_on_this_host": refused,
            });
        }
    };
    let warnings = config.warnings.iter();
    let warnings: Vec<_> = warnings
        .map(|warning| finding(&warning.location, &warning.doubt))
        .collect();
    let rules: Vec<_> = config.rules.iter().map(|r| rule(config, r)).collect();
    let owners = Owners::numbered(&config.rules);
    json!({
        "file": file,
        "valid": true,
        "errors": [],
        "warnings": warnings,
        "refused_on_this_host": refused,
        "daemon": daemon(config),
        "metrics": { "listen": config.metrics_listen.as_ref().map_or_else(String::new, ToString::to_string) },
        "control": {
            "socket": config.control.socket.path().map_or_else(String::new, |path| path.display().to_string()),
            "group": config.control.group.clone().unwrap_or_default(),
        },
        "audit": { "path": config.audit.to_string(), "sync": config.audit_sync },
        "rule": rules,
        "match_entries": config.match_entries(&owners).len(),
        "max_match_entries": MAX_MATCH_ENTRIES,
    })
}

fn finding(at: &Location, message: &impl ToString) -> Value {
    json!({
        "line": at.position.map(|position| position.line),
        "column": at.position.map(|position| position.column),
        "key": at.key,
        "message": message.to_string(),
    })
}

fn daemon(config: &Config) -> Value {
    let text = |path: &Path| path.display().to_string();
    json!({
        "cgroup": config.cgroup.as_deref().map(text),
        "mode": match config.mode {
            Mode::Enforce => "enforce",
            Mode::Observe => "observe",
        },
        "max_sessions": config.max_sessions,
        "on_full": match config.on_full {
            OnFull::Leave => "leave",
            OnFull::Reset => "reset",
        },
        "pin_dir": config.pin_dir.as_deref().map_or_else(String::new, text),
        "network_namespaces": match config.network_namespaces {
            NetworkNamespaces::All => "all",
            NetworkNamespaces::Own => "own",
        },
        "reconcile_interval": format_duration(config.reconcile_interval),
    })
}

fn rule(config: &Config, rule: &Rule) -> Value {
    let users: Vec<Value> = rule.users.iter().map(user).collect();
    json!({
        "name": rule.name,
        "direction": match rule.direction {
            None => "any",
            Some(Direction::Inbound) => "inbound",
            Some(Direction::Outbound) => "outbound",
        },
        "local_ports": ports(&rule.local_ports),
        "remote_ports": ports(&rule.remote_ports),
        "local": texts(&rule.local),
        "remote": texts(&rule.remote),
        "cgroups": rule.cgroups,
        "users": users,
        "action": match rule.action {
            Action::Enforce => "enforce",
            Action::Observe => "observe",
            Action::Exempt => "exempt",
        },
        "idle_timeout": rule.idle_timeout.map(format_duration),
        "max_lifetime": rule.max_lifetime.map(format_duration),
        "lifetime_jitter": format!("{}%", rule.lifetime_jitter_percent),
        "activity": match rule.activity {
            Activity::Any => "any",
            Activity::Received => "received",
            Activity::Sent => "sent",
        },
        "response_timeout": rule.response_timeout.map(format_duration),
        "half_closed_timeout": rule.half_closed_timeout.map(format_duration),
        "min_payload": rule.min_payload,
        "min_answer": rule.min_answer,
        "max_sessions": rule.max_sessions,
        "words": format!("connections {}", action_words(config, rule)),
    })
}

fn ports(ranges: &[PortRange]) -> Vec<Value> {
    let value = |range: &PortRange| match (range.first, range.last) {
        (first, last) if first == last => json!(first),
        (first, last) => json!(format!("{first}-{last}")),
    };
    ranges.iter().map(value).collect()
}

fn texts(values: &[impl ToString]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn user(user: &User) -> Value {
    match user {
        User::Uid(uid) => json!(uid),
        User::Name(name) => json!(name),
    }
}
