//! The real daemon, attached to a cgroup of the test.

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
    clock::{Moment, eventually},
    interpose::{Interposer, ask_about_calls},
    metrics::Metrics,
    pace::patience,
    pins::Pins,
    process::{Finished, block_signals, die_with_parent, keep_capabilities, run_to_end},
    services::enter_mounts,
    tcp::Pair,
};

/// The control socket in the daemon's directory.
const CONTROL: &str = "control.sock";

/// The environment variable with the path of the daemon's binary. `cargo xtask test` sets it.
pub const BINARY: &str = "SESSION_ENFORCER_BIN";

/// A configuration with one rule, `idle`, that has this limit in whole seconds and matches every connection.
pub fn idle_rule(timeout: Duration) -> String {
    format!(
        "[[rule]]\nname = \"idle\"\nidle_timeout = \"{}s\"\n",
        timeout.as_secs()
    )
}

/// A command for the real daemon, without arguments.
///
/// # Errors
///
/// Fails if the daemon is not built.
pub fn daemon_command() -> Result<Command> {
    let mut command = Command::new(binary()?);
    // The tests read the log, so disable colours and the caller's log settings.
    command.env("NO_COLOR", "1").env_remove("RUST_LOG");
    Ok(command)
}

fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os(BINARY) {
        return Ok(path.into());
    }
    // A test program is target/PROFILE/deps/NAME. Use the newest build of the daemon.
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

/// The parameters of a daemon.
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

    /// Sets the configuration, in TOML.
    #[must_use]
    pub fn config(self, text: &'a str) -> Self {
        Self {
            config: Some(text),
            ..self
        }
    }

    /// Sets the directory of the pins. Without one, nothing outlives the daemon.
    #[must_use]
    pub fn pinned(self, pins: &'a Pins) -> Self {
        Self {
            pins: Some(pins.path()),
            ..self
        }
    }

    /// Adds these arguments.
    #[must_use]
    pub fn args(self, args: &'a [&'a str]) -> Self {
        Self { args, ..self }
    }

    /// Limits the daemon to these capabilities, numbered as in `linux/capability.h`.
    #[must_use]
    pub fn capabilities(self, bits: &'a [u8]) -> Self {
        Self {
            capabilities: Some(bits),
            ..self
        }
    }

    /// Blocks these signals in the parent, so that the daemon inherits the mask.
    #[must_use]
    pub fn blocked(self, signals: &'a [Signal]) -> Self {
        Self {
            blocked: signals,
            ..self
        }
    }

    /// Runs the daemon in the mount namespace of this process.
    #[must_use]
    pub fn mounts_of(self, pid: u32) -> Self {
        Self {
            mounts_of: Some(pid),
            ..self
        }
    }

    /// Calls `prepare` with the final command.
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
        // A configured control socket takes precedence.
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
    /// Fails with the daemon's log if it ends or is not ready in time.
    pub fn start(&self) -> Result<Daemon> {
        let mut daemon = self.start_unready()?;
        daemon.when_running("the daemon is ready", |daemon| {
            let (status, _) = daemon.get("/readyz")?;
            Ok((status == 200).then_some(()))
        })?;
        Ok(daemon)
    }

    /// Starts the daemon and waits until its log names the address of the metrics, which follows the attachment
    /// and the first adoption. The daemon need not be ready.
    ///
    /// # Errors
    ///
    /// Fails with the daemon's log if it ends or does not serve them in time.
    pub fn start_unready(&self) -> Result<Daemon> {
        let mut daemon = self.spawn()?;
        daemon.metrics = daemon.when_running("the daemon serves metrics", Daemon::served_at)?;
        Ok(daemon)
    }

    /// Starts the daemon with an interposer for some of its system calls.
    ///
    /// # Errors
    ///
    /// Fails as [`Launch::start_unready`] does.
    pub fn start_interposed(self) -> Result<(Daemon, Interposer)> {
        let mut daemon = self.prepared(ask_about_calls).spawn()?;
        let interposer = Interposer::of(daemon.pid())?;
        daemon.metrics = daemon.when_running("the daemon serves metrics", Daemon::served_at)?;
        daemon.wait_for_degraded("not_adopted", false)?;
        Ok((daemon, interposer))
    }

    /// Starts the daemon without waiting. Its metrics need not be served at an address.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be started.
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

    /// Starts the daemon, kills it after this time, and returns its records of terminations.
    ///
    /// # Errors
    ///
    /// Fails if the daemon cannot be started.
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
    /// Fails if the daemon runs.
    pub fn refused(&self) -> Result<Finished> {
        let directory = tempfile::tempdir()?;
        run_to_end(self.command(directory.path())?, patience())
    }
}

/// The state of a process (proc(5), `/proc/pid/stat`). `None` if it has ended.
pub fn state_of(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state follows the process name, which may contain any character.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A running daemon. Dropping it kills it and prints its log and audit, which the test runner shows if the
/// test fails.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: TempDir,
    metrics: SocketAddr,
    quiet: bool,
}

impl Daemon {
    /// Does not print the log and the audit when dropped.
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

    /// The address of the metrics, from the log.
    fn served_at(&self) -> Result<Option<SocketAddr>> {
        let log = self.log();
        let after = log.split_once("metrics at http://").map(|(_, after)| after);
        let address = after.and_then(|after| after.split_once("/metrics"));
        Ok(address.map(|(address, _)| address.parse()).transpose()?)
    }

    /// Changes the configuration and waits until the log reports that it is in force or refused. Returns the
    /// new part of the log.
    ///
    /// # Errors
    ///
    /// Fails if the log reports neither in time.
    pub fn reload(&self, config: &str) -> Result<String> {
        self.reload_within(config, patience())
    }

    /// The same with another time limit, for very many sessions.
    ///
    /// # Errors
    ///
    /// Fails if the log reports neither in time.
    pub fn reload_within(&self, config: &str, bound: Duration) -> Result<String> {
        let before = self.log().len();
        self.reload_soon(config)?;
        eventually("the daemon has read its configuration", bound, || {
            let log = self.log().split_off(before);
            let done = log.contains("rule(s) in force") || log.contains("in force stays");
            Ok(done.then_some(log))
        })
    }

    /// Changes the configuration without waiting.
    ///
    /// # Errors
    ///
    /// Fails if the daemon has ended.
    pub fn reload_soon(&self, config: &str) -> Result<()> {
        self.write_config(config)?;
        self.signal(Signal::SIGHUP)
    }

    /// Writes another configuration without a signal to the daemon.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write_config(&self, config: &str) -> Result<()> {
        // Replace the file atomically, because the daemon may read it at any time.
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

    /// The daemon's PID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The PIDs of its reapers.
    ///
    /// # Errors
    ///
    /// Fails if the daemon has ended.
    pub fn reapers(&self) -> Result<Vec<u32>> {
        let mut reapers = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            reapers.extend(children.split_whitespace().flat_map(str::parse::<u32>));
        }
        Ok(reapers)
    }

    /// The log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Waits until the log contains a text. A separate thread writes the log, so a line may appear after its
    /// event.
    ///
    /// # Errors
    ///
    /// Fails with the log if the text does not appear in time.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        eventually("a line in the log", patience(), || {
            Ok(self.log().contains(text).then_some(()))
        })
        .with_context(|| format!("{text:?} is not in the log:\n{}", self.log()))
    }

    /// The standard output so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.directory.path().join("stdout")).unwrap_or_default()
    }

    /// The path of the audit file.
    pub fn audit_path(&self) -> PathBuf {
        self.directory.path().join("audit.json")
    }

    /// All audit records so far.
    ///
    /// # Errors
    ///
    /// Fails if a line is not JSON.
    pub fn audit(&self) -> Result<Vec<Record>> {
        records(&self.audit_path())
    }

    /// The records of terminations so far, including failed and observed ones.
    ///
    /// # Errors
    ///
    /// Fails if a line is not JSON.
    pub fn terminations(&self) -> Result<Vec<Record>> {
        let mut records = self.audit()?;
        records.retain(Record::is_termination);
        Ok(records)
    }

    /// Waits for at least this number of records of terminations.
    ///
    /// # Errors
    ///
    /// Fails if they do not appear in time.
    pub fn wait_for_terminations(&self, count: usize) -> Result<Vec<Record>> {
        eventually("terminations in the audit", patience(), || {
            let records = self.terminations()?;
            Ok((records.len() >= count).then_some(records))
        })
        .with_context(|| format!("{count} records, the daemon's log:\n{}", self.log()))
    }

    /// Waits for the record of the only termination.
    ///
    /// # Errors
    ///
    /// Fails if there is none or more than one.
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
    /// Fails if there is none or more than one.
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

    /// Waits for the only record of this connection, and checks it. Neither end may have seen the reset early.
    ///
    /// # Errors
    ///
    /// See [`wait_for_termination_of`](Self::wait_for_termination_of) and [`Pair::ends`].
    pub fn assert_reset_of(
        &self,
        pair: &Pair,
        reason: &str,
        since: &Moment,
        limit: Duration,
    ) -> Result<()> {
        for end in pair.ends()? {
            end.assert_not_early(since, limit);
        }
        let record = self.wait_for_termination_of(pair)?;
        record.assert_reset(reason, since, limit);
        Ok(())
    }

    /// Waits for the record of the connection from this port.
    ///
    /// # Errors
    ///
    /// Fails if there is none in time.
    pub fn wait_for_termination_from(&self, port: u16) -> Result<Record> {
        let found = eventually("the end of a session", 2 * patience(), || {
            let mut records = self.terminations()?.into_iter();
            Ok(records.find(|record| record.ports()[0] == port))
        });
        found.with_context(|| format!("port {port}"))
    }

    /// The number of repairs of this kind that comparisons have made.
    ///
    /// # Errors
    ///
    /// See [`metric`](Self::metric).
    pub fn repaired(&self, kind: &str) -> Result<f64> {
        let name = "session_enforcer_reconcile_repaired_total";
        self.metric(name, &[("kind", kind)])
    }

    /// Waits for this number of records of this connection's terminations.
    ///
    /// # Errors
    ///
    /// Fails if they do not appear in time.
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
    /// Fails if a line is not JSON.
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
    /// Fails if the daemon does not serve them.
    pub fn metrics(&self) -> Result<Metrics> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics: {status} {body}");
        Ok(Metrics::new(body))
    }

    /// The present sum of a metric's samples.
    ///
    /// # Errors
    ///
    /// Fails if the metric does not exist.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        self.metrics()?.get(name, labels)
    }

    /// Waits until a metric has a value.
    ///
    /// # Errors
    ///
    /// Fails if the metric does not reach the value in time.
    pub fn wait_for_metric(&self, name: &str, labels: &[(&str, &str)], value: f64) -> Result<()> {
        let mut last = f64::NAN;
        eventually("the value of a metric", patience(), || {
            last = self.metric(name, labels)?;
            Ok((last == value).then_some(()))
        })
        .with_context(|| format!("{name} {labels:?}: {last} and not {value}"))
    }

    /// Whether the metric and `/readyz` report this degradation.
    ///
    /// # Errors
    ///
    /// Fails if they disagree.
    pub fn is_degraded(&self, cause: &str) -> Result<bool> {
        let name = "session_enforcer_degraded";
        let all = self.metric(name, &[])?;
        let degraded = self.metric(name, &[("cause", cause)])?;
        let (status, body) = self.get("/readyz")?;
        let after = self.metric(name, &[])?;
        ensure!(
            all != after || (status == 200) == (all == 0.0),
            "{all} causes, and {status} {body}"
        );
        Ok(degraded == 1.0)
    }

    /// Waits until the daemon has, or does not have, this degradation.
    ///
    /// # Errors
    ///
    /// Fails if that does not happen in time.
    pub fn wait_for_degraded(&self, cause: &str, wanted: bool) -> Result<()> {
        eventually("a degraded cause to begin or end", patience(), || {
            Ok((self.is_degraded(cause)? == wanted).then_some(()))
        })
        .with_context(|| format!("{cause}: not {wanted}"))
    }

    /// Sends a request to the HTTP server. Returns the status and the body.
    ///
    /// # Errors
    ///
    /// Fails if the server does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.metrics).context("connecting to the daemon")?;
        stream.set_read_timeout(Some(patience()))?;
        // Send the request in one piece, because the daemon does not wait long for the rest.
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

    /// The path of the control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.path().join(CONTROL)
    }

    /// Sends a request to the control socket. Returns the status and the body.
    ///
    /// # Errors
    ///
    /// Fails if the daemon does not answer.
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

    /// Runs a client command against this daemon to its end.
    ///
    /// # Errors
    ///
    /// Fails if the command does not end.
    pub fn command(&self, args: &[&str]) -> Result<Finished> {
        run_to_end(self.command_for(args)?, patience())
    }

    /// Builds the same command without running it.
    ///
    /// # Errors
    ///
    /// Fails if the program is not built.
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
    /// Fails if the daemon has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            signal,
        )?)
    }

    /// Stops the daemon with SIGSTOP and waits until it is stopped.
    ///
    /// # Errors
    ///
    /// Fails if the daemon has ended.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        eventually("the daemon stands still", patience(), || {
            Ok((state_of(self.pid()) == Some('T')).then_some(()))
        })
    }

    /// Continues a stopped daemon.
    ///
    /// # Errors
    ///
    /// Fails if the daemon has ended.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Waits until the daemon has ended.
    ///
    /// # Errors
    ///
    /// Fails if the daemon keeps running.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        eventually("the daemon ends", patience(), || {
            Ok(self.child.try_wait()?)
        })
    }

    /// Kills the daemon with SIGKILL, like a crash.
    ///
    /// # Errors
    ///
    /// Fails if the daemon does not end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait()?;
        Ok(())
    }

    /// Stops the daemon with SIGTERM and checks that it exits with status 0. The audit and the log stay
    /// readable.
    ///
    /// # Errors
    ///
    /// Fails if the daemon ends in another way.
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
        // The daemon may have ended already.
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

/// The status and the body of an HTTP answer, which may use chunked encoding.
///
/// # Errors
///
/// Fails if the answer is incomplete.
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

/// The records of an audit file. Incomplete lines are skipped: the last one may be half written, and a killed
/// daemon may have cut one.
///
/// # Errors
///
/// Fails if a complete line is not JSON.
pub fn records(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let written = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let whole = written.lines().filter(|line| line.ends_with('}'));
    whole.map(Record::parse).collect()
}
