//! Every metric of the daemon, in one struct. No other module registers a metric.
//!
//! Label values are rule names and the finite names of enums, never addresses, users or process IDs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use prometheus::{
    Encoder as _, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
    core::{Collector, Desc},
    process_collector::ProcessCollector,
    proto::{LabelPair, MetricFamily},
};
use session_enforcer_common::{ErrorKind, PacketDirection, Reason, RuleCounters};

use crate::{
    config::Mode,
    reaper::pool::Counts,
    report::{
        audit::{Outcome, Termination, mode_name, reason_name},
        health::DegradedCause,
    },
};

/// From 0.1 ms, which is below the timer's precision, to one minute.
const LATENESS_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
    15.0, 60.0,
];

/// From the shortest limit to one week, including the limits that compliance controls require.
const AGE_BUCKETS: &[f64] = &[
    1.0, 5.0, 15.0, 60.0, 300.0, 600.0, 900.0, 1_800.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0,
    604_800.0,
];

/// The kind of inconsistency that a sync repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// A session in the table had no deadline, because the event of its opening was lost.
    Unscheduled,
    /// A session in the table had no socket, because its end was not reported.
    Stale,
    /// A session had passed payload while no program was attached.
    Behind,
    /// A session was not in the table: it could not be tracked when it opened, or no program was attached
    /// then.
    Missed,
    /// A session had ended but was still scheduled, because the event of its end was lost.
    Unreported,
}

impl Repair {
    const ALL: [Self; 5] = [
        Self::Unscheduled,
        Self::Stale,
        Self::Behind,
        Self::Missed,
        Self::Unreported,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Unscheduled => "unscheduled",
            Self::Stale => "stale",
            Self::Behind => "behind",
            Self::Missed => "missed",
            Self::Unreported => "unreported",
        }
    }
}

/// Causes that the daemon finds for untracked sessions. The kernel programs count their own causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untracked {
    /// The session table is full.
    MapFull,
    /// The rule has reached its maximum number of sessions.
    RuleFull,
    /// The session's network namespace cannot be entered.
    Namespace,
}

impl Untracked {
    const fn name(self) -> &'static str {
        match self {
            Self::MapFull => ErrorKind::MapFull.name(),
            Self::RuleFull => ErrorKind::RuleFull.name(),
            Self::Namespace => "namespace",
        }
    }
}

/// The counters and states at the time of a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSnapshot {
    /// By rule index.
    pub rules: Vec<RuleCounters>,
    /// The number of scheduled sessions, by rule index.
    pub sessions: Vec<u64>,
    /// The number of sessions in the session table.
    pub map_entries: u64,
    /// By [`ErrorKind`].
    pub errors: [u64; ErrorKind::COUNT as usize],
    /// Packets that the gate dropped, by [`PacketDirection`].
    pub gate_drops: [u64; PacketDirection::COUNT as usize],
    /// Audit records that could not be written.
    pub audit_lost: u64,
    /// By [`DegradedCause`].
    pub troubles: [bool; DegradedCause::COUNT],
    /// Sessions whose reset hangs.
    pub quarantined: usize,
    /// The number of reapers by state.
    pub reapers: Counts,
}

/// Every metric.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rules: Vec<String>,
    sessions: IntGaugeVec,
    opened: IntCounterVec,
    closed: IntCounterVec,
    adopted: IntCounter,
    taken_over: IntCounter,
    terminations: IntCounterVec,
    lateness: Histogram,
    age: HistogramVec,
    idle: HistogramVec,
    gate_dropped: IntCounterVec,
    untracked: IntCounterVec,
    events_lost: IntCounter,
    map_entries: IntGauge,
    repaired: IntCounterVec,
    kernel_errors: IntCounterVec,
    audit_lost: IntCounter,
    degraded: IntGaugeVec,
    quarantined: IntGauge,
    reapers: IntGaugeVec,
    reaper_restarts: IntCounter,
    loaded: IntGauge,
    loaded_at: Gauge,
    daemon: Vec<DaemonCounts>,
    map_full_by_daemon: u64,
    rule_full_by_daemon: u64,
}

/// The daemon's part of a rule's session counts.
#[derive(Clone, Copy, Debug, Default)]
struct DaemonCounts {
    opened: u64,
    removed: u64,
}

impl Metrics {
    /// Creates the metrics for these rules and their modes, all at zero.
    ///
    /// # Errors
    ///
    /// Fails if two metrics have the same name, which a test excludes.
    pub fn new(
        rules: &[(String, Mode)],
        map_capacity: u32,
        version: &str,
        kernel: &str,
    ) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let mut metrics = Self {
            rules: Vec::new(),
            sessions: add(
                r,
                IntGaugeVec::new(
                    opts("sessions", "Sessions that are tracked now."),
                    &["rule"],
                ),
            )?,
            opened: counters(
                r,
                "sessions_opened_total",
                "Sessions that were established while tracked.",
                &["rule"],
            )?,
            closed: counters(
                r,
                "sessions_closed_total",
                "Tracked sessions that ended, or that no rule matches any more.",
                &["rule"],
            )?,
            adopted: counter(
                r,
                "sessions_adopted_total",
                "Sessions that were adopted: older than the daemon, matched by a rule since, or missed when they opened.",
            )?,
            taken_over: counter(
                r,
                "sessions_taken_over_total",
                "Sessions that the daemon took over from an earlier one, with their true ages.",
            )?,
            terminations: counters(
                r,
                "terminations_total",
                "Sessions that reached a limit. result: reset, gone (it ended by itself meanwhile), failed, none (mode observe).",
                &["rule", "reason", "mode", "result"],
            )?,
            lateness: add(
                r,
                Histogram::with_opts(histogram(
                    "termination_lateness_seconds",
                    "From a session's deadline to the kernel's answer that it is reset.",
                    LATENESS_BUCKETS,
                )),
            )?,
            age: histograms(
                r,
                "terminated_session_age_seconds",
                "Age of the sessions that were reset, since establishment.",
            )?,
            idle: histograms(
                r,
                "terminated_session_idle_seconds",
                "Time without activity of the sessions that were reset.",
            )?,
            gate_dropped: counters(
                r,
                "gate_dropped_packets_total",
                "Packets with payload of sessions past their deadline that the gate dropped. direction: ingress (received by this host), egress (sent by it).",
                &["direction"],
            )?,
            untracked: counters(
                r,
                "sessions_untracked_total",
                "Sessions that a rule matches and that could not be tracked.",
                &["cause"],
            )?,
            events_lost: counter(
                r,
                "events_lost_total",
                "Events that the kernel could not deliver to the daemon; the daemon makes up for them.",
            )?,
            map_entries: add(
                r,
                IntGauge::with_opts(opts("map_entries", "Sessions in the kernel's session map.")),
            )?,
            repaired: counters(
                r,
                "reconcile_repaired_total",
                "Differences between session map, schedule and sockets that were mended.",
                &["kind"],
            )?,
            kernel_errors: counters(
                r,
                "kernel_errors_total",
                "Other errors of the eBPF programs.",
                &["kind"],
            )?,
            audit_lost: counter(
                r,
                "audit_records_lost_total",
                "Audit records that could not be written.",
            )?,
            degraded: add(
                r,
                IntGaugeVec::new(
                    opts(
                        "degraded",
                        "1 while not everything is enforced or recorded that should be, by cause; /readyz says more.",
                    ),
                    &["cause"],
                ),
            )?,
            quarantined: add(
                r,
                IntGauge::with_opts(opts(
                    "quarantined_sessions",
                    "Sessions whose reset hangs on their socket's lock.",
                )),
            )?,
            reapers: add(
                r,
                IntGaugeVec::new(
                    opts(
                        "reapers",
                        "Processes that act on sockets. state: idle, busy, stuck (hanging in the kernel).",
                    ),
                    &["state"],
                ),
            )?,
            reaper_restarts: counter(
                r,
                "reaper_restarts_total",
                "Reapers that were started since the first ones.",
            )?,
            loaded: add(
                r,
                IntGauge::with_opts(opts(
                    "config_last_reload_successful",
                    "Whether the last configuration that was read is in force.",
                )),
            )?,
            loaded_at: add(
                r,
                Gauge::with_opts(opts(
                    "config_last_reload_success_timestamp_seconds",
                    "When the configuration in force was read.",
                )),
            )?,
            daemon: Vec::new(),
            map_full_by_daemon: 0,
            rule_full_by_daemon: 0,
            registry,
        };
        metrics.register_constants(map_capacity, version, kernel)?;
        metrics.begin_series();
        metrics.set_rules(rules);
        metrics.config_loaded();
        Ok(metrics)
    }

    /// Sets the rules by index. The series of removed rules stay.
    pub fn set_rules(&mut self, rules: &[(String, Mode)]) {
        self.rules = rules.iter().map(|(name, _)| name.clone()).collect();
        self.daemon.resize_with(rules.len(), DaemonCounts::default);
        for (name, mode) in rules {
            for vec in [&self.opened, &self.closed] {
                vec.with_label_values(&[name]);
            }
            self.sessions.with_label_values(&[name]);
            self.age.with_label_values(&[name]);
            self.idle.with_label_values(&[name]);
            self.begin_terminations(name, *mode);
        }
    }

    /// Records that the last configuration that was read came into force now.
    pub fn config_loaded(&self) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.loaded.set(1);
        self.loaded_at.set(now.as_secs_f64());
    }

    /// Records that the last configuration that was read was refused.
    pub fn config_refused(&self) {
        self.loaded.set(0);
    }

    /// Whether the last configuration that was read was refused.
    pub fn is_config_refused(&self) -> bool {
        self.loaded.get() == 0
    }

    fn register_constants(
        &self,
        capacity: u32,
        version: &str,
        kernel: &str,
    ) -> prometheus::Result<()> {
        let r = &self.registry;
        let map_capacity = opts(
            "map_capacity",
            "Sessions that the kernel's session map may come to hold: daemon.max_sessions.",
        );
        add(r, IntGauge::with_opts(map_capacity))?.set(i64::from(capacity));
        let build = opts(
            "build_info",
            "Version of the daemon and of the kernel; always 1.",
        );
        let labels = ["version", "kernel"];
        add(r, IntGaugeVec::new(build, &labels))?
            .with_label_values(&[version, kernel])
            .set(1);
        r.register(Box::new(Process(ProcessCollector::for_self())))
    }

    /// Creates every foreseeable series at zero, because a rate needs a sample before the first event.
    fn begin_series(&self) {
        let causes = [
            Untracked::MapFull.name(),
            Untracked::RuleFull.name(),
            Untracked::Namespace.name(),
        ];
        for cause in causes {
            self.untracked.with_label_values(&[cause]);
        }
        for trouble in DegradedCause::ALL {
            self.degraded.with_label_values(&[trouble.name()]);
        }
        for way in PacketDirection::ALL {
            self.gate_dropped.with_label_values(&[way.name()]);
        }
        for repair in Repair::ALL {
            self.repaired.with_label_values(&[repair.name()]);
        }
    }

    fn begin_terminations(&self, rule: &str, mode: Mode) {
        let outcomes: &[Outcome] = match mode {
            Mode::Enforce => &[Outcome::Reset, Outcome::Gone, Outcome::Failed],
            Mode::Observe => &[Outcome::Observed],
        };
        for reason in [
            Reason::IdleTimeout,
            Reason::MaxLifetime,
            Reason::ResponseTimeout,
            Reason::HalfClosedTimeout,
            Reason::Policy,
            Reason::Untracked,
        ] {
            for outcome in outcomes {
                let labels = [rule, reason_name(reason), mode_name(mode), outcome.name()];
                self.terminations.with_label_values(&labels);
            }
        }
        // A client can request a reset under a rule of any mode.
        for outcome in [Outcome::Reset, Outcome::Gone, Outcome::Failed] {
            let labels = [
                rule,
                reason_name(Reason::Admin),
                mode_name(Mode::Enforce),
                outcome.name(),
            ];
            self.terminations.with_label_values(&labels);
        }
    }

    /// The terminations of a rule so far, by reason and result, without zero counts.
    pub fn terminations_of(&self, rule: &str) -> Vec<(String, String, u64)> {
        let families = self.terminations.collect();
        let series = families.iter().flat_map(MetricFamily::get_metric);
        let mut found = Vec::new();
        for one in series {
            let label = |name: &str| {
                let mut labels = one.get_label().iter();
                labels.find(|l| l.name() == name).map(LabelPair::value)
            };
            let count = one.get_counter().get_value() as u64;
            if let (Some(of), Some(reason), Some(result)) =
                (label("rule"), label("reason"), label("result"))
                && of == rule
                && count > 0
            {
                found.push((reason.to_owned(), result.to_owned(), count));
            }
        }
        found.sort_unstable();
        found
    }

    /// The numbers of opened and of closed sessions of all rules.
    pub fn turnover(&self, kernel: &[RuleCounters]) -> (u64, u64) {
        let rules = kernel.iter().zip(&self.daemon);
        let each = rules.map(|(kernel, daemon)| {
            (
                kernel.opened + daemon.opened,
                kernel.closed + daemon.removed,
            )
        });
        let (opened, closed): (Vec<u64>, Vec<u64>) = each.unzip();
        let adopted = self.adopted.get() + self.taken_over.get();
        (opened.iter().sum::<u64>() + adopted, closed.iter().sum())
    }

    /// Counts the termination of a session, or what would have been its termination in enforce mode.
    pub fn ended(&self, ended: &Termination<'_>) {
        let (reason, mode) = (reason_name(ended.reason), mode_name(ended.mode));
        let outcome = ended.end.outcome();
        self.terminations
            .with_label_values(&[ended.rule, reason, mode, outcome.name()])
            .inc();
        if outcome == Outcome::Reset {
            let since = |then_ns: u64| {
                Duration::from_nanos(ended.answered_ns.saturating_sub(then_ns)).as_secs_f64()
            };
            self.lateness.observe(since(ended.deadline_ns));
            self.age
                .with_label_values(&[ended.rule])
                .observe(since(ended.session.established_ns));
            self.idle
                .with_label_values(&[ended.rule])
                .observe(since(ended.idle_since_ns));
        }
    }

    /// The number of reset sessions of all rules.
    pub fn resets(&self) -> u64 {
        let families = self.terminations.collect();
        let series = families.iter().flat_map(MetricFamily::get_metric);
        let reset = Outcome::Reset.name();
        let resets = series.filter(|one| one.get_label().iter().any(|l| l.value() == reset));
        resets.map(|one| one.get_counter().get_value() as u64).sum()
    }

    /// Counts an opened session whose rule only the daemon could determine.
    pub fn opened(&mut self, rule: usize) {
        if let Some(counts) = self.daemon.get_mut(rule) {
            counts.opened += 1;
        }
    }

    /// Counts a session that the daemon adopted.
    pub fn adopted(&self) {
        self.adopted.inc();
    }

    /// Counts the sessions that an earlier daemon left.
    pub fn taken_over(&self, sessions: usize) {
        self.taken_over.inc_by(sessions as u64);
    }

    /// Counts a session that the daemon removed from the table. The kernel programs do not count it.
    pub fn removed(&mut self, rule: usize) {
        if let Some(counts) = self.daemon.get_mut(rule) {
            counts.removed += 1;
        }
    }

    /// Counts sessions that the daemon could not track.
    pub fn untracked(&mut self, cause: Untracked) {
        match cause {
            // The kernel's count goes into the same series; `render` adds both.
            Untracked::MapFull => self.map_full_by_daemon += 1,
            Untracked::RuleFull => self.rule_full_by_daemon += 1,
            Untracked::Namespace => self.untracked.with_label_values(&[cause.name()]).inc(),
        }
    }

    /// Counts a repair.
    pub fn repaired(&self, repair: Repair) {
        self.repaired.with_label_values(&[repair.name()]).inc();
    }

    /// Renders the metrics in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// Fails if the encoder refuses a metric, which a test excludes.
    pub fn render(&self, snapshot: &KernelSnapshot) -> prometheus::Result<String> {
        self.take_in(snapshot);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn take_in(&self, snapshot: &KernelSnapshot) {
        for ((name, kernel), daemon) in self.rules.iter().zip(&snapshot.rules).zip(&self.daemon) {
            let closed = kernel.closed + daemon.removed;
            let opened = kernel.opened + daemon.opened;
            raise(&self.opened.with_label_values(&[name]), opened);
            raise(&self.closed.with_label_values(&[name]), closed);
        }
        for (place, name) in self.rules.iter().enumerate() {
            let sessions = snapshot.sessions.get(place).copied().unwrap_or(0);
            self.sessions
                .with_label_values(&[name])
                .set(clamp(sessions));
        }
        self.map_entries.set(clamp(snapshot.map_entries));
        raise(&self.audit_lost, snapshot.audit_lost);
        for (trouble, is_there) in DegradedCause::ALL.into_iter().zip(snapshot.troubles) {
            let gauge = self.degraded.with_label_values(&[trouble.name()]);
            gauge.set(i64::from(is_there));
        }
        self.quarantined.set(clamp(snapshot.quarantined as u64));
        let reapers = snapshot.reapers;
        for (state, count) in [
            ("idle", reapers.idle),
            ("busy", reapers.busy),
            ("stuck", reapers.stuck),
        ] {
            let gauge = self.reapers.with_label_values(&[state]);
            gauge.set(clamp(count as u64));
        }
        raise(&self.reaper_restarts, reapers.restarts);
        for way in PacketDirection::ALL {
            let dropped = snapshot.gate_drops[way as usize];
            raise(&self.gate_dropped.with_label_values(&[way.name()]), dropped);
        }
        for kind in ErrorKind::ALL {
            self.take_in_error(kind, snapshot.errors[kind as usize]);
        }
    }

    fn raise_untracked(&self, kind: ErrorKind, all: u64) {
        raise(&self.untracked.with_label_values(&[kind.name()]), all);
    }

    fn take_in_error(&self, kind: ErrorKind, count: u64) {
        match kind {
            ErrorKind::MapFull => self.raise_untracked(kind, count + self.map_full_by_daemon),
            ErrorKind::RuleFull => self.raise_untracked(kind, count + self.rule_full_by_daemon),
            ErrorKind::EventLost => raise(&self.events_lost, count),
            ErrorKind::HeaderUnreadable
            | ErrorKind::NoTcpSocket
            | ErrorKind::CallbackRefused
            | ErrorKind::TableUnreadable
            | ErrorKind::OwnerNotKept => {
                raise(&self.kernel_errors.with_label_values(&[kind.name()]), count);
            }
        }
    }
}

/// The library's process metrics, but with processor time in nanoseconds. The library reports whole seconds,
/// and a daemon that uses a thousandth of a core needs a quarter of an hour for one second.
struct Process(ProcessCollector);

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.0.collect();
        // Without a reading, keep the library's whole seconds.
        let Ok(used) = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from) else {
            return families;
        };
        let is_cpu = |family: &&mut MetricFamily| family.name() == "process_cpu_seconds_total";
        let samples = families
            .iter_mut()
            .filter(is_cpu)
            .flat_map(MetricFamily::mut_metric);
        for sample in samples {
            let mut counter = prometheus::proto::Counter::default();
            counter.set_value(used.as_secs_f64());
            sample.set_counter(counter);
        }
        families
    }
}

/// Raises a counter to an external total. It never decreases.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn clamp(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("session_enforcer")
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts {
        common_opts: opts(name, help),
        buckets: buckets.to_vec(),
    }
}

fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> prometheus::Result<C> {
    let collector = collector?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::with_opts(opts(name, help)))
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    add(registry, IntCounterVec::new(opts(name, help), labels))
}

fn histograms(registry: &Registry, name: &str, help: &str) -> prometheus::Result<HistogramVec> {
    add(
        registry,
        HistogramVec::new(histogram(name, help, AGE_BUCKETS), &["rule"]),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::report::audit::{self, End};

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
            troubles: [false; DegradedCause::COUNT],
            quarantined: 0,
            reapers: Counts::default(),
        }
    }

    #[test]
    fn the_entries_of_the_map_are_what_the_kernel_counts() {
        let metrics = metrics();
        metrics.taken_over(4);
        metrics.adopted();
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
    fn what_the_daemon_removed_has_closed() {
        let mut metrics = metrics();
        for _ in 0..3 {
            metrics.adopted();
        }
        metrics.removed(0);
        let text = metrics.render(&snapshot(10, 4, 0)).unwrap();
        assert!(has(&text, "session_enforcer_sessions{rule=\"pg\"} 10"));
        assert!(has(
            &text,
            "session_enforcer_sessions_closed_total{rule=\"pg\"} 5"
        ));
        assert!(has(&text, "session_enforcer_sessions_adopted_total 3"));
    }

    #[test]
    fn a_rule_that_comes_later_has_its_series_and_one_that_goes_keeps_them() {
        let mut metrics = metrics();
        let rules = ["pg", "ssh", "web"].map(|name| (name.to_owned(), Mode::Enforce));
        metrics.set_rules(&rules);
        metrics.adopted();
        metrics.config_refused();
        let text = metrics.render(&snapshot(0, 0, 0)).unwrap();
        for line in [
            "session_enforcer_sessions{rule=\"ssh\"} 0",
            "session_enforcer_sessions{rule=\"web\"} 0",
            "session_enforcer_sessions_adopted_total 1",
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
    fn what_the_gate_dropped_is_told_by_direction() {
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

    const PAGE: &str = include_str!("../../docs/metrics.md");

    /// The name, type and labels of each metric in the documentation page.
    fn documented() -> BTreeSet<(String, String, BTreeSet<String>)> {
        let rows = PAGE.lines().filter(|line| {
            line.starts_with("| `session_enforcer_") || line.starts_with("| `process_")
        });
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
        let ways = PacketDirection::ALL.map(PacketDirection::name).into_iter();
        let causes = [
            Untracked::MapFull,
            Untracked::RuleFull,
            Untracked::Namespace,
        ]
        .map(Untracked::name);
        let words = outcomes.map(Outcome::name).into_iter().chain(ways);
        for word in words.chain(causes) {
            assert!(PAGE.contains(&format!("`{word}`")), "{word}");
        }
    }

    #[test]
    fn rules_and_dashboard_ask_for_metrics_that_there_are_and_the_page_has_each_alert() {
        let pages = [
            include_str!("../../monitoring/rules.yml"),
            include_str!("../../monitoring/grafana-dashboard.json"),
        ];
        let there: BTreeSet<String> = documented().into_iter().map(|(name, ..)| name).collect();
        let part = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':'));
        for word in pages.iter().flat_map(|page| page.split(part)) {
            // The names of recording rules contain colons.
            let is_metric = word.starts_with("session_enforcer_") || word.starts_with("process_");
            let name = word.strip_suffix("_bucket").unwrap_or(word);
            assert!(!is_metric || there.contains(name), "{word}");
        }
        let page = include_str!("../../docs/monitoring.md");
        let alerts = pages[0].lines().map(str::trim_start);
        for alert in alerts.filter_map(|line| line.strip_prefix("- alert: ")) {
            assert!(page.contains(&format!("`{alert}`")), "{alert}");
        }
    }
}
