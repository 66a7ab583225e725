//! A `MariaDB` of the test.

use std::{os::unix::fs::chown, path::Path};

use anyhow::{Context as _, Result};
use nix::unistd::User;
use tempfile::TempDir;

use super::{
    Host, Hosts, node_client,
    program::{self, PYTHON, Program},
};
use crate::{lab::Lab, netns::Veth};

/// `MariaDB` refuses to run as root.
const OWNER: &str = "nobody";
const READY: &str = "ready for connections";

/// A client that prints `port: NUMBER` and then executes each line that it reads.
const CLIENT: &str = include_str!("../../clients/mysql.py");

/// A running `MariaDB` on a separate host, without accounts.
#[derive(Debug)]
pub struct MariaDb {
    server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    hosts: Hosts,
    _directory: TempDir,
}

impl MariaDb {
    /// The server's port.
    pub const PORT: u16 = 3306;

    /// Starts a server in a new cgroup. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails with the log if `MariaDB` is not installed or does not start.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let (lab, hosts) = (Lab::new(agent)?, Hosts::new()?);
        let directory = tempfile::tempdir()?;
        let owner = User::from_name(OWNER)?.context("there is no user `nobody`")?;
        let ids = [owner.uid.as_raw(), owner.gid.as_raw()];
        chown(directory.path(), Some(ids[0]), Some(ids[1]))?;
        let ids = ids.map(|id| id.to_string());
        let mut command = hosts.command(&lab, Host::Server, "setpriv");
        command.args(["--reuid", &ids[0], "--regid", &ids[1], "--clear-groups"]);
        // The change of the user would clear the parent-death signal.
        command.args(["--pdeathsig", "KILL", "--"]);
        command.arg(program::find("mariadbd", "mariadb-server", &[])?);
        let path = |name: &str| directory.path().join(name).display().to_string();
        command.args([
            "--no-defaults".to_owned(),
            format!("--datadir={}", directory.path().display()),
            format!("--socket={}", path("socket")),
            format!("--pid-file={}", path("pid")),
            format!("--port={}", Self::PORT),
            "--bind-address=0.0.0.0".to_owned(),
        ]);
        // Without account tables the server listens on a port only if it is told to.
        command.args(["--skip-grant-tables", "--skip-networking=0"]);
        command.args(["--skip-name-resolve", "--innodb-fast-shutdown=2"]);
        command.args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]);
        let server = Program::server("mariadbd", command, READY)?;
        Ok(Self {
            server,
            lab,
            hosts,
            _directory: directory,
        })
    }

    /// The server's log.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// Starts a Node client on the other host.
    ///
    /// # Errors
    ///
    /// Fails if Node is not installed, or if the client cannot connect.
    pub fn node_client(&self, name: &str) -> Result<Program> {
        let [host, port] = [Veth::LEFT.to_string(), Self::PORT.to_string()];
        node_client(&self.lab, Some(&self.hosts.far), [name, &host, &port])
    }

    /// Starts a client on the other host that reads commands. Returns it with its port.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed, or if the server does not answer.
    pub fn client(&self, name: &str) -> Result<(Program, u16)> {
        let python = program::find(PYTHON, "python3", &[])?;
        let mut command = self.hosts.command(&self.lab, Host::Far, python);
        command.args(["-u", "-c", CLIENT, &Veth::LEFT.to_string()]);
        let mut client = Program::client(name, command)?;
        let [port] = client.numbers_after("port: ")?;
        Ok((client, port.try_into()?))
    }
}
