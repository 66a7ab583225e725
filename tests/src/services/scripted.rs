//! Servers and clients that the distribution's packages for Python have, each run by a script.

use std::{path::Path, process::Command};

use anyhow::Result;

use super::{
    Host, Hosts,
    program::{self, PYTHON, Program},
};
use crate::{lab::Lab, netns::Veth};

/// A running server on a host of its own. Its script is told `server ADDRESS` and says `ready`, or `client ADDRESS` and says
/// `port: NUMBER`.
#[derive(Debug)]
pub struct Scripted {
    server: Program,
    /// The cgroup that it is in.
    pub lab: Lab,
    hosts: Hosts,
    script: &'static str,
}

impl Scripted {
    /// Starts a server in a new cgroup, with these arguments more. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Where Python or a package is not installed, or it does not start.
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

    /// What the server has written.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// A client on the other host with these arguments more; its port.
    ///
    /// # Errors
    ///
    /// Where it cannot connect.
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
