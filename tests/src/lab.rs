//! What nearly every test begins with.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    agent::{Agent, Place},
    cgroup::Cgroup,
    daemon::{Daemon, Launch},
    netns::Netns,
    pins::Pins,
};

/// A cgroup for the daemon to watch, and sockets in it and beside it.
///
/// Held until the end of the test, before the daemon in the order of declaration, so that the
/// daemon goes first.
#[derive(Debug)]
pub struct Lab {
    /// Makes sockets in the cgroup: the daemon sees them.
    pub inside: Agent,
    /// Makes sockets where the test is: the daemon does not see them.
    pub outside: Agent,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// For a daemon that is to leave something to the next.
    pub pins: Pins,
    agent: PathBuf,
}

impl Lab {
    /// Sets one up. `agent` is the path of the agent's binary: within the tests
    /// `env!("CARGO_BIN_EXE_session-enforcer-test-agent")`.
    ///
    /// # Errors
    ///
    /// Without root's rights.
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

    /// The agent's binary.
    pub fn agent_binary(&self) -> &Path {
        &self.agent
    }

    /// Makes sockets at another place.
    ///
    /// # Errors
    ///
    /// Where the agent cannot be started.
    pub fn at(&self, place: &Place) -> Result<Agent> {
        Agent::start(&self.agent, place)
    }

    /// Makes sockets in the cgroup and in a network namespace.
    ///
    /// # Errors
    ///
    /// Where the agent cannot be started.
    pub fn inside_in(&self, netns: &Netns) -> Result<Agent> {
        Agent::start(
            &self.agent,
            &Place::here().in_cgroup(&self.cgroup).in_netns(netns),
        )
    }

    /// Makes sockets in a network namespace, not in the cgroup.
    ///
    /// # Errors
    ///
    /// Where the agent cannot be started.
    pub fn outside_in(&self, netns: &Netns) -> Result<Agent> {
        self.at(&Place::here().in_netns(netns))
    }

    /// A daemon to be started on the cgroup.
    pub fn launch(&self) -> Launch<'_> {
        Launch::on(self.cgroup.path())
    }

    /// Starts the daemon on the cgroup, with this configuration and with pins.
    ///
    /// # Errors
    ///
    /// Where it is not ready in time.
    pub fn pinned_daemon(&self, config: &str) -> Result<Daemon> {
        self.launch().pinned(&self.pins).config(config).start()
    }

    /// Starts the daemon on the cgroup, with this configuration.
    ///
    /// # Errors
    ///
    /// Where it is not ready in time.
    pub fn daemon(&self, config: &str) -> Result<Daemon> {
        Launch::on(self.cgroup.path()).config(config).start()
    }
}
