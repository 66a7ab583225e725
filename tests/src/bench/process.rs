//! What a process has used.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    sched::sched_getaffinity,
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeVal,
    },
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

/// The processor on which everything runs whose latency is compared: the last that is allowed, which
/// has the fewest interrupts on most machines.
pub(crate) fn pinned_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let mut cpus = (0..nix::sched::CpuSet::count()).rev();
    cpus.find(is_allowed).context("a processor that is allowed")
}

/// Time that the process has run, with threads that have ended, to the nanosecond.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
    Ok(clock_gettime(clock)?.into())
}

/// Time that the children of this process that have ended have run, with theirs.
pub(crate) fn children_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let duration = |time: TimeVal| -> Result<Duration> {
        let seconds = u64::try_from(time.tv_sec())?;
        Ok(Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_usec())?))
    };
    Ok(duration(usage.user_time())? + duration(usage.system_time())?)
}

/// Bytes of the process that are in memory.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.context("VmRSS in status")?.trim().parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_run_and_is_in_memory() {
        let pid = std::process::id();
        assert!(cpu_time(pid).unwrap() > Duration::ZERO);
        assert!(resident_bytes(pid).unwrap() > 100_000);
        assert!(pinned_cpu().is_ok());
    }
}
