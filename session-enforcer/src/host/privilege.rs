//! What engine and reapers may do after the start: few capabilities, an empty bounding set,
//! `no_new_privs`, and a filter of system calls.
//!
//! Capabilities belong to threads. The engine's own and its writers' keep [`ENGINE`]. One thread,
//! which does nothing but start reapers, keeps [`REAPER`]: the engine could not replace a reaper that
//! was killed otherwise. Another one, which does nothing but load the programs of a larger session table, keeps
//! [`LOADER`].

use std::{collections::BTreeMap, thread};

use anyhow::{Context as _, Result, anyhow};
use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// What the engine's calls of `bpf(2)` need after the programs are loaded and attached.
pub const ENGINE: [Capability; 1] = [Capability::CAP_BPF];

/// What it takes to load the programs (`bpf_prog_load` of `kernel/bpf/syscall.c`).
pub const LOADER: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

/// What reapers need: to destroy sockets, to enter namespaces, to look into processes and take their
/// sockets, and to find a cgroup by its identity.
pub const REAPER: [Capability; 4] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// System calls that neither engine nor reaper makes and that would serve whoever takes one over.
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

/// What only reapers do.
const FORBIDDEN_TO_ENGINE: [i64; 6] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_open_by_handle_at,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_open,
    libc::SYS_setns,
];

/// Nine times the weight of an ordinary process (`sched_prio_to_weight`).
const FIRST: i32 = -10;

/// That of an ordinary one.
const ORDINARY: i32 = 0;

/// What only the engine does.
const FORBIDDEN_TO_REAPER: [i64; 3] = [libc::SYS_bpf, libc::SYS_execve, libc::SYS_execveat];

/// Leaves the calling thread what the engine needs after the start. Threads that it starts later have
/// no more.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn confine_engine() -> Result<()> {
    confine(&ENGINE)
}

/// Leaves the calling thread what loading the programs needs, and threads that it starts later no more.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn confine_loader() -> Result<()> {
    confine(&LOADER)
}

fn confine(wanted: &[Capability]) -> Result<()> {
    let has = caps::read(None, CapSet::Permitted).context("capget")?;
    if has.contains(&Capability::CAP_BPF) {
        keep(wanted)?;
    } else {
        // It includes the others (capabilities(7)).
        keep(&[Capability::CAP_SYS_ADMIN])?;
    }
    caps::clear(None, CapSet::Ambient).context("PR_CAP_AMBIENT_CLEAR_ALL")?;
    caps::clear(None, CapSet::Inheritable).context("capset")?;
    forbid(&FORBIDDEN_TO_ENGINE)
}

/// Leaves the calling thread, which a reaper's only one is, what reapers need.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn confine_reaper() -> Result<()> {
    keep(&REAPER)?;
    caps::clear(None, CapSet::Ambient).context("PR_CAP_AMBIENT_CLEAR_ALL")?;
    caps::clear(None, CapSet::Inheritable).context("capset")?;
    forbid(&FORBIDDEN_TO_REAPER)
}

/// Has the calling thread, and those that it starts from now on, go before others that want its processor: nobody is to
/// put off resets by keeping the processors busy. Without `CAP_SYS_NICE` nothing changes.
pub fn go_first() {
    set_priority(FIRST);
}

/// Has the calling thread be one of many again: what it does takes long, or is done for others. There is no way back.
pub fn give_way() {
    set_priority(ORDINARY);
}

/// Of the calling thread alone, as Linux has it.
fn set_priority(nice: i32) {
    // SAFETY: numbers only.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

/// Leaves the calling thread, which starts reapers, what they need, so that they get it whoever's the
/// process is. The bounding set does not matter to what is inherited so.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn prepare_to_start_reapers() -> Result<()> {
    let has = caps::read(None, CapSet::Permitted).context("capget")?;
    let inherited = REAPER.into_iter().filter(|c| has.contains(c)).collect();
    // While they are in the bounding set.
    caps::set(None, CapSet::Inheritable, &inherited).context("capset")?;
    for capability in keep(&REAPER)? {
        caps::raise(None, CapSet::Ambient, capability).context("PR_CAP_AMBIENT_RAISE")?;
    }
    no_new_privileges()
}

/// Runs something on a thread that has no capabilities and the engine's filter: threads that it starts
/// have neither more.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let confined = || {
        keep(&[])?;
        forbid(&FORBIDDEN_TO_ENGINE)?;
        Ok(work())
    };
    let done = thread::scope(|scope| scope.spawn(confined).join());
    done.map_err(|_| anyhow!("a thread panicked"))?
}

/// Reduces the calling thread's capabilities to those of these that it has, and empties its bounding set
/// where it may (`CAP_SETPCAP`); what it has then.
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

/// Has these system calls fail with EPERM on the calling thread, besides those that nobody makes.
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
        // The calling thread keeps what it had.
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
            // SAFETY: a call that the filter ends before anything is read.
            let status = unsafe { libc::syscall(libc::SYS_bpf, 0, 0, 0) };
            (status, std::io::Error::last_os_error().raw_os_error())
        });
        assert_eq!(done.join().unwrap(), (-1, Some(libc::EPERM)));
    }
}
