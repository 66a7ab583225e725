//! Servers and clients of the distribution's Python packages, each run by a script.

use std::{path::Path, process::Command};

use anyhow::Result;

use super::{
    Host, Hosts,
    program::{self, PYTHON, Program},
};
use crate::{lab::Lab, netns::Veth};

/// A running server on a separate host. Its script gets the arguments `server ADDRESS` and prints `ready`, or
/// `client ADDRESS` and prints `port: NUMBER`.
#[derive(Debug)]
pub struct Scripted {
    server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    hosts: Hosts,
    script: &'static str,
}

impl Scripted {
    /// Starts a server in a new cgroup with these additional arguments. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails if Python or a package is not installed, or if the server does not start.
    pub fn start(agent: impl AsRef<Path>, script: &'static str, args: &[&str]) -> Result<Self> {
        let (lab, hosts) = (Lab::new(agent)?, Hosts::new()?);
        let mut command = python(&lab, &hosts, Host::Server, script, "server")?;
        command.args(args);
        let server = Program::server("the server", command, "ready")?;
        Ok(Self {
            server,
            lab,
            hosts,
            script,
        })
    }

    /// The server's output.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// Starts a client on the other host with these additional arguments. Returns it with its port.
    ///
    /// # Errors
    ///
    /// Fails if the client cannot connect.
    pub fn client(&self, name: &str, args: &[&str]) -> Result<(Program, u16)> {
        let mut command = python(&self.lab, &self.hosts, Host::Far, self.script, "client")?;
        command.args(args);
        let mut client = Program::client(name, command)?;
        let [port] = client.numbers_after("port: ")?;
        Ok((client, port.try_into()?))
    }
}

fn python(lab: &Lab, hosts: &Hosts, host: Host, script: &str, what: &str) -> Result<Command> {
    let python = program::find(PYTHON, "python3", &[])?;
    let mut command = hosts.command(lab, host, python);
    command.args(["-u", "-c", script, what, &Veth::LEFT.to_string()]);
    Ok(command)
}
