//! The one event loop: ring buffer, timer, signals, requests.
//!
//! [`Enforcer`] decides and acts, one call at a time; this module waits, and calls it.

mod adoption;
mod book;
mod destroyer;
mod enforcer;
mod owners;
mod pace;
mod reconcile;
mod reload;
mod takeover;
mod terminate;

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::yield_now,
    time::{Instant, sleep_until},
};

pub use book::{RuleBook, TooManyRules};
pub use enforcer::{Enforcer, Parts};
pub use reload::Redecided;
pub use takeover::Begun;

use crate::{
    bpf::{Events, KernelLog},
    cgroup::Cgroup,
    clock::monotonic_ns,
    config::{Config, NetworkNamespaces},
    http::Request,
    owners::UserError,
    survey::{Found, Survey},
    timer::Timer,
    watch::Watch,
};

/// How long the daemon leaves events in the ring buffer after it has read some. It bounds the
/// wake-ups of a host with many short connections to ten a second, most of which have ended by
/// then. The shortest limit is ten times as long, so no deadline is missed by it.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// Reads the configuration once more.
pub type Source = Box<dyn Fn() -> Result<Config>>;

/// What a reload needs.
pub struct Reloading {
    /// Reads the configuration; none where it came from the command line.
    pub source: Option<Source>,
    /// What is in force.
    pub config: Config,
    /// What the programs are attached to.
    pub cgroup: Cgroup,
}

impl Reloading {
    fn all_namespaces(&self) -> bool {
        self.config.network_namespaces == NetworkNamespaces::All
    }
}

/// The loop and what it waits for.
pub struct Engine {
    enforcer: Enforcer,
    reloading: Reloading,
    events: EventReader,
    log: KernelLog,
    timer: Timer,
    requests: mpsc::Receiver<Request>,
    signals: Signals,
    watch: Watch,
    /// Lists the sockets, while sessions are compared with them.
    survey: Option<Survey>,
}

impl Engine {
    /// Prepares the loop.
    ///
    /// # Errors
    ///
    /// Where a timer or a signal handler cannot be had.
    pub fn new(
        enforcer: Enforcer,
        events: Events,
        log: KernelLog,
        requests: mpsc::Receiver<Request>,
        signals: Signals,
        reloading: Reloading,
    ) -> Result<Self> {
        Ok(Self {
            enforcer,
            reloading,
            events: EventReader {
                events,
                paused_until: None,
            },
            log,
            timer: Timer::new().context("making a timer")?,
            requests,
            signals,
            watch: Watch::default(),
            survey: None,
        })
    }

    /// Runs until SIGTERM or SIGINT, then detaches and flushes.
    ///
    /// # Errors
    ///
    /// Where the kernel's channels cannot be watched any more, or the programs' maps cannot be
    /// read: without them nothing can be enforced.
    pub async fn run(mut self) -> Result<()> {
        let result = self.serve().await;
        result.and(self.enforcer.stop())
    }

    async fn serve(&mut self) -> Result<()> {
        self.follow_cgroups()?;
        loop {
            let due_ns = self.enforcer.next_due_ns();
            let next_ns = due_ns.into_iter().chain(self.enforcer.next_comparison_ns());
            self.timer.set(next_ns.min()).context("setting the timer")?;
            tokio::select! {
                biased;
                received = self.signals.next() => match received {
                    Received::Stop(name) => {
                        tracing::info!("{name}: stopping");
                        return Ok(());
                    }
                    Received::Hangup => self.reload()?,
                },
                expired = self.timer.expired() => {
                    expired.context("waiting for the timer")?;
                    self.enforce_due()?;
                    self.compare_if_due();
                }
                ready = self.events.wait() => {
                    ready.context("waiting for the kernel's events")?;
                    self.events.read_all(&mut self.enforcer)?;
                }
                Some(request) = self.requests.recv() => {
                    // An answer is about now, and not about the last time that events were read.
                    self.events.read_all(&mut self.enforcer)?;
                    self.enforcer.note_attachment(&self.reloading.cgroup);
                    self.enforcer.answer(request);
                }
                changed = self.watch.changed() => {
                    changed.context("watching the cgroups of the rules")?;
                    self.follow_cgroups()?;
                }
                forwarded = self.log.forward() => {
                    forwarded.context("waiting for the kernel programs' log")?;
                }
                () = yield_now(), if self.enforcer.has_missing() => {
                    self.events.read_all(&mut self.enforcer)?;
                    self.enforcer.look_at_missing()?;
                }
                found = next_of(&mut self.survey), if !self.enforcer.has_missing() => {
                    self.compare(found)?;
                }
            }
        }
    }
}

/// Sessions that are due.
impl Engine {
    fn enforce_due(&mut self) -> Result<()> {
        self.enforcer.enforce_due()?;
        // Each reset has put an event into the ring buffer: keep it from filling.
        self.events.read_all(&mut self.enforcer)
    }

    /// Ends what a change of the policy made late, before a look at all sockets takes its time.
    fn enforce_all_due(&mut self) -> Result<()> {
        while self.enforcer.is_due() {
            self.enforce_due()?;
        }
        Ok(())
    }
}

/// The comparison of sessions and sockets.
impl Engine {
    fn compare_if_due(&mut self) {
        let next_ns = self.enforcer.next_comparison_ns();
        if next_ns.is_none_or(|next_ns| monotonic_ns() < next_ns) {
            return;
        }
        self.enforcer.note_attachment(&self.reloading.cgroup);
        let reach = self.enforcer.reach(self.reloading.all_namespaces());
        match Survey::start(&self.reloading.cgroup, reach) {
            Ok(survey) => {
                self.survey = Some(survey);
                self.enforcer.begin_comparison();
            }
            Err(error) => self
                .enforcer
                .break_off_comparison(&format!("a thread cannot be had: {error}")),
        }
    }

    fn compare(&mut self, found: Option<Found>) -> Result<()> {
        match found {
            Some(found) => {
                // What opened and closed by now is known.
                self.events.read_all(&mut self.enforcer)?;
                self.enforcer.compare(found)?;
            }
            None => self.enforcer.break_off_comparison("their list broke off"),
        }
        if !self.enforcer.is_comparing() {
            self.survey = None;
        }
        Ok(())
    }
}

/// What the survey finds next, if there is one.
async fn next_of(survey: &mut Option<Survey>) -> Option<Found> {
    match survey {
        Some(survey) => survey.next().await,
        None => std::future::pending().await,
    }
}

/// The cgroups that the rules name.
impl Engine {
    /// Looks at them, and watches for them to come and go.
    fn follow_cgroups(&mut self) -> Result<()> {
        // Watched first: one that comes between is found by the look.
        let directories = self.enforcer.cgroup_directories();
        if let Err(error) = self.watch.set(&directories) {
            tracing::error!(
                "a cgroup of the rules that comes later is not seen before the next SIGHUP, no \
                 inotify watch: {error}; raise fs.inotify.max_user_instances or max_user_watches"
            );
        }
        // What was opened before is known when connections are adopted.
        self.events.read_all(&mut self.enforcer)?;
        let Reloading { config, cgroup, .. } = &self.reloading;
        let all_namespaces = self.reloading.all_namespaces();
        self.enforcer
            .cgroups_changed(config, cgroup, all_namespaces)
    }
}

/// SIGHUP.
impl Engine {
    /// Opens the audit file again, and puts the configuration into force if it is good. A wrong one
    /// changes nothing.
    fn reload(&mut self) -> Result<()> {
        self.enforcer.reopen_audit();
        let Some(source) = &self.reloading.source else {
            tracing::info!("SIGHUP: the configuration came from the command line and stays");
            return Ok(());
        };
        match source().and_then(|config| self.reloading.accept(config)) {
            Ok(config) => self.put_into_force(config),
            Err(error) => {
                tracing::error!("SIGHUP: the configuration in force stays: {error:#}");
                self.enforcer.reload_failed();
                Ok(())
            }
        }
    }

    fn put_into_force(&mut self, config: Config) -> Result<()> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        // What was opened under the policy before is known when it is decided about.
        self.events.read_all(&mut self.enforcer)?;
        let redecided = match self.enforcer.change_policy(&config) {
            Ok(redecided) => redecided,
            Err(error) if error.is::<TooManyRules>() || error.is::<UserError>() => {
                tracing::error!("SIGHUP: the configuration in force stays: {error:#}");
                self.enforcer.reload_failed();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.enforce_all_due()?;
        let all_namespaces = config.network_namespaces == NetworkNamespaces::All;
        let adopted = self
            .enforcer
            .adopt_by_change(&self.reloading.cgroup, all_namespaces)?;
        self.enforcer.reload_succeeded();
        tracing::info!(
            "SIGHUP: {} rule(s) in force; of the sessions {} kept, {} released, {} expired, \
             {adopted} adopted",
            config.rules.len(),
            redecided.kept,
            redecided.released,
            redecided.expired,
        );
        self.reloading.config = config;
        self.follow_cgroups()
    }
}

impl Reloading {
    /// Refuses a configuration that only a restart can put into force: it would be so by half.
    fn accept(&self, config: Config) -> Result<Config> {
        let now = &self.config;
        let changed = [
            ("daemon.cgroup", now.cgroup != config.cgroup),
            (
                "daemon.max_sessions",
                now.max_sessions != config.max_sessions,
            ),
            (
                "daemon.network_namespaces",
                now.network_namespaces != config.network_namespaces,
            ),
            (
                "metrics.listen",
                now.metrics_listen != config.metrics_listen,
            ),
            ("audit.path", now.audit != config.audit),
            ("daemon.pin_dir", now.pin_dir != config.pin_dir),
        ];
        let changed: Vec<&str> = changed
            .iter()
            .filter(|(_, c)| *c)
            .map(|(k, _)| *k)
            .collect();
        anyhow::ensure!(
            changed.is_empty(),
            "{} cannot change while the daemon runs; restart it",
            changed.join(" and ")
        );
        // Its connections would be looked for, and others be found.
        self.cgroup.scope()?;
        Ok(config)
    }
}

/// Reads the kernel's events, with a pause after each reading that found some.
struct EventReader {
    events: Events,
    paused_until: Option<Instant>,
}

impl EventReader {
    async fn wait(&mut self) -> io::Result<()> {
        match self.paused_until {
            Some(end) => {
                sleep_until(end).await;
                Ok(())
            }
            None => self.events.wait().await,
        }
    }

    fn read_all(&mut self, enforcer: &mut Enforcer) -> Result<()> {
        let mut any = false;
        while let Some(event) = self.events.read() {
            any = true;
            match event {
                Ok((kind, event)) => enforcer.handle(kind, &event),
                Err(error) => tracing::error!("an event of the kernel is not understood: {error}"),
            }
        }
        enforcer.flush_audit();
        self.paused_until = any.then(|| Instant::now() + READ_PAUSE);
        enforcer.repair()
    }
}

/// The signals that the daemon obeys.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over from their default actions.
    ///
    /// # Errors
    ///
    /// Where the system refuses.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Received::Stop("SIGINT"),
            _ = self.hangup.recv() => Received::Hangup,
        }
    }
}

/// What a signal asks for.
enum Received {
    Stop(&'static str),
    Hangup,
}
