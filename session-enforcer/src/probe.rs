//! What this kernel and these privileges allow, found by trying and not by version numbers.
//!
//! `run` asks before it starts and `doctor` prints the answers. Every trial is on sockets and maps
//! of the daemon's own.

use std::{
    fs,
    io::{ErrorKind as IoErrorKind, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::Context as _;
use nix::errno::Errno;
use session_enforcer_common::Address;

use crate::{
    bpf::{self, Bpffs, Kernel, Options},
    cgroup, clock,
    disconnect::{self, Answer},
    exit::{ExitStatus, Failure},
    processes::Descriptors,
    sock_diag::{DiagSocket, Target},
};

/// A capability and what it is needed for (`linux/capability.h`).
struct Capability {
    bit: u32,
    name: &'static str,
    needed_for: &'static str,
    /// Whether only `network_namespaces = "all"` needs it.
    only_for_all_namespaces: bool,
}

impl Capability {
    const fn new(bit: u32, name: &'static str, needed_for: &'static str) -> Self {
        Self {
            bit,
            name,
            needed_for,
            only_for_all_namespaces: false,
        }
    }

    const fn for_all_namespaces(mut self) -> Self {
        self.only_for_all_namespaces = true;
        self
    }
}

/// In the order in which they are asked for.
const CAPABILITIES: [Capability; 5] = [
    Capability::new(39, "CAP_BPF", "loading the eBPF programs and maps"),
    Capability::new(
        12,
        "CAP_NET_ADMIN",
        "attaching to a cgroup and resetting sockets",
    ),
    Capability::new(38, "CAP_PERFMON", "eBPF programs that read packets"),
    Capability::new(21, "CAP_SYS_ADMIN", "entering other network namespaces").for_all_namespaces(),
    Capability::new(
        19,
        "CAP_SYS_PTRACE",
        "finding the namespaces of other users' processes",
    )
    .for_all_namespaces(),
];

/// `CAP_SYS_ADMIN` includes `CAP_BPF` and `CAP_PERFMON` (capabilities(7)).
const SYS_ADMIN_BIT: u32 = 21;
const IN_SYS_ADMIN: [u32; 2] = [38, 39];

/// The answer to one question.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was asked, in a few words.
    pub name: String,
    /// What was found.
    pub found: String,
    /// What is wrong and what to do, and the exit status that `run` has then; `None`: it runs.
    pub problem: Option<Failure>,
    /// What is less than it could be, and what to do; `run` runs and says so.
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

/// Asks everything.
pub fn all() -> Vec<Check> {
    let mut checks = vec![Check::good("kernel", kernel_release())];
    checks.extend(capabilities(true));
    checks.extend([
        cgroup2(),
        bpffs(),
        clock_lag(),
        netns_cookie(),
        sock_destroy(),
        programs(),
    ]);
    checks
}

/// The first thing that keeps the daemon from its work; what only hinders it is logged. The programs
/// are left out: the daemon loads its own at once.
///
/// # Errors
///
/// The failure to end with.
pub fn require(all_namespaces: bool) -> Result<(), Failure> {
    let probes = [netns_cookie as fn() -> Check, sock_destroy];
    let checks = capabilities(all_namespaces).into_iter();
    for check in checks.chain(probes.into_iter().map(|probe| probe())) {
        if let Some(problem) = check.problem {
            return Err(problem);
        }
        if let Some(warning) = check.warning {
            tracing::warn!("{warning}");
        }
    }
    Ok(())
}

/// The kernel's release, as `uname -r` prints it.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}

fn capabilities(all_namespaces: bool) -> Vec<Check> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = parse_effective(&status).unwrap_or(0);
    let needed = |c: &&Capability| all_namespaces || !c.only_for_all_namespaces;
    CAPABILITIES
        .iter()
        .filter(needed)
        .map(|c| check_capability(c, effective))
        .collect()
}

fn check_capability(capability: &Capability, effective: u64) -> Check {
    let has = |bit: u32| effective & (1 << bit) != 0;
    let included = IN_SYS_ADMIN.contains(&capability.bit) && has(SYS_ADMIN_BIT);
    if has(capability.bit) || included {
        return Check::good(capability.name, "present");
    }
    Check::bad(
        capability.name,
        ExitStatus::NoPermission,
        format!("missing, needed for {}", capability.needed_for),
        "run as root, or give the service this capability",
    )
}

/// Format: proc(5), `/proc/pid/status`.
fn parse_effective(status: &str) -> Option<u64> {
    let hex = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn cgroup2() -> Check {
    match cgroup::mount_point() {
        Ok(path) => Check::good("cgroup v2", path.display().to_string()),
        Err(error) => Check::bad(
            "cgroup v2",
            ExitStatus::Unavailable,
            error.to_string(),
            "the programs are attached to a cgroup",
        ),
    }
}

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    match bpf::find_bpffs() {
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
            format!("not mounted, and cannot be: {}", error.desc()),
            "mount it (mount -t bpf bpf /sys/fs/bpf), or set daemon.pin_dir to \"\" and sessions \
             are adopted anew at each start",
        ),
    }
}

fn clock_lag() -> Check {
    let lag = Duration::from_nanos(clock::coarse_lag_ns());
    Check::good(
        "time stamps",
        format!(
            "exact; activity of sessions older than the daemon is known to {lag:?} and taken as so much \
             later, so that none ends early"
        ),
    )
}

fn netns_cookie() -> Check {
    const NAME: &str = "network namespace cookies";
    match DiagSocket::open().and_then(|diag| diag.netns_cookie()) {
        Ok(cookie) => Check::good(NAME, format!("present, the own one is {cookie}")),
        Err(error) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            error.to_string(),
            "Linux 6.1 or newer with sock_diag is needed",
        ),
    }
}

/// Destroys a loopback connection of its own and looks whether that is so.
fn sock_destroy() -> Check {
    const NAME: &str = "SOCK_DESTROY";
    match try_destroy() {
        Ok(0) => Check::good(NAME, "resets a connection"),
        Ok(libc::EPERM) => Check::bad(
            NAME,
            ExitStatus::NoPermission,
            "refused",
            "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace",
        ),
        Ok(libc::EOPNOTSUPP) => without_destroy(NAME, try_disconnect()),
        Ok(code) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            nix::Error::from_raw(code).desc(),
            "the kernel must be able to destroy sockets",
        ),
        Err(error) => Check::bad(
            NAME,
            ExitStatus::Unavailable,
            error.to_string(),
            "a connection over the loopback interface is needed to try it; is it up?",
        ),
    }
}

/// What a kernel without it is good for, by whether a connection was reset through its process.
fn without_destroy(name: &str, tried: anyhow::Result<()>) -> Check {
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
            format!("{found}, and connections are not reset through their processes: {error:#}"),
            REMEDY,
        ),
    }
}

/// Resets a connection that this function makes, in the way of kernels without `SOCK_DESTROY`.
fn try_disconnect() -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let target = target_of(&client)?;
    let processes = Descriptors::of_all_processes();
    let answer = disconnect::reset_tcp(&mut DiagSocket::open()?, &target, &processes)?;
    anyhow::ensure!(answer == Answer::Reset, "the connection is not found");
    Ok(())
}

/// The kernel's answer to the destruction of a connection that this function makes.
fn try_destroy() -> anyhow::Result<i32> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let target = target_of(&client)?;
    let (codes, result) = DiagSocket::open()?.destroy(&[target]);
    result?;
    let code = codes.first().copied().flatten().unwrap_or(libc::EIO);
    if code == 0 {
        client.set_read_timeout(Some(Duration::from_secs(1)))?;
        match client.read(&mut [0]) {
            Err(error) if error.kind() == IoErrorKind::ConnectionAborted => {}
            other => anyhow::bail!("the kernel claims success and the socket lives: {other:?}"),
        }
    }
    Ok(code)
}

fn target_of(stream: &TcpStream) -> anyhow::Result<Target> {
    let address = |address: SocketAddr| match address {
        SocketAddr::V4(v4) => Address::from_octets(v4.ip().to_ipv6_mapped().octets()),
        SocketAddr::V6(v6) => Address::from_octets(v6.ip().octets()),
    };
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    Ok(Target {
        local: address(local),
        remote: address(remote),
        local_port: local.port(),
        remote_port: remote.port(),
        ifindex: 0,
        cookie: disconnect::cookie(stream).context("SO_COOKIE")?,
    })
}

/// Loads the programs, small, and attaches them to nothing.
fn programs() -> Check {
    const NAME: &str = "eBPF programs";
    let options = Options {
        max_sessions: 1,
        only_netns: None,
        verbose: false,
    };
    match Kernel::load(options, None) {
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

    #[test]
    fn effective_capabilities_are_read() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert_eq!(parse_effective(status), Some(0x1ff_ffff_ffff));
        assert_eq!(parse_effective("Name:\tx\n"), None);
    }

    #[test]
    fn a_missing_capability_is_named_with_its_purpose() {
        let check = check_capability(&CAPABILITIES[1], !(1 << 12));
        let failure = check.problem.unwrap();
        assert_eq!(failure.status, ExitStatus::NoPermission);
        assert!(
            failure
                .message
                .starts_with("CAP_NET_ADMIN: missing, needed for"),
            "{failure}"
        );
    }

    #[test]
    fn sys_admin_stands_for_the_capabilities_that_came_out_of_it() {
        let only_sys_admin = 1 << SYS_ADMIN_BIT;
        assert!(
            check_capability(&CAPABILITIES[0], only_sys_admin)
                .problem
                .is_none()
        );
        assert!(
            check_capability(&CAPABILITIES[1], only_sys_admin)
                .problem
                .is_some()
        );
    }

    #[test]
    fn without_sock_destroy_the_daemon_runs_where_processes_give_their_sockets() {
        let check = without_destroy("SOCK_DESTROY", try_disconnect());
        assert!(check.problem.is_none());
        let warning = check.warning.unwrap();
        assert!(warning.contains("CONFIG_INET_DIAG_DESTROY"), "{warning}");
        let check = without_destroy("SOCK_DESTROY", Err(anyhow::anyhow!("EPERM")));
        let failure = check.problem.unwrap();
        assert_eq!(failure.status, ExitStatus::Unavailable);
        assert!(
            failure.message.contains("EPERM; a kernel built"),
            "{failure}"
        );
    }
}
