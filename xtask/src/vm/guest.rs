//! The first process of the virtual machine after `init.sh` has set up the root.
//!
//! It mounts the usual file systems, runs the planned programs of this boot, and restarts the machine, or
//! powers it off after the last boot.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::debugger::{ANSWERED, ASKED};
use super::plan::{
    BOOTS, Boot, End, FAULTS, Hierarchy, MARK, OUTCOMES, Outcome, PLAN, Plan, Program,
};

use crate::process::find_program;

/// The folder that is shared with the host.
const SHARED: &str = "/run/session-enforcer-vm";

/// The controllers of a hybrid hierarchy, as systemd mounts them.
const CONTROLLERS: [&str; 4] = ["cpu,cpuacct", "memory", "net_cls,net_prio", "pids"];

/// File systems of the machine that replace those of the host.
const OWN: [(&str, &str); 4] = [
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
];

/// The mount that hides a folder of the host from the machine.
pub(super) fn hidden_by(folder: &Path) -> Option<&'static str> {
    let mut places = OWN.into_iter().map(|(_, place)| place);
    places.find(|place| folder.starts_with(place))
}

/// The limit of open files per process. The kernel gives its first process 1,024, but tests open thousands of
/// connections and hold both ends of each.
const OPEN_FILES: u64 = 65_536;

/// The interval of checks for ended programs.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs the first process. Returns only if this is not the first process of such a machine.
pub(crate) fn guest() -> Result<()> {
    if process::id() != 1 {
        bail!("only `cargo xtask vm` runs this command, inside its virtual machines");
    }
    let mode = match boot() {
        Ok(mode) => mode,
        Err(error) => {
            eprintln!("vm-guest: {error:#}");
            // Record the error: after the last program nothing else would show it. The folder may not exist
            // yet.
            let told = format!("    vm-guest: {error:#}\n");
            let _ = append(&Path::new(SHARED).join(FAULTS), &told);
            RebootMode::RB_POWER_OFF
        }
    };
    match reboot(mode)? {}
}

/// Runs one boot and returns what follows it.
fn boot() -> Result<RebootMode> {
    file_system("proc", "proc", "/proc", "")?;
    let words = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    if !words.split_whitespace().any(|word| word == MARK) {
        bail!("this machine was not started by `cargo xtask vm`");
    }
    for (kind, place) in OWN {
        file_system(kind, kind, place, "")?;
    }
    for (kind, place) in [("devpts", "/dev/pts"), ("tmpfs", "/dev/shm")] {
        fs::create_dir_all(place)?;
        file_system(kind, kind, place, "")?;
    }
    fs::create_dir_all(SHARED)?;
    file_system("virtiofs", "own", SHARED, "")?;
    let shared = Path::new(SHARED);
    let text = fs::read_to_string(shared.join(PLAN)).context("cannot read the plan")?;
    let plan: Plan = serde_json::from_str(&text).context("cannot parse the plan")?;
    let number = count_boot(&shared.join(BOOTS))?;
    let now = plan
        .boots
        .get(number)
        .context("there is no plan for this boot")?;
    prepare(&plan, now)?;
    run_all(&plan, now, shared)?;
    note_faults(shared)?;
    Ok(if number + 1 < plan.boots.len() {
        RebootMode::RB_AUTOBOOT
    } else {
        RebootMode::RB_POWER_OFF
    })
}

/// Returns the number of earlier boots and increments it.
fn count_boot(path: &Path) -> Result<usize> {
    let before = match fs::read_to_string(path) {
        Ok(text) => text
            .trim()
            .parse()
            .context("cannot parse the number of boots")?,
        Err(_) => 0,
    };
    fs::write(path, (before + 1).to_string()).context("cannot count the boot")?;
    Ok(before)
}

/// Does what a system's init does before its services.
fn prepare(plan: &Plan, boot: &Boot) -> Result<()> {
    fs::create_dir_all("/lib/modules")?;
    bind(&plan.modules, Path::new("/lib/modules"))?;
    match boot.hierarchy {
        Hierarchy::Unified => file_system("cgroup2", "cgroup2", "/sys/fs/cgroup", "")?,
        Hierarchy::Hybrid => hybrid()?,
    }
    if boot.bpffs {
        file_system("bpf", "bpf", "/sys/fs/bpf", "")?;
    }
    if !boot.sock_destroy {
        forget_destroy(Path::new(SHARED))?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .context("cannot raise the limit of open files")?;
    nix::unistd::sethostname("session-enforcer-vm")?;
    let status = system("ip")?.args(["link", "set", "lo", "up"]).status();
    if !status.context("cannot start ip")?.success() {
        bail!("the loopback interface does not come up");
    }
    Ok(())
}

/// The path of a system program; the kernel sets an incomplete `PATH`.
fn system(name: &str) -> Result<Command> {
    let path = find_program(name, &[]).with_context(|| format!("there is no {name}"))?;
    Ok(Command::new(path))
}

/// Asks the host to clear the `destroy` pointer of `tcp_diag`.
fn forget_destroy(shared: &Path) -> Result<()> {
    let loaded = system("modprobe")?.arg("tcp_diag").status();
    if !loaded.context("cannot start modprobe")?.success() {
        bail!("tcp_diag cannot be loaded");
    }
    let symbols = fs::read_to_string("/proc/kallsyms").context("cannot read /proc/kallsyms")?;
    let address = |name: &str| {
        let of_name = |line: &&str| line.split_whitespace().nth(2) == Some(name);
        let line = symbols.lines().find(of_name);
        let address = line.and_then(|line| line.split_whitespace().next());
        address.with_context(|| format!("the kernel has no symbol {name}"))
    };
    let asked = format!(
        "{} {}",
        address("tcp_diag_handler")?,
        address("tcp_diag_destroy")?
    );
    // Rename the complete file, because the host looks for its name.
    fs::write(shared.join("asked"), asked)?;
    fs::rename(shared.join("asked"), shared.join(ASKED))?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(120) {
        if let Ok(said) = fs::read_to_string(shared.join(ANSWERED)) {
            if said.is_empty() {
                return Ok(());
            }
            bail!("cannot remove the destroy function from tcp_diag: {said}");
        }
        thread::sleep(POLL_INTERVAL);
    }
    bail!("the host did not remove the destroy function from tcp_diag")
}

/// Mounts the cgroup v1 controllers of the kernel, and cgroup v2 beside them.
fn hybrid() -> Result<()> {
    file_system("tmpfs", "cgroup", "/sys/fs/cgroup", "")?;
    for controllers in CONTROLLERS {
        let place = format!("/sys/fs/cgroup/{controllers}");
        fs::create_dir(&place)?;
        if let Err(error) = file_system("cgroup", "cgroup", &place, controllers) {
            println!("vm-guest: {error:#}");
        }
    }
    let unified = "/sys/fs/cgroup/unified";
    fs::create_dir(unified)?;
    file_system("cgroup2", "cgroup2", unified, "")
}

fn file_system(kind: &str, source: &str, place: &str, options: &str) -> Result<()> {
    mount(
        Some(source),
        place,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )
    .with_context(|| format!("cannot mount {kind} at {place} ({options})"))
}

fn bind(source: &Path, place: &Path) -> Result<()> {
    mount(
        Some(source),
        place,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("cannot bind {}", source.display()))
}

/// A running program.
struct Running<'a> {
    program: &'a Program,
    child: Child,
    start: Instant,
    killed: bool,
}

/// Runs the programs of a boot, some at a time, and records how each ended.
fn run_all(plan: &Plan, boot: &Boot, shared: &Path) -> Result<()> {
    let mut waiting: VecDeque<_> = boot.programs.iter().collect();
    let mut running: Vec<Running<'_>> = Vec::new();
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < boot.at_once {
            let Some(program) = waiting.pop_front() else {
                break;
            };
            running.push(start(plan, program, shared)?);
        }
        thread::sleep(POLL_INTERVAL);
        bury_orphans(&running);
        let mut still = Vec::new();
        for mut one in running {
            match one.look()? {
                Some(outcome) => write_down(&outcome, shared)?,
                None => still.push(one),
            }
        }
        running = still;
    }
    Ok(())
}

fn start<'a>(plan: &Plan, program: &'a Program, shared: &Path) -> Result<Running<'a>> {
    let log = File::create(program.log(shared)).context("cannot create a log")?;
    // Use a separate session. When an orphaned process ends in init's session, its process group gets a
    // hangup if a member is stopped (`kill_orphaned_pgrp`); and tests stop daemons and orphan reapers.
    let mut command = Command::new("/usr/bin/setsid");
    command
        .arg(&program.path)
        .args(&program.arguments)
        .env_clear()
        .envs(plan.environment.iter().cloned())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.path.display()))?;
    Ok(Running {
        program,
        child,
        start: Instant::now(),
        killed: false,
    })
}

impl Running<'_> {
    fn look(&mut self) -> Result<Option<Outcome>> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(Some(self.outcome(status)));
        }
        if !self.killed && self.start.elapsed() > Duration::from_secs(self.program.limit_seconds) {
            self.killed = true;
            let group = Pid::from_raw(i32::try_from(self.child.id())?);
            nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL)?;
        }
        Ok(None)
    }

    fn outcome(&self, status: ExitStatus) -> Outcome {
        let end = match (self.killed, status.code(), status.signal()) {
            (true, ..) => End::TimeLimit,
            (false, Some(code), _) => End::Exit(code),
            (false, None, signal) => End::Signal(signal.unwrap_or_default()),
        };
        Outcome {
            name: self.program.name.clone(),
            end,
            seconds: self.start.elapsed().as_secs_f64(),
        }
    }
}

fn write_down(outcome: &Outcome, shared: &Path) -> Result<()> {
    let line = serde_json::to_string(outcome)? + "\n";
    append(&shared.join(OUTCOMES), &line)
}

fn append(path: &Path, text: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("cannot write to {}", path.display()))
}

/// Prefixes of kernel log lines that report a kernel fault, such as a warning or an oops.
const FAULT: [&str; 11] = [
    "WARNING: ",
    "BUG: ",
    "UBSAN: ",
    "kernel BUG at ",
    "Oops",
    "general protection fault",
    "divide error",
    "invalid opcode",
    "double fault",
    // These two are of aarch64.
    "Unable to handle kernel ",
    "Internal error: ",
];

/// A stalled processor is no fault, because emulated processors stall.
const STOOD_STILL: &str = "BUG: workqueue lockup";

/// The time for the kernel's work after a program has ended.
const AFTERMATH: Duration = Duration::from_secs(1);

/// Records faults in the kernel log: a passing test may have caused one.
fn note_faults(shared: &Path) -> Result<()> {
    thread::sleep(AFTERMATH);
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("cannot open the kernel's log")?;
    // Each read returns one record.
    let mut record = [0; 8192];
    let mut faults = String::new();
    loop {
        match log.read(&mut record) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length]);
                faults.extend(fault_in(&text).map(|fault| format!("    {fault}\n")));
            }
            // Older records were overwritten.
            Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("cannot read the kernel's log"),
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    append(&shared.join(FAULTS), &faults)
}

/// The fault that a kernel log record reports. The format is `PRIORITY,NUMBER,TIME,FLAGS;TEXT`. The upper
/// bits of the priority are the facility: 0 for the kernel, others for programs.
fn fault_in(record: &str) -> Option<&str> {
    let (priority, rest) = record.split_once(',')?;
    let is_the_kernels = priority.parse::<u32>().ok()? >> 3 == 0;
    let (_, text) = rest.split_once(';')?;
    let line = text.lines().next()?;
    let tells = FAULT.iter().any(|fault| line.starts_with(fault));
    (is_the_kernels && tells && !line.starts_with(STOOD_STILL)).then_some(line)
}

/// Reaps orphaned processes, because the machine has no other init.
fn bury_orphans(running: &[Running<'_>]) {
    let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    // waitid returns the same process until it is reaped. If it is in `running`, its `Child` must reap it
    // first; other processes wait until then.
    while let Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) = waitid(Id::All, peek)
    {
        let is_ours = |one: &Running<'_>| i32::try_from(one.child.id()) == Ok(pid.as_raw());
        if running.iter().any(is_ours) || waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_and_oopses_are_faults_of_the_kernel_and_a_late_processor_is_none() {
        let told = |text: &str| fault_in(&format!("4,339,5140900,-;{text}\n")).map(str::to_owned);
        for text in [
            "WARNING: CPU: 1 PID: 7 at net/ipv4/tcp.c:2801 tcp_recvmsg+0x1/0x2",
            "BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "Oops: 0000 [#1] PREEMPT SMP",
            "Unable to handle kernel NULL pointer dereference at virtual address 0000000000000008",
            "Internal error: Oops: 0000000096000004 [#1] SMP",
        ] {
            assert_eq!(told(text).as_deref(), Some(text));
        }
        for text in [
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s!",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!",
            "init: WARNING: said by a program",
        ] {
            assert_eq!(told(text), None);
        }
        assert_eq!(
            fault_in("12,340,5140901,-;WARNING: said by a program\n"),
            None
        );
    }

    #[test]
    fn a_folder_below_what_the_machine_has_of_its_own_is_hidden() {
        assert_eq!(hidden_by(Path::new("/tmp/clone/target")), Some("/tmp"));
        assert_eq!(hidden_by(Path::new("/home/user/tmp/target")), None);
        assert_eq!(hidden_by(Path::new("/tmpfs/target")), None);
    }
}
