//! Converts the document to the configuration: the daemon's tables and the list of rules.

use std::path::Path;

use super::document::{Document, Field, Keys, Section};
use super::rule::read_time;
use super::value::{
    ALLOWED_AUDIT, ALLOWED_CONTROL_SOCKET, ALLOWED_GROUP, ALLOWED_LISTEN, ALLOWED_PIN_DIR,
    is_absolute, parse_audit, parse_control_socket, parse_group, parse_listen, parse_pin_dir,
};
use super::{
    AuditTarget, Config, ConfigError, Doubt, MAX_MAX_SESSIONS, MetricsListen, Mode,
    NetworkNamespaces, OnFull, Problem, Warning,
};
use super::{entries, impossible_conditions, owners, rule, shadowed_rules};

const ALLOWED_TABLE: &str = "one table, under its header in single brackets";
const ALLOWED_CGROUP: &str = "the absolute path of a directory such as \"/sys/fs/cgroup\"";
const ALLOWED_MODE: &str = "\"enforce\" or \"observe\"";
const ALLOWED_MAX_SESSIONS: &str = "a number from 1 to 16777216";
const ALLOWED_ON_FULL: &str = "\"leave\" or \"reset\"";
const ALLOWED_NAMESPACES: &str = "\"all\" or \"own\"";

const _: () = assert!(MAX_MAX_SESSIONS == 16_777_216, "the text above says so");

/// Every documented table with its keys, in the order of the constants below.
pub(super) static TABLES: [Keys; 6] = [
    Keys {
        header: "no header, at the top of the file",
        known: &["daemon", "metrics", "control", "audit", "rule"],
    },
    Keys {
        header: "[daemon]",
        known: &[
            "cgroup",
            "mode",
            "max_sessions",
            "on_full",
            "pin_dir",
            "network_namespaces",
            "reconcile_interval",
        ],
    },
    Keys {
        header: "[metrics]",
        known: &["listen"],
    },
    Keys {
        header: "[audit]",
        known: &["path", "sync"],
    },
    Keys {
        header: "[control]",
        known: &["socket", "group"],
    },
    Keys {
        header: "[[rule]]",
        known: &[
            "name",
            "direction",
            "local_ports",
            "remote_ports",
            "local",
            "remote",
            "cgroups",
            "users",
            "action",
            "idle_timeout",
            "max_lifetime",
            "lifetime_jitter",
            "activity",
            "response_timeout",
            "half_closed_timeout",
            "min_payload",
            "min_answer",
            "max_sessions",
        ],
    },
];
const ROOT: usize = 0;
const DAEMON: usize = 1;
const METRICS: usize = 2;
const AUDIT: usize = 3;
const CONTROL: usize = 4;
const RULE: usize = 5;

/// The configuration that the document describes. Invalid parts keep their defaults.
pub(super) fn config(document: &Document<'_>) -> Config {
    let mut config = Config::with_rules(Vec::new());
    let Some(tables) = document.tables() else {
        return config;
    };
    let root = Section {
        document,
        label: String::new(),
        table: &tables,
        offset: 0,
    };
    root.check_keys(&TABLES[ROOT], &TABLES);
    if let Some(daemon) = table(&root, "daemon", DAEMON) {
        read_daemon(&daemon, &mut config);
    }
    let metrics = table(&root, "metrics", METRICS);
    if let Some(listen) = metrics.and_then(|metrics| metrics.read("listen", read_listen)) {
        (config.metrics_listen, config.warnings) = listen;
    }
    if let Some(control) = table(&root, "control", CONTROL) {
        read_control(&control, &mut config);
    }
    let audit = table(&root, "audit", AUDIT);
    let path = |field: &Field<'_>| read_audit(field, &config);
    if let Some(path) = audit.as_ref().and_then(|audit| audit.read("path", path)) {
        config.audit = path;
    }
    let sync = |field: &Field<'_>| read_sync(field, &config.audit);
    if let Some(sync) = audit.and_then(|audit| audit.read("sync", sync)) {
        config.audit_sync = sync;
    }
    read_rules(&root, &mut config);
    config
}

/// The top-level table of this name, if it is present. Reports its unknown keys.
fn table<'a>(root: &Section<'a>, name: &'static str, keys: usize) -> Option<Section<'a>> {
    let section = root.read(name, |field| {
        field.section(format!("{name}."), ALLOWED_TABLE)
    })?;
    section.check_keys(&TABLES[keys], &TABLES);
    Some(section)
}

fn read_daemon(daemon: &Section<'_>, config: &mut Config) {
    if let Some(cgroup) = daemon.read("cgroup", read_directory) {
        config.cgroup = Some(cgroup.into());
    }
    let modes = [("enforce", Mode::Enforce), ("observe", Mode::Observe)];
    if let Some(mode) = daemon.read("mode", |field| field.choice(ALLOWED_MODE, &modes)) {
        config.mode = mode;
    }
    if let Some(max_sessions) = daemon.read("max_sessions", read_max_sessions) {
        config.max_sessions = max_sessions;
    }
    let leave_or_reset = [("leave", OnFull::Leave), ("reset", OnFull::Reset)];
    let on_full = |field: &Field<'_>| field.choice(ALLOWED_ON_FULL, &leave_or_reset);
    if let Some(on_full) = daemon.read("on_full", on_full) {
        config.on_full = on_full;
    }
    let pin_dir = |field: &Field<'_>| field.parse(ALLOWED_PIN_DIR, parse_pin_dir);
    if let Some(pin_dir) = daemon.read("pin_dir", pin_dir) {
        config.pin_dir = pin_dir;
    }
    let all_or_own = [
        ("all", NetworkNamespaces::All),
        ("own", NetworkNamespaces::Own),
    ];
    let namespaces = |field: &Field<'_>| field.choice(ALLOWED_NAMESPACES, &all_or_own);
    if let Some(namespaces) = daemon.read("network_namespaces", namespaces) {
        config.network_namespaces = namespaces;
    }
    let interval = |field: &Field<'_>| read_time(field, "for 15m, the default, leave it out");
    if let Some(interval) = daemon.read("reconcile_interval", interval) {
        config.reconcile_interval = interval;
    }
}

/// Reads `audit.sync`, which is invalid with the journal: journald does not report when a record is on the
/// disk.
fn read_sync(field: &Field<'_>, target: &AuditTarget) -> Result<bool, ConfigError> {
    let is_synced = field.truth()?;
    if is_synced && *target == AuditTarget::Journald {
        return Err(field.error(Problem::SyncedJournal));
    }
    Ok(is_synced)
}

fn read_control(control: &Section<'_>, config: &mut Config) {
    let socket = |field: &Field<'_>| {
        field.check_path_is_literal()?;
        field.parse(ALLOWED_CONTROL_SOCKET, parse_control_socket)
    };
    let socket = |field: &Field<'_>| {
        let socket = socket(field)?;
        match socket.path() {
            Some(path) if Some(path) == metrics_socket(config) => {
                Err(field.error(Problem::SharedPath("metrics.listen")))
            }
            _ => Ok(socket),
        }
    };
    if let Some(socket) = control.read("socket", socket) {
        config.control.socket = socket;
    }
    let group = |field: &Field<'_>| field.parse(ALLOWED_GROUP, parse_group);
    if let Some(group) = control.read("group", group) {
        config.control.group = group;
    }
}

/// The Unix socket of the metrics.
fn metrics_socket(config: &Config) -> Option<&Path> {
    match &config.metrics_listen {
        Some(MetricsListen::Unix(path)) => Some(path),
        _ => None,
    }
}

/// Reads the audit's target. A file must not have the path of a socket.
fn read_audit(field: &Field<'_>, config: &Config) -> Result<AuditTarget, ConfigError> {
    let target = field.parse(ALLOWED_AUDIT, parse_audit)?;
    let sockets = [
        ("metrics.listen", metrics_socket(config)),
        ("control.socket", config.control.socket.path()),
    ];
    if let AuditTarget::File(file) = &target
        && let Some((key, _)) = sockets
            .iter()
            .find(|(_, path)| *path == Some(file.as_path()))
    {
        return Err(field.error(Problem::SharedPath(key)));
    }
    Ok(target)
}

/// Reads the metrics' address, with a possible warning.
fn read_listen(field: &Field<'_>) -> Result<(Option<MetricsListen>, Vec<Warning>), ConfigError> {
    let listen = field.parse(ALLOWED_LISTEN, parse_listen)?;
    let doubt = listen.as_ref().and_then(MetricsListen::doubt);
    let warning = |doubt| Warning {
        location: field.location(),
        doubt,
    };
    Ok((listen, doubt.map(warning).into_iter().collect()))
}

fn read_directory<'a>(field: &Field<'a>) -> Result<&'a str, ConfigError> {
    let text = field.text(ALLOWED_CGROUP)?;
    field.check_path_is_literal()?;
    if !is_absolute(text) {
        return Err(field.not_allowed(ALLOWED_CGROUP));
    }
    Ok(text)
}

fn read_max_sessions(field: &Field<'_>) -> Result<u32, ConfigError> {
    field
        .integer()
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (1..=MAX_MAX_SESSIONS).contains(number))
        .ok_or_else(|| field.not_allowed(ALLOWED_MAX_SESSIONS))
}

fn read_rules(root: &Section<'_>, config: &mut Config) {
    let document = root.document;
    let Some(list) = root.field("rule") else {
        let missing = document.error(None, Some("rule".to_owned()), Problem::NoRule);
        document.keep::<()>(Err(missing));
        return;
    };
    let Some(sources) = document.keep(rule::sources(&list)) else {
        return;
    };
    let (rules, sections) = rule::read_all(&sources, &TABLES[RULE], &TABLES);
    config.rules = rules;
    if document.error_count() > 0 {
        // The checks below compare complete rules.
        return;
    }
    if let Err((index, problem)) = entries::check_count(&config.rules) {
        document.keep::<()>(Err(sections[index].error(problem)));
        return;
    }
    let warning = |(index, doubt): (usize, Doubt)| {
        let key = format!("rule \"{}\"", config.rules[index].name);
        let location = document.location(Some(sections[index].offset), Some(key));
        Warning { location, doubt }
    };
    let of_rules: Vec<Warning> = doubts(config).into_iter().map(warning).collect();
    config.warnings.extend(of_rules);
    let line = |warning: &Warning| warning.location.position.map(|at| at.line);
    config.warnings.sort_by_key(line);
}

/// The warnings about rules, by their index and in their order.
fn doubts(config: &Config) -> Vec<(usize, Doubt)> {
    let name = |index: usize| config.rules[index].name.clone();
    let shadowed = |(index, by): (usize, Vec<usize>)| {
        let by = by.into_iter().map(name).collect();
        (index, Doubt::Hidden { by })
    };
    let shadowed = shadowed_rules::rules(&config.rules)
        .into_iter()
        .map(shadowed);
    let mut doubts: Vec<(usize, Doubt)> = shadowed.collect();
    for (index, rule) in config.rules.iter().enumerate() {
        let watched = config.cgroup.clone();
        if let Some(watched) = watched.filter(|watched| owners::all_beside(rule, watched)) {
            doubts.push((index, Doubt::OutsideDaemonCgroup { watched }));
        }
        doubts.extend(
            impossible_conditions::doubts(rule)
                .into_iter()
                .map(|doubt| (index, doubt)),
        );
    }
    doubts.sort_by_key(|(index, _)| *index);
    doubts
}
