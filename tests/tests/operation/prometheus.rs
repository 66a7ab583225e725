//! Metrics, alerts and dashboard, checked with Prometheus and promtool.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use session_enforcer_tests::{
    Daemon, Lab, Listener, Pair, eventually, scaled,
    services::{Prometheus, promtool_check, promtool_of_shipped},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
/// Prometheus finds a target within 5 s, then scrapes it every second.
const SCRAPED: Duration = Duration::from_secs(60);
const RULES: &str = "\
[[rule]]\nname = \"idle\"\nlocal_ports = [PORT]\nidle_timeout = \"LIMITs\"\n\
[[rule]]\nname = \"other\"\naction = \"observe\"\nlocal_ports = [1]\nmax_lifetime = \"12h\"\n";

const RULES_OF_PROMETHEUS: &str = include_str!("../../../session-enforcer/monitoring/rules.yml");
const CASES: &str = include_str!("../../../session-enforcer/monitoring/rules-tests.yml");
const DASHBOARD: &str = include_str!("../../../session-enforcer/monitoring/grafana-dashboard.json");

/// Name, type and labels of each metric that the documentation promises.
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
    (
        "session_enforcer_sessions_adopted_total",
        "counter",
        &["rule"],
    ),
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
        // Long enough to open a connection and read its addresses.
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

    /// A Prometheus that has scraped the daemon at least once.
    fn prometheus(&self) -> Result<Prometheus> {
        let prometheus = Prometheus::start(&self.lab, self.daemon.metrics_address())?;
        eventually("a scrape", scaled(SCRAPED), || {
            Ok((prometheus.query("up{job=\"session-enforcer\"}")? == Some(1.0)).then_some(()))
        })
        .with_context(|| prometheus.targets().unwrap_or_default())?;
        Ok(prometheus)
    }

    /// Opens a session and waits until the daemon resets it.
    fn reset_one(&self) -> Result<()> {
        let before = self.daemon.terminations()?.len();
        Pair::open(&self.lab.outside, &self.listener)?.ends()?;
        let after = self.daemon.wait_for_terminations(before + 1)?.len();
        ensure!(after == before + 1, "{after} terminations after {before}");
        Ok(())
    }
}

/// One sample line of the exposition.
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

    /// Whether the sample belongs to this metric. A histogram has samples with three suffixes.
    fn is_of(&self, metric: &str, kind: &str) -> bool {
        let suffix = self.name.strip_prefix(metric);
        match kind {
            "histogram" => matches!(suffix, Some("_bucket" | "_sum" | "_count")),
            _ => suffix == Some(""),
        }
    }
}

#[test]
fn prometheus_and_the_audit_have_the_same_number_of_terminations() -> Result<()> {
    let scene = Scene::set()?;
    let prometheus = scene.prometheus()?;
    // A scrape that times out leaves no samples until the next one.
    let answers = |query: &str, number| {
        eventually("the number of the audit", scaled(SCRAPED), || {
            Ok((prometheus.query(query)? == Some(number)).then_some(()))
        })
    };
    let scraped = |count| answers("sum(session_enforcer_terminations_total)", count);
    scraped(1.0)?;
    // Later scrapes see the next termination.
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
fn promtool_accepts_the_metrics() -> Result<()> {
    let scene = Scene::set()?;
    let metrics = scene.daemon.metrics()?;
    assert_eq!(promtool_check(metrics.text())?, (Some(0), String::new()));
    // promtool does complain if a counter's name does not end in `_total`.
    let wrong = metrics.text().replace("terminations_total", "terminations");
    let (status, found) = promtool_check(&wrong)?;
    assert_ne!(status, Some(0));
    assert!(found.contains("session_enforcer_terminations"), "{found}");
    Ok(())
}

#[test]
fn every_documented_metric_is_served_with_its_type_and_labels() -> Result<()> {
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
        "state",
        "version",
    ];
    assert!(keys.iter().all(|key| finite.contains(key)), "{keys:?}");
    Ok(())
}

#[test]
fn the_alerts_pass_their_promtool_tests() -> Result<()> {
    let unchanged = |text: &str| text.to_owned();
    let check = promtool_of_shipped(&["check", "config", "prometheus.yml"], unchanged)?;
    assert_eq!(check.0, Some(0), "{}", check.1);
    let test = ["test", "rules", "rules-tests.yml"];
    let (status, said) = promtool_of_shipped(&test, unchanged)?;
    assert_eq!(status, Some(0), "{said}");
    // promtool does complain if the alert never fires or always fires.
    let refused = "session_enforcer_config_last_reload_successful == 0";
    for never_or_always in [
        "session_enforcer_config_last_reload_successful == 2",
        "vector(1)",
    ] {
        let changed = |text: &str| text.replace(refused, never_or_always);
        let (status, said) = promtool_of_shipped(&test, changed)?;
        assert_ne!(status, Some(0));
        assert!(said.contains("SessionEnforcerReloadRefused"), "{said}");
    }
    Ok(())
}

#[test]
fn each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() {
    let names = |text: &'static str, key: &str| -> Vec<&'static str> {
        let lines = text.lines().map(str::trim_start);
        lines.filter_map(|line| line.strip_prefix(key)).collect()
    };
    let alerts = names(RULES_OF_PROMETHEUS, "- alert: ");
    assert!(alerts.len() > 10, "{alerts:?}");
    // The text of a case, from its alert's name to the next case.
    let cases: Vec<_> = CASES.split("- alertname: ").skip(1).collect();
    for alert in alerts {
        let of_alert = cases
            .iter()
            .filter_map(|case| case.strip_prefix(alert)?.strip_prefix('\n'));
        let (rests, fires): (Vec<&str>, Vec<&str>) =
            of_alert.partition(|case| case.contains("exp_alerts: []"));
        assert!(!rests.is_empty() && !fires.is_empty(), "{alert}");
    }
}

/// The panels of the dashboard, without rows.
fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = dashboard["panels"].as_array().expect("a list");
    panels
        .iter()
        .filter(|panel| panel["type"] != "row")
        .collect()
}

/// The queries of the panels and of the variables.
fn queries(dashboard: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let of_panel = |panel: &Value| -> Vec<String> {
        let targets = panel["targets"].as_array().expect("a list");
        targets.iter().map(|target| text(&target["expr"])).collect()
    };
    let variables = dashboard["templating"]["list"].as_array().expect("a list");
    let of_variables = variables
        .iter()
        .filter(|variable| variable["type"] == "query");
    // The query that Grafana makes of `label_values`.
    let as_query = |variable: &Value| {
        let definition = text(&variable["definition"]);
        let inner = definition
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (series, label) = inner
            .and_then(|inner| inner.rsplit_once(", "))
            .expect(&definition);
        format!("count by ({label}) ({series})")
    };
    let panels = panels(dashboard).into_iter().flat_map(of_panel);
    panels.chain(of_variables.map(as_query)).collect()
}

#[test]
fn each_query_of_the_dashboard_has_series_and_no_alert_fires() -> Result<()> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let queries = queries(&dashboard);
    assert!(queries.len() > 25, "{queries:#?}");
    let scene = Scene::set()?;
    let prometheus = scene.prometheus()?;
    // A counter has a rate only once Prometheus has seen it change.
    scene.reset_one()?;
    for query in queries {
        let query = query
            .replace("$__rate_interval", "1m")
            .replace("$instance", ".*")
            .replace("$rule", ".*");
        assert!(!query.contains('$'), "{query}");
        eventually("series", scaled(SCRAPED), || {
            let values = prometheus.query_all(&query)?;
            Ok(values.iter().any(|value| value.is_finite()).then_some(()))
        })
        .with_context(|| query.clone())?;
    }
    for recorded in [
        "instance_rule:session_enforcer_terminations:rate5m",
        "instance:session_enforcer_map_use:ratio",
    ] {
        assert!(!prometheus.query_all(recorded)?.is_empty(), "{recorded}");
    }
    let firing = prometheus.query_all("ALERTS{alertstate=\"firing\"}")?;
    assert!(
        firing.is_empty(),
        "an alert fires although nothing is wrong"
    );
    Ok(())
}

#[test]
fn a_refused_reload_and_a_dead_daemon_make_alerts_pending() -> Result<()> {
    let mut scene = Scene::set()?;
    let prometheus = scene.prometheus()?;
    // The alerts fire after a minute or more, which `rules-tests.yml` covers. Here they only become
    // pending.
    let pending = |alert: &str| {
        let series = format!("ALERTS{{alertname=\"{alert}\",alertstate=\"pending\"}}");
        eventually("a pending alert", scaled(SCRAPED), || {
            Ok((prometheus.query(&series)? == Some(1.0)).then_some(()))
        })
        .with_context(|| alert.to_owned())
    };
    scene.daemon.reload("nothing = 'of the kind'")?;
    pending("SessionEnforcerReloadRefused")?;
    scene.daemon.kill()?;
    pending("SessionEnforcerDown")
}

#[test]
fn the_panels_of_the_dashboard_are_described_and_do_not_overlap() -> Result<()> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let all = dashboard["panels"].as_array().context("no panels")?;
    let ids: BTreeSet<_> = all.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), all.len());
    let mut taken = BTreeSet::new();
    for panel in all {
        let side = |name: &str| {
            panel["gridPos"][name]
                .as_u64()
                .expect("gridPos has a number")
        };
        assert!(side("x") + side("w") <= 24, "{}", panel["title"]);
        for y in side("y")..side("y") + side("h") {
            for x in side("x")..side("x") + side("w") {
                assert!(taken.insert((x, y)), "{} at {x}, {y}", panel["title"]);
            }
        }
    }
    for panel in panels(&dashboard) {
        assert!(
            panel["description"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{}",
            panel["title"]
        );
        assert_eq!(panel["datasource"]["uid"], "${datasource}");
    }
    Ok(())
}
