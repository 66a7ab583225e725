//! Runs other programs. None of them outlives the test.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Seek as _},
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    sys::{
        prctl,
        signal::{SigSet, Signal},
    },
    unistd::{Pid, Uid},
};

use crate::clock::eventually;

/// Fails if the privileged tests cannot run. They are never skipped.
pub(crate) fn require_root() -> Result<()> {
    let remedy = "run `cargo xtask test`, which asks for root's rights where it needs them";
    ensure!(
        Uid::effective().is_root(),
        "the privileged tests need root: {remedy}"
    );
    Ok(())
}

/// Makes the kernel kill the command's process when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let set = || prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: the closure makes only a system call between fork and exec and allocates nothing.
    unsafe { command.pre_exec(set) }
}

/// Blocks these signals in the command's process.
pub fn block_signals(command: &mut Command, signals: &[Signal]) {
    let mut mask = SigSet::empty();
    for signal in signals {
        mask.add(*signal);
    }
    // SAFETY: the closure makes only a system call between fork and exec.
    unsafe { command.pre_exec(move || Ok(mask.thread_block()?)) };
}

/// Runs the command's process and its children only on this processor.
///
/// # Errors
///
/// Fails if the number exceeds the kernel's maximum.
pub fn pin_to_cpu(command: &mut Command, cpu: usize) -> Result<&mut Command> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    let pin = move || Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?);
    // SAFETY: the closure makes only a system call between fork and exec and allocates nothing.
    Ok(unsafe { command.pre_exec(pin) })
}

/// Reduces the capabilities of the command's process to these numbers.
///
/// The others are removed from the bounding set, which limits the capabilities that a program of root gets.
pub fn keep_capabilities<'a>(command: &'a mut Command, bits: &[u8]) -> &'a mut Command {
    let others: Vec<u8> = (0..64).filter(|bit| !bits.contains(bit)).collect();
    let drop_others = move || {
        for bit in &others {
            // SAFETY: the system call takes no pointers.
            let status = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(*bit)) };
            // The kernel has fewer than 64 capabilities.
            if status != 0 && Errno::last() != Errno::EINVAL {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes only system calls between fork and exec and allocates nothing.
    unsafe { command.pre_exec(drop_others) }
}

/// Runs a system tool and returns its output.
pub(crate) fn output_of<S: AsRef<OsStr>>(
    program: &str,
    package: &str,
    args: &[S],
) -> Result<String> {
    let mut command = Command::new(program);
    let output = command.args(args).stdin(Stdio::null()).output();
    let output = output.with_context(|| {
        format!("running `{program}` (package {package}; `cargo xtask test` installs it)")
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, text(&output.stderr));
    }
    Ok(text(&output.stdout))
}

/// The results of an ended program.
#[derive(Debug)]
pub struct Finished {
    /// The exit status. -1 if a signal ended the program.
    pub code: i32,
    /// The standard output.
    pub stdout: String,
    /// The standard error.
    pub stderr: String,
}

impl Finished {
    /// The standard output of a successful program, without the last line break.
    ///
    /// # Errors
    ///
    /// Fails if the program has failed. The error names it as `what`.
    pub fn output(self, what: &str) -> Result<String> {
        let Self {
            code,
            stdout,
            stderr,
        } = self;
        ensure!(code == 0, "`{what}` failed ({code}): {stdout}{stderr}");
        Ok(stdout.trim_end().to_owned())
    }
}

/// Runs a program to its end.
///
/// # Errors
///
/// Fails if the program cannot be started, or if it is still running after `bound`; it is killed then.
pub fn run_to_end(mut command: Command, bound: Duration) -> Result<Finished> {
    // Use files instead of pipes, so that nobody must read while the program runs.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?);
    let mut child = die_with_parent(&mut command)
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let waited = eventually("the program ends", bound, || Ok(child.try_wait()?));
    if waited.is_err() {
        child.kill().and_then(|()| child.wait())?;
    }
    let (stdout, stderr) = (text_of(&mut stdout)?, text_of(&mut stderr)?);
    let status = waited.with_context(|| format!("{command:?}\n{stdout}\n{stderr}"))?;
    Ok(Finished {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr,
    })
}

fn text_of(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
