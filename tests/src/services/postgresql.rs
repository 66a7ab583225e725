//! A PostgreSQL cluster of the test.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::User;
use tempfile::TempDir;

use super::{
    Host, Hosts, ReservedPort,
    program::{self, PYTHON, Program, succeed},
};
use crate::{agent::Place, lab::Lab, netns::Veth};

/// Debian keeps each version's programs in a folder outside PATH. In PATH, the same names are a script that
/// searches for a system cluster.
const VERSIONS: &str = "/usr/lib/postgresql";
const PACKAGE: &str = "postgresql";
const READY: &str = "database system is ready to accept connections";

const QUIETLY: [&str; 4] = ["--no-psqlrc", "--no-align", "--tuples-only", "--quiet"];

/// Every client is trusted.
const ACCESS: &str = "\
host all all 127.0.0.1/32 trust
host all all 10.77.0.0/24 trust
host replication all 10.77.0.0/24 trust
";

/// PostgreSQL refuses to run as root.
const OWNER: &str = "nobody";

/// A running PostgreSQL with the database and the superuser `postgres`.
#[derive(Debug)]
pub struct Postgres {
    server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    network: Network,
    directory: TempDir,
}

/// The addresses of the server.
#[derive(Debug)]
enum Network {
    /// This port of 127.0.0.1, at the place of the test.
    Here(ReservedPort),
    /// The usual port of every address of the server's host.
    Hosts(Hosts),
}

impl Postgres {
    /// The port on a separate host.
    pub const PORT: u16 = 5432;

    /// Creates a cluster and starts its server in a new cgroup, on 127.0.0.1. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails with the log if PostgreSQL is not installed or does not start.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let port = ReservedPort::take(&lab.outside)?;
        Self::start_on(lab, Network::Here(port))
    }

    /// The same on a separate host, at the usual port, connected to another host.
    ///
    /// # Errors
    ///
    /// Fails as [`Postgres::start`] does.
    pub fn start_on_host(agent: impl AsRef<Path>) -> Result<Self> {
        Self::start_on(Lab::new(agent)?, Network::Hosts(Hosts::new()?))
    }

    fn start_on(lab: Lab, network: Network) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let owner = User::from_name(OWNER)?.context("there is no user `nobody`")?;
        chown(
            directory.path(),
            Some(owner.uid.as_raw()),
            Some(owner.gid.as_raw()),
        )?;
        let data = directory.path().join("data");
        let place = Place::here().in_cgroup(&lab.cgroup);
        let mut initdb = owned_by(&owner, &lab, &place, "initdb", &data)?;
        initdb.args([
            "--no-sync",
            "--auth=trust",
            "--username=postgres",
            "--locale=C",
        ]);
        succeed(initdb)?;
        let (address, port, place) = match &network {
            Network::Here(port) => ("127.0.0.1", port.number, place),
            Network::Hosts(hosts) => ("*", Self::PORT, place.in_netns(&hosts.near)),
        };
        fs::write(data.join("postgresql.conf"), configuration(address, port))?;
        fs::write(data.join("pg_hba.conf"), ACCESS)?;
        let server = owned_by(&owner, &lab, &place, "postgres", &data)?;
        let server = Program::server("postgres", server, READY)?;
        Ok(Self {
            server,
            lab,
            network,
            directory,
        })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        match &self.network {
            Network::Here(port) => port.number,
            Network::Hosts(_) => Self::PORT,
        }
    }

    /// The server's host and the other one.
    ///
    /// # Errors
    ///
    /// Fails if the server is not on a separate host.
    pub fn hosts(&self) -> Result<&Hosts> {
        match &self.network {
            Network::Here(_) => bail!("this server is not on a host of its own"),
            Network::Hosts(hosts) => Ok(hosts),
        }
    }

    /// Starts a `psql` on one of the hosts.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed, or if the server is not on a separate host.
    pub fn psql_at(&self, host: Host) -> Result<Program> {
        let mut psql = self.client_at(host, "psql")?;
        psql.args(QUIETLY);
        Program::client("psql", psql)
    }

    /// Starts a pooler on the other host: `PgBouncer` with its own connections to this server.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed or does not start.
    pub fn start_pooler(&self) -> Result<Program> {
        let path = |name: &str| self.directory.path().join(name);
        fs::write(path("users.txt"), "\"postgres\" \"\"\n")?;
        fs::write(path("pooler.ini"), pooler_configuration(&path("users.txt")))?;
        let pgbouncer = program::find("pgbouncer", "pgbouncer", &[])?;
        let mut command = self.hosts()?.command(&self.lab, Host::Far, "setpriv");
        // PgBouncer also refuses to run as root.
        command.args(["--reuid", OWNER, "--clear-groups", "--pdeathsig", "KILL"]);
        command.arg(pgbouncer).arg(path("pooler.ini"));
        Program::server("pgbouncer", command, "process up")
    }

    /// The answer to a query through the pooler.
    ///
    /// # Errors
    ///
    /// The errors of the database.
    pub fn query_pooler(&self, sql: &str) -> Result<String> {
        let mut psql = self.client_at(Host::Far, "psql")?;
        let pooler = [("PGHOST", "127.0.0.1"), ("PGPORT", "6432")];
        psql.envs(pooler).args(QUIETLY).args(["--command", sql]);
        Ok(succeed(psql)?.trim().to_owned())
    }

    /// Starts a program of PostgreSQL on the other host that receives the write-ahead log, as a replica does.
    /// It connects from `source`.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed.
    pub fn start_replica(&self, source: IpAddr) -> Result<Program> {
        let hosts = self.hosts()?;
        let to = IpAddr::from([10, 77, 0, 200]);
        let interface = Veth::INTERFACE;
        hosts
            .near
            .ip(&format!("addr add {to}/32 dev {interface}"))?;
        hosts
            .far
            .ip(&format!("addr add {source}/32 dev {interface}"))?;
        hosts
            .near
            .ip(&format!("route add {source} dev {interface}"))?;
        hosts
            .far
            .ip(&format!("route add {to} dev {interface} src {source}"))?;
        let mut receiver = self.client_at(Host::Far, "pg_receivewal")?;
        receiver.env("PGHOST", to.to_string());
        let directory = self.directory.path().join("replica");
        fs::create_dir(&directory)?;
        receiver.args(["--verbose", "--status-interval=0", "--directory"]);
        receiver.arg(directory);
        let mut receiver = Program::client("pg_receivewal", receiver)?;
        receiver.wait_for("starting log streaming")?;
        Ok(receiver)
    }

    /// Starts a `psql` outside the cgroup. It connects over TCP at its first command.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed.
    pub fn psql(&self) -> Result<Program> {
        Program::client("psql", self.psql_command()?)
    }

    /// Starts a Python script outside the cgroup. Its clients find the server through the environment.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed.
    pub fn python(&self, name: &str, script: &str, args: &[&str]) -> Result<Program> {
        let mut python = self.client(PYTHON)?;
        python.args(["-c", script]).args(args);
        Program::client(name, python)
    }

    /// The server's log.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// The answer to a query on a new connection, with `|` between columns.
    ///
    /// # Errors
    ///
    /// The errors of the database.
    pub fn query(&self, sql: &str) -> Result<String> {
        let mut psql = self.psql_command()?;
        psql.args(["--set=ON_ERROR_STOP=1", "--command", sql]);
        Ok(succeed(psql)?.trim().to_owned())
    }

    /// Creates the tables of pgbench.
    ///
    /// # Errors
    ///
    /// Fails if pgbench fails.
    pub fn prepare_pgbench(&self) -> Result<()> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.args(["--initialize", "--quiet"]);
        succeed(pgbench).map(drop)
    }

    /// Starts a pgbench outside the cgroup with these arguments.
    ///
    /// # Errors
    ///
    /// Fails if it is not installed.
    pub fn pgbench(&self, args: &[&str]) -> Result<Program> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.arg("--no-vacuum").args(args);
        Program::client("pgbench", pgbench)
    }

    fn psql_command(&self) -> Result<Command> {
        let mut psql = self.client("psql")?;
        psql.args(QUIETLY);
        Ok(psql)
    }

    fn client_at(&self, host: Host, name: &str) -> Result<Command> {
        let command = self.hosts()?.command(&self.lab, host, find(name)?);
        Ok(self.told(command, &Veth::LEFT.to_string()))
    }

    /// A client command that the environment of the test cannot divert to another server.
    fn client(&self, name: &str) -> Result<Command> {
        let command = match &self.network {
            Network::Here(_) => Command::new(find(name)?),
            Network::Hosts(hosts) => hosts.command(&self.lab, Host::Near, find(name)?),
        };
        Ok(self.told(command, "127.0.0.1"))
    }

    fn told(&self, mut command: Command, address: &str) -> Command {
        let settings = [
            ("PGHOST", address),
            ("PGPORT", &self.port().to_string()),
            ("PGUSER", "postgres"),
            ("PGDATABASE", "postgres"),
            ("PGSSLMODE", "disable"),
            ("PGGSSENCMODE", "disable"),
            ("LC_ALL", "C"),
        ];
        command.env_clear().envs(settings);
        command
    }
}

/// No data must survive a crash of the machine, so nothing waits for the disk. The kernel sends keepalive
/// probes every second.
fn configuration(address: &str, port: u16) -> String {
    format!(
        "listen_addresses = '{address}'\nport = {port}\nunix_socket_directories = ''\n\
         fsync = off\nshared_buffers = 16MB\nmax_connections = 30\nlc_messages = 'C'\n\
         dynamic_shared_memory_type = mmap\n\
         tcp_keepalives_idle = 1\ntcp_keepalives_interval = 1\n\
         timezone = 'UTC'\nlog_timezone = 'UTC'\n"
    )
}

/// Each client keeps one server connection. The pooler's own limits do not end it.
fn pooler_configuration(users: &Path) -> String {
    format!(
        "[databases]\npostgres = host={server} port={port}\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = 6432\nunix_socket_dir =\n\
         auth_type = trust\nauth_file = {users}\npool_mode = transaction\ndefault_pool_size = 1\n\
         server_lifetime = 36000\nserver_idle_timeout = 36000\nserver_check_delay = 36000\n",
        server = Veth::LEFT,
        port = Postgres::PORT,
        users = users.display(),
    )
}

fn find(name: &str) -> Result<PathBuf> {
    program::find(name, PACKAGE, &version_folders())
}

/// The folders of the versions, newest first.
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

/// A command in the cgroup that runs a program on the data as the data's owner.
fn owned_by(owner: &User, lab: &Lab, place: &Place, program: &str, data: &Path) -> Result<Command> {
    let mut command = place.command(lab.agent_binary(), "unshare");
    let ids = [owner.uid.to_string(), owner.gid.to_string()];
    // The IPC namespace removes the shared memory of a killed server.
    command.args(["--ipc", "setpriv"]);
    command.args(["--reuid", &ids[0], "--regid", &ids[1], "--clear-groups"]);
    // The change of the user would clear the parent-death signal.
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(find(program)?).arg("-D").arg(data);
    command.current_dir("/").env_remove("PGDATA");
    Ok(command)
}
