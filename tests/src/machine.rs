//! A machine with systemd for tests of the package: a container of `systemd-nspawn --boot`.
//!
//! Its root is an overlay on a Debian root of `cargo xtask dist --test`. It has its own cgroups (below one of
//! the test), loopback network and bpffs. All of it is removed with its top process.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{
    cgroup::Cgroup,
    clock::eventually,
    names,
    pace::{patience, scaled},
    process::{Finished, die_with_parent, run_to_end},
};

/// This variable names the Debian root.
const ROOT: &str = "SESSION_ENFORCER_MACHINE";

/// A shell runs this script in new namespaces, with the scratch folder, the root and the machine's name.
const BOOT: &str = r#"
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/machine
echo 0 >/sys/fs/cgroup/machine/cgroup.procs
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root" "$1/bpf"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
# As systemd mounts it on a real machine.
mount -t bpf -o mode=0700 bpf "$1/bpf"
exec systemd-nspawn --quiet --directory="$1/root" --machine="$3" --register=no --keep-unit \
    --private-network --bind="$1/bpf:/sys/fs/bpf" \
    --capability=CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN,CAP_SYS_PTRACE,CAP_SYS_ADMIN,CAP_DAC_READ_SEARCH,CAP_SYS_RESOURCE \
    --system-call-filter='bpf perf_event_open pidfd_getfd' --boot
"#;

/// The machine. Dropping it powers it off without a shutdown.
#[derive(Debug)]
pub struct Machine {
    top: Child,
    /// The host's PID of the machine's process 1.
    init: u32,
    scratch: TempDir,
    _cgroup: Cgroup,
}

impl Machine {
    /// Boots a machine.
    ///
    /// # Errors
    ///
    /// Fails if the environment does not name the root, or if the machine does not come up.
    pub fn boot() -> Result<Self> {
        let root = required(ROOT)?;
        let cgroup = Cgroup::new()?;
        let scratch = tempfile::tempdir()?;
        let console = fs::File::create(scratch.path().join("console"))?;
        let name = names::unique();
        let mounts = scratch.path().join("mounts");
        fs::create_dir(&mounts)?;
        let mut command = entering(cgroup.path());
        command
            .args(["unshare", "--mount", "--cgroup", "--pid", "--fork"])
            .args(["--mount-proc", "--kill-child", "sh", "-euc", BOOT, "sh"])
            .args([&mounts, &root])
            .arg(name)
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console);
        let top = die_with_parent(&mut command).spawn()?;
        let mut machine = Self {
            top,
            init: 0,
            scratch,
            _cgroup: cgroup,
        };
        let booted = machine.wait_until_up();
        booted.with_context(|| format!("the machine's console:\n{}", machine.console()))?;
        Ok(machine)
    }

    fn wait_until_up(&mut self) -> Result<()> {
        eventually("the machine is up", scaled(patience()), || {
            ensure!(self.top.try_wait()?.is_none(), "it ended");
            // The processes are unshare, systemd-nspawn, and then the machine's init.
            let nspawn = child_of(self.top.id());
            let Some(init) = nspawn.and_then(child_of) else {
                return Ok(None);
            };
            self.init = init;
            // Before its namespaces exist, the PID may lead to another process or system.
            let state = self.run("systemctl is-system-running")?;
            let is_up = ["running", "degraded"].contains(&state.stdout.trim());
            Ok(is_up.then_some(()))
        })
    }

    fn console(&self) -> String {
        fs::read_to_string(self.scratch.path().join("console")).unwrap_or_default()
    }

    /// Runs a shell command in the machine to its end.
    ///
    /// # Errors
    ///
    /// Fails if the command does not end.
    pub fn run(&self, line: &str) -> Result<Finished> {
        let mut command = Command::new("nsenter");
        command
            .args(["--all", "--target", &self.init.to_string(), "--"])
            .args(["bash", "-c", line])
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .env("LC_ALL", "C.UTF-8");
        run_to_end(command, scaled(patience()))
    }

    /// Runs a command and returns its output.
    ///
    /// # Errors
    ///
    /// Fails if the command fails.
    pub fn ask(&self, line: &str) -> Result<String> {
        self.run(line)?.output(line)
    }

    /// Writes a file in the machine.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        fs::write(self.outside(path), text).with_context(|| format!("writing {path}"))
    }

    /// Copies the file that an environment variable names into the machine.
    ///
    /// # Errors
    ///
    /// Fails if the variable or the file is missing, or if the copy cannot be written.
    pub fn put(&self, variable: &str, path: &str) -> Result<()> {
        let from = required(variable)?;
        let copied = fs::copy(from, self.outside(path));
        copied.map(drop).with_context(|| format!("writing {path}"))
    }

    /// The host's path of a file in the machine.
    fn outside(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.init).into()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill(&mut self.top, "the machine");
    }
}

/// A command that enters the cgroup with this directory and then runs the program of its further arguments.
pub(crate) fn entering(cgroup: &Path) -> Command {
    let mut command = Command::new("sh");
    let script = "echo 0 >\"$1/cgroup.procs\"; shift; exec \"$@\"";
    command.args(["-euc", script, "sh"]).arg(cgroup);
    command
}

/// Kills the `unshare` that started a PID namespace. Its option `--kill-child` ends the namespace's init, and the
/// kernel then kills all other processes of the namespace.
pub(crate) fn kill(top: &mut Child, what: &str) {
    if let Err(error) = top.kill().and_then(|()| top.wait()) {
        eprintln!("{what} is left running: {error}");
    }
}

pub(crate) fn required(name: &str) -> Result<PathBuf> {
    let value = env::var_os(name);
    let path = PathBuf::from(value.with_context(|| {
        format!("{name} is not set: `cargo xtask dist --test` makes what this test needs")
    })?);
    ensure!(path.exists(), "{name}: there is no {}", path.display());
    Ok(path)
}

/// The first child of a process.
pub(crate) fn child_of(pid: u32) -> Option<u32> {
    let path = Path::new("/proc").join(format!("{pid}/task/{pid}/children"));
    let children = fs::read_to_string(path).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
