//! A process that opens connections in a cgroup and a network namespace and measures them.
//!
//! It is this program, started again. A request is a line on its standard input, the answer a line on its
//! standard output. It handles one request at a time, so nothing disturbs a measurement.

mod serve;

use std::{
    fmt::Display,
    io::{BufRead as _, BufReader, Write as _},
    os::fd::AsFd as _,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags};
use session_enforcer_tests::{Place, Stop, pin_to_cpu};

pub(crate) use serve::serve;

/// The argument that makes this program a worker.
pub(crate) const ARGUMENT: &str = "worker";

/// The time limit of the longest request on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// The maximum number of connections of a worker, which holds both ends and may open 20,000 files.
pub(crate) const MAX_PAIRS: usize = 9_900;

/// A running worker. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a worker at a place and, if given, only on this processor. `agent` is the path of the agent's
    /// binary.
    pub(crate) fn start(agent: &Path, place: &Place, cpu: Option<usize>) -> Result<Self> {
        let own = std::env::current_exe()?;
        let mut command = place.command(agent, own);
        command.arg(ARGUMENT);
        if let Some(cpu) = cpu {
            pin_to_cpu(&mut command, cpu)?;
        }
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a worker")?;
        let answers = child.stdout.take().context("a worker's output")?;
        Ok(Self {
            requests: child.stdin.take(),
            answers: BufReader::new(answers),
            child,
        })
    }

    /// The worker's PID.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn ask(&mut self, stop: &Stop, request: impl Display) -> Result<Vec<f64>> {
        self.begin(&request)?;
        self.answer(stop)
            .with_context(|| format!("a worker was asked to {request}"))
    }

    /// The same for an answer of one number.
    pub(crate) fn number(&mut self, stop: &Stop, request: impl Display) -> Result<f64> {
        let answer = self.ask(stop, &request)?;
        ensure!(answer.len() == 1, "{request} has the answer {answer:?}");
        Ok(answer[0])
    }

    /// Sends a request. A call of [`Self::answer`] must follow.
    pub(crate) fn begin(&mut self, request: impl Display) -> Result<()> {
        let requests = self.requests.as_mut().context("the worker's input")?;
        writeln!(requests, "{request}").context("asking a worker")
    }

    /// Waits for the answer to the last request.
    pub(crate) fn answer(&mut self, stop: &Stop) -> Result<Vec<f64>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut fds = [PollFd::new(
                self.answers.get_ref().as_fd(),
                PollFlags::POLLIN,
            )];
            stop.wait(&mut fds, end.saturating_duration_since(Instant::now()))?;
            if fds[0].any().unwrap_or(false) {
                break;
            }
            ensure!(Instant::now() < end, "no answer for {PATIENCE:?}");
        }
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        match line.trim_end().split_once(' ') {
            Some(("ok", numbers)) => numbers.split(' ').map(|word| Ok(word.parse()?)).collect(),
            Some(("error", text)) => bail!("{text}"),
            _ => bail!("the worker has ended"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The worker may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
