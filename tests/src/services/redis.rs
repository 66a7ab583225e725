//! A Redis of the test.

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

/// A running Redis in a separate network namespace, connected to a second one for remote clients. The kernel
/// sends keepalive probes every second.
#[derive(Debug)]
pub struct Redis {
    server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    near: Netns,
    far: Netns,
    _directory: TempDir,
}

impl Redis {
    /// The server's port.
    pub const PORT: u16 = 6379;
    /// The server's address.
    pub const ADDRESS: IpAddr = Veth::LEFT;
    /// The address of the remote clients.
    pub const FAR: IpAddr = Veth::RIGHT;

    /// Starts a server in a new cgroup. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails with the log if Redis is not installed or does not start.
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

    /// Starts a second server beside the first one, on another port.
    ///
    /// # Errors
    ///
    /// Fails with the log if it does not start.
    pub fn second(&self, port: u16) -> Result<(Program, TempDir)> {
        let place = Place::here()
            .in_cgroup(&self.lab.cgroup)
            .in_netns(&self.near);
        redis_at(&self.lab, &place, Self::ADDRESS, port)
    }

    /// The answer to a command, on a new connection from the other host.
    ///
    /// # Errors
    ///
    /// Fails if the server does not answer.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        succeed(self.client_command(&self.far, words)?)
    }

    /// The server's log.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// Starts a client on the same host, outside the cgroup, that reads commands.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed.
    pub fn near_client(&self, name: &str) -> Result<Program> {
        self.client(name, &self.near, &[])
    }

    /// Starts a client on the other host with these arguments.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed.
    pub fn far_client(&self, name: &str, args: &[&str]) -> Result<Program> {
        self.client(name, &self.far, args)
    }

    /// The server's host, outside the cgroup.
    pub fn near_place(&self) -> Place {
        Place::here().in_netns(&self.near)
    }

    /// Starts a Node client on the same host.
    ///
    /// # Errors
    ///
    /// Fails if Node is not installed, or if the client cannot connect.
    pub fn node_client(&self, name: &str) -> Result<Program> {
        let [host, port] = [Self::ADDRESS.to_string(), Self::PORT.to_string()];
        node_client(&self.lab, Some(&self.near), [name, &host, &port])
    }

    /// Waits until this number of clients wait in a blocking command.
    ///
    /// # Errors
    ///
    /// Fails if they do not in time.
    pub fn wait_for_blocked(&self, count: usize) -> Result<()> {
        eventually("clients are blocked", patience(), || {
            let clients = self.ask(&["INFO", "clients"])?;
            let line = format!("blocked_clients:{count}\r");
            Ok(clients.contains(&line).then_some(()))
        })
    }

    /// Starts a Python script on the same host, outside the cgroup.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed.
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

/// Starts a Redis at this place and waits until it is ready. It uses the directory alone.
///
/// # Errors
///
/// Fails with the log if Redis is not installed or does not start.
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
