//! The resource usage of processes.

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
use session_enforcer_tests::Daemon;

/// The processor for everything whose latency is compared: the last allowed one, which has the fewest
/// interrupts on most machines.
pub(crate) fn pinned_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let mut cpus = (0..nix::sched::CpuSet::count()).rev();
    cpus.find(is_allowed).context("a processor that is allowed")
}

/// The processor time of the process in nanosecond resolution, including ended threads.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
    Ok(clock_gettime(clock)?.into())
}

/// The processor time of the daemon and its present reapers.
pub(crate) fn daemon_time(daemon: &Daemon) -> Result<Duration> {
    // A reaper that ends meanwhile counts as zero.
    let reapers = daemon.reapers()?.into_iter();
    let reapers: Duration = reapers.filter_map(|pid| cpu_time(pid).ok()).sum();
    Ok(cpu_time(daemon.pid())? + reapers)
}

/// The memory of the daemon and its reapers in bytes. Shared memory counts once.
pub(crate) fn daemon_bytes(daemon: &Daemon) -> Result<u64> {
    let reapers = daemon.reapers()?.into_iter();
    let reapers: u64 = reapers.filter_map(|pid| proportional_bytes(pid).ok()).sum();
    Ok(proportional_bytes(daemon.pid())? + reapers)
}

/// The processor time of this process's ended children and of their children.
pub(crate) fn children_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let duration = |time: TimeVal| -> Result<Duration> {
        let seconds = u64::try_from(time.tv_sec())?;
        Ok(Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_usec())?))
    };
    Ok(duration(usage.user_time())? + duration(usage.system_time())?)
}

/// The resident memory of the process in bytes, with its share of shared pages (`Pss` of proc(5)).
fn proportional_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.context("Pss in smaps_rollup")?.trim().parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_run_and_is_in_memory() {
        let pid = std::process::id();
        assert!(cpu_time(pid).unwrap() > Duration::ZERO);
        assert!(proportional_bytes(pid).unwrap() > 100_000);
        assert!(pinned_cpu().is_ok());
    }
}
