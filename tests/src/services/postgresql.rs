//! A PostgreSQL cluster of the test's own.

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

/// Debian keeps each version's programs in a folder outside of PATH, and a script that looks for a
/// system's cluster under the same names in PATH.
const VERSIONS: &str = "/usr/lib/postgresql";
const PACKAGE: &str = "postgresql";
const READY: &str = "database system is ready to accept connections";

const QUIETLY: [&str; 4] = ["--no-psqlrc", "--no-align", "--tuples-only", "--quiet"];

/// Whoever comes is trusted.
const ACCESS: &str = "\
host all all 127.0.0.1/32 trust
host all all 10.77.0.0/24 trust
host replication all 10.77.0.0/24 trust
";

/// PostgreSQL refuses to be root.
const OWNER: &str = "nobody";

/// A running PostgreSQL, with the database and the superuser `postgres`.
#[derive(Debug)]
pub struct Postgres {
    server: Program,
    /// The cgroup that it is in.
    pub lab: Lab,
    network: Network,
    directory: TempDir,
}

/// Where the server listens.
#[derive(Debug)]
enum Network {
    /// On this port of 127.0.0.1, where the test is.
    Here(ReservedPort),
    /// On the usual port of every address of the server's host.
    Hosts(Hosts),
}

impl Postgres {
    /// Its port where it is on a host of its own.
    pub const PORT: u16 = 5432;

    /// Makes a new cluster, and starts its server in a new cgroup, on 127.0.0.1. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Where PostgreSQL is not installed or does not start, with its log.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let port = ReservedPort::take(&lab.outside)?;
        Self::start_on(lab, Network::Here(port))
    }

    /// The same on a host of its own, at its usual port, with another host beside it.
    ///
    /// # Errors
    ///
    /// As above.
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

    /// Its port.
    pub fn port(&self) -> u16 {
        match &self.network {
            Network::Here(port) => port.number,
            Network::Hosts(_) => Self::PORT,
        }
    }

    /// Its host and the other one.
    ///
    /// # Errors
    ///
    /// Where it is not on a host of its own.
    pub fn hosts(&self) -> Result<&Hosts> {
        match &self.network {
            Network::Here(_) => bail!("this server is not on a host of its own"),
            Network::Hosts(hosts) => Ok(hosts),
        }
    }

    /// A `psql` on one of the hosts.
    ///
    /// # Errors
    ///
    /// Where it is not installed, or the server has no host.
    pub fn psql_at(&self, host: Host) -> Result<Program> {
        let mut psql = self.client_at(host, "psql")?;
        psql.args(QUIETLY);
        Program::client("psql", psql)
    }

    /// A pooler on the other host: `PgBouncer` with connections of its own to this server.
    ///
    /// # Errors
    ///
    /// Where it is not installed or does not start.
    pub fn start_pooler(&self) -> Result<Program> {
        let path = |name: &str| self.directory.path().join(name);
        fs::write(path("users.txt"), "\"postgres\" \"\"\n")?;
        fs::write(path("pooler.ini"), pooler_configuration(&path("users.txt")))?;
        let pgbouncer = program::find("pgbouncer", "pgbouncer", &[])?;
        let mut command = self.hosts()?.command(&self.lab, Host::Far, "setpriv");
        // PgBouncer refuses to be root too.
        command.args(["--reuid", OWNER, "--clear-groups", "--pdeathsig", "KILL"]);
        command.arg(pgbouncer).arg(path("pooler.ini"));
        Program::server("pgbouncer", command, "process up")
    }

    /// The answer to a query through the pooler.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn query_pooler(&self, sql: &str) -> Result<String> {
        let mut psql = self.client_at(Host::Far, "psql")?;
        let pooler = [("PGHOST", "127.0.0.1"), ("PGPORT", "6432")];
        psql.envs(pooler).args(QUIETLY).args(["--command", sql]);
        Ok(succeed(psql)?.trim().to_owned())
    }

    /// A program of PostgreSQL's on the other host that receives what the server writes ahead, as a replica does. It
    /// comes from `source`.
    ///
    /// # Errors
    ///
    /// Where it is not installed.
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
        psql.args(QUIETLY);
        Ok(psql)
    }

    fn client_at(&self, host: Host, name: &str) -> Result<Command> {
        let command = self.hosts()?.command(&self.lab, host, find(name)?);
        Ok(self.told(command, &Veth::LEFT.to_string()))
    }

    /// A client that nothing in the environment of the test diverts to another server.
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

/// Nothing here must survive the machine: no time is spent on getting it to the disk. The kernel
/// sends keepalive probes every second.
fn configuration(address: &str, port: u16) -> String {
    format!(
        "listen_addresses = '{address}'\nport = {port}\nunix_socket_directories = ''\n\
         fsync = off\nshared_buffers = 16MB\nmax_connections = 30\nlc_messages = 'C'\n\
         dynamic_shared_memory_type = mmap\n\
         tcp_keepalives_idle = 1\ntcp_keepalives_interval = 1\n\
         timezone = 'UTC'\nlog_timezone = 'UTC'\n"
    )
}

/// One connection for each client, which it keeps; its own limits do not end it.
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
fn owned_by(owner: &User, lab: &Lab, place: &Place, program: &str, data: &Path) -> Result<Command> {
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
