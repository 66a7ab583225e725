//! Finds and runs programs of the system.

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    clock::eventually,
    pace::{patience, scaled},
    process::{Finished, die_with_parent, run_to_end},
};

/// The distribution's Python, to which the packages with clients belong.
pub(super) const PYTHON: &str = "/usr/bin/python3";

/// The time limit for the start of a server or for a command, on a busy machine.
const STARTING: Duration = Duration::from_secs(120);

/// Finds a program in one of the folders, in PATH, or in the system folders.
///
/// # Errors
///
/// Fails if the program is not installed: the test must not be skipped.
pub(super) fn find(program: &str, package: &str, folders: &[PathBuf]) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let administration = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = folders
        .iter()
        .cloned()
        .chain(env::split_paths(&path))
        .chain(administration);
    let found = places.find_map(|folder| Some(folder.join(program)).filter(|path| path.is_file()));
    found.with_context(|| {
        format!(
            "the program `{program}` is missing (package {package}): `cargo xtask test` or `bench` \
             installs it"
        )
    })
}

/// Runs a command that must succeed, and returns its output.
///
/// # Errors
///
/// Fails with the output if the command fails.
pub(super) fn succeed(command: Command) -> Result<String> {
    let shown = format!("{command:?}");
    let finished = run_to_end(command, scaled(STARTING))?;
    let Finished {
        code,
        stdout,
        stderr,
    } = finished;
    ensure!(code == 0, "{shown}: status {code}\n{stdout}\n{stderr}");
    Ok(stdout)
}

/// A running program: a server, or a client that reads commands. Dropping it kills it and prints its output,
/// which the test runner shows if the test fails.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: File,
    quiet: bool,
}

impl Program {
    /// Starts a client. Its standard input stays open until it is closed or the client is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the client cannot be started.
    pub(super) fn client(name: &str, mut command: Command) -> Result<Self> {
        // Use a file instead of a pipe, so that nobody must read while the program runs.
        let output = tempfile::tempfile()?;
        command
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?);
        let spawned = die_with_parent(command.stdin(Stdio::piped())).spawn();
        let mut child = spawned.with_context(|| format!("starting {command:?}"))?;
        Ok(Self {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            child,
            output,
            quiet: false,
        })
    }

    /// Starts a server and waits until its log contains this text.
    ///
    /// # Errors
    ///
    /// Fails with the log if the server cannot be started, ends, or does not print the text in time.
    pub(super) fn server(name: &str, command: Command, ready: &str) -> Result<Self> {
        let mut server = Self::client(name, command)?;
        server.stdin = None;
        server.wait_until(scaled(STARTING), ready, |output| {
            output.contains(ready).then_some(())
        })?;
        Ok(server)
    }

    /// Starts a server that prints nothing, and waits until a socket listens on this port of 127.0.0.1 in its
    /// network namespace.
    ///
    /// # Errors
    ///
    /// Fails as [`Program::server`] does.
    pub(super) fn listening(name: &str, command: Command, port: u16) -> Result<Self> {
        Self::listening_on("0100007F", name, command, port)
    }

    /// The same for this port of any address.
    ///
    /// # Errors
    ///
    /// Fails as [`Program::server`] does.
    pub(super) fn listening_anywhere(name: &str, command: Command, port: u16) -> Result<Self> {
        Self::listening_on("00000000", name, command, port)
    }

    fn listening_on(address: &str, name: &str, command: Command, port: u16) -> Result<Self> {
        let mut server = Self::client(name, command)?;
        server.stdin = None;
        let sockets = PathBuf::from(format!("/proc/{}/net/tcp", server.child.id()));
        let found = eventually("it listens", STARTING, || {
            if let Some(status) = server.child.try_wait()? {
                bail!("it has ended: {status}");
            }
            let table = fs::read_to_string(&sockets)?;
            Ok(listens(&table, address, port).then_some(()))
        });
        found.with_context(|| format!("{name} wrote:\n{}", server.output()))?;
        Ok(server)
    }

    /// The program's PID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Does not print the output when dropped.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// The standard output and standard error so far.
    pub fn output(&self) -> String {
        let mut bytes = vec![0; self.output.metadata().map_or(0, |file| file.len()) as usize];
        // `read_at` does not move the file offset, which the program shares.
        let length = self.output.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// Sends a line to the standard input.
    ///
    /// # Errors
    ///
    /// Fails if the program has ended or its input was closed.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input has ended")?;
        writeln!(stdin, "{line}").with_context(|| format!("typing {line:?} to {}", self.name))
    }

    /// Closes the standard input.
    pub(super) fn say_no_more(&mut self) {
        self.stdin = None;
    }

    /// Waits until the output contains this text.
    ///
    /// # Errors
    ///
    /// Fails if it does not in time, or if the program ends before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        self.wait_until(patience(), text, |output| {
            output.contains(text).then_some(())
        })
    }

    /// Waits until the output has this number of lines.
    ///
    /// # Errors
    ///
    /// Fails if it does not in time, or if the program ends before.
    pub fn wait_for_lines(&mut self, count: usize) -> Result<()> {
        self.wait_until(patience(), "lines", |output| {
            (output.matches('\n').count() >= count).then_some(())
        })
    }

    /// Waits until the output has this number of lines that report an end: `ok`, or the error.
    ///
    /// # Errors
    ///
    /// Fails if it does not in time, or if the program ends before.
    pub fn wait_for_said(&mut self, count: usize) -> Result<()> {
        self.wait_until(patience(), "the end of a use", |output| {
            let (whole, _) = output.rsplit_once('\n')?;
            let ends = |line: &&str| *line == "ok" || line.starts_with("error: ");
            (whole.lines().filter(ends).count() >= count).then_some(())
        })
    }

    /// Waits for a line with this prefix directly followed by numbers. A terminal echoes the input, too, but
    /// there the prefix is followed by something else.
    ///
    /// # Errors
    ///
    /// Fails if it does not appear in time, or if the program ends before.
    pub fn numbers_after<const N: usize>(&mut self, prefix: &str) -> Result<[u64; N]> {
        self.wait_until(patience(), prefix, |output| {
            // A line without a newline may be incomplete.
            let (whole, _) = output.rsplit_once('\n')?;
            let rests = whole
                .lines()
                .filter_map(|line| Some(line.split_once(prefix)?.1));
            let mut numbers = rests.filter_map(|rest| {
                let words = rest.split_whitespace().take(N);
                let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
                numbers.try_into().ok()
            });
            numbers.next()
        })
    }

    fn wait_until<T>(
        &mut self,
        bound: Duration,
        what: &str,
        look: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let found = eventually(what, bound, || {
            // Check for the end first, so that the program's last output is not missed.
            let ended = self.child.try_wait()?;
            let found = look(&self.output());
            if let (None, Some(status)) = (&found, ended) {
                bail!("it has ended: {status}");
            }
            Ok(found)
        });
        found.with_context(|| format!("{} wrote:\n{}", self.name, self.output()))
    }

    /// Waits until the program ends.
    ///
    /// # Errors
    ///
    /// Fails if it has not ended after `bound`.
    pub fn finish(&mut self, bound: Duration) -> Result<ExitStatus> {
        let ended = eventually("its end", bound, || Ok(self.child.try_wait()?));
        ended.with_context(|| format!("{} wrote:\n{}", self.name, self.output()))
    }

    /// Whether the program runs.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not report it.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

/// Whether a socket table (proc(5), `/proc/net/tcp`) has a listener on this port of an address in hexadecimal
/// digits.
fn listens(table: &str, address: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let local = format!("{address}:{port:04X}");
    let fields = table.lines().map(|line| line.split_whitespace());
    fields
        .map(|mut fields| (fields.nth(1), fields.nth(1)))
        .any(|(address, state)| address == Some(local.as_str()) && state == Some(LISTEN))
}

impl Drop for Program {
    fn drop(&mut self) {
        // The program may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.quiet {
            println!("{} wrote:\n{}", self.name, self.output());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_from_a_connection() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
             0: 0100007F:1B59 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0\n\
             1: 0100007F:1B5A 0100007F:1B59 01 00000000:00000000 00:00000000 00000000 0\n";
        assert!(listens(table, "0100007F", 0x1b59));
        assert!(!listens(table, "0100007F", 0x1b5a));
        assert!(!listens("", "0100007F", 0x1b59));
    }
}
