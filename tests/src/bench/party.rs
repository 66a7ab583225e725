//! The compared parties: the same traffic without a watcher, with session-enforcer, and with its peers.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use session_enforcer_tests::{
    Cgroup, Daemon, Launch, Netns, Place, Stop,
    services::{Program, haproxy, nginx, track_connections},
};
use tempfile::TempDir;

use crate::{
    bpf::{Body, PlainPrograms},
    worker::Worker,
};

/// The port of a party's worker.
const BACKEND: u16 = 7000;

/// The port of a proxy.
const PROXY: u16 = 7001;

/// A rule for both ends of every connection, with a limit that no connection reaches.
pub(crate) const EVERYTHING: &str = "[[rule]]\nname = \"all\"\nidle_timeout = \"1h\"\n";

/// The same rule for the owner of every connection.
const OWNED: &str = "[[rule]]\nname = \"all\"\nusers = [0]\nidle_timeout = \"1h\"\n";

/// A rule that matches none of the benchmark's connections.
const NOTHING: &str = "[[rule]]\nname = \"other\"\nlocal_ports = [1]\ndirection = \"inbound\"\n\
                       idle_timeout = \"1h\"\n";

/// The same, but the rule does not exclude them by port, so the programs must look up each session.
const ELSEWHERE: &str =
    "[[rule]]\nname = \"other\"\nremote = [\"192.0.2.0/24\"]\nidle_timeout = \"1h\"\n";

/// The watcher of the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No watcher.
    Bare,
    /// Programs on the same hooks that do little or nothing.
    Plain(Body),
    /// A daemon that tracks both ends.
    Tracked,
    /// A daemon that tracks both ends by a rule that names their owner.
    Owned,
    /// A daemon that tracks connections to other ports.
    Untracked,
    /// A daemon that tracks connections to other addresses on any port.
    Elsewhere,
    /// The kernel's connection tracking.
    Conntrack,
    /// HAProxy between the ends.
    Haproxy,
    /// nginx between the ends.
    Nginx,
}

impl Kind {
    /// Programs that do nothing.
    pub(crate) const NULL: Self = Self::Plain(Body::Nothing);

    /// The kinds that are compared by time. The baselines come first.
    pub(crate) const ALL: [Self; 8] = [
        Self::Bare,
        Self::NULL,
        Self::Plain(Body::Calls),
        Self::Tracked,
        Self::Untracked,
        Self::Conntrack,
        Self::Haproxy,
        Self::Nginx,
    ];

    /// Those that differ from these for each connection only.
    pub(crate) const OWNERS: [Self; 2] = [Self::Plain(Body::OwnerCalls), Self::Owned];

    /// Whether it is a third-party program, which may be missing.
    pub(crate) const fn is_a_peer(self) -> bool {
        matches!(self, Self::Conntrack | Self::Haproxy | Self::Nginx)
    }

    /// The name in the table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Plain(Body::Nothing) => "null program",
            Self::Plain(Body::Clock) => "clock alone",
            Self::Plain(Body::CoarseClock) => "coarse clock alone",
            Self::Plain(Body::Cookie) => "cookie alone",
            Self::Plain(Body::LookUp) => "cookie and look-up alone",
            Self::Plain(Body::StorageMissed) => "socket storage alone, nothing there",
            Self::Plain(Body::StorageFound) => "socket storage alone, found",
            Self::Plain(Body::Calls) => "necessary calls alone",
            Self::Plain(Body::OwnerCalls) => "necessary calls alone, with the owner",
            Self::Tracked => "session-enforcer, both ends tracked",
            Self::Owned => "session-enforcer, both ends tracked by owner",
            Self::Untracked => "session-enforcer, not tracked",
            Self::Elsewhere => "session-enforcer, rule without ports, not tracked",
            Self::Conntrack => "conntrack",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx stream",
        }
    }
}

/// Keeps the watcher alive.
#[derive(Debug)]
enum Watcher {
    Nobody,
    Plain(#[expect(dead_code, reason = "detached on drop")] PlainPrograms),
    Daemon(Daemon),
    Proxy((Program, TempDir)),
}

/// A worker in a separate cgroup and network namespace, with its watcher. All of it runs on one processor, so
/// the elapsed time includes all work for a connection.
#[derive(Debug)]
pub(crate) struct Party {
    /// The kind of watcher.
    pub(crate) kind: Kind,
    /// The worker, which opens the connections.
    pub(crate) worker: Worker,
    watcher: Watcher,
    /// The cgroup of the worker and of a proxy.
    pub(crate) cgroup: Cgroup,
    _netns: Netns,
}

impl Party {
    /// Sets up a party on this processor. `agent` is the path of the agent's binary.
    pub(crate) fn set_up(kind: Kind, agent: &Path, cpu: usize, stop: &Stop) -> Result<Self> {
        stop.check()?;
        let (cgroup, netns) = (Cgroup::new()?, namespace()?);
        let place = Place::here().in_cgroup(&cgroup).in_netns(&netns);
        let ports = [PROXY, BACKEND];
        let watcher = match kind {
            Kind::Bare => Watcher::Nobody,
            Kind::Plain(body) => Watcher::Plain(PlainPrograms::attach(cgroup.path(), body)?),
            Kind::Tracked => Watcher::Daemon(pinned_daemon(&cgroup, EVERYTHING, cpu, stop)?),
            Kind::Owned => Watcher::Daemon(pinned_daemon(&cgroup, OWNED, cpu, stop)?),
            Kind::Untracked => Watcher::Daemon(pinned_daemon(&cgroup, NOTHING, cpu, stop)?),
            Kind::Elsewhere => Watcher::Daemon(pinned_daemon(&cgroup, ELSEWHERE, cpu, stop)?),
            Kind::Conntrack => {
                track_connections(agent, &netns)?;
                Watcher::Nobody
            }
            Kind::Haproxy => Watcher::Proxy(haproxy(agent, &place, cpu, ports)?),
            Kind::Nginx => Watcher::Proxy(nginx(agent, &place, cpu, ports)?),
        };
        let mut worker = Worker::start(agent, &place, Some(cpu))?;
        worker.ask(stop, format_args!("listen {BACKEND}"))?;
        if let Watcher::Proxy(_) = watcher {
            worker.ask(stop, format_args!("dial {PROXY}"))?;
        }
        Ok(Self {
            kind,
            worker,
            watcher,
            cgroup,
            _netns: netns,
        })
    }

    /// The PIDs of all processes that work for its connections.
    pub(crate) fn processes(&self) -> impl Iterator<Item = u32> + use<> {
        let watcher = match &self.watcher {
            Watcher::Nobody | Watcher::Plain(_) => None,
            Watcher::Daemon(daemon) => Some(daemon.pid()),
            Watcher::Proxy((program, _)) => Some(program.pid()),
        };
        [self.worker.pid()].into_iter().chain(watcher)
    }

    /// The daemon, if the party has one.
    pub(crate) fn daemon(&self) -> Option<&Daemon> {
        match &self.watcher {
            Watcher::Daemon(daemon) => Some(daemon),
            _ => None,
        }
    }
}

/// A network namespace with enough ports for many connections in a row.
pub(crate) fn namespace() -> Result<Netns> {
    let netns = Netns::new()?;
    netns.set_parameter("ipv4/ip_local_port_range", "'10000 65535'")?;
    netns.set_parameter("ipv4/tcp_tw_reuse", "1")?;
    Ok(netns)
}

/// Starts a daemon that watches the cgroup and handles signals.
pub(crate) fn daemon(cgroup: &Cgroup, config: &str, stop: &Stop) -> Result<Daemon> {
    let launch = Launch::on(cgroup.path()).config(config);
    Ok(stop.unblocked(|| launch.start())?.quiet())
}

fn pinned_daemon(cgroup: &Cgroup, config: &str, cpu: usize, stop: &Stop) -> Result<Daemon> {
    let daemon = daemon(cgroup, config, stop)?;
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        let name = task?.file_name();
        let id = name.to_str().context("the name of a thread")?.parse()?;
        sched_setaffinity(Pid::from_raw(id), &cpus).context("pinning the daemon")?;
    }
    Ok(daemon)
}
