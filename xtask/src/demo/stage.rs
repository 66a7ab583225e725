//! The environment of the show: two connected network namespaces and a cgroup.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use session_enforcer_tests::{Agent, Cgroup, Listener, Netns, Pair, Place, Veth};

/// Dropping it removes everything. The order of the fields is the order of removal.
pub(super) struct Stage {
    servers: Vec<Listener>,
    clients: Agent,
    /// The servers' sockets belong to it. The daemon sees only these.
    pub(super) cgroup: Cgroup,
    server_side: Netns,
    client_side: Netns,
}

impl Stage {
    /// Creates the environment with a server on each of these addresses of the link's right end.
    pub(super) fn build(agent: &Path, servers: &BTreeSet<SocketAddr>) -> Result<Self> {
        let cgroup = Cgroup::new().context("the demo makes a cgroup of its own")?;
        let [client_side, server_side] = [Netns::new()?, Netns::new()?];
        Veth::between(&client_side, &server_side)?;
        let place = Place::here().in_cgroup(&cgroup).in_netns(&server_side);
        let server_agent = Agent::start(agent, &place)?;
        let listen = |address: &SocketAddr| server_agent.listen(*address);
        Ok(Self {
            servers: servers.iter().map(listen).collect::<Result<_>>()?,
            clients: Agent::start(agent, &Place::here().in_netns(&client_side))?,
            cgroup,
            server_side,
            client_side,
        })
    }

    /// Connects a client in one namespace to a server in the other.
    pub(super) fn connect(&self, server: SocketAddr) -> Result<Pair> {
        let listener = self
            .servers
            .iter()
            .find(|listener| listener.address == server);
        let listener = listener.with_context(|| format!("no server on {server}"))?;
        Pair::open(&self.clients, listener)
    }

    /// The names of the clients' and of the servers' namespace.
    pub(super) fn namespaces(&self) -> [&str; 2] {
        [self.client_side.name(), self.server_side.name()]
    }

    /// Files that exist as long as the environment does.
    pub(super) fn traces(&self) -> Vec<PathBuf> {
        let cgroup = self.cgroup.path().to_owned();
        vec![cgroup, self.server_side.path(), self.client_side.path()]
    }
}

/// Fails if one of the files still exists.
pub(super) fn ensure_gone(traces: &[PathBuf]) -> Result<()> {
    let left: Vec<_> = traces.iter().filter(|path| path.exists()).collect();
    if !left.is_empty() {
        bail!("left behind: {left:?}");
    }
    Ok(())
}
