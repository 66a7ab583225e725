//! A PostgreSQL cluster of the test's own.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::unistd::User;
use tempfile::TempDir;

use super::{
    ReservedPort,
    program::{self, PYTHON, Program, succeed},
};
use crate::{agent::Place, lab::Lab};

/// Debian keeps each version's programs in a folder outside of PATH, and a script that looks for a
/// system's cluster under the same names in PATH.
const VERSIONS: &str = "/usr/lib/postgresql";
const PACKAGE: &str = "postgresql";
const READY: &str = "database system is ready to accept connections";

/// PostgreSQL refuses to be root.
const OWNER: &str = "nobody";

/// A running PostgreSQL, on 127.0.0.1, with the database and the superuser `postgres`.
#[derive(Debug)]
pub struct Postgres {
    server: Program,
    /// The cgroup that it is in.
    pub lab: Lab,
    port: ReservedPort,
    _directory: TempDir,
}

impl Postgres {
    /// Makes a new cluster, and starts its server in a new cgroup. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Where PostgreSQL is not installed or does not start, with its log.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let port = ReservedPort::take(&lab.outside)?;
        let directory = tempfile::tempdir()?;
        let owner = User::from_name(OWNER)?.context("there is no user `nobody`")?;
        chown(
            directory.path(),
            Some(owner.uid.as_raw()),
            Some(owner.gid.as_raw()),
        )?;
        let data = directory.path().join("data");
        let mut initdb = owned_by(&owner, &lab, "initdb", &data)?;
        initdb.args([
            "--no-sync",
            "--auth=trust",
            "--username=postgres",
            "--locale=C",
        ]);
        succeed(initdb)?;
        fs::write(data.join("postgresql.conf"), configuration(port.number))?;
        let server = owned_by(&owner, &lab, "postgres", &data)?;
        let server = Program::server("postgres", server, READY)?;
        Ok(Self {
            server,
            lab,
            port,
            _directory: directory,
        })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// A `psql` outside of the cgroup, connected over TCP as soon as it is typed to.
    ///
    /// # Errors
    ///
    /// Where it is not installed.
    pub fn psql(&self) -> Result<Program> {
        Program::client("psql", self.psql_command()?)
    }

    /// A Python script outside of the cgroup, whose clients find the server in the environment.
    ///
    /// # Errors
    ///
    /// Where Python is not installed.
    pub fn python(&self, name: &str, script: &str, args: &[&str]) -> Result<Program> {
        let mut python = self.client(PYTHON)?;
        python.args(["-c", script]).args(args);
        Program::client(name, python)
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// The answer to a query on a connection of its own, with `|` between columns.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn query(&self, sql: &str) -> Result<String> {
        let mut psql = self.psql_command()?;
        psql.args(["--set=ON_ERROR_STOP=1", "--command", sql]);
        Ok(succeed(psql)?.trim().to_owned())
    }

    /// Makes the tables that pgbench works on.
    ///
    /// # Errors
    ///
    /// Where that fails.
    pub fn prepare_pgbench(&self) -> Result<()> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.args(["--initialize", "--quiet"]);
        succeed(pgbench).map(drop)
    }

    /// Starts a pgbench outside of the cgroup with these arguments.
    ///
    /// # Errors
    ///
    /// Where it is not installed.
    pub fn pgbench(&self, args: &[&str]) -> Result<Program> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.arg("--no-vacuum").args(args);
        Program::client("pgbench", pgbench)
    }

    fn psql_command(&self) -> Result<Command> {
        let mut psql = self.client("psql")?;
        psql.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet"]);
        Ok(psql)
    }

    /// A client that nothing in the environment of the test diverts to another server.
    fn client(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(find(name)?);
        let settings = [
            ("PGHOST", "127.0.0.1"),
            ("PGPORT", &self.port.number.to_string()),
            ("PGUSER", "postgres"),
            ("PGDATABASE", "postgres"),
            ("PGSSLMODE", "disable"),
            ("PGGSSENCMODE", "disable"),
            ("LC_ALL", "C"),
        ];
        command.env_clear().envs(settings);
        Ok(command)
    }
}

/// Nothing here must survive the machine: no time is spent on getting it to the disk. The kernel
/// sends keepalive probes every second.
fn configuration(port: u16) -> String {
    format!(
        "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\n\
         fsync = off\nshared_buffers = 16MB\nmax_connections = 30\nlc_messages = 'C'\n\
         dynamic_shared_memory_type = mmap\n\
         tcp_keepalives_idle = 1\ntcp_keepalives_interval = 1\n\
         timezone = 'UTC'\nlog_timezone = 'UTC'\n"
    )
}

fn find(name: &str) -> Result<PathBuf> {
    program::find(name, PACKAGE, &version_folders())
}

/// The newest version first.
fn version_folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(VERSIONS).into_iter().flatten().flatten();
    let mut versions: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect();
    versions.sort();
    versions
        .into_iter()
        .rev()
        .map(|(_, path)| path.join("bin"))
        .collect()
}

/// A command in the cgroup that runs a program on the data as its owner.
fn owned_by(owner: &User, lab: &Lab, program: &str, data: &Path) -> Result<Command> {
    let place = Place::here().in_cgroup(&lab.cgroup);
    let mut command = place.command(lab.agent_binary(), "unshare");
    let ids = [owner.uid.to_string(), owner.gid.to_string()];
    // The shared memory of a server that is killed ends with the namespace.
    command.args(["--ipc", "setpriv"]);
    command.args(["--reuid", &ids[0], "--regid", &ids[1], "--clear-groups"]);
    // The change of the user clears it.
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(find(program)?).arg("-D").arg(data);
    command.current_dir("/").env_remove("PGDATA");
    Ok(command)
}
