//! The metrics in groups, each with its name, help text and labels.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, Result,
    core::Collector,
    proto::{LabelPair, Metric, MetricFamily},
};
use session_enforcer_common::{PacketDirection, Reason};

use super::{Repair, Untracked};
use crate::{
    config::Mode,
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

/// Creates metrics and registers them.
pub(super) struct Registrar<'a>(pub(super) &'a Registry);

impl Registrar<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: Result<C>) -> Result<C> {
        let collector = collector?;
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.add(IntCounter::with_opts(opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.add(IntCounterVec::new(opts(name, help), labels))
    }

    /// Counters with one label, for all of whose values the series begin at zero.
    fn counters_of(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec> {
        let counters = self.counters(name, help, &[label])?;
        for value in values {
            counters.with_label_values(&[*value]);
        }
        Ok(counters)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge> {
        self.add(IntGauge::with_opts(opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram> {
        self.add(Histogram::with_opts(histogram_opts(name, help, buckets)))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        label: &str,
        buckets: &[f64],
    ) -> Result<HistogramVec> {
        let opts = histogram_opts(name, help, buckets);
        self.add(HistogramVec::new(opts, &[label]))
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("session_enforcer")
}

fn histogram_opts(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts {
        common_opts: opts(name, help),
        buckets: buckets.to_vec(),
    }
}

/// The tracked sessions of each rule, and where they came from.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) tracked: IntGaugeVec,
    pub(super) opened: IntCounterVec,
    pub(super) closed: IntCounterVec,
    pub(super) adopted: IntCounterVec,
    pub(super) taken_over: IntCounter,
    pub(super) untracked: IntCounterVec,
}

impl Sessions {
    pub(super) fn new(registrar: &Registrar<'_>) -> Result<Self> {
        Ok(Self {
            tracked: registrar.gauges("sessions", "Sessions that are tracked now.", &["rule"])?,
            opened: registrar.counters(
                "sessions_opened_total",
                "Sessions that were established while tracked.",
                &["rule"],
            )?,
            closed: registrar.counters(
                "sessions_closed_total",
                "Tracked sessions that ended, or that no rule matches any more.",
                &["rule"],
            )?,
            adopted: registrar.counters(
                "sessions_adopted_total",
                "Sessions that were adopted: older than the daemon, matched by a rule since, or missed when they opened.",
                &["rule"],
            )?,
            taken_over: registrar.counter(
                "sessions_taken_over_total",
                "Sessions that the daemon took over from an earlier one, with their true ages.",
            )?,
            untracked: registrar.counters_of(
                "sessions_untracked_total",
                "Sessions that a rule matches and that could not be tracked.",
                "cause",
                &Untracked::ALL.map(Untracked::name),
            )?,
        })
    }

    /// Creates the series of a rule at zero.
    pub(super) fn begin(&self, rule: &str) {
        self.tracked.with_label_values(&[rule]);
        self.opened.with_label_values(&[rule]);
        self.closed.with_label_values(&[rule]);
        self.adopted.with_label_values(&[rule]);
    }
}

/// The sessions that reached a limit.
#[derive(Debug)]
pub(super) struct Terminations {
    count: IntCounterVec,
    lateness: Histogram,
    age: HistogramVec,
    idle: HistogramVec,
}

impl Terminations {
    pub(super) fn new(registrar: &Registrar<'_>) -> Result<Self> {
        Ok(Self {
            count: registrar.counters(
                "terminations_total",
                "Sessions that reached a limit. result: reset, gone (it ended by itself meanwhile), failed, none (mode observe).",
                &["rule", "reason", "mode", "result"],
            )?,
            lateness: registrar.histogram(
                "termination_lateness_seconds",
                "From a session's deadline to the kernel's answer that it is reset.",
                LATENESS_BUCKETS,
            )?,
            age: registrar.histograms(
                "terminated_session_age_seconds",
                "Age of the sessions that were reset, since establishment.",
                "rule",
                AGE_BUCKETS,
            )?,
            idle: registrar.histograms(
                "terminated_session_idle_seconds",
                "Time without activity of the sessions that were reset.",
                "rule",
                AGE_BUCKETS,
            )?,
        })
    }

    /// Creates the series of a rule at zero, as far as its mode can lead to them.
    pub(super) fn begin(&self, rule: &str, mode: Mode) {
        const RESET: &[Outcome] = &[Outcome::Reset, Outcome::Gone, Outcome::Failed];
        self.age.with_label_values(&[rule]);
        self.idle.with_label_values(&[rule]);
        let outcomes = match mode {
            Mode::Enforce => RESET,
            Mode::Observe => &[Outcome::Observed],
        };
        for reason in Reason::ALL {
            match reason {
                // A client can request a reset under a rule of any mode.
                Reason::Admin => self.begin_reason(rule, reason, Mode::Enforce, RESET),
                _ => self.begin_reason(rule, reason, mode, outcomes),
            }
        }
    }

    fn begin_reason(&self, rule: &str, reason: Reason, mode: Mode, outcomes: &[Outcome]) {
        for outcome in outcomes {
            let labels = [rule, reason_name(reason), mode_name(mode), outcome.name()];
            self.count.with_label_values(&labels);
        }
    }

    pub(super) fn add(&self, ended: &Termination<'_>) {
        let (reason, mode) = (reason_name(ended.reason), mode_name(ended.mode));
        let outcome = ended.end.outcome();
        let labels = [ended.rule, reason, mode, outcome.name()];
        self.count.with_label_values(&labels).inc();
        if outcome != Outcome::Reset {
            return;
        }
        let since = |then_ns: u64| {
            Duration::from_nanos(ended.answered_ns.saturating_sub(then_ns)).as_secs_f64()
        };
        let rule = &[ended.rule];
        self.lateness.observe(since(ended.deadline_ns));
        let age = since(ended.session.established_ns);
        self.age.with_label_values(rule).observe(age);
        let idle = since(ended.idle_since_ns);
        self.idle.with_label_values(rule).observe(idle);
    }

    /// The terminations of a rule, by reason and result, without zero counts.
    pub(super) fn of(&self, rule: &str) -> Vec<(String, String, u64)> {
        let families = self.count.collect();
        let series = families.iter().flat_map(MetricFamily::get_metric);
        let of_rule = series.filter(|one| label(one, "rule") == Some(rule));
        let counts = of_rule.filter_map(|one| {
            let (reason, result) = (label(one, "reason")?, label(one, "result")?);
            let count = one.get_counter().get_value() as u64;
            (count > 0).then(|| (reason.to_owned(), result.to_owned(), count))
        });
        let mut counts: Vec<_> = counts.collect();
        counts.sort_unstable();
        counts
    }

    /// The number of reset sessions of all rules.
    pub(super) fn resets(&self) -> u64 {
        let families = self.count.collect();
        let series = families.iter().flat_map(MetricFamily::get_metric);
        let resets = series.filter(|one| label(one, "result") == Some(Outcome::Reset.name()));
        resets.map(|one| one.get_counter().get_value() as u64).sum()
    }
}

fn label<'a>(series: &'a Metric, name: &str) -> Option<&'a str> {
    let mut labels = series.get_label().iter();
    labels.find(|l| l.name() == name).map(LabelPair::value)
}

/// What the eBPF programs count.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) map_entries: IntGauge,
    pub(super) gate_dropped: IntCounterVec,
    pub(super) events_lost: IntCounter,
    pub(super) errors: IntCounterVec,
}

impl Kernel {
    pub(super) fn new(registrar: &Registrar<'_>) -> Result<Self> {
        Ok(Self {
            map_entries: registrar.gauge("map_entries", "Sessions in the kernel's session table.")?,
            gate_dropped: registrar.counters_of(
                "gate_dropped_packets_total",
                "Packets with payload of sessions past their deadline that the gate dropped. direction: ingress (received by this host), egress (sent by it).",
                "direction",
                &PacketDirection::ALL.map(PacketDirection::name),
            )?,
            events_lost: registrar.counter(
                "events_lost_total",
                "Events that the kernel could not deliver to the daemon; the daemon makes up for them.",
            )?,
            errors: registrar.counters(
                "kernel_errors_total",
                "Other errors of the eBPF programs.",
                &["kind"],
            )?,
        })
    }
}

/// The daemon's repairs, losses and reapers.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) repaired: IntCounterVec,
    pub(super) audit_lost: IntCounter,
    pub(super) degraded: IntGaugeVec,
    pub(super) quarantined: IntGauge,
    pub(super) reapers: IntGaugeVec,
    pub(super) reaper_restarts: IntCounter,
}

impl Engine {
    pub(super) fn new(registrar: &Registrar<'_>) -> Result<Self> {
        Ok(Self {
            repaired: registrar.counters_of(
                "reconcile_repaired_total",
                "Differences between session table, schedule and sockets that were repaired.",
                "kind",
                &Repair::ALL.map(Repair::name),
            )?,
            audit_lost: registrar.counter(
                "audit_records_lost_total",
                "Audit records that could not be written.",
            )?,
            degraded: registrar.gauges(
                "degraded",
                "1 while not everything is enforced or recorded that should be, by cause; /readyz says more.",
                &["cause"],
            )?,
            quarantined: registrar.gauge(
                "quarantined_sessions",
                "Sessions whose reset hangs on their socket's lock.",
            )?,
            reapers: registrar.gauges(
                "reapers",
                "Processes that act on sockets. state: idle, busy, stuck (hanging in the kernel).",
                &["state"],
            )?,
            reaper_restarts: registrar.counter(
                "reaper_restarts_total",
                "Reapers that were started since the first ones.",
            )?,
        })
    }

    pub(super) fn set_degraded(&self, cause: DegradedCause, is_degraded: bool) {
        let gauge = self.degraded.with_label_values(&[cause.name()]);
        gauge.set(i64::from(is_degraded));
    }
}

/// The last configuration that was read.
#[derive(Debug)]
pub(super) struct Configuration {
    is_in_force: IntGauge,
    read_at: Gauge,
}

impl Configuration {
    pub(super) fn new(registrar: &Registrar<'_>) -> Result<Self> {
        let read_at = opts(
            "config_last_reload_success_timestamp_seconds",
            "When the configuration in force was read.",
        );
        Ok(Self {
            is_in_force: registrar.gauge(
                "config_last_reload_successful",
                "Whether the last configuration that was read is in force.",
            )?,
            read_at: registrar.add(Gauge::with_opts(read_at))?,
        })
    }

    /// Records that the last configuration that was read came into force now.
    pub(super) fn loaded(&self) {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        self.is_in_force.set(1);
        self.read_at
            .set(since_1970.unwrap_or_default().as_secs_f64());
    }

    pub(super) fn refused(&self) {
        self.is_in_force.set(0);
    }

    pub(super) fn is_refused(&self) -> bool {
        self.is_in_force.get() == 0
    }
}

/// Registers the metrics that never change.
pub(super) fn register_constants(
    registrar: &Registrar<'_>,
    map_capacity: u32,
    version: &str,
    kernel: &str,
) -> Result<()> {
    let capacity = registrar.gauge(
        "map_capacity",
        "The number of sessions to which the kernel's session table may grow: daemon.max_sessions.",
    )?;
    capacity.set(i64::from(map_capacity));
    let build = registrar.gauges(
        "build_info",
        "Version of the daemon and of the kernel; always 1.",
        &["version", "kernel"],
    )?;
    build.with_label_values(&[version, kernel]).set(1);
    Ok(())
}
