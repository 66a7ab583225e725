//! The `session-enforcer` program: reads the command line, calls the command, ends with its status.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use anyhow::Result;
use session_enforcer::{
    cli::{Cli, Command, RunArgs},
    commands::{
        check, detach, doctor, explain, follow, kill, last_good, list, printed, reload_now,
        run as daemon, status, top,
    },
    config::NetworkNamespaces,
    engine::Source,
    exit,
    host::privilege,
    reaper::{pool, worker},
};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

fn main() -> ExitCode {
    // First, so that reapers, of which there are several, use little memory.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == pool::SUBCOMMAND)
    {
        return worker::run().unwrap_or_else(|error| exit::report(&error.into()));
    }
    let cli = match Cli::from_args(std::env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    run(&cli).unwrap_or_else(|error| exit::report(&error))
}

fn run(cli: &Cli) -> Result<ExitCode> {
    if matches!(cli.command, Command::Run(_)) {
        daemon::hold_hangups()?;
    }
    let filter = cli.log_filter()?;
    // The log's thread gets no privileges.
    let _log = if matches!(cli.command, Command::Run(_)) {
        privilege::unprivileged(|| start_log(filter))?
    } else {
        start_log(filter)
    };
    match &cli.command {
        Command::Run(args) => {
            run_daemon(args)?;
        }
        Command::Check(args) => {
            printed(stdout(), |out| check::check(&args.config, args.json, out))?;
        }
        Command::Status(args) => printed(stdout(), |out| status::status(args, out))?,
        Command::List(args) => printed(stdout(), |out| list::list(args, out))?,
        Command::Kill(args) => printed(stdout(), |out| kill::kill(args, out))?,
        Command::Top(args) => top::top(args)?,
        Command::Reload(args) => printed(stdout(), |out| reload_now::reload(args, out))?,
        Command::Events(args) => printed(stdout(), |out| follow::events(args, out))?,
        Command::Explain(args) => printed(stdout(), |out| explain::explain(args, out))?,
        Command::Detach(args) => {
            let pins = args.pin_dir()?;
            printed(stdout(), |out| detach::detach(pins.as_deref(), out))?;
        }
        Command::Doctor(args) => {
            let all = args.network_namespaces == NetworkNamespaces::All;
            let problem = printed(stdout(), |out| Ok(doctor::doctor(args.json, all, out)?))?;
            return Ok(problem.map_or(ExitCode::SUCCESS, ExitCode::from));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn stdout() -> io::StdoutLock<'static> {
    io::stdout().lock()
}

fn run_daemon(args: &RunArgs) -> Result<()> {
    let started = args
        .to_config()
        .and_then(|config| daemon::run(&config, source(args), args.force));
    let Err(error) = started else {
        return Ok(());
    };
    match last_good::stand_in(args, &error) {
        Some(config) => daemon::run(&config, source(args), args.force),
        None => Err(error),
    }
}

/// How SIGHUP reads the configuration; `None` without a file.
fn source(args: &RunArgs) -> Option<Source> {
    args.config_path()?;
    let (read, keep) = (args.clone(), args.clone());
    Some(Source {
        read: Box::new(move || read.to_config()),
        in_force: Box::new(move || last_good::keep(&keep)),
    })
}

/// Maximum number of waiting log lines. The memory is allocated at the start; the library's default is 128,000.
const WAITING_LINES: usize = 4_096;

/// Logs to stderr, because stdout is for the audit. A thread writes; if the reader of the log stops reading, lines are
/// lost and the enforcement continues. Dropping the guard writes the last lines.
fn start_log(filter: Targets) -> WorkerGuard {
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .finish(io::stderr());
    let lines = fmt::layer()
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal());
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .init();
    guard
}
