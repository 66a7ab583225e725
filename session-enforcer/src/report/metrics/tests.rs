//! Tests of the metrics, of their page, and of the rules and the dashboard that use them.

use std::collections::BTreeSet;

use super::*;
use crate::report::audit::{self, End, Outcome};

fn metrics() -> Metrics {
    let rules = [
        ("pg".to_owned(), Mode::Enforce),
        ("ssh".to_owned(), Mode::Observe),
    ];
    Metrics::new(&rules, 1000, "1.2.3", "6.1.0").unwrap()
}

fn snapshot(opened: u64, closed: u64, map_full: u64) -> KernelSnapshot {
    let mut errors = [0; ErrorKind::COUNT as usize];
    errors[ErrorKind::MapFull as usize] = map_full;
    let rules = vec![RuleCounters { opened, closed }, RuleCounters::default()];
    KernelSnapshot {
        rules,
        sessions: vec![opened, 0],
        map_entries: opened - closed.min(opened),
        errors,
        gate_drops: [0; PacketDirection::COUNT as usize],
        audit_lost: 0,
        degraded: [false; DegradedCause::COUNT],
        quarantined: 0,
        reapers: Counts::default(),
    }
}

#[test]
fn the_entries_of_the_map_are_what_the_kernel_counts() {
    let metrics = metrics();
    metrics.taken_over(4);
    metrics.adopted("pg");
    let counted = KernelSnapshot {
        map_entries: 7,
        ..snapshot(3, 0, 0)
    };
    let text = metrics.render(&counted).unwrap();
    assert!(has(&text, "session_enforcer_sessions_taken_over_total 4"));
    assert!(has(&text, "session_enforcer_map_entries 7"));
}

fn has(text: &str, line: &str) -> bool {
    text.lines().any(|l| l == line)
}

#[test]
fn every_series_of_a_rule_is_there_from_the_start() {
    let text = metrics().render(&snapshot(0, 0, 0)).unwrap();
    for line in [
        "session_enforcer_sessions{rule=\"pg\"} 0",
        "session_enforcer_sessions_opened_total{rule=\"ssh\"} 0",
        "session_enforcer_terminations_total{mode=\"enforce\",reason=\"idle_timeout\",result=\"reset\",rule=\"pg\"} 0",
        "session_enforcer_terminations_total{mode=\"observe\",reason=\"max_lifetime\",result=\"none\",rule=\"ssh\"} 0",
        "session_enforcer_sessions_untracked_total{cause=\"namespace\"} 0",
        "session_enforcer_gate_dropped_packets_total{direction=\"ingress\"} 0",
        "session_enforcer_gate_dropped_packets_total{direction=\"egress\"} 0",
        "session_enforcer_map_capacity 1000",
        "session_enforcer_build_info{kernel=\"6.1.0\",version=\"1.2.3\"} 1",
        "session_enforcer_config_last_reload_successful 1",
    ] {
        assert!(has(&text, line), "{line} is missing in\n{text}");
    }
    assert!(text.contains("process_resident_memory_bytes"));
    let resets = text
        .lines()
        .filter(|l| l.contains("result=\"reset\",rule=\"ssh\""));
    let resets: Vec<&str> = resets.collect();
    assert_eq!(
        resets,
        [
            "session_enforcer_terminations_total{mode=\"enforce\",reason=\"admin\",result=\"reset\",rule=\"ssh\"} 0"
        ]
    );
}

#[test]
fn processor_time_is_told_in_fractions_of_a_second() {
    let text = metrics().render(&snapshot(0, 0, 0)).unwrap();
    let name = "process_cpu_seconds_total ";
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    let seconds: f64 = value.parse().unwrap();
    assert!(seconds > 0.0 && seconds.fract() != 0.0, "{value}");
}

#[test]
fn sessions_that_the_daemon_removed_count_as_closed() {
    let mut metrics = metrics();
    for _ in 0..3 {
        metrics.adopted("pg");
    }
    metrics.removed(0);
    let text = metrics.render(&snapshot(10, 4, 0)).unwrap();
    assert!(has(&text, "session_enforcer_sessions{rule=\"pg\"} 10"));
    assert!(has(
        &text,
        "session_enforcer_sessions_closed_total{rule=\"pg\"} 5"
    ));
    assert!(has(
        &text,
        "session_enforcer_sessions_adopted_total{rule=\"pg\"} 3"
    ));
}

#[test]
fn a_rule_that_comes_later_has_its_series_and_one_that_goes_keeps_them() {
    let mut metrics = metrics();
    let rules = ["pg", "ssh", "web"].map(|name| (name.to_owned(), Mode::Enforce));
    metrics.set_rules(&rules);
    metrics.adopted("pg");
    metrics.config_refused();
    let text = metrics.render(&snapshot(0, 0, 0)).unwrap();
    for line in [
        "session_enforcer_sessions{rule=\"ssh\"} 0",
        "session_enforcer_sessions{rule=\"web\"} 0",
        "session_enforcer_sessions_adopted_total{rule=\"pg\"} 1",
        "session_enforcer_config_last_reload_successful 0",
    ] {
        assert!(has(&text, line), "{line} is missing in\n{text}");
    }
}

#[test]
fn counters_of_kernel_and_daemon_add_up_and_never_go_back() {
    let mut metrics = metrics();
    metrics.untracked(Untracked::MapFull);
    metrics.render(&snapshot(7, 0, 5)).unwrap();
    metrics.untracked(Untracked::MapFull);
    let text = metrics.render(&snapshot(6, 0, 5)).unwrap();
    let line = "session_enforcer_sessions_untracked_total{cause=\"map_full\"} 7";
    assert!(has(&text, line), "{text}");
    assert!(has(
        &text,
        "session_enforcer_sessions_opened_total{rule=\"pg\"} 7"
    ));
}

#[test]
fn dropped_packets_are_counted_by_direction() {
    let dropped = KernelSnapshot {
        gate_drops: [3, 5],
        ..snapshot(0, 0, 0)
    };
    let text = metrics().render(&dropped).unwrap();
    let name = "session_enforcer_gate_dropped_packets_total";
    for (direction, count) in [("ingress", 3), ("egress", 5)] {
        let line = format!("{name}{{direction=\"{direction}\"}} {count}");
        assert!(has(&text, &line), "{line} is missing in\n{text}");
    }
}

#[test]
fn only_a_reset_has_a_lateness() {
    let metrics = metrics();
    let session = audit::tests::session();
    let ended = |end| Termination {
        rule: "pg",
        end,
        ..audit::tests::termination(&session)
    };
    metrics.ended(&ended(End::Reset(None)));
    metrics.ended(&ended(End::Failed("refused")));
    let text = metrics.render(&snapshot(0, 0, 0)).unwrap();
    assert!(has(
        &text,
        "session_enforcer_termination_lateness_seconds_count 1"
    ));
    assert!(has(
        &text,
        "session_enforcer_termination_lateness_seconds_bucket{le=\"0.0005\"} 0"
    ));
    assert!(has(
        &text,
        "session_enforcer_termination_lateness_seconds_bucket{le=\"0.001\"} 1"
    ));
    for result in ["reset", "failed"] {
        let labels =
            format!("mode=\"enforce\",reason=\"idle_timeout\",result=\"{result}\",rule=\"pg\"");
        assert!(has(
            &text,
            &format!("session_enforcer_terminations_total{{{labels}}} 1")
        ));
    }
}

const PAGE: &str = include_str!("../../../docs/metrics.md");

/// The name, type and labels of each metric in the documentation page.
fn documented() -> BTreeSet<(String, String, BTreeSet<String>)> {
    let rows = PAGE
        .lines()
        .filter(|line| line.starts_with("| `session_enforcer_") || line.starts_with("| `process_"));
    let words = |cell: &str| -> BTreeSet<String> {
        let words = cell.split([' ', '`', ',']);
        words
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let entry = |row: &str| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = cells[1].trim_matches('`').to_owned();
        (name, cells[2].to_owned(), words(cells[3]))
    };
    rows.map(entry).collect()
}

#[test]
fn the_page_has_each_metric_with_its_type_and_labels_and_no_other() {
    let metrics = metrics();
    metrics.render(&snapshot(0, 0, 0)).unwrap();
    let labels = |family: &MetricFamily| -> BTreeSet<String> {
        let samples = family.get_metric().iter();
        samples
            .flat_map(prometheus::proto::Metric::get_label)
            .map(|label| label.name().to_owned())
            .collect()
    };
    let served: BTreeSet<_> = metrics
        .registry
        .gather()
        .iter()
        .map(|family| {
            let kind = format!("{:?}", family.get_field_type()).to_lowercase();
            (family.name().to_owned(), kind, labels(family))
        })
        .collect();
    assert_eq!(documented(), served);
}

#[test]
fn the_page_has_each_value_of_the_labels() {
    let own = [
        ErrorKind::MapFull,
        ErrorKind::RuleFull,
        ErrorKind::EventLost,
    ];
    let errors = ErrorKind::ALL.iter().filter(|kind| !own.contains(kind));
    let rows = Repair::ALL.map(Repair::name).into_iter();
    for name in rows.chain(errors.map(|kind| kind.name())) {
        assert!(PAGE.contains(&format!("\n| `{name}` |")), "{name}");
    }
    let outcomes = [
        Outcome::Reset,
        Outcome::Gone,
        Outcome::Failed,
        Outcome::Observed,
    ];
    let directions = PacketDirection::ALL.map(PacketDirection::name).into_iter();
    let causes = Untracked::ALL.map(Untracked::name);
    let words = outcomes.map(Outcome::name).into_iter().chain(directions);
    for word in words.chain(causes) {
        assert!(PAGE.contains(&format!("`{word}`")), "{word}");
    }
}

#[test]
fn rules_and_dashboard_ask_for_metrics_that_there_are_and_the_page_has_each_alert() {
    let pages = [
        include_str!("../../../monitoring/rules.yml"),
        include_str!("../../../monitoring/grafana-dashboard.json"),
    ];
    let there: BTreeSet<String> = documented().into_iter().map(|(name, ..)| name).collect();
    let part = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':'));
    for word in pages.iter().flat_map(|page| page.split(part)) {
        // The names of recording rules contain colons.
        let is_metric = word.starts_with("session_enforcer_") || word.starts_with("process_");
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        assert!(!is_metric || there.contains(name), "{word}");
    }
    let page = include_str!("../../../docs/monitoring.md");
    let alerts = pages[0].lines().map(str::trim_start);
    for alert in alerts.filter_map(|line| line.strip_prefix("- alert: ")) {
        assert!(page.contains(&format!("`{alert}`")), "{alert}");
    }
    for cause in Untracked::ALL.map(Untracked::name) {
        assert!(pages[0].contains(&format!("{cause}: ")), "{cause}");
    }
}
