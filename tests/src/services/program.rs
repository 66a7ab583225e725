//! Programs of the system, found and run.

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

/// The distribution's Python, for which its packages with clients are.
pub(super) const PYTHON: &str = "/usr/bin/python3";

/// How long a server may take to start, or a command to do its work, on a busy machine.
const STARTING: Duration = Duration::from_secs(120);

/// Finds a program in one of the folders, in PATH, or where administrators' programs are.
///
/// # Errors
///
/// Where it is not installed: the test fails, it does not skip.
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

/// Runs a command that must succeed, for what it prints.
///
/// # Errors
///
/// Where it fails, with what it says.
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

/// A program that runs: a server, or a client that is typed to. On drop it is killed, and what it
/// wrote goes to the test's output, which is shown where the test fails.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: File,
    quiet: bool,
}

impl Program {
    /// Starts a client, whose standard input stays open until it is told or dropped.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub(super) fn client(name: &str, mut command: Command) -> Result<Self> {
        // A file, not a pipe: nobody has to read while the program runs.
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

    /// Starts a server, and waits until its log has this text.
    ///
    /// # Errors
    ///
    /// Where it cannot be started, ends, or does not come to that, with its log.
    pub(super) fn server(name: &str, command: Command, ready: &str) -> Result<Self> {
        let mut server = Self::client(name, command)?;
        server.stdin = None;
        server.wait_until(scaled(STARTING), ready, |output| {
            output.contains(ready).then_some(())
        })?;
        Ok(server)
    }

    /// Starts a server that says nothing, and waits until somebody listens on this port of 127.0.0.1
    /// in its network namespace.
    ///
    /// # Errors
    ///
    /// As above.
    pub(super) fn listening(name: &str, command: Command, port: u16) -> Result<Self> {
        Self::listening_on("0100007F", name, command, port)
    }

    /// The same on this port of any address.
    ///
    /// # Errors
    ///
    /// As above.
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

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Leaves what it wrote out of the output on drop.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// What it has written so far, to standard output and standard error.
    pub fn output(&self) -> String {
        let mut bytes = vec![0; self.output.metadata().map_or(0, |file| file.len()) as usize];
        // Reading from the start must not move the offset, which is the program's too.
        let length = self.output.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// Types a line.
    ///
    /// # Errors
    ///
    /// Where it has ended or was told that nothing more comes.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input has ended")?;
        writeln!(stdin, "{line}").with_context(|| format!("typing {line:?} to {}", self.name))
    }

    /// Ends its standard input.
    pub(super) fn say_no_more(&mut self) {
        self.stdin = None;
    }

    /// Waits until it has written this text.
    ///
    /// # Errors
    ///
    /// Where it does not, or ends before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        self.wait_until(patience(), text, |output| {
            output.contains(text).then_some(())
        })
    }

    /// Waits until it has written so many lines.
    ///
    /// # Errors
    ///
    /// Where it does not, or ends before.
    pub fn wait_for_lines(&mut self, count: usize) -> Result<()> {
        self.wait_until(patience(), "lines", |output| {
            (output.matches('\n').count() >= count).then_some(())
        })
    }

    /// Waits until it has written so many lines that say how something ended: `ok`, or the error.
    ///
    /// # Errors
    ///
    /// Where it does not, or ends before.
    pub fn wait_for_said(&mut self, count: usize) -> Result<()> {
        self.wait_until(patience(), "the end of a use", |output| {
            let (whole, _) = output.rsplit_once('\n')?;
            let ends = |line: &&str| *line == "ok" || line.starts_with("error: ");
            (whole.lines().filter(ends).count() >= count).then_some(())
        })
    }

    /// Waits until it has written a line with this prefix and numbers right after it. A terminal
    /// shows what is typed, too: the prefix in that is followed by something else.
    ///
    /// # Errors
    ///
    /// Where it does not, or ends before.
    pub fn numbers_after<const N: usize>(&mut self, prefix: &str) -> Result<[u64; N]> {
        self.wait_until(patience(), prefix, |output| {
            // A line without its end may be half of one.
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
            // In this order, what it wrote last before its end is seen.
            let ended = self.child.try_wait()?;
            let found = look(&self.output());
            if let (None, Some(status)) = (&found, ended) {
                bail!("it has ended: {status}");
            }
            Ok(found)
        });
        found.with_context(|| format!("{} wrote:\n{}", self.name, self.output()))
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// Where it has not ended after `bound`.
    pub fn finish(&mut self, bound: Duration) -> Result<ExitStatus> {
        let ended = eventually("its end", bound, || Ok(self.child.try_wait()?));
        ended.with_context(|| format!("{} wrote:\n{}", self.name, self.output()))
    }

    /// Whether it runs.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

/// Whether a table of sockets (proc(5), `/proc/net/tcp`) has one that listens on a port of an address, in its digits.
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
        // It may have ended already.
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
