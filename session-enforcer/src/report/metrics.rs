//! Every metric of the daemon, in one struct. No other module registers a metric.
//!
//! Label values are rule names and the finite names of enums, never addresses, users or process IDs.

mod groups;

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use prometheus::{
    Encoder as _, IntCounter, Registry, TextEncoder,
    core::{Collector, Desc},
    process_collector::ProcessCollector,
    proto::MetricFamily,
};
use session_enforcer_common::{ErrorKind, PacketDirection, RuleCounters};

use self::groups::{Configuration, Engine, Kernel, Registrar, Sessions, Terminations};
use crate::{
    config::Mode,
    reaper::pool::Counts,
    report::{audit::Termination, health::DegradedCause},
};

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
    const ALL: [Self; 3] = [Self::MapFull, Self::RuleFull, Self::Namespace];

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
    pub degraded: [bool; DegradedCause::COUNT],
    /// Sessions whose reset hangs.
    pub quarantined: usize,
    /// The number of reapers by state.
    pub reapers: Counts,
}

/// Every metric.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sessions: Sessions,
    terminations: Terminations,
    kernel: Kernel,
    engine: Engine,
    configuration: Configuration,
    /// The names of the rules, by rule index.
    rules: Vec<String>,
    /// By rule index.
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
    /// Creates the metrics for these rules and their modes. Every foreseeable series begins at zero, because a
    /// rate needs a sample before the first event.
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
        let registrar = Registrar(&registry);
        groups::register_constants(&registrar, map_capacity, version, kernel)?;
        registry.register(Box::new(Process(ProcessCollector::for_self())))?;
        let mut metrics = Self {
            sessions: Sessions::new(&registrar)?,
            terminations: Terminations::new(&registrar)?,
            kernel: Kernel::new(&registrar)?,
            engine: Engine::new(&registrar)?,
            configuration: Configuration::new(&registrar)?,
            registry,
            rules: Vec::new(),
            daemon: Vec::new(),
            map_full_by_daemon: 0,
            rule_full_by_daemon: 0,
        };
        metrics.set_rules(rules);
        metrics.config_loaded();
        Ok(metrics)
    }

    /// Sets the rules by index. The series of removed rules stay.
    pub fn set_rules(&mut self, rules: &[(String, Mode)]) {
        self.rules = rules.iter().map(|(name, _)| name.clone()).collect();
        self.daemon.resize_with(rules.len(), DaemonCounts::default);
        for (name, mode) in rules {
            self.sessions.begin(name);
            self.terminations.begin(name, *mode);
        }
    }

    /// Records that the last configuration that was read came into force now.
    pub fn config_loaded(&self) {
        self.configuration.loaded();
    }

    /// Records that the last configuration that was read was refused.
    pub fn config_refused(&self) {
        self.configuration.refused();
    }

    /// Whether the last configuration that was read was refused.
    pub fn is_config_refused(&self) -> bool {
        self.configuration.is_refused()
    }

    /// The terminations of a rule so far, by reason and result, without zero counts.
    pub fn terminations_of(&self, rule: &str) -> Vec<(String, String, u64)> {
        self.terminations.of(rule)
    }

    /// The numbers of sessions of all rules that were opened, adopted or taken over, and that have ended or were released.
    pub fn turnover(&self, kernel: &[RuleCounters]) -> (u64, u64) {
        let opened = kernel.iter().map(|kernel| kernel.opened);
        let closed = kernel.iter().map(|kernel| kernel.closed);
        let by_daemon = self.daemon.iter().map(|daemon| daemon.opened);
        let adopted = self.rules.iter().map(|rule| {
            let adopted = &self.sessions.adopted;
            adopted.with_label_values(&[rule]).get()
        });
        let removed = self.daemon.iter().map(|daemon| daemon.removed);
        (
            opened.chain(by_daemon).chain(adopted).sum::<u64>() + self.sessions.taken_over.get(),
            closed.chain(removed).sum(),
        )
    }

    /// Counts the termination of a session, or what would have been its termination in enforce mode.
    pub fn ended(&self, ended: &Termination<'_>) {
        self.terminations.add(ended);
    }

    /// The number of reset sessions of all rules.
    pub fn resets(&self) -> u64 {
        self.terminations.resets()
    }

    /// Counts an opened session whose rule only the daemon could determine.
    pub fn opened(&mut self, rule: usize) {
        if let Some(counts) = self.daemon.get_mut(rule) {
            counts.opened += 1;
        }
    }

    /// Counts a session that the daemon adopted.
    pub fn adopted(&self, rule: &str) {
        self.sessions.adopted.with_label_values(&[rule]).inc();
    }

    /// Counts the sessions that an earlier daemon left.
    pub fn taken_over(&self, sessions: usize) {
        self.sessions.taken_over.inc_by(sessions as u64);
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
            Untracked::Namespace => {
                let untracked = &self.sessions.untracked;
                untracked.with_label_values(&[cause.name()]).inc();
            }
        }
    }

    /// Counts a repair.
    pub fn repaired(&self, repair: Repair) {
        let repaired = &self.engine.repaired;
        repaired.with_label_values(&[repair.name()]).inc();
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
        self.take_in_sessions(snapshot);
        self.take_in_engine(snapshot);
        self.kernel.map_entries.set(clamp(snapshot.map_entries));
        for direction in PacketDirection::ALL {
            let dropped = snapshot.gate_drops[direction as usize];
            let counter = &self.kernel.gate_dropped;
            raise(&counter.with_label_values(&[direction.name()]), dropped);
        }
        for kind in ErrorKind::ALL {
            self.take_in_error(kind, snapshot.errors[kind as usize]);
        }
    }

    fn take_in_sessions(&self, snapshot: &KernelSnapshot) {
        let Sessions {
            tracked,
            opened,
            closed,
            ..
        } = &self.sessions;
        for ((name, kernel), daemon) in self.rules.iter().zip(&snapshot.rules).zip(&self.daemon) {
            let all_opened = kernel.opened + daemon.opened;
            let all_closed = kernel.closed + daemon.removed;
            raise(&opened.with_label_values(&[name]), all_opened);
            raise(&closed.with_label_values(&[name]), all_closed);
        }
        for (index, name) in self.rules.iter().enumerate() {
            let sessions = snapshot.sessions.get(index).copied().unwrap_or(0);
            tracked.with_label_values(&[name]).set(clamp(sessions));
        }
    }

    fn take_in_engine(&self, snapshot: &KernelSnapshot) {
        let (engine, reapers) = (&self.engine, &snapshot.reapers);
        raise(&engine.audit_lost, snapshot.audit_lost);
        for (cause, is_degraded) in DegradedCause::ALL.into_iter().zip(snapshot.degraded) {
            engine.set_degraded(cause, is_degraded);
        }
        engine.quarantined.set(clamp(snapshot.quarantined as u64));
        for (state, count) in [
            ("idle", reapers.idle),
            ("busy", reapers.busy),
            ("stuck", reapers.stuck),
        ] {
            let gauge = engine.reapers.with_label_values(&[state]);
            gauge.set(clamp(count as u64));
        }
        raise(&engine.reaper_restarts, reapers.restarts);
    }

    fn take_in_error(&self, kind: ErrorKind, count: u64) {
        match kind {
            ErrorKind::MapFull => self.raise_untracked(kind, count + self.map_full_by_daemon),
            ErrorKind::RuleFull => self.raise_untracked(kind, count + self.rule_full_by_daemon),
            ErrorKind::EventLost => raise(&self.kernel.events_lost, count),
            ErrorKind::HeaderUnreadable
            | ErrorKind::NoTcpSocket
            | ErrorKind::CallbackRefused
            | ErrorKind::TableUnreadable
            | ErrorKind::OwnerNotKept => {
                let counter = self.kernel.errors.with_label_values(&[kind.name()]);
                raise(&counter, count);
            }
        }
    }

    fn raise_untracked(&self, kind: ErrorKind, all: u64) {
        let counter = self.sessions.untracked.with_label_values(&[kind.name()]);
        raise(&counter, all);
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

#[cfg(test)]
mod tests;
