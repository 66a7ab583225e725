//! From the document to the configuration: the tables of the daemon, and the list of rules.

use super::document::{Document, Field, Keys, Section};
use super::value::{
    ALLOWED_AUDIT, ALLOWED_LISTEN, ALLOWED_PIN_DIR, ALLOWED_TIME, is_absolute, parse_audit,
    parse_limit, parse_listen, parse_pin_dir,
};
use super::{
    Config, ConfigError, Doubt, MAX_MAX_SESSIONS, Mode, NetworkNamespaces, Problem, Warning,
};
use super::{entries, hidden, owners, rule};

const ALLOWED_TABLE: &str = "one table, under its header in single brackets";
const ALLOWED_CGROUP: &str = "the absolute path of a directory such as \"/sys/fs/cgroup\"";
const ALLOWED_MODE: &str = "\"enforce\" or \"observe\"";
const ALLOWED_MAX_SESSIONS: &str = "a number from 1 to 16777216";
const ALLOWED_NAMESPACES: &str = "\"all\" or \"own\"";

const _: () = assert!(MAX_MAX_SESSIONS == 16_777_216, "the text above says so");

/// Every table of the contract with its keys. The order is that of the constants below.
pub(super) static TABLES: [Keys; 5] = [
    Keys {
        header: "no header, at the top of the file",
        known: &["daemon", "metrics", "audit", "rule"],
        later: &["control"],
    },
    Keys {
        header: "[daemon]",
        known: &[
            "cgroup",
            "mode",
            "max_sessions",
            "pin_dir",
            "network_namespaces",
            "reconcile_interval",
        ],
        later: &[],
    },
    Keys {
        header: "[metrics]",
        known: &["listen"],
        later: &[],
    },
    Keys {
        header: "[audit]",
        known: &["path"],
        later: &[],
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
            "min_payload",
        ],
        later: &[],
    },
];
const ROOT: usize = 0;
const DAEMON: usize = 1;
const METRICS: usize = 2;
const AUDIT: usize = 3;
const RULE: usize = 4;

/// The configuration that the document describes.
pub(super) fn config(document: &Document<'_>) -> Result<Config, ConfigError> {
    let tables = document.tables()?;
    let root = Section {
        document,
        label: String::new(),
        table: &tables,
        offset: 0,
    };
    refuse_control(&root)?;
    root.check_keys(&TABLES[ROOT], &TABLES)?;
    let mut config = Config::with_rules(Vec::new());
    if let Some(daemon) = table(&root, "daemon", DAEMON)? {
        read_daemon(&daemon, &mut config)?;
    }
    if let Some(listen) = value(&root, "metrics", METRICS, "listen")? {
        config.metrics_listen = listen.parse(ALLOWED_LISTEN, parse_listen)?;
    }
    if let Some(path) = value(&root, "audit", AUDIT, "path")? {
        config.audit = path.parse(ALLOWED_AUDIT, parse_audit)?;
    }
    read_rules(&root, &mut config)?;
    Ok(config)
}

/// Names the key inside of a table that comes later as a whole, rather than the table.
fn refuse_control(root: &Section<'_>) -> Result<(), ConfigError> {
    static CONTROL: Keys = Keys {
        header: "[control]",
        known: &[],
        later: &["socket"],
    };
    let Some(field) = root.field("control") else {
        return Ok(());
    };
    let control = field.section("control.".to_owned(), ALLOWED_TABLE)?;
    control.check_keys(&CONTROL, &TABLES)
}

/// A table of the top level, if it is there, without unknown keys.
fn table<'a>(
    root: &Section<'a>,
    name: &'static str,
    keys: usize,
) -> Result<Option<Section<'a>>, ConfigError> {
    let Some(field) = root.field(name) else {
        return Ok(None);
    };
    let section = field.section(format!("{name}."), ALLOWED_TABLE)?;
    section.check_keys(&TABLES[keys], &TABLES)?;
    Ok(Some(section))
}

/// The value of a key of a table of the top level, if both are there.
fn value<'a>(
    root: &Section<'a>,
    name: &'static str,
    keys: usize,
    key: &'static str,
) -> Result<Option<Field<'a>>, ConfigError> {
    let section = table(root, name, keys)?;
    Ok(section.and_then(|section| section.field(key)))
}

fn read_daemon(daemon: &Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    if let Some(cgroup) = daemon.field("cgroup") {
        let text = cgroup.text(ALLOWED_CGROUP)?;
        cgroup.check_path_is_literal()?;
        if !is_absolute(text) {
            return Err(cgroup.not_allowed(ALLOWED_CGROUP));
        }
        config.cgroup = Some(text.into());
    }
    if let Some(mode) = daemon.field("mode") {
        let choices = [("enforce", Mode::Enforce), ("observe", Mode::Observe)];
        config.mode = mode.choice(ALLOWED_MODE, &choices)?;
    }
    if let Some(max_sessions) = daemon.field("max_sessions") {
        config.max_sessions = max_sessions
            .integer()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| (1..=MAX_MAX_SESSIONS).contains(number))
            .ok_or_else(|| max_sessions.not_allowed(ALLOWED_MAX_SESSIONS))?;
    }
    if let Some(pin_dir) = daemon.field("pin_dir") {
        config.pin_dir = pin_dir.parse(ALLOWED_PIN_DIR, parse_pin_dir)?;
    }
    if let Some(namespaces) = daemon.field("network_namespaces") {
        let choices = [
            ("all", NetworkNamespaces::All),
            ("own", NetworkNamespaces::Own),
        ];
        config.network_namespaces = namespaces.choice(ALLOWED_NAMESPACES, &choices)?;
    }
    if let Some(interval) = daemon.field("reconcile_interval") {
        config.reconcile_interval = interval.parse(ALLOWED_TIME, parse_limit)?;
    }
    Ok(())
}

fn read_rules(root: &Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    let document = root.document;
    let missing = || document.error(None, Some("rule".to_owned()), Problem::NoRule);
    let list = root.field("rule").ok_or_else(missing)?;
    let sources = rule::sources(&list, &TABLES[RULE], &TABLES)?;
    if sources.is_empty() {
        return Err(list.error(Problem::NoRule));
    }
    config.rules = sources
        .iter()
        .map(rule::read)
        .collect::<Result<_, ConfigError>>()?;
    config.users_at = sources.iter().map(rule::users_at).collect();
    entries::check_count(&config.rules)
        .map_err(|(index, problem)| sources[index].error(problem))?;
    let warning = |(index, doubt): (usize, Doubt)| {
        let key = format!("rule \"{}\"", config.rules[index].name);
        let location = document.location(Some(sources[index].offset), Some(key));
        Warning { location, doubt }
    };
    config.warnings = doubts(config).into_iter().map(warning).collect();
    Ok(())
}

/// What is doubtful about the rules, by their index and in their order.
fn doubts(config: &Config) -> Vec<(usize, Doubt)> {
    let name = |index: usize| config.rules[index].name.clone();
    let hidden = |(index, by): (usize, Vec<usize>)| {
        let by = by.into_iter().map(name).collect();
        (index, Doubt::Hidden { by })
    };
    let hidden = hidden::rules(&config.rules).into_iter().map(hidden);
    let mut doubts: Vec<(usize, Doubt)> = hidden.collect();
    for (index, rule) in config.rules.iter().enumerate() {
        let watched = config.cgroup.clone();
        if let Some(watched) = watched.filter(|watched| owners::all_beside(rule, watched)) {
            doubts.push((index, Doubt::Beside { watched }));
        }
    }
    doubts.sort_by_key(|(index, _)| *index);
    doubts
}
