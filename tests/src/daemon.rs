//! The real daemon, attached to a cgroup of the test's own.

use std::{
    env,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{net::UnixStream, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    audit::Record,
    clock::eventually,
    interpose::{Interposer, ask_about_calls},
    metrics::Metrics,
    pace::patience,
    pins::Pins,
    process::{Finished, block_signals, die_with_parent, keep_capabilities, run_to_end},
    services::enter_mounts,
    tcp::Pair,
};

/// The control socket, in the daemon's directory.
const CONTROL: &str = "control.sock";

/// Names the daemon's binary; `cargo xtask test` sets it.
const BINARY: &str = "SESSION_ENFORCER_BIN";

/// A configuration of one rule, `idle`, with this limit in whole seconds for every connection.
pub fn idle_rule(timeout: Duration) -> String {
    format!(
        "[[rule]]\nname = \"idle\"\nidle_timeout = \"{}s\"\n",
        timeout.as_secs()
    )
}

/// A command that runs the real daemon, without arguments yet.
///
/// # Errors
///
/// Where it has not been built.
pub fn daemon_command() -> Result<Command> {
    let mut command = Command::new(binary()?);
    // The log is read here: no colours, and what the caller's environment asks for is not for it.
    command.env("NO_COLOR", "1").env_remove("RUST_LOG");
    Ok(command)
}

fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os(BINARY) {
        return Ok(path.into());
    }
    // A test program is target/PROFILE/deps/NAME; the newer of the builds is the one meant.
    let own = env::current_exe()?;
    let target = own
        .ancestors()
        .nth(3)
        .context("the test program is not in a target directory")?;
    let built = ["release", "debug"].map(|profile| target.join(profile).join("session-enforcer"));
    let age = |path: &PathBuf| fs::metadata(path).and_then(|found| found.modified()).ok();
    let newest = built
        .into_iter()
        .filter(|path| age(path).is_some())
        .max_by_key(age);
    newest.with_context(|| {
        format!("the daemon is not built: run `cargo xtask test`, or set {BINARY} to its path")
    })
}

/// What a daemon is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    cgroup: &'a Path,
    pins: Option<&'a Path>,
    config: Option<&'a str>,
    args: &'a [&'a str],
    capabilities: Option<&'a [u8]>,
    blocked: &'a [Signal],
    prepare: Option<fn(&mut Command)>,
    mounts_of: Option<u32>,
}

impl<'a> Launch<'a> {
    /// A daemon that watches this cgroup.
    pub fn on(cgroup: &'a Path) -> Self {
        Self {
            cgroup,
            pins: None,
            config: None,
            args: &[],
            capabilities: None,
            blocked: &[],
            prepare: None,
            mounts_of: None,
        }
    }

    /// With a file of this configuration, in TOML.
    #[must_use]
    pub fn config(self, text: &'a str) -> Self {
        Self {
            config: Some(text),
            ..self
        }
    }

    /// With pins in this directory. Without, nothing outlives the daemon.
    #[must_use]
    pub fn pinned(self, pins: &'a Pins) -> Self {
        Self {
            pins: Some(pins.path()),
            ..self
        }
    }

    /// With these arguments more.
    #[must_use]
    pub fn args(self, args: &'a [&'a str]) -> Self {
        Self { args, ..self }
    }

    /// With these capabilities alone, by their numbers in `linux/capability.h`.
    #[must_use]
    pub fn capabilities(self, bits: &'a [u8]) -> Self {
        Self {
            capabilities: Some(bits),
            ..self
        }
    }

    /// By a parent that has blocked these signals, a mask that the daemon inherits.
    #[must_use]
    pub fn blocked(self, signals: &'a [Signal]) -> Self {
        Self {
            blocked: signals,
            ..self
        }
    }

    /// Among the mounts of this process.
    #[must_use]
    pub fn mounts_of(self, pid: u32) -> Self {
        Self {
            mounts_of: Some(pid),
            ..self
        }
    }

    /// With something done to the command at last.
    #[must_use]
    pub fn prepared(self, prepare: fn(&mut Command)) -> Self {
        Self {
            prepare: Some(prepare),
            ..self
        }
    }

    fn command(&self, directory: &Path) -> Result<Command> {
        let mut command = daemon_command()?;
        command.arg("run").arg("--cgroup").arg(self.cgroup);
        if let Some(text) = self.config {
            let path = directory.join("config.toml");
            fs::write(&path, text)?;
            command.arg("--config").arg(path);
        }
        let (audit, control) = (directory.join("audit.json"), directory.join(CONTROL));
        // A file that names its socket is to be obeyed.
        let names_control = self.config.is_some_and(|text| text.contains("[control]"));
        if !names_control && !self.args.contains(&"--control-socket") {
            command.arg("--control-socket").arg(control);
        }
        let defaults = [
            ("--audit", audit.as_path()),
            ("--metrics-listen", Path::new("127.0.0.1:0")),
            ("--pin-dir", self.pins.unwrap_or(Path::new(""))),
        ];
        for (flag, value) in defaults {
            if !self.args.contains(&flag) {
                command.arg(flag).arg(value);
            }
        }
        command.args(self.args);
        if let Some(bits) = self.capabilities {
            keep_capabilities(&mut command, bits);
        }
        block_signals(&mut command, self.blocked);
        if let Some(pid) = self.mounts_of {
            enter_mounts(&mut command, pid)?;
        }
        if let Some(prepare) = self.prepare {
            prepare(&mut command);
        }
        Ok(command)
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Where it ends or is not ready in time, with its log.
    pub fn start(&self) -> Result<Daemon> {
        let mut daemon = self.start_unready()?;
        daemon.when_running("the daemon is ready", |daemon| {
            let (status, _) = daemon.get("/readyz")?;
            Ok((status == 200).then_some(()))
        })?;
        Ok(daemon)
    }

    /// Starts the daemon and waits until everything is attached and adopted, as far as that can be.
    ///
    /// # Errors
    ///
    /// Where it ends or does not come so far in time, with its log.
    pub fn start_unready(&self) -> Result<Daemon> {
        let mut daemon = self.spawn()?;
        daemon.metrics = daemon.when_running("the daemon serves metrics", Daemon::served_at)?;
        Ok(daemon)
    }

    /// Starts the daemon with something that decides about some of its system calls.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn start_interposed(self) -> Result<(Daemon, Interposer)> {
        let mut daemon = self.prepared(ask_about_calls).spawn()?;
        let interposer = Interposer::of(daemon.pid())?;
        daemon.metrics = daemon.when_running("the daemon serves metrics", Daemon::served_at)?;
        daemon.wait_for_trouble("not_adopted", false)?;
        Ok((daemon, interposer))
    }

    /// Starts the daemon and waits for nothing: its metrics need not be served at an address.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn spawn(&self) -> Result<Daemon> {
        let directory = tempfile::tempdir()?;
        let mut command = self.command(directory.path())?;
        let output = |name: &str| File::create(directory.path().join(name));
        command
            .stdin(Stdio::null())
            .stdout(output("stdout")?)
            .stderr(output("log")?);
        let child = die_with_parent(&mut command)
            .spawn()
            .context("starting the daemon")?;
        let metrics = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Daemon {
            child,
            directory,
            metrics,
            quiet: false,
        })
    }

    /// Starts the daemon, kills it after this time, wherever it is then, and returns its records of
    /// terminations.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn cut_short(&self, after: Duration) -> Result<Vec<Record>> {
        let directory = tempfile::tempdir()?;
        let mut command = self.command(directory.path())?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = die_with_parent(&mut command).spawn()?;
        thread::sleep(after);
        child.kill().and_then(|()| child.wait())?;
        let audit = directory.path().join("audit.json");
        let mut found = if audit.exists() {
            records(&audit)?
        } else {
            Vec::new()
        };
        found.retain(Record::is_termination);
        Ok(found)
    }

    /// Starts a daemon that must refuse to run, and waits for its end.
    ///
    /// # Errors
    ///
    /// Where it runs.
    pub fn refused(&self) -> Result<Finished> {
        let directory = tempfile::tempdir()?;
        run_to_end(self.command(directory.path())?, patience())
    }
}

/// The state of a process (proc(5), `/proc/pid/stat`); none where it has gone.
pub fn state_of(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may have any character.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A running daemon. On drop it is killed, and its log and audit go to the test's output, which
/// is shown where the test fails.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: TempDir,
    metrics: SocketAddr,
    quiet: bool,
}

impl Daemon {
    /// Leaves the log and the audit out of the output on drop.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    fn when_running<T>(
        &mut self,
        what: &str,
        look: impl Fn(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let found = eventually(what, patience(), || {
            if let Some(status) = self.child.try_wait()? {
                bail!("the daemon has ended: {status}");
            }
            look(self)
        });
        found.with_context(|| format!("the daemon's log:\n{}", self.log()))
    }

    /// Where the metrics are, from the log.
    fn served_at(&self) -> Result<Option<SocketAddr>> {
        let log = self.log();
        let after = log.split_once("metrics at http://").map(|(_, after)| after);
        let address = after.and_then(|after| after.split_once("/metrics"));
        Ok(address.map(|(address, _)| address.parse()).transpose()?)
    }

    /// Gives the daemon another configuration, and waits until it has put it into force or refused
    /// it, which it says in its log; the new part of the log.
    ///
    /// # Errors
    ///
    /// Where it says neither in time.
    pub fn reload(&self, config: &str) -> Result<String> {
        self.reload_within(config, patience())
    }

    /// The same with another bound, for very many sessions.
    ///
    /// # Errors
    ///
    /// Where it says neither in time.
    pub fn reload_within(&self, config: &str, bound: Duration) -> Result<String> {
        let before = self.log().len();
        self.reload_soon(config)?;
        eventually("the daemon has read its configuration", bound, || {
            let log = self.log().split_off(before);
            let done = log.contains("rule(s) in force") || log.contains("in force stays");
            Ok(done.then_some(log))
        })
    }

    /// Gives the daemon another configuration, and does not wait.
    ///
    /// # Errors
    ///
    /// Where it has ended.
    pub fn reload_soon(&self, config: &str) -> Result<()> {
        self.write_config(config)?;
        self.signal(Signal::SIGHUP)
    }

    /// Writes another configuration, and does not say so to the daemon.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn write_config(&self, config: &str) -> Result<()> {
        // Whole or not at all, as an operator should write it: the daemon may read at any time.
        let (path, next) = (
            self.directory.path().join("config.toml"),
            self.directory.path().join("config.toml.next"),
        );
        fs::write(&next, config)?;
        Ok(fs::rename(next, path)?)
    }

    /// The address of the metrics server.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of its reapers.
    ///
    /// # Errors
    ///
    /// Where it has ended.
    pub fn reapers(&self) -> Result<Vec<u32>> {
        let mut reapers = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            reapers.extend(children.split_whitespace().flat_map(str::parse::<u32>));
        }
        Ok(reapers)
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Waits until it has logged a text. The log is written by a thread of its own: it may come after what
    /// it is about.
    ///
    /// # Errors
    ///
    /// Where it does not log it in time, with its log.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        eventually("a line in the log", patience(), || {
            Ok(self.log().contains(text).then_some(()))
        })
        .with_context(|| format!("{text:?} is not in the log:\n{}", self.log()))
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.directory.path().join("stdout")).unwrap_or_default()
    }

    /// The audit file.
    pub fn audit_path(&self) -> PathBuf {
        self.directory.path().join("audit.json")
    }

    /// Every audit record so far.
    ///
    /// # Errors
    ///
    /// Where a line is not JSON.
    pub fn audit(&self) -> Result<Vec<Record>> {
        records(&self.audit_path())
    }

    /// The records of terminations so far, those that failed or were only observed included.
    ///
    /// # Errors
    ///
    /// Where a line is not JSON.
    pub fn terminations(&self) -> Result<Vec<Record>> {
        let mut records = self.audit()?;
        records.retain(Record::is_termination);
        Ok(records)
    }

    /// Waits until there are at least this many records of terminations.
    ///
    /// # Errors
    ///
    /// Where they do not come.
    pub fn wait_for_terminations(&self, count: usize) -> Result<Vec<Record>> {
        eventually("terminations in the audit", patience(), || {
            let records = self.terminations()?;
            Ok((records.len() >= count).then_some(records))
        })
        .with_context(|| format!("{count} records, the daemon's log:\n{}", self.log()))
    }

    /// Waits for the record of the only termination that there must be.
    ///
    /// # Errors
    ///
    /// Where there is none or are several.
    pub fn wait_for_termination(&self) -> Result<Record> {
        let mut records = self.wait_for_terminations(1)?;
        ensure!(
            records.len() == 1,
            "one termination was expected: {records:#?}"
        );
        records.pop().context("one record")
    }

    /// Waits for the record of this connection's only termination.
    ///
    /// # Errors
    ///
    /// Where there is none or are several.
    pub fn wait_for_termination_of(&self, pair: &Pair) -> Result<Record> {
        let mut records = eventually("a termination in the audit", patience(), || {
            let records = self.terminations_of(pair)?;
            Ok((!records.is_empty()).then_some(records))
        })?;
        ensure!(
            records.len() == 1,
            "one termination was expected: {records:#?}"
        );
        records.pop().context("one record")
    }

    /// Waits until there are so many records of this connection's terminations.
    ///
    /// # Errors
    ///
    /// Where they do not come.
    pub fn wait_for_terminations_of(&self, pair: &Pair, count: usize) -> Result<Vec<Record>> {
        eventually("terminations in the audit", patience(), || {
            let records = self.terminations_of(pair)?;
            Ok((records.len() >= count).then_some(records))
        })
    }

    /// The records of this connection's terminations so far.
    ///
    /// # Errors
    ///
    /// Where a line is not JSON.
    pub fn terminations_of(&self, pair: &Pair) -> Result<Vec<Record>> {
        let ports = [pair.client_address.port(), pair.server_address.port()];
        let mut records = self.terminations()?;
        records.retain(|record| record.ports() == ports);
        Ok(records)
    }

    /// Scrapes the metrics.
    ///
    /// # Errors
    ///
    /// Where the daemon does not serve them.
    pub fn metrics(&self) -> Result<Metrics> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics: {status} {body}");
        Ok(Metrics::new(body))
    }

    /// The sum of the samples of a metric, now.
    ///
    /// # Errors
    ///
    /// Where there is no such metric.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        self.metrics()?.get(name, labels)
    }

    /// Waits until a metric has a value.
    ///
    /// # Errors
    ///
    /// Where it does not come to it.
    pub fn wait_for_metric(&self, name: &str, labels: &[(&str, &str)], value: f64) -> Result<()> {
        let mut last = f64::NAN;
        eventually("the value of a metric", patience(), || {
            last = self.metric(name, labels)?;
            Ok((last == value).then_some(()))
        })
        .with_context(|| format!("{name} {labels:?}: {last} and not {value}"))
    }

    /// Whether the daemon says that it is in this trouble, by the metric and by `/readyz`.
    ///
    /// # Errors
    ///
    /// Where the two do not agree.
    pub fn is_degraded(&self, cause: &str) -> Result<bool> {
        let name = "session_enforcer_degraded";
        let all = self.metric(name, &[])?;
        let degraded = self.metric(name, &[("cause", cause)])?;
        let (status, body) = self.get("/readyz")?;
        let after = self.metric(name, &[])?;
        ensure!(
            all != after || (status == 200) == (all == 0.0),
            "{all} troubles, and {status} {body}"
        );
        Ok(degraded == 1.0)
    }

    /// Waits until the daemon is in this trouble, or is not.
    ///
    /// # Errors
    ///
    /// Where that does not come.
    pub fn wait_for_trouble(&self, cause: &str, wanted: bool) -> Result<()> {
        eventually("a trouble to begin or end", patience(), || {
            Ok((self.is_degraded(cause)? == wanted).then_some(()))
        })
        .with_context(|| format!("{cause}: not {wanted}"))
    }

    /// Asks the HTTP server; the status and the body.
    ///
    /// # Errors
    ///
    /// Where it does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.metrics).context("connecting to the daemon")?;
        stream.set_read_timeout(Some(patience()))?;
        // In one piece: the daemon does not wait long for the rest of a request.
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("GET {path}"))?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("an answer without a body")?;
        let status = head
            .split(' ')
            .nth(1)
            .context("an answer without a status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.path().join(CONTROL)
    }

    /// Asks the control socket; the status and the body.
    ///
    /// # Errors
    ///
    /// Where it does not answer.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let mut stream = UnixStream::connect(self.control_socket())?;
        stream.set_read_timeout(Some(patience()))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = Vec::new();
        stream
            .read_to_end(&mut answer)
            .with_context(|| format!("{method} {path}"))?;
        whole_answer(&answer)
    }

    /// Runs a command that asks this daemon, to its end.
    ///
    /// # Errors
    ///
    /// Where it does not end.
    pub fn command(&self, args: &[&str]) -> Result<Finished> {
        run_to_end(self.command_for(args)?, patience())
    }

    /// The same command, not run yet.
    ///
    /// # Errors
    ///
    /// Where the program is not built.
    pub fn command_for(&self, args: &[&str]) -> Result<Command> {
        let mut command = daemon_command()?;
        command
            .args(args)
            .arg("--socket")
            .arg(self.control_socket());
        Ok(command)
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// Where the daemon has gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            signal,
        )?)
    }

    /// Stops the daemon with SIGSTOP, and waits until it stands still.
    ///
    /// # Errors
    ///
    /// Where it has gone.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        eventually("the daemon stands still", patience(), || {
            Ok((state_of(self.pid()) == Some('T')).then_some(()))
        })
    }

    /// Lets a daemon that was frozen go on.
    ///
    /// # Errors
    ///
    /// Where it has gone.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Waits until the daemon has ended.
    ///
    /// # Errors
    ///
    /// Where it runs on.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        eventually("the daemon ends", patience(), || {
            Ok(self.child.try_wait()?)
        })
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    ///
    /// Where it does not die.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait()?;
        Ok(())
    }

    /// Stops it with SIGTERM, and makes sure that it ends with status 0. The audit and the log
    /// can still be read.
    ///
    /// # Errors
    ///
    /// Where it ends otherwise.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = self.wait()?;
        let ended = (status.code(), status.signal());
        ensure!(
            ended == (Some(0), None),
            "the daemon ended with {status}:\n{}",
            self.log()
        );
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.quiet {
            let audit = fs::read_to_string(self.audit_path()).unwrap_or_default();
            let last: Vec<_> = audit.lines().rev().take(10).collect();
            println!("the daemon's log:\n{}", self.log());
            println!(
                "the last lines of its audit, from the end:\n{}",
                last.join("\n")
            );
        }
    }
}

/// The status and the body of an HTTP answer, which may have come in chunks.
///
/// # Errors
///
/// Where it is no whole answer.
pub fn whole_answer(answer: &[u8]) -> Result<(u16, String)> {
    let text = std::str::from_utf8(answer)?;
    let (head, mut body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("an answer without a body: {text:?}"))?;
    let status = head
        .split(' ')
        .nth(1)
        .context("an answer without a status")?;
    let status = status.parse()?;
    if !head.contains("transfer-encoding: chunked") {
        return Ok((status, body.to_owned()));
    }
    let mut whole = String::new();
    loop {
        let (length, rest) = body.split_once("\r\n").context("a chunk was cut")?;
        let length = usize::from_str_radix(length, 16)?;
        whole += rest.get(..length).context("a chunk was cut")?;
        body = rest.get(length + 2..).context("a chunk was cut")?;
        if length == 0 {
            return Ok((status, whole));
        }
    }
}

/// The records of an audit file. Its last line may be half written, and a daemon that was killed may have cut one.
///
/// # Errors
///
/// Where a whole line is not JSON.
pub fn records(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let written = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let whole = written.lines().filter(|line| line.ends_with('}'));
    whole.map(Record::parse).collect()
}
