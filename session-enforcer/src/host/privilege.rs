//! Restricts the engine and the reapers after the start: few capabilities, an empty bounding set,
//! `no_new_privs`, and a seccomp filter.
//!
//! Capabilities belong to threads. The engine's thread keeps [`ENGINE`]. One thread only starts reapers and
//! keeps [`REAPER`]; without it the engine could not replace a killed reaper. Another thread only loads the
//! programs of a larger session table and keeps [`LOADER`].

use std::{collections::BTreeMap, thread};

use anyhow::{Context as _, Result, anyhow};
use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// The capability for the engine's bpf(2) calls after the programs are loaded and attached.
pub const ENGINE: [Capability; 1] = [Capability::CAP_BPF];

/// The capabilities for loading the programs (`bpf_prog_load` in `kernel/bpf/syscall.c`).
pub const LOADER: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

/// The capabilities of reapers: to destroy sockets, enter namespaces, inspect processes and duplicate their
/// sockets, and find a cgroup by its ID.
pub const REAPER: [Capability; 4] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// System calls that neither the engine nor a reaper makes, but that an attacker in either process could use.
const FORBIDDEN_TO_ALL: [i64; 24] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_settimeofday,
];

/// System calls that only reapers make.
const FORBIDDEN_TO_ENGINE: [i64; 6] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_open_by_handle_at,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_setns,
];

/// This nice value has nine times the weight of an ordinary process (`sched_prio_to_weight`).
const FIRST: i32 = -10;

/// The nice value of an ordinary process.
const ORDINARY: i32 = 0;

/// System calls that only the engine makes.
const FORBIDDEN_TO_REAPER: [i64; 3] = [libc::SYS_bpf, libc::SYS_execve, libc::SYS_execveat];

/// Reduces the calling thread to the engine's privileges after the start. Threads that it starts later
/// inherit the restriction.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn confine_engine() -> Result<()> {
    confine(&ENGINE)
}

/// Reduces the calling thread to the privileges for loading programs. Threads that it starts later inherit
/// the restriction.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn confine_loader() -> Result<()> {
    confine(&LOADER)
}

fn confine(wanted: &[Capability]) -> Result<()> {
    let has = caps::read(None, CapSet::Permitted).context("capget")?;
    if has.contains(&Capability::CAP_BPF) {
        keep(wanted)?;
    } else {
        // For bpf(2), `CAP_SYS_ADMIN` includes the others (capabilities(7)).
        keep(&[Capability::CAP_SYS_ADMIN])?;
    }
    caps::clear(None, CapSet::Ambient).context("PR_CAP_AMBIENT_CLEAR_ALL")?;
    caps::clear(None, CapSet::Inheritable).context("capset")?;
    forbid(&FORBIDDEN_TO_ENGINE)
}

/// Reduces the calling thread, the only thread of a reaper, to a reaper's privileges.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn confine_reaper() -> Result<()> {
    keep(&REAPER)?;
    caps::clear(None, CapSet::Ambient).context("PR_CAP_AMBIENT_CLEAR_ALL")?;
    caps::clear(None, CapSet::Inheritable).context("capset")?;
    forbid(&FORBIDDEN_TO_REAPER)
}

/// Raises the priority of the calling thread and of the threads that it starts later, so that busy processors
/// cannot delay resets. Has no effect without `CAP_SYS_NICE`.
pub fn go_first() {
    set_priority(FIRST);
}

/// Returns the calling thread to normal priority for long or secondary work. It cannot raise it again.
pub fn give_way() {
    set_priority(ORDINARY);
}

/// Linux applies the nice value to the calling thread alone.
fn set_priority(nice: i32) {
    // SAFETY: the call takes no pointers.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

/// Reduces the calling thread, which starts reapers, to their capabilities, and makes those ambient, so that
/// reapers inherit them under any user. The bounding set does not limit that inheritance.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn prepare_to_start_reapers() -> Result<()> {
    let has = caps::read(None, CapSet::Permitted).context("capget")?;
    let inherited = REAPER.into_iter().filter(|c| has.contains(c)).collect();
    // Raise the inheritable set before the bounding set is emptied, which limits it.
    caps::set(None, CapSet::Inheritable, &inherited).context("capset")?;
    for capability in keep(&REAPER)? {
        caps::raise(None, CapSet::Ambient, capability).context("PR_CAP_AMBIENT_RAISE")?;
    }
    no_new_privileges()
}

/// Runs `work` on a new thread that has no capabilities and has the engine's filter. Threads that it starts
/// inherit both.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let confined = || {
        keep(&[])?;
        forbid(&FORBIDDEN_TO_ENGINE)?;
        Ok(work())
    };
    let done = thread::scope(|scope| scope.spawn(confined).join());
    done.map_err(|_| anyhow!("a thread panicked"))?
}

/// Reduces the calling thread's capabilities to those of `wanted` that it has, and empties its bounding set
/// if it has `CAP_SETPCAP`. Returns the capabilities that it keeps.
fn keep(wanted: &[Capability]) -> Result<CapsHashSet> {
    let has = caps::read(None, CapSet::Permitted).context("capget")?;
    let kept: CapsHashSet = wanted.iter().copied().filter(|c| has.contains(c)).collect();
    if has.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding).context("PR_CAPBSET_READ")? {
            caps::drop(None, CapSet::Bounding, capability).context("PR_CAPBSET_DROP")?;
        }
    }
    caps::set(None, CapSet::Effective, &kept).context("capset")?;
    caps::set(None, CapSet::Permitted, &kept).context("capset")?;
    Ok(kept)
}

fn no_new_privileges() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("PR_SET_NO_NEW_PRIVS")
}

/// Makes these system calls, and those of [`FORBIDDEN_TO_ALL`], fail with EPERM on the calling thread.
fn forbid(calls: &[i64]) -> Result<()> {
    no_new_privileges()?;
    let calls = FORBIDDEN_TO_ALL.iter().chain(calls);
    let rules: BTreeMap<i64, Vec<_>> = calls.map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().context("seccomp")?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch);
    let program: BpfProgram = filter.and_then(TryInto::try_into).context("seccomp")?;
    seccompiler::apply_filter(&program).context("seccomp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_privileges_has_none_and_its_calls_are_filtered() {
        let (permitted, error) = unprivileged(|| {
            let permitted = caps::read(None, CapSet::Permitted).unwrap();
            let executed = std::process::Command::new("true").spawn();
            (permitted, executed.unwrap_err())
        })
        .unwrap();
        assert!(permitted.is_empty());
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        // The calling thread keeps its privileges.
        assert!(
            std::process::Command::new("true")
                .status()
                .unwrap()
                .success()
        );
    }

    #[test]
    fn a_reaper_may_do_nothing_with_programs_of_the_kernel() {
        let done = thread::spawn(|| {
            confine_reaper().unwrap();
            // SAFETY: the filter rejects the call before the kernel reads any argument.
            let status = unsafe { libc::syscall(libc::SYS_bpf, 0, 0, 0) };
            (status, std::io::Error::last_os_error().raw_os_error())
        });
        assert_eq!(done.join().unwrap(), (-1, Some(libc::EPERM)));
    }
}
