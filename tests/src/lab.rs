//! The common setup of nearly every test.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    agent::{Agent, Place},
    cgroup::Cgroup,
    daemon::{Daemon, Launch},
    netns::Netns,
    pins::Pins,
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
