//! Tests what this kernel and these privileges allow, by trying and not by version numbers.
//!
//! `run` tests before it starts; `doctor` prints the results. Every test uses only sockets and maps of this
//! process.

use std::time::Duration;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;

use crate::{
    datapath::{self, Bpffs, Datapath, Options},
    exit::{ExitStatus, Failure},
    host::{boot, cgroup, clock},
    reaper::{diag::DiagSocket, protocol::Probed, trial},
};

/// A capability and its purpose.
struct Purpose {
    capability: Capability,
    needed_for: &'static str,
    need: Need,
}

/// Which daemons need a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// All daemons.
    Always,
    /// Daemons that enforce other network namespaces than their own. The value describes what does not work
    /// without it for the others.
    AllNamespaces(Option<&'static str>),
    /// No daemon. The value describes what does not work without it.
    Never(&'static str),
}

/// In the order of the checks.
const CAPABILITIES: [Purpose; 6] = [
    Purpose {
        capability: Capability::CAP_BPF,
        needed_for: "loading the eBPF programs and maps",
        need: Need::Always,
    },
    Purpose {
        capability: Capability::CAP_NET_ADMIN,
        needed_for: "attaching to a cgroup and resetting sockets",
        need: Need::Always,
    },
    Purpose {
        capability: Capability::CAP_PERFMON,
        needed_for: "eBPF programs that read packets",
        need: Need::Always,
    },
    Purpose {
        capability: Capability::CAP_SYS_ADMIN,
        needed_for: "entering other network namespaces",
        need: Need::AllNamespaces(None),
    },
    Purpose {
        capability: Capability::CAP_SYS_PTRACE,
        needed_for: "finding the namespaces of other users' processes",
        need: Need::AllNamespaces(Some(
            "connections of other users' processes cannot be reset if they use MPTCP or if the kernel \
             has no SOCK_DESTROY",
        )),
    },
    Purpose {
        capability: Capability::CAP_DAC_READ_SEARCH,
        needed_for: "finding a cgroup by its ID",
        need: Need::Never(
            "the daemon searches the whole hierarchy for the cgroup of each connection, and does not find \
             it in a directory that its user may not read",
        ),
    },
];

/// `CAP_SYS_ADMIN` includes `CAP_BPF` and `CAP_PERFMON` (capabilities(7)).
const IN_SYS_ADMIN: [Capability; 2] = [Capability::CAP_PERFMON, Capability::CAP_BPF];

/// The result of one check.
#[derive(Clone, Debug)]
pub(super) struct Check {
    /// The name of the check.
    pub name: String,
    /// The finding.
    pub found: String,
    /// The problem with its remedy and the exit status of `run`. `None` if `run` would start.
    pub problem: Option<Failure>,
    /// A restriction with its remedy. `run` logs it and starts.
    pub warning: Option<String>,
}

impl Check {
    fn good(name: &str, found: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            found: found.into(),
            problem: None,
            warning: None,
        }
    }

    fn bad(name: &str, status: ExitStatus, found: impl Into<String>, remedy: &str) -> Self {
        let found = found.into();
        let problem = Failure::new(status, format!("{name}: {found}; {remedy}"));
        Self {
            name: name.to_owned(),
            found,
            problem: Some(problem),
            warning: None,
        }
    }
}

/// Runs all checks, for a daemon that enforces all network namespaces or only its own.
pub(super) fn all(all_namespaces: bool) -> Vec<Check> {
    let mut checks = vec![Check::good("kernel", boot::kernel_release())];
    checks.extend(capabilities(all_namespaces));
    checks.extend([
        cgroup2(),
        bpffs(),
        clock_of_host(),
        clock_lag(),
        netns_cookie(),
        resets(&trial::try_reset()),
        programs(),
    ]);
    checks
}

/// Returns the first problem that prevents the daemon's start, and logs restrictions. Does not check the
/// programs, because the daemon loads its own at once, and not resets, because a reaper tests them.
///
/// # Errors
///
/// The failure that ends the daemon.
pub(super) fn require(all_namespaces: bool) -> Result<(), Failure> {
    let checks = capabilities(all_namespaces).into_iter();
    let mut checks = checks.chain([clock_of_host(), netns_cookie()]);
    checks.try_for_each(require_one)
}

/// The same for a reaper's test of resets.
///
/// # Errors
///
/// Fails as [`require`] does.
pub(super) fn require_resets(probed: &Probed) -> Result<(), Failure> {
    require_one(resets(probed))
}

fn require_one(check: Check) -> Result<(), Failure> {
    if let Some(warning) = check.warning {
        tracing::warn!("{warning}");
    }
    check.problem.map_or(Ok(()), Err)
}

fn capabilities(all_namespaces: bool) -> Vec<Check> {
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    CAPABILITIES
        .iter()
        .map(|purpose| check_capability(purpose, &effective, all_namespaces))
        .collect()
}

fn check_capability(purpose: &Purpose, effective: &CapsHashSet, all_namespaces: bool) -> Check {
    let name = &purpose.capability.to_string();
    let included = IN_SYS_ADMIN.contains(&purpose.capability)
        && effective.contains(&Capability::CAP_SYS_ADMIN);
    if effective.contains(&purpose.capability) || included {
        return Check::good(name, "present");
    }
    let without = match purpose.need {
        Need::Never(without) => Some(without),
        Need::AllNamespaces(Some(without)) if !all_namespaces => Some(without),
        Need::AllNamespaces(None) if !all_namespaces => {
            return Check::good(
                name,
                "missing, but not needed with daemon.network_namespaces = \"own\"",
            );
        }
        Need::Always | Need::AllNamespaces(_) => None,
    };
    if let Some(without) = without {
        return Check {
            warning: Some(format!("{name}: missing; {without}")),
            ..Check::good(name, "missing")
        };
    }
    Check::bad(
        name,
        ExitStatus::NoPermission,
        format!("missing, needed for {}", purpose.needed_for),
        "run as root, or give the service this capability",
    )
}

fn cgroup2() -> Check {
    match cgroup::mount_point() {
        Ok(path) => Check::good("cgroup v2", path.display().to_string()),
        Err(error) => Check::bad(
            "cgroup v2",
            ExitStatus::Unavailable,
            error.to_string(),
            "the daemon attaches its programs to a cgroup: mount cgroup2",
        ),
    }
}

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    match datapath::find_bpffs() {
        Bpffs::Mounted(path) => Check::good(NAME, format!("mounted at {}", path.display())),
        Bpffs::Mountable(path) => {
            let path = path.display();
            Check::good(NAME, format!("not mounted; `run` mounts it at {path}"))
        }
        Bpffs::Refused(error) => Check::bad(
            NAME,
            match error {
                Errno::EPERM => ExitStatus::NoPermission,
                _ => ExitStatus::Unavailable,
            },
            format!("not mounted, and cannot be mounted: {}", error.desc()),
            "mount it (mount -t bpf bpf /sys/fs/bpf), or set daemon.pin_dir to \"\": then each start \
             adopts all sessions anew",
        ),
    }
}

fn clock_of_host() -> Check {
    const NAME: &str = "clock";
    if clock::is_of_host() {
        return Check::good(NAME, "the host's");
    }
    Check::bad(
        NAME,
        ExitStatus::Unavailable,
        "this time namespace has an offset, so ages of connections would be wrong",
        "start the daemon in the host's time namespace",
    )
}

fn clock_lag() -> Check {
    let lag = Duration::from_nanos(clock::coarse_lag_ns());
    Check::good(
        "time stamps",
        format!(
            "exact; the activity of sessions older than the daemon is known to within {lag:?}, which is \
             added so that none ends early"
        ),
    )
}

fn netns_cookie() -> Check {
    const NAME: &str = "network namespace cookies";
    match DiagSocket::open().and_then(|diag| diag.netns_cookie()) {
        Ok(cookie) => Check::good(NAME, format!("present; this namespace has {cookie}")),
        Err(error) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            error.to_string(),
            "Linux 6.1 or newer with sock_diag is needed",
        ),
    }
}

/// The check for the result of a test reset.
fn resets(probed: &Probed) -> Check {
    const NAME: &str = "SOCK_DESTROY";
    match probed {
        Probed::Destroyed(0) => Check::good(NAME, "resets a connection"),
        Probed::Destroyed(libc::EPERM) => Check::bad(
            NAME,
            ExitStatus::NoPermission,
            "refused",
            "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace",
        ),
        Probed::NotSupported(tried) => without_destroy(NAME, tried),
        Probed::Destroyed(code) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            nix::Error::from_raw(*code).desc(),
            "the daemon needs a kernel that can destroy sockets",
        ),
        Probed::NotDestroyed(error) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            error.clone(),
            "the daemon needs a kernel that can destroy sockets",
        ),
        Probed::Failed(error) => untested(NAME, error),
    }
}

/// The check for a test that could not be made. It does not show that the kernel cannot reset connections: any local
/// user can take all ports.
fn untested(name: &str, error: &str) -> Check {
    Check {
        warning: Some(format!(
            "{name}: not tested: {error}; the test needs a connection over the loopback interface: is the \
             interface up, and does it have free ports (ss -tan, net.ipv4.ip_local_port_range)?"
        )),
        ..Check::good(name, "not tested")
    }
}

/// The check for a kernel without `SOCK_DESTROY`, depending on whether a reset through a descriptor worked.
fn without_destroy(name: &str, tried: &Result<(), String>) -> Check {
    const REMEDY: &str = "a kernel built with CONFIG_INET_DIAG_DESTROY has it";
    let found = "not supported";
    match tried {
        Ok(()) => Check {
            warning: Some(format!(
                "{name}: {found}; connections are reset through the processes that hold them \
                 (pidfd_getfd, which needs CAP_SYS_PTRACE), and one that no process has accepted, or \
                 that its process has closed, is only kept from passing payload; {REMEDY}"
            )),
            ..Check::good(name, found)
        },
        Err(error) => Check::bad(
            name,
            ExitStatus::Unavailable,
            format!("{found}, and connections are not reset through their processes: {error}"),
            REMEDY,
        ),
    }
}

/// Loads the programs with small maps and attaches them to nothing.
fn programs() -> Check {
    const NAME: &str = "eBPF programs";
    let options = Options {
        max_sessions: 1,
        only_netns: None,
        notes_owners: true,
        verbose: false,
    };
    match Datapath::load(options, None) {
        Ok(_) => Check::good(NAME, "accepted by the verifier"),
        Err(error) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            error.to_string(),
            "Linux 6.1 or newer and CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::trial::Trial;

    /// The check of a capability under these effective ones.
    fn check(capability: Capability, effective: &CapsHashSet, all_namespaces: bool) -> Check {
        let find = |purpose: &&Purpose| purpose.capability == capability;
        let purpose = CAPABILITIES.iter().find(find).unwrap();
        check_capability(purpose, effective, all_namespaces)
    }

    #[test]
    fn a_missing_capability_is_named_with_its_purpose() {
        let mut effective = caps::all();
        effective.remove(&Capability::CAP_NET_ADMIN);
        let check = check(Capability::CAP_NET_ADMIN, &effective, true);
        let failure = check.problem.unwrap();
        assert_eq!(failure.status, ExitStatus::NoPermission);
        let start = "CAP_NET_ADMIN: missing, needed for";
        assert!(failure.message.starts_with(start), "{failure}");
    }

    #[test]
    fn the_features_that_a_missing_capability_disables_are_reported() {
        let missing = |capability, all| check(capability, &CapsHashSet::new(), all);
        for all in [true, false] {
            let unread = missing(Capability::CAP_DAC_READ_SEARCH, all);
            assert!(unread.problem.is_none());
            assert!(unread.warning.unwrap().contains("hierarchy"));
            let untraced = missing(Capability::CAP_SYS_PTRACE, all);
            assert_eq!(untraced.problem.is_some(), all);
            assert_eq!(untraced.warning.is_some(), !all);
            let not_entered = missing(Capability::CAP_SYS_ADMIN, all);
            assert_eq!(not_entered.problem.is_some(), all);
        }
        assert!(missing(Capability::CAP_BPF, false).problem.is_some());
    }

    #[test]
    fn sys_admin_stands_for_the_capabilities_that_came_out_of_it() {
        let only_sys_admin = CapsHashSet::from([Capability::CAP_SYS_ADMIN]);
        let problem = |capability| check(capability, &only_sys_admin, true).problem;
        assert!(problem(Capability::CAP_BPF).is_none());
        assert!(problem(Capability::CAP_PERFMON).is_none());
        assert!(problem(Capability::CAP_NET_ADMIN).is_some());
    }

    #[test]
    fn without_sock_destroy_the_daemon_runs_where_processes_give_their_sockets() {
        let tried = Trial::new().and_then(Trial::disconnect);
        let check = without_destroy("SOCK_DESTROY", &tried.map_err(|error| error.to_string()));
        assert!(check.problem.is_none());
        let warning = check.warning.unwrap();
        assert!(warning.contains("CONFIG_INET_DIAG_DESTROY"), "{warning}");
        let check = without_destroy("SOCK_DESTROY", &Err("EPERM".to_owned()));
        let failure = check.problem.unwrap();
        assert_eq!(failure.status, ExitStatus::Unavailable);
        assert!(
            failure.message.contains("EPERM; a kernel built"),
            "{failure}"
        );
    }

    #[test]
    fn a_test_that_cannot_be_made_is_a_warning_and_a_kernel_that_lies_is_an_error() {
        let in_use = Errno::EADDRINUSE.desc().to_owned();
        let check = resets(&Probed::Failed(in_use.clone()));
        assert!(check.problem.is_none());
        let warning = check.warning.unwrap();
        assert!(warning.contains(&in_use) && warning.contains("free ports"));
        let check = resets(&Probed::NotDestroyed("it lives".to_owned()));
        assert_eq!(check.problem.unwrap().status, ExitStatus::Unavailable);
    }
}
