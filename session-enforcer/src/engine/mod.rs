//! The engine decides and never waits for another process; it only waits for the kernel's answers about its own maps.
//!
//! One loop waits for events, deadlines, signals and requests. Work that needs a reaper runs in separate tasks beside
//! the loop ([`context`]): resets ([`terminate`]), the comparison of table, schedule and sockets ([`sync`]), owners
//! ([`owner_search`]), policy changes ([`reload`]), the start ([`takeover`]), and growth ([`growth`]). The decisions
//! are pure: [`judge`], [`tracker`], [`rule_set`], [`backlog`], [`hang_limits`]. The engine makes no call that a process
//! or a user can block; `docs/design/reapers.md` lists the files that it reads.

pub mod adopt;
mod ask;
mod backlog;
mod backoff;
mod batch;
mod context;
#[cfg(test)]
pub(crate) mod fixtures;
mod growth;
mod handles;
mod hang_limits;
mod holder_search;
mod holder_searches;
mod in_progress;
mod judge;
mod kills;
mod named_cgroups;
mod outcome;
pub mod owner_resolver;
mod owner_search;
mod phase;
mod records;
mod reload;
mod requests;
mod rule_set;
mod schedule;
mod slow_owners;
mod state;
mod sync;
mod takeover;
mod terminate;
mod tracker;
mod unrecorded;
mod unreported;
mod waiting;

use std::{cell::Cell, io, rc::Rc, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};

pub use rule_set::{RuleSet, TooManyRules};
pub use state::Parts;
pub use takeover::Begun;

use context::Context;
use state::State;

use crate::{
    config::{Config, NetworkNamespaces},
    datapath::{Events, KernelLog},
    exit,
    host::{cgroup::Cgroup, clock::monotonic_ns, timer::Timer, watch::Watch},
    reaper::pool::Pool,
    report::{
        audit::Requester,
        control::{self, PolicyChange, Refusal, ReloadRequest, ReloadResult},
        service_manager::{Beat, ServiceManager},
        to_engine::Request,
    },
};

/// How long the HTTP server waits for the adoption to end. After that it serves and reports that the adoption is in
/// progress.
const ADOPTION_PATIENCE: Duration = Duration::from_secs(1);

/// How long a stop waits for outstanding resets.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Minimum pause between two lookups of the cgroups that the rules name, because a user who may create one can do so
/// repeatedly.
const CGROUPS_PAUSE: Duration = Duration::from_millis(100);

/// The pause while the kernel gives no watch, so that only lookups find new ones.
const CGROUPS_POLL: Duration = Duration::from_secs(1);

/// How long the metrics wait for the lookup of new connections' cgroups.
const CGROUPS_PATIENCE: Duration = Duration::from_secs(1);

/// Poll interval of that wait.
const CGROUPS_WAIT_POLL: Duration = Duration::from_millis(2);

/// The pause after answering requests is this multiple of the time that the answers took, because any user may send
/// requests.
const ANSWERS_REST: u32 = 4;

/// Maximum of that pause, for the case that the daemon was stopped while it answered.
const MAX_ANSWERS_REST: Duration = Duration::from_secs(1);

/// Maximum number of requests that are answered together.
const MAX_ANSWERS: usize = 64;

/// The pause after handling new cgroups is this multiple of the time that it took.
const CGROUPS_REST: u32 = 10;

/// The source of the configuration.
pub struct Source {
    /// Reads the configuration again.
    pub read: Box<dyn Fn() -> Result<Config>>,
    /// Called when the configuration that was read last is active.
    pub in_force: Box<dyn Fn()>,
}

/// The inputs of a reload.
pub struct Reloading {
    /// Reads the configuration; `None` if it came from the command line.
    pub source: Option<Source>,
    /// The active configuration.
    pub config: Config,
}

/// The loop and its inputs.
pub struct Engine {
    context: Rc<Context>,
    reloading: Rc<Reload>,
    log: KernelLog,
    timer: Timer,
    requests: mpsc::Receiver<Request>,
    /// Requests are not answered before this time.
    answers_rest_until: Instant,
    /// Notified when audit records are on disk.
    audit_written: Arc<Notify>,
    signals: Signals,
    watch: Rc<Watch>,
    manager: Rc<ServiceManager>,
    beat: Beat,
    /// Whether the cgroups of the rules must be looked up again.
    are_cgroups_wanted: bool,
    /// They are not looked up before this time.
    cgroups_paused_until: Rc<Cell<Instant>>,
}

/// State of reloads.
struct Reload {
    source: Option<Source>,
    config: std::cell::RefCell<Config>,
    /// The error of the last configuration that was read, if it was refused.
    refused: std::cell::RefCell<Option<String>>,
    is_under_way: Cell<bool>,
    is_wanted: Cell<bool>,
    /// Clients of the control socket that wait for the next reload.
    waiting: std::cell::RefCell<Vec<ReloadRequest>>,
    /// Whether the set of cgroups that the rules name may have changed.
    has_changed: Cell<bool>,
}

/// The engine's event sources.
pub struct Channels {
    /// The kernel's events.
    pub events: Events,
    /// The programs' log.
    pub log: KernelLog,
    /// Requests of the HTTP server and the control socket.
    pub requests: mpsc::Receiver<Request>,
    /// Signals.
    pub signals: Signals,
}

impl Engine {
    /// Prepares the loop.
    ///
    /// # Errors
    ///
    /// Fails if no timer can be created or the service manager cannot be notified.
    pub fn new(
        parts: Parts,
        pool: Pool,
        cgroup: Cgroup,
        channels: Channels,
        reloading: Reloading,
    ) -> Result<Self> {
        let all_namespaces = reloading.config.network_namespaces == NetworkNamespaces::All;
        let audit_written = parts.audit.written();
        let state = State::new(parts);
        let context = Context::new(state, channels.events, pool, cgroup, all_namespaces);
        Ok(Self {
            context,
            reloading: Rc::new(Reload {
                source: reloading.source,
                refused: std::cell::RefCell::new(reloading.config.stands_in_for.clone()),
                config: std::cell::RefCell::new(reloading.config),
                // The start counts as a reload in progress.
                is_under_way: Cell::new(true),
                is_wanted: Cell::new(false),
                waiting: std::cell::RefCell::default(),
                has_changed: Cell::new(false),
            }),
            log: channels.log,
            timer: Timer::new().context("making a timer")?,
            requests: channels.requests,
            answers_rest_until: Instant::now(),
            audit_written,
            signals: channels.signals,
            watch: Rc::default(),
            manager: Rc::new(ServiceManager::from_env().context("NOTIFY_SOCKET")?),
            beat: Beat::from_env(),
            are_cgroups_wanted: false,
            cgroups_paused_until: Rc::new(Cell::new(Instant::now())),
        })
    }

    /// Activates the first policy, attaches the programs, and runs until SIGTERM or SIGINT; then detaches and flushes.
    /// `attached` is called when the programs are attached, `begun` when the existing connections are adopted. `serve`
    /// is called at the end of the adoption, or after `ADOPTION_PATIENCE` if that takes longer.
    ///
    /// # Errors
    ///
    /// Fails if the programs cannot be attached, the kernel's channels cannot be watched any more, or the programs'
    /// maps cannot be read, without which nothing can be enforced.
    pub async fn run(
        mut self,
        attached: impl FnOnce() -> Result<()> + 'static,
        begun: impl FnOnce(Begun) + 'static,
        serve: impl FnOnce() -> Result<()> + 'static,
    ) -> Result<()> {
        let (is_serving, served) = tokio::sync::oneshot::channel();
        let start = start(
            Rc::clone(&self.context),
            Rc::clone(&self.reloading),
            attached,
            begun,
            is_serving,
        );
        self.context.spawn(start);
        let (context, manager) = (Rc::clone(&self.context), Rc::clone(&self.manager));
        let reload = Rc::clone(&self.reloading);
        self.context.spawn(async move {
            // The channel is closed without a message if the programs could not be attached.
            if let Ok(mut adopting) = served.await {
                let adopted = tokio::time::timeout(ADOPTION_PATIENCE, &mut adopting).await;
                serve()?;
                if adopted.is_err() {
                    // The sender is dropped at the end of the adoption; the error carries no information.
                    let _ = adopting.await;
                }
                manager.ready(|| context.state().standing(&reload.config.borrow()));
            }
            context.wake.notify_one();
            Ok(())
        });
        let result = self.serve().await;
        self.manager.stopping();
        let was_enforcing = self.context.state().is_enforcing;
        if result.is_ok() {
            self.finish_resets().await;
        }
        let mut state = self.context.state();
        let stopped = match &result {
            // This daemon has not attached anything, so it detaches nothing.
            Err(_) if !was_enforcing => Ok(()),
            _ => state.stop().context("detaching the programs"),
        };
        state.records.audit.close();
        state.datapath.journal().close();
        result.and(stopped)
    }

    /// Waits for outstanding resets, so that their results are recorded. The loop starts no new ones.
    async fn finish_resets(&self) {
        self.context.state().is_enforcing = false;
        let until = Instant::now() + STOP_PATIENCE;
        while self.context.state().tracker.is_resetting() {
            let answered = self.context.wake.notified();
            if tokio::time::timeout_at(until, answered).await.is_err() {
                return;
            }
        }
    }

    async fn serve(&mut self) -> Result<()> {
        loop {
            self.context.take_failure()?;
            self.are_cgroups_wanted |= self.reloading.has_changed.take();
            let look_up_at = Some(self.cgroups_paused_until.get());
            let look_up_at = look_up_at.filter(|_| self.are_cgroups_wanted);
            owner_search::find_cgroups(&self.context);
            growth::begin_if_half_full(&self.context);
            holder_search::find(&self.context);
            owner_search::find(&self.context);
            terminate::retry_waiting(&self.context);
            terminate::confirm_candidates(&self.context);
            unreported::query_unreported(&self.context);
            terminate::reset_waiting_untracked(&self.context)?;
            self.context.state().records.audit.flush();
            let next_ns = self.next_ns();
            self.timer.set(next_ns).context("setting the timer")?;
            tokio::select! {
                biased;
                received = self.signals.next() => match received {
                    Received::Stop(name) => {
                        tracing::info!("{name}: stopping");
                        return Ok(());
                    }
                    Received::Hangup => self.hangup(),
                    Received::Reopen => self.context.state().records.audit.reopen(),
                },
                () = self.beat.due() => {
                    let config = self.reloading.config.borrow();
                    self.manager.beat(|| self.context.state().standing(&config));
                }
                expired = self.timer.expired() => {
                    expired.context("waiting for the timer")?;
                    terminate::reset_due(&self.context)?;
                    self.sync_if_due();
                }
                ready = self.context.events() => {
                    ready.context("waiting for the kernel's events")?;
                    self.context.read_events()?;
                }
                requests = waiting(&mut self.requests, self.answers_rest_until) => {
                    let began = Instant::now();
                    // The answer must reflect the present, so pending events are read first.
                    self.context.read_events()?;
                    self.note_attachment();
                    let requests = self.answer_control(requests)?;
                    self.answer(requests);
                    let rest = (began.elapsed() * ANSWERS_REST).min(MAX_ANSWERS_REST);
                    self.answers_rest_until = Instant::now() + rest;
                }
                changed = self.watch.changed() => {
                    changed.context("watching the cgroups of the rules")?;
                    self.are_cgroups_wanted = true;
                }
                () = at(look_up_at) => self.follow_cgroups(),
                forwarded = self.log.forward() => {
                    forwarded.context("waiting for the kernel programs' log")?;
                }
                () = self.context.wake.notified() => {}
                () = self.audit_written.notified() => {}
            }
        }
    }

    /// The time of the next timer event.
    fn next_ns(&self) -> Option<u64> {
        let state = self.context.state();
        let may_end = state.is_enforcing && terminate::may_end_more(&self.context, &state);
        let due_ns = state.tracker.next_due_ns().filter(|_| may_end);
        due_ns.into_iter().chain(state.next_sync_ns()).min()
    }

    fn sync_if_due(&mut self) {
        let (aim, next_ns) = {
            let state = self.context.state();
            (sync::routine(&state), state.next_sync_ns())
        };
        if next_ns.is_some_and(|next_ns| next_ns <= monotonic_ns()) {
            self.note_attachment();
            let context = Rc::clone(&self.context);
            self.context
                .spawn(async move { sync::sync(&context, aim).await.map(drop) });
            // Marked here and not when the task runs, so that it is not started twice.
            self.context.state().backlog.begin();
        }
    }

    /// Answers requests of the control socket; returns the other requests.
    fn answer_control(&self, requests: Vec<Request>) -> Result<Vec<Request>> {
        let mut others = Vec::new();
        for request in requests {
            match request {
                Request::Control(control::Request::Reload(request)) => {
                    self.reloading.waiting.borrow_mut().push(request);
                    self.reload();
                }
                Request::Control(request) => {
                    requests::answer(&self.context, &self.reloading, request)?;
                }
                other => others.push(other),
            }
        }
        Ok(others)
    }

    /// Answers requests of the HTTP server. The metrics wait until the cgroups of new connections are known, so that
    /// the audit can name them.
    fn answer(&self, requests: Vec<Request>) {
        let mut state = self.context.state();
        let is_waited_for = !state.scrapes.is_empty();
        state.answer(requests);
        if !state.owner_resolver.is_asking() {
            state.answer_scrapes(self.context.pool.counts());
        } else if !state.scrapes.is_empty() && !is_waited_for {
            self.context
                .spawn(answer_scrapes_later(Rc::clone(&self.context)));
        }
    }

    /// Updates the health with whether the programs are still attached to the right cgroup.
    fn note_attachment(&self) {
        let mut state = self.context.state();
        if !state.is_enforcing {
            return;
        }
        let what = if self.context.cgroup.is_gone() {
            Some(
                "the cgroup of daemon.cgroup was removed: connections of one that is made anew are \
                 not tracked; restart the daemon",
            )
        } else if !state.datapath.is_attached() {
            Some(
                "the programs were detached by someone else: no session is tracked any more; \
                 restart the daemon",
            )
        } else {
            None
        };
        let detached = crate::report::health::DegradedCause::Detached;
        state.records.health.set(detached, what);
        state.hanging.is_short = self.context.pool.is_short();
        state.note_backlog();
    }
}

async fn answer_scrapes_later(context: Rc<Context>) -> Result<()> {
    let until = Instant::now() + CGROUPS_PATIENCE;
    while context.state().owner_resolver.is_asking() && Instant::now() < until {
        owner_search::find_cgroups(&context);
        tokio::time::sleep(CGROUPS_WAIT_POLL).await;
    }
    context.state().answer_scrapes(context.pool.counts());
    Ok(())
}

/// Waits until `until`, and then for at least one request; returns all that are waiting.
async fn waiting(requests: &mut mpsc::Receiver<Request>, until: Instant) -> Vec<Request> {
    sleep_until(until).await;
    let mut waiting = Vec::new();
    if requests.recv_many(&mut waiting, MAX_ANSWERS).await == 0 {
        // No server is running.
        std::future::pending::<()>().await;
    }
    waiting
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The start: the first policy, the take-over, the attachment, the adoption.
async fn start(
    context: Rc<Context>,
    reload: Rc<Reload>,
    attached: impl FnOnce() -> Result<()>,
    begun: impl FnOnce(Begun),
    serve: tokio::sync::oneshot::Sender<tokio::sync::oneshot::Receiver<()>>,
) -> Result<()> {
    let config = reload.config.borrow().clone();
    let users = reload::find_users(&context, &config).await;
    let cgroups = owner_search::look_up(&context, &owner_resolver::cgroup_names(&config)).await;
    let cgroups = cgroups.as_ref();
    context.state().put_policy(&config, &users, cgroups)?;
    reload.has_changed.set(true);
    context.wake.notify_one();
    let taken_over = takeover::attach(&context).await?;
    attached()?;
    let (is_adopted, adopting) = tokio::sync::oneshot::channel::<()>();
    // The receiver is gone if the daemon is stopping.
    let _ = serve.send(adopting);
    let adopted = takeover::adopt(&context).await?;
    context.state().records.started(&config);
    if config.stands_in_for.is_some() {
        context.state().records.metrics.config_refused();
    } else {
        reload.note_in_force();
    }
    begun(Begun {
        taken_over,
        adopted,
    });
    drop(is_adopted);
    reload_while_wanted(&context, &reload).await
}

/// The cgroups that the rules name.
impl Engine {
    /// Starts the task that looks them up and handles those that have come.
    fn follow_cgroups(&mut self) {
        self.are_cgroups_wanted = false;
        // A start and a reload look them up and adopt all connections, and request this lookup at their end.
        if self.reloading.is_under_way.get() {
            return;
        }
        let (context, reload) = (Rc::clone(&self.context), Rc::clone(&self.reloading));
        let (watch, paused_until) = (
            Rc::clone(&self.watch),
            Rc::clone(&self.cgroups_paused_until),
        );
        // Blocks further lookups until the task has ended.
        let far = Instant::now() + Duration::from_secs(3_600);
        self.cgroups_paused_until.set(far);
        self.context.spawn(async move {
            let began = Instant::now();
            let followed = named_cgroups::follow(&context, &reload, &watch).await;
            let pause = if context.state().backlog.is_unwatched {
                CGROUPS_POLL
            } else {
                CGROUPS_PAUSE
            };
            let rest = (began.elapsed() * CGROUPS_REST).max(pause);
            paused_until.set(Instant::now() + rest);
            followed
        });
    }
}

/// Reloads.
impl Engine {
    /// SIGHUP: reopens the audit file and reloads the configuration. An invalid configuration changes nothing.
    fn hangup(&self) {
        if self.reloading.source.is_none() {
            self.context.state().records.audit.reopen();
            tracing::info!("SIGHUP: the configuration came from the command line and stays");
            return;
        }
        self.reload();
    }

    /// Reopens the audit file and reloads the configuration for all clients that wait.
    fn reload(&self) {
        self.context.state().records.audit.reopen();
        if self.reloading.is_under_way.replace(true) {
            self.reloading.is_wanted.set(true);
            return;
        }
        let (context, reload) = (Rc::clone(&self.context), Rc::clone(&self.reloading));
        let manager = Rc::clone(&self.manager);
        manager.reloading();
        self.context.spawn(async move {
            reload.is_wanted.set(true);
            let reloaded = reload_while_wanted(&context, &reload).await;
            manager.ready(|| context.state().standing(&reload.config.borrow()));
            reloaded
        });
    }
}

/// Reloads until no further reload is requested. Neither a start nor another reload may be in progress.
async fn reload_while_wanted(context: &Rc<Context>, reload: &Rc<Reload>) -> Result<()> {
    while reload.is_wanted.take() {
        let waiting = reload.waiting.take();
        let by = waiting.first().map(|request| request.by.clone());
        let reloaded = reload_once(context, reload, by.as_ref()).await?;
        for request in waiting {
            // The receiver is gone if the client has disconnected.
            let _ = request.reply.send(reloaded.clone());
        }
    }
    reload.is_under_way.set(false);
    // Cgroup changes during the reload were left for this lookup.
    reload.has_changed.set(true);
    Ok(())
}

async fn reload_once(
    context: &Rc<Context>,
    reload: &Rc<Reload>,
    by: Option<&Requester>,
) -> Result<ReloadResult> {
    let what = match by {
        None => "SIGHUP".to_owned(),
        Some(by) => format!(
            "reload, asked for by user {}, process {} ({:?})",
            by.uid, by.pid, by.command
        ),
    };
    let refused = |error: &anyhow::Error| {
        let error = exit::causes(error);
        tracing::error!("{what}: the configuration in force stays: {error}");
        context.state().records.metrics.config_refused();
        *reload.refused.borrow_mut() = Some(error.clone());
        Ok(Err(Refusal { error }))
    };
    let Some(source) = &reload.source else {
        let error = "the configuration came from the command line, and stays; restart the daemon to change it".to_owned();
        return Ok(Err(Refusal { error }));
    };
    let config = (source.read)();
    let config = match config.and_then(|config| reload.accept(config, &context.cgroup)) {
        Ok(config) => config,
        Err(error) => return refused(&error),
    };
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let redecided = match reload::change_policy(context, &config, by).await {
        Ok(redecided) => redecided,
        Err(error) if reload::is_refusal(&error) => return refused(&error),
        Err(error) => return Err(error),
    };
    let rules = config.rules.len();
    *reload.config.borrow_mut() = config;
    *reload.refused.borrow_mut() = None;
    let adopted = reload::adopt_by_change(context).await?;
    context.state().records.metrics.config_loaded();
    reload.note_in_force();
    tracing::info!(
        "{what}: {rules} rule(s) in force; of the sessions {} kept, {} released, {} expired, \
         {adopted} adopted",
        redecided.kept,
        redecided.released,
        redecided.expired,
    );
    reload.has_changed.set(true);
    Ok(Ok(PolicyChange {
        rules,
        kept: redecided.kept,
        released: redecided.released,
        expired: redecided.expired,
        adopted,
    }))
}

impl Reload {
    fn note_in_force(&self) {
        if let Some(source) = &self.source {
            (source.in_force)();
        }
    }

    /// Refuses a configuration that needs a restart, since a reload would only activate a part of it.
    fn accept(&self, config: Config, cgroup: &Cgroup) -> Result<Config> {
        let now = self.config.borrow();
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
            (
                "control.socket",
                now.control.socket != config.control.socket,
            ),
            ("control.group", now.control.group != config.control.group),
            ("audit.path", now.audit != config.audit),
            ("audit.sync", now.audit_sync != config.audit_sync),
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
        // Otherwise connections would be searched for in a cgroup that has replaced the attached one.
        cgroup.check_there()?;
        Ok(config)
    }
}

/// The signals that the daemon handles.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    reopen: Signal,
}

impl Signals {
    /// Installs handlers for the signals.
    ///
    /// # Errors
    ///
    /// Fails if the system refuses a handler.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            reopen: signal(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Received::Stop("SIGINT"),
            _ = self.hangup.recv() => Received::Hangup,
            _ = self.reopen.recv() => Received::Reopen,
        }
    }
}

/// The action that a signal requests.
enum Received {
    Stop(&'static str),
    Hangup,
    Reopen,
}
