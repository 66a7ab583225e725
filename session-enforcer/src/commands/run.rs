//! `run`: opens everything in an order in which a failure leaves nothing behind, and starts the engine.

use std::{
    io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::{
    signal::{SigHandler, SigSet, Signal, signal},
    stat::{self, umask},
};
use tokio::{runtime, sync::mpsc, task::LocalSet};

use crate::{
    commands::{detach, probe},
    config::{self, Config, Mode, NetworkNamespaces, Rule},
    datapath::{BpfError, Datapath, Options, PinDir},
    engine::{
        Begun, Channels, Engine, Parts, Reloading, Signals, Source,
        owner_resolver::{OwnerResolver, UserError},
    },
    exit::{ExitStatus, Failure, OrExit as _, causes},
    host::{
        boot,
        cgroup::{self, Cgroup},
        clock, privilege,
    },
    reaper::{
        diag::DiagSocket,
        pool::{Next, Pool, Purpose},
        protocol::{Reply, Request},
    },
    report::{
        audit::{Audit, AuditError},
        control::{self, Admission},
        http::{self, BindError},
        metrics::Metrics,
        to_engine,
    },
};

/// The start waits this long for the test reset and then continues without its result.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);

/// How often, and at which interval, the start checks whether another daemon's programs are gone.
const OTHERS_LOOKS: u32 = 50;
const OTHERS_PAUSE: Duration = Duration::from_millis(20);

/// A stop waits this long for the clients of the control socket to take the rest of their answers.
const ANSWERS_PATIENCE: Duration = Duration::from_secs(1);

/// The maximum number of HTTP requests in the engine's queue, which it answers together.
const WAITING_REQUESTS: usize = 64;

/// Runs the daemon until a signal stops it. `source` reads the configuration again at SIGHUP. With
/// `is_forced` the daemon starts even if another daemon is attached to the same cgroup.
///
/// # Errors
///
/// Fails if a prerequisite is missing or in use. Nothing is attached then, except what a killed daemon had
/// left attached.
pub fn run(config: &Config, source: Option<Source>, is_forced: bool) -> Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let all_namespaces = config.network_namespaces == NetworkNamespaces::All;
    probe::require(all_namespaces)?;
    raise_file_limit();
    keep_own_rights();
    let cgroup = open_cgroup(config)?;
    // Take the lock of the pins before any other shared resource: its error names the other daemon.
    let pins = config.pin_dir.as_deref().map(PinDir::hold).transpose();
    let pins = pins.map_err(|error| detach::failure(&error))?;
    let metrics = config.metrics_listen.as_ref().map(bind_metrics);
    let metrics = metrics.transpose()?;
    let control = bind_control(&config.control)?;
    // The audit's thread must have no more privileges than the engine has after the start.
    let audit = privilege::unprivileged(|| Audit::open(&config.audit, config.audit_sync))?;
    let audit = audit.map_err(audit_failure)?;
    privilege::go_first();
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    let serving = serve(
        config,
        source,
        cgroup,
        pins,
        (metrics, control),
        audit,
        is_forced,
    );
    let served = LocalSet::new().block_on(&runtime, serving);
    served.map_err(
        |error| match is_shortage(error.as_ref()) && !error.is::<Failure>() {
            true => shortage(&causes(&error)).into(),
            false => error,
        },
    )
}

async fn serve(
    config: &Config,
    source: Option<Source>,
    cgroup: Cgroup,
    pins: Option<PinDir>,
    (address, control): (Option<http::Address>, Option<ControlSocket>),
    audit: Audit,
    is_forced: bool,
) -> Result<()> {
    let signals = Signals::new().context("taking over signals")?;
    unblock_signals();
    // While SIGCHLD is ignored, the kernel itself reaps child processes that have ended. While SIGXFSZ is ignored, a
    // write beyond RLIMIT_FSIZE fails like one to a full disk.
    for name in [Signal::SIGCHLD, Signal::SIGXFSZ] {
        // SAFETY: ignoring a signal installs no handler code.
        let _ = unsafe { signal(name, SigHandler::SigIgn) };
    }
    let pool = Pool::start()?;
    try_a_reset(&pool).await?;
    let own_netns = own_netns()?;
    let all_namespaces = config.network_namespaces == NetworkNamespaces::All;
    let options = Options {
        max_sessions: config.max_sessions,
        only_netns: (!all_namespaces).then_some(own_netns),
        notes_owners: config.asks_owner(),
        verbose: tracing::enabled!(target: "session_enforcer_ebpf", tracing::Level::DEBUG),
    };
    let datapath = Datapath::load(options, pins);
    let mut datapath = datapath.map_err(|error| load_failure(&error))?;
    if !is_forced {
        refuse_others(&datapath, &cgroup).await?;
    }
    let (events, log) = (datapath.take_events()?, datapath.take_log()?);
    let control = control.map(|(listener, gid)| {
        anyhow::Ok(control::Server {
            listener,
            admission: Admission::new(gid),
            sessions: datapath.table_in_use(),
        })
    });
    let control = control.transpose()?;
    let parts = Parts {
        datapath,
        owner_resolver: OwnerResolver::default(),
        audit,
        metrics: metrics(config)?,
        lag_ns: clock::coarse_lag_ns(),
        own_netns,
    };
    let (requests_in, requests) = mpsc::channel(WAITING_REQUESTS);
    let reloading = Reloading {
        source,
        config: config.clone(),
    };
    let channels = Channels {
        events,
        log,
        requests,
        signals,
    };
    let announced = (config.clone(), cgroup.path().to_owned());
    let engine = Engine::new(parts, pool, cgroup, channels, reloading)?;
    let begun = move |begun| announce(&announced.0, &announced.1, begun);
    let (ended, answers) = sync::mpsc::channel::<()>();
    let served = move || start_http(address, control, requests_in, ended);
    let run = engine.run(privilege::confine_engine, begun, served);
    let result = run.await.map_err(start_failure);
    // An error means that the thread has ended, that a client does not read, or that nothing was served.
    let _ = answers.recv_timeout(ANSWERS_PATIENCE);
    result
}

/// Takes the owner's rights out of the umask: the daemon could not open again what it makes.
fn keep_own_rights() {
    let mask = umask(stat::Mode::empty());
    umask(mask & (stat::Mode::S_IRWXG | stat::Mode::S_IRWXO));
}

/// Refuses to start beside another daemon: each would reset the other's sessions and record them as gone.
/// Retries, because the kernel takes a moment to detach the programs of a killed daemon.
async fn refuse_others(datapath: &Datapath, cgroup: &Cgroup) -> Result<(), Failure> {
    let mut others = datapath.others(cgroup);
    for _ in 0..OTHERS_LOOKS {
        if others.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(OTHERS_PAUSE).await;
        others = datapath.others(cgroup);
    }
    let numbers: Vec<String> = others.iter().map(ToString::to_string).collect();
    let message = format!(
        "{}: the programs of another session-enforcer are attached here (program {}): stop its daemon; if \
         it was killed, run `session-enforcer detach --pin-dir DIR` with its daemon.pin_dir; or start with \
         --force",
        cgroup.path().display(),
        numbers.join(", ")
    );
    Err(Failure::new(ExitStatus::Other, message))
}

/// Tests whether this kernel resets connections. If the test does not answer in time, the start continues; a
/// hanging reaper is reported later.
async fn try_a_reset(pool: &Pool) -> Result<()> {
    let asked = pool.ask(Purpose::Others, &Request::Probe, None).await;
    let mut exchange = asked.context("requesting a test of a reset from a reaper")?;
    loop {
        match exchange.next(PROBE_PATIENCE).await {
            Next::Reply(Reply::Probed(probed), _) => probe::require_resets(&probed)?,
            Next::Reply(Reply::Done { .. }, _) => return Ok(()),
            Next::Reply(..) => {}
            Next::Ended => anyhow::bail!("a reaper ended during the test of a reset"),
            Next::Silent => {
                tracing::warn!(
                    "SOCK_DESTROY: no answer yet; before Linux 6.9 a process that keeps a socket \
                     locked delays all resets"
                );
                exchange.leave_behind();
                tokio::task::spawn_local(async move {
                    while let Next::Silent | Next::Reply(..) = exchange.next(PROBE_PATIENCE).await {
                        exchange.condition();
                    }
                });
                return Ok(());
            }
        }
    }
}

fn own_netns() -> Result<u64, Failure> {
    let cookie = DiagSocket::open().and_then(|diag| diag.netns_cookie());
    cookie.or_exit(ExitStatus::Unavailable)
}

/// Errors of the kernel at the start, and unknown users, have their own exit statuses.
fn start_failure(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(error) => load_failure(error).into(),
        None => policy_failure(error),
    }
}

fn announce(config: &Config, cgroup: &Path, begun: Begun) {
    let mode = match config.mode {
        Mode::Enforce => "enforcing",
        Mode::Observe => "observing",
    };
    tracing::info!(
        "{mode} {} rule(s) on {}, {} session(s) taken over, {} existing connection(s) adopted",
        config.rules.len(),
        cgroup.display(),
        begun.taken_over,
        begun.adopted,
    );
}

/// The listening socket, and the group whose members may connect.
type ControlSocket = (UnixListener, Option<u32>);

/// Binds the address of the metrics. If another program listens there, the daemon enforces without metrics until
/// the address is free: any local user can take a port while no daemon runs.
fn bind_metrics(listen: &config::MetricsListen) -> Result<http::Address> {
    match http::bind(listen) {
        Ok(listener) => Ok(http::Address::Bound(listener)),
        Err(error) if error.is_in_use() => {
            tracing::error!(
                "{error}; the daemon enforces without metrics until the address is free"
            );
            Ok(http::Address::InUse(listen.clone()))
        }
        Err(error) => Err(bind_failure(error)),
    }
}

/// Binds the control socket. If the configuration does not name one, a failure to bind is only logged: the
/// daemon enforces without it.
fn bind_control(wanted: &config::Control) -> Result<Option<ControlSocket>> {
    match control::bind(wanted) {
        Ok(bound) => Ok(bound),
        Err(error) if wanted.socket == config::ControlSocket::Default && wanted.group.is_none() => {
            tracing::warn!(
                "no control socket, and no commands such as list and kill for this daemon: {error}"
            );
            Ok(None)
        }
        Err(error) if error.is_configuration() => {
            Err(Failure::new(ExitStatus::Configuration, error.to_string()).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Starts the HTTP thread without privileges, because it reads data from clients.
fn start_http(
    address: Option<http::Address>,
    control: Option<control::Server>,
    requests: mpsc::Sender<to_engine::Request>,
    ended: sync::mpsc::Sender<()>,
) -> Result<()> {
    if let Some(control) = &control {
        let path = http::path_of(&control.listener).context("control.socket")?;
        tracing::info!("control socket at {}", path.display());
    }
    if address.is_none() && control.is_none() {
        return Ok(());
    }
    let started = privilege::unprivileged(|| http::start(address, control, requests, ended))?;
    started.context("starting the thread that serves the metrics and the control socket")
}

fn metrics(config: &Config) -> Result<Metrics> {
    let rule = |rule: &Rule| (rule.name.clone(), config.mode_of(rule));
    let rules: Vec<_> = config.rules.iter().map(rule).collect();
    let version = env!("CARGO_PKG_VERSION");
    Metrics::new(
        &rules,
        config.max_sessions,
        version,
        &boot::kernel_release(),
    )
    .context("preparing the metrics")
}

/// Raises the limit of open files. Each network namespace with sessions takes a descriptor, and the usual
/// soft limit of 1,024 is too low for a large container host. If the limit cannot be raised, the later
/// failure to open a descriptor is reported.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("raising the limit of open files to {hard}: {error}");
    }
}

/// Blocks SIGHUP and SIGUSR1 until their handlers exist, because their default action would end the process.
/// Threads that are started later inherit the mask, so the main thread receives them.
///
/// # Errors
///
/// Fails if the system refuses.
pub fn hold_hangups() -> Result<()> {
    let held = SigSet::from_iter([Signal::SIGHUP, Signal::SIGUSR1]);
    held.thread_block().context("blocking SIGHUP and SIGUSR1")
}

/// Unblocks the signals after their handlers exist. Also unblocks signals that stop the daemon, which a
/// parent may have blocked: the mask is inherited.
fn unblock_signals() {
    if let Err(error) = SigSet::empty().thread_set_mask() {
        tracing::warn!("unblocking signals: {error}");
    }
}

/// Opens the cgroup of the configuration, or the root cgroup.
///
/// # Errors
///
/// Fails if the cgroup does not exist.
pub(crate) fn open_cgroup(config: &Config) -> Result<Cgroup, Failure> {
    let (path, status): (PathBuf, _) = match &config.cgroup {
        Some(path) => (path.clone(), ExitStatus::Configuration),
        None => (
            cgroup::mount_point().or_exit(ExitStatus::Unavailable)?,
            ExitStatus::Unavailable,
        ),
    };
    Cgroup::open(&path).map_err(|error| Failure::new(status, format!("daemon.cgroup: {error}")))
}

/// An audit that cannot be opened is an error of the configuration, which names it.
fn audit_failure(error: AuditError) -> anyhow::Error {
    match error {
        AuditError::Thread(_) => error.into(),
        named => Failure::new(ExitStatus::Configuration, named.to_string()).into(),
    }
}

/// A Unix socket that others could replace is an error of the configuration.
fn bind_failure(error: BindError) -> anyhow::Error {
    match error {
        BindError::Untrusted(_) => {
            Failure::new(ExitStatus::Configuration, error.to_string()).into()
        }
        other @ BindError::Bind { .. } => other.into(),
    }
}

/// A user that the host does not have is an error of the configuration.
fn policy_failure(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<UserError>() {
        Ok(error) => Failure::new(ExitStatus::Configuration, error.to_string()).into(),
        Err(error) => error,
    }
}

/// The kernel refuses programs for lack of privileges or of a feature; each has its own exit status.
fn load_failure(error: &BpfError) -> Failure {
    if let BpfError::Pins(error) = error {
        return detach::failure(error);
    }
    if let BpfError::Taken { .. } = error {
        return Failure::new(ExitStatus::Other, error.to_string());
    }
    if is_permission(error) {
        let message = format!("{error}; CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed");
        return Failure::new(ExitStatus::NoPermission, message);
    }
    if is_shortage(error) {
        return shortage(&error.to_string());
    }
    let message = format!(
        "{error}; Linux 6.1 or newer with CONFIG_BPF_EVENTS is needed; `session-enforcer doctor` shows the details"
    );
    Failure::new(ExitStatus::Unavailable, message)
}

/// Whether the kernel lacks no feature, but descriptors or memory.
fn is_shortage(error: &(dyn std::error::Error + 'static)) -> bool {
    has_errno(error, |errno| {
        [libc::EMFILE, libc::ENFILE, libc::ENOMEM].contains(&errno)
    })
}

fn shortage(error: &str) -> Failure {
    let message = format!(
        "{error}; raise the limit: LimitNOFILE=, LimitMEMLOCK=, or the memory of the service's cgroup"
    );
    Failure::new(ExitStatus::Other, message)
}

fn has_errno(error: &(dyn std::error::Error + 'static), is_meant: impl Fn(i32) -> bool) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.and_then(io::Error::raw_os_error).is_some_and(&is_meant)
    })
}

/// Whether missing privileges caused the error.
pub(crate) fn is_permission(error: &(dyn std::error::Error + 'static)) -> bool {
    has_errno(error, |errno| [libc::EPERM, libc::EACCES].contains(&errno))
}
