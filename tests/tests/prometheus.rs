//! The metrics, as Prometheus and its own checker see them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{
    Daemon, Lab, Listener, Pair, eventually, scaled,
    services::{Prometheus, promtool_check},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
/// A target is found within 5 s, and then scraped every second.
const SCRAPED: Duration = Duration::from_secs(60);
const RULES: &str = "\
[[rule]]\nname = \"idle\"\nlocal_ports = [PORT]\nidle_timeout = \"LIMITs\"\n\
[[rule]]\nname = \"other\"\naction = \"observe\"\nlocal_ports = [1]\nmax_lifetime = \"12h\"\n";

/// Name, type and labels of every metric that users rely on.
const METRICS: [(&str, &str, &[&str]); 23] = [
    ("session_enforcer_sessions", "gauge", &["rule"]),
    (
        "session_enforcer_sessions_opened_total",
        "counter",
        &["rule"],
    ),
    (
        "session_enforcer_sessions_closed_total",
        "counter",
        &["rule"],
    ),
    ("session_enforcer_sessions_adopted_total", "counter", &[]),
    (
        "session_enforcer_terminations_total",
        "counter",
        &["mode", "reason", "result", "rule"],
    ),
    (
        "session_enforcer_termination_lateness_seconds",
        "histogram",
        &[],
    ),
    (
        "session_enforcer_terminated_session_age_seconds",
        "histogram",
        &["rule"],
    ),
    (
        "session_enforcer_terminated_session_idle_seconds",
        "histogram",
        &["rule"],
    ),
    (
        "session_enforcer_gate_dropped_packets_total",
        "counter",
        &["direction"],
    ),
    (
        "session_enforcer_sessions_untracked_total",
        "counter",
        &["cause"],
    ),
    ("session_enforcer_events_lost_total", "counter", &[]),
    ("session_enforcer_map_capacity", "gauge", &[]),
    ("session_enforcer_map_entries", "gauge", &[]),
    (
        "session_enforcer_reconcile_repaired_total",
        "counter",
        &["kind"],
    ),
    (
        "session_enforcer_config_last_reload_successful",
        "gauge",
        &[],
    ),
    (
        "session_enforcer_config_last_reload_success_timestamp_seconds",
        "gauge",
        &[],
    ),
    (
        "session_enforcer_build_info",
        "gauge",
        &["kernel", "version"],
    ),
    ("process_cpu_seconds_total", "counter", &[]),
    ("process_open_fds", "gauge", &[]),
    ("process_max_fds", "gauge", &[]),
    ("process_virtual_memory_bytes", "gauge", &[]),
    ("process_resident_memory_bytes", "gauge", &[]),
    ("process_start_time_seconds", "gauge", &[]),
];

/// A daemon that has reset one session.
struct Scene {
    daemon: Daemon,
    listener: Listener,
    lab: Lab,
}

impl Scene {
    fn set() -> Result<Self> {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        // Longer than it takes to open a connection and look at its addresses.
        let limit = unhurried(Duration::from_secs(1)).as_secs();
        let rules = RULES
            .replace("PORT", &listener.port().to_string())
            .replace("LIMIT", &limit.to_string());
        let daemon = lab.daemon(&rules)?;
        let scene = Self {
            daemon,
            listener,
            lab,
        };
        scene.reset_one()?;
        Ok(scene)
    }

    /// Has one more session run into its limit.
    fn reset_one(&self) -> Result<()> {
        let before = self.daemon.terminations()?.len();
        Pair::open(&self.lab.outside, &self.listener)?.ends()?;
        let after = self.daemon.wait_for_terminations(before + 1)?.len();
        ensure!(after == before + 1, "{after} terminations after {before}");
        Ok(())
    }
}

/// A line with a value.
struct Sample<'a> {
    name: &'a str,
    labels: BTreeMap<&'a str, &'a str>,
}

impl<'a> Sample<'a> {
    fn all(exposition: &'a str) -> Result<Vec<Self>> {
        let lines = exposition.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| Self::parse(line).with_context(|| line.to_owned()))
            .collect()
    }

    fn parse(line: &'a str) -> Option<Self> {
        let (series, _) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels
            .strip_suffix('}')?
            .split(',')
            .filter(|label| !label.is_empty());
        let pair = |label: &'a str| {
            let (key, value) = label.split_once('=')?;
            Some((key, value.strip_prefix('"')?.strip_suffix('"')?))
        };
        Some(Self {
            name,
            labels: labels.map(pair).collect::<Option<_>>()?,
        })
    }

    /// Whether it is one of a metric's: a histogram has samples of three names.
    fn is_of(&self, metric: &str, kind: &str) -> bool {
        let suffix = self.name.strip_prefix(metric);
        match kind {
            "histogram" => matches!(suffix, Some("_bucket" | "_sum" | "_count")),
            _ => suffix == Some(""),
        }
    }
}

#[test]
fn prometheus_scrapes_the_daemon_and_answers_with_the_number_of_the_audit() -> Result<()> {
    let scene = Scene::set()?;
    let prometheus = Prometheus::start(&scene.lab, scene.daemon.metrics_address())?;
    eventually("a scrape", scaled(SCRAPED), || {
        Ok((prometheus.query("up{job=\"session-enforcer\"}")? == Some(1.0)).then_some(()))
    })
    .with_context(|| prometheus.targets().unwrap_or_default())?;
    // A scrape that takes too long leaves no numbers until the next.
    let answers = |query: &str, number| {
        eventually("the number of the audit", scaled(SCRAPED), || {
            Ok((prometheus.query(query)? == Some(number)).then_some(()))
        })
    };
    let scraped = |count| answers("sum(session_enforcer_terminations_total)", count);
    scraped(1.0)?;
    // And it goes on.
    scene.reset_one()?;
    scraped(2.0)?;
    assert_eq!(scene.daemon.terminations()?.len(), 2);
    let reset = "session_enforcer_terminations_total{rule=\"idle\",reason=\"idle_timeout\",\
                 mode=\"enforce\",result=\"reset\"}";
    answers(reset, 2.0)?;
    let other = "sum(session_enforcer_terminations_total{rule=\"other\"})";
    answers(other, 0.0)
}

#[test]
fn promtool_finds_nothing_to_say_about_the_metrics() -> Result<()> {
    let scene = Scene::set()?;
    let metrics = scene.daemon.metrics()?;
    assert_eq!(promtool_check(metrics.text())?, (Some(0), String::new()));
    // It would have: a counter's name ends so.
    let wrong = metrics.text().replace("terminations_total", "terminations");
    let (status, found) = promtool_check(&wrong)?;
    assert_ne!(status, Some(0));
    assert!(found.contains("session_enforcer_terminations"), "{found}");
    Ok(())
}

#[test]
fn every_metric_of_the_contract_is_there_with_its_type_and_labels() -> Result<()> {
    let scene = Scene::set()?;
    let metrics = scene.daemon.metrics()?;
    let samples = Sample::all(metrics.text())?;
    for (name, kind, labels) in METRICS {
        let of_type = format!("# TYPE {name} {kind}");
        assert!(
            metrics.text().lines().any(|line| line == of_type),
            "{of_type}\n{}",
            metrics.text()
        );
        let own: Vec<_> = samples
            .iter()
            .filter(|sample| sample.is_of(name, kind))
            .collect();
        assert!(
            !own.is_empty(),
            "{name} has no sample in\n{}",
            metrics.text()
        );
        for sample in own {
            let keys = sample.labels.keys().copied().filter(|key| *key != "le");
            assert!(
                keys.eq(labels.iter().copied()),
                "{name} {:?}",
                sample.labels
            );
        }
    }
    Ok(())
}

#[test]
fn no_address_user_or_process_is_a_label() -> Result<()> {
    let scene = Scene::set()?;
    let metrics = scene.daemon.metrics()?;
    let mut keys = BTreeSet::new();
    for sample in Sample::all(metrics.text())? {
        for (key, value) in sample.labels {
            keys.insert(key);
            let is_number = value.parse::<u64>().is_ok();
            let is_address = value.parse::<IpAddr>().is_ok() || value.parse::<SocketAddr>().is_ok();
            assert!(
                key == "le" || !(is_number || is_address),
                "{}: {key}={value}",
                sample.name
            );
        }
    }
    let finite = [
        "cause",
        "direction",
        "kernel",
        "kind",
        "le",
        "mode",
        "reason",
        "result",
        "rule",
        "version",
    ];
    assert!(keys.iter().all(|key| finite.contains(key)), "{keys:?}");
    Ok(())
}
