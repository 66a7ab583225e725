//! A systemd-journald of the test.

use std::{
    fs::File,
    os::unix::{net::UnixDatagram, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::program::{self, Program};
use crate::{clock::eventually, daemon::state_of, pace::patience};

const PACKAGE: &str = "systemd";

/// The folders of journald in the distributions.
const FOLDERS: [&str; 2] = ["/usr/lib/systemd", "/lib/systemd"];

/// The catalogue that explains the daemon's entries.
const CATALOGUE: &str =
    include_str!("../../../session-enforcer/packaging/session-enforcer.catalog");

/// A shell runs this script in a new mount namespace: it changes no file of the machine and reaches none of
/// its sockets. The kernel's log and audit are not read.
const PREPARE: &str = r#"
mount -t tmpfs tmpfs /run
mkdir -p /run/log/journal /run/etc /run/catalogues /run/state
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
mount --bind /run/catalogues /usr/lib/systemd/catalog
mount --bind /run/state /var/lib/systemd
mkdir -p /etc/systemd /var/lib/systemd/catalog
printf '5e551011000000000000000000000000\n' >/etc/machine-id
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\nRateLimitIntervalSec=0\n' >/etc/systemd/journald.conf
cat >/usr/lib/systemd/catalog/session-enforcer.catalog
journalctl --update-catalog
echo prepared
exec sleep infinity
"#;

/// A mount namespace with a journal. Dropping it kills journald and removes everything that it wrote.
#[derive(Debug)]
pub struct Journal {
    journald: Option<Program>,
    namespace: Program,
}

impl Journal {
    /// Prepares the namespace without starting journald.
    ///
    /// # Errors
    ///
    /// Fails if the kernel or systemd's tools refuse.
    pub fn stopped() -> Result<Self> {
        program::find("journalctl", PACKAGE, &[])?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=private", "sh", "-euc", PREPARE]);
        let mut namespace = Program::client("the journal's namespace", command)?;
        for line in CATALOGUE.lines() {
            namespace.say(line)?;
        }
        namespace.say_no_more();
        namespace.wait_for("prepared\n")?;
        Ok(Self {
            journald: None,
            namespace: namespace.quiet(),
        })
    }

    /// Prepares the namespace and starts journald.
    ///
    /// # Errors
    ///
    /// Fails if journald does not start.
    pub fn start() -> Result<Self> {
        let mut journal = Self::stopped()?;
        journal.begin()?;
        Ok(journal)
    }

    /// Starts journald and waits until it accepts entries.
    ///
    /// # Errors
    ///
    /// Fails if journald does not start.
    pub fn begin(&mut self) -> Result<()> {
        let path = program::find("systemd-journald", PACKAGE, &FOLDERS.map(PathBuf::from))?;
        let mut command = Command::new(path);
        command.env("SYSTEMD_LOG_TARGET", "console");
        enter_mounts(&mut command, self.pid())?;
        self.journald = Some(Program::client("journald", command)?.quiet());
        let socket = PathBuf::from(format!(
            "/proc/{}/root/run/systemd/journal/socket",
            self.pid()
        ));
        eventually("journald takes entries", patience(), || {
            Ok(UnixDatagram::unbound()?.connect(&socket).ok())
        })
    }

    /// The PID of a process in the namespace, for [`Launch::mounts_of`](crate::Launch::mounts_of).
    pub fn pid(&self) -> u32 {
        self.namespace.pid()
    }

    /// Kills journald.
    pub fn kill(&mut self) {
        self.journald = None;
    }

    /// Stops or continues journald.
    ///
    /// # Errors
    ///
    /// Fails if journald does not run.
    pub fn freeze(&self, is_frozen: bool) -> Result<()> {
        let journald = self.journald.as_ref().context("journald does not run")?;
        let pid = Pid::from_raw(i32::try_from(journald.pid())?);
        let signal = if is_frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        kill(pid, signal)?;
        eventually("journald stands still, or goes on", patience(), || {
            Ok(((state_of(journald.pid()) == Some('T')) == is_frozen).then_some(()))
        })
    }

    /// The output of `journalctl`.
    ///
    /// # Errors
    ///
    /// Fails if `journalctl` fails.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("journalctl");
        command.args(["--quiet", "--no-pager"]).args(args);
        command.stdin(Stdio::null());
        enter_mounts(&mut command, self.pid())?;
        program::succeed(command)
    }

    /// The matching entries, oldest first.
    ///
    /// # Errors
    ///
    /// Fails if `journalctl` fails or its output is not JSON.
    pub fn entries(&self, matches: &[&str]) -> Result<Vec<Value>> {
        let printed = self.ask(&[&["--output=json"], matches].concat())?;
        let parse = |line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"));
        printed.lines().map(parse).collect()
    }

    /// Waits until this number of entries match.
    ///
    /// # Errors
    ///
    /// Fails if they do not appear in time.
    pub fn wait_for_entries(&self, matches: &[&str], count: usize) -> Result<Vec<Value>> {
        let mut found = 0;
        eventually("entries in the journal", patience(), || {
            let entries = self.entries(matches)?;
            found = entries.len();
            Ok((found == count).then_some(entries))
        })
        .with_context(|| format!("{matches:?}: {found} entries and not {count}"))
    }
}

/// Runs the command's process in the mount namespace of another process.
///
/// # Errors
///
/// Fails if that process has ended.
pub fn enter_mounts(command: &mut Command, pid: u32) -> Result<()> {
    let path = Path::new("/proc").join(pid.to_string()).join("ns/mnt");
    let namespace = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    // setns(2) also changes the working directory to the root.
    let enter = move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNS)?);
    // SAFETY: the closure makes only a system call between fork and exec and allocates nothing.
    unsafe { command.pre_exec(enter) };
    Ok(())
}
