//! The common setup of nearly every test.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use nix::errno::Errno;

use crate::{
    agent::{Agent, Place},
    audit::Record,
    cgroup::Cgroup,
    clock::Moment,
    daemon::{Daemon, Launch},
    netns::Netns,
    pins::Pins,
    tcp::{Listener, Pair},
};

/// A cgroup for the daemon to watch, with agents in it and outside.
///
/// Declare it before the daemon and hold it until the end of the test, so that the daemon is dropped first.
#[derive(Debug)]
pub struct Lab {
    /// Creates sockets in the cgroup, which the daemon sees.
    pub inside: Agent,
    /// Creates sockets at the place of the test, which the daemon does not see.
    pub outside: Agent,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The pins, through which one daemon leaves its state to the next.
    pub pins: Pins,
    agent: PathBuf,
}

impl Lab {
    /// Sets up a lab. `agent` is the path of the agent's binary: in the tests
    /// `env!("CARGO_BIN_EXE_session-enforcer-test-agent")`.
    ///
    /// # Errors
    ///
    /// Fails without root's privileges.
    pub fn new(agent: impl AsRef<Path>) -> Result<Self> {
        let agent = agent.as_ref().to_owned();
        let cgroup = Cgroup::new()?;
        let inside = Agent::start(&agent, &Place::here().in_cgroup(&cgroup))?;
        let outside = Agent::start(&agent, &Place::here())?;
        Ok(Self {
            inside,
            outside,
            cgroup,
            pins: Pins::new(),
            agent,
        })
    }

    /// The path of the agent's binary.
    pub fn agent_binary(&self) -> &Path {
        &self.agent
    }

    /// Starts an agent at another place.
    ///
    /// # Errors
    ///
    /// Fails if the agent cannot be started.
    pub fn at(&self, place: &Place) -> Result<Agent> {
        Agent::start(&self.agent, place)
    }

    /// Starts an agent in the cgroup and in a network namespace.
    ///
    /// # Errors
    ///
    /// Fails if the agent cannot be started.
    pub fn inside_in(&self, netns: &Netns) -> Result<Agent> {
        Agent::start(
            &self.agent,
            &Place::here().in_cgroup(&self.cgroup).in_netns(netns),
        )
    }

    /// Starts an agent in a network namespace, outside the cgroup.
    ///
    /// # Errors
    ///
    /// Fails if the agent cannot be started.
    pub fn outside_in(&self, netns: &Netns) -> Result<Agent> {
        self.at(&Place::here().in_netns(netns))
    }

    /// The launch parameters of a daemon on the cgroup.
    pub fn launch(&self) -> Launch<'_> {
        Launch::on(self.cgroup.path())
    }

    /// Starts a daemon on the cgroup with this configuration and with pins.
    ///
    /// # Errors
    ///
    /// Fails if it is not ready in time.
    pub fn pinned_daemon(&self, config: &str) -> Result<Daemon> {
        self.launch().pinned(&self.pins).config(config).start()
    }

    /// Starts a daemon on the cgroup with this configuration.
    ///
    /// # Errors
    ///
    /// Fails if it is not ready in time.
    pub fn daemon(&self, config: &str) -> Result<Daemon> {
        Launch::on(self.cgroup.path()).config(config).start()
    }
}

/// A connection whose server's end a daemon tracks. The fields are dropped in this order.
#[derive(Debug)]
pub struct TrackedPair {
    /// The connection.
    pub pair: Pair,
    /// The daemon, which was started before the connection was opened.
    pub daemon: Daemon,
    /// The server's listener.
    pub listener: Listener,
    /// The lab.
    pub lab: Lab,
}

impl TrackedPair {
    /// Starts a daemon with this configuration and opens a connection on loopback. `agent` is as in [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails if the daemon is not ready in time.
    pub fn open(agent: impl AsRef<Path>, config: &str) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let daemon = lab.daemon(config)?;
        let pair = Pair::open(&lab.outside, &listener)?;
        Ok(Self {
            pair,
            daemon,
            listener,
            lab,
        })
    }

    /// Waits until client and server get these errors, and returns the record. Checks that the reset was due by the idle
    /// timeout and not early.
    ///
    /// # Errors
    ///
    /// See [`Pair::ends`] and [`Daemon::wait_for_termination_of`].
    pub fn assert_reset_when_idle(
        &self,
        errors: [Errno; 2],
        last: &Moment,
        limit: Duration,
    ) -> Result<Record> {
        for (end, error) in self.pair.ends()?.iter().zip(errors) {
            end.assert_reset(error, last, limit);
        }
        let record = self.daemon.wait_for_termination_of(&self.pair)?;
        record.assert_reset("idle_timeout", last, limit);
        Ok(record)
    }
}
