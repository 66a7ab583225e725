//! A Redis of the test's own.

use std::{net::IpAddr, path::Path, process::Command};

use anyhow::Result;
use tempfile::TempDir;

use super::{
    node_client,
    program::{self, PYTHON, Program, succeed},
};
use crate::{
    agent::Place,
    clock::eventually,
    lab::Lab,
    netns::{Netns, Veth},
    pace::patience,
};

const READY: &str = "Ready to accept connections";

/// A running Redis in a network namespace of its own, with a cable to a second one for clients
/// from another host. It has the kernel send keepalive probes every second.
#[derive(Debug)]
pub struct Redis {
    server: Program,
    /// The cgroup that it is in.
    pub lab: Lab,
    near: Netns,
    far: Netns,
    _directory: TempDir,
}

impl Redis {
    /// Its port.
    pub const PORT: u16 = 6379;
    /// Its address.
    pub const ADDRESS: IpAddr = Veth::LEFT;
    /// The address of the clients from the other host.
    pub const FAR: IpAddr = Veth::RIGHT;

    /// Starts a server in a new cgroup. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Where Redis is not installed or does not start, with its log.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let (near, far) = (Netns::new()?, Netns::new()?);
        Veth::between(&near, &far)?;
        let place = Place::here().in_cgroup(&lab.cgroup).in_netns(&near);
        let (server, directory) = redis_at(&lab, &place, Self::ADDRESS, Self::PORT)?;
        Ok(Self {
            server,
            lab,
            near,
            far,
            _directory: directory,
        })
    }

    /// A second server beside the first, on another port.
    ///
    /// # Errors
    ///
    /// Where it does not start, with its log.
    pub fn second(&self, port: u16) -> Result<(Program, TempDir)> {
        let place = Place::here()
            .in_cgroup(&self.lab.cgroup)
            .in_netns(&self.near);
        redis_at(&self.lab, &place, Self::ADDRESS, port)
    }

    /// The answer to a command, on a connection of its own from the other host.
    ///
    /// # Errors
    ///
    /// Where the server does not answer.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        succeed(self.client_command(&self.far, words)?)
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// A client from the same host, not in the cgroup, that is typed to.
    ///
    /// # Errors
    ///
    /// Where it is not installed.
    pub fn near_client(&self, name: &str) -> Result<Program> {
        self.client(name, &self.near, &[])
    }

    /// A client from the other host that does this.
    ///
    /// # Errors
    ///
    /// Where it is not installed.
    pub fn far_client(&self, name: &str, args: &[&str]) -> Result<Program> {
        self.client(name, &self.far, args)
    }

    /// Its host, beside the cgroup.
    pub fn near_place(&self) -> Place {
        Place::here().in_netns(&self.near)
    }

    /// A client of Node's from the same host.
    ///
    /// # Errors
    ///
    /// Where it is not installed, or cannot connect.
    pub fn node_client(&self, name: &str) -> Result<Program> {
        let [host, port] = [Self::ADDRESS.to_string(), Self::PORT.to_string()];
        node_client(&self.lab, Some(&self.near), [name, &host, &port])
    }

    /// Waits until so many clients wait in a blocking command.
    ///
    /// # Errors
    ///
    /// Where they do not.
    pub fn wait_for_blocked(&self, count: usize) -> Result<()> {
        eventually("clients are blocked", patience(), || {
            let clients = self.ask(&["INFO", "clients"])?;
            let line = format!("blocked_clients:{count}\r");
            Ok(clients.contains(&line).then_some(()))
        })
    }

    /// A Python script from the same host, not in the cgroup.
    ///
    /// # Errors
    ///
    /// Where Python is not installed.
    pub fn python(&self, name: &str, script: &str, args: &[&str]) -> Result<Program> {
        let python = program::find(PYTHON, "python3", &[])?;
        let place = Place::here().in_netns(&self.near);
        let mut command = place.command(self.lab.agent_binary(), python);
        command.args(["-c", script]).args(args);
        Program::client(name, command)
    }

    fn client(&self, name: &str, netns: &Netns, args: &[&str]) -> Result<Program> {
        Program::client(name, self.client_command(netns, args)?)
    }

    fn client_command(&self, netns: &Netns, args: &[&str]) -> Result<Command> {
        let redis_cli = program::find("redis-cli", "redis-tools", &[])?;
        let place = Place::here().in_netns(netns);
        let mut command = place.command(self.lab.agent_binary(), redis_cli);
        command.args([
            "-h",
            &Self::ADDRESS.to_string(),
            "-p",
            &Self::PORT.to_string(),
        ]);
        command.args(args);
        Ok(command)
    }
}

/// Starts a Redis at this place and waits until it is ready; the directory is its own.
///
/// # Errors
///
/// Where Redis is not installed or does not start, with its log.
pub fn redis_at(
    lab: &Lab,
    place: &Place,
    address: IpAddr,
    port: u16,
) -> Result<(Program, TempDir)> {
    let directory = tempfile::tempdir()?;
    let redis = program::find("redis-server", "redis-server", &[])?;
    let mut command = place.command(lab.agent_binary(), redis);
    command.args(["--bind", &address.to_string(), "--port", &port.to_string()]);
    command.args(["--save", "", "--appendonly", "no", "--protected-mode", "no"]);
    command.args(["--timeout", "0", "--tcp-keepalive", "1"]);
    command.args(["--loglevel", "verbose", "--dir"]);
    command.arg(directory.path());
    Ok((Program::server("redis-server", command, READY)?, directory))
}
