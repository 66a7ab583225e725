//! An OpenSSH server of the test.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::program::{self, PYTHON, Program, succeed};
use crate::{agent::Place, lab::Lab, netns::Netns};

/// Debian's sshd requires a directory in `/run` and system accounts, and writes logins to `/var/log`. In a
/// new mount namespace it uses those of the test.
const IN_OWN_MOUNTS: &str = "\
set -eu
mount -t tmpfs none /run
mkdir -m 755 /run/sshd
mount -t tmpfs none /var/log
mount --bind \"$1/passwd\" /etc/passwd
mount --bind \"$1/shadow\" /etc/shadow
shift
exec \"$@\"
";

/// The IDs are that of nobody and the one before it, which every user namespace maps.
const PASSWD: &str = "\
root:x:0:0::/:/bin/sh
sshd:x:65533:65534::/:/bin/false
tester:x:65534:65534::{home}:/bin/sh
";
const SHADOW: &str = "root:*::0:99999:7:::\nsshd:*::0:99999:7:::\ntester:*::0:99999:7:::\n";

const READY: &str = "Server listening on";

/// A running sshd on 127.0.0.1 in a separate network namespace, in which the kernel sends keepalive probes
/// every second.
#[derive(Debug)]
pub struct OpenSsh {
    server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    netns: Netns,
    directory: TempDir,
}

impl OpenSsh {
    /// The server's port.
    pub const PORT: u16 = 22;
    /// The server's address.
    pub const ADDRESS: &str = "127.0.0.1";
    /// Another address of the host, for clients (`BindAddress`) and for the server behind this one.
    pub const BEHIND: &str = "127.0.0.2";

    /// Creates keys and an account, and starts a server in a new cgroup. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails with the log if OpenSSH is not installed or does not start.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        Self::start_with(agent, &[])
    }

    /// The same with options as in `sshd_config(5)`.
    ///
    /// # Errors
    ///
    /// Fails as [`OpenSsh::start`] does.
    pub fn start_with(agent: impl AsRef<Path>, options: &[&str]) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let netns = Netns::new()?;
        let directory = tempfile::tempdir()?;
        probe_every_second(&lab, &netns)?;
        furnish(directory.path())?;
        let place = Place::here().in_cgroup(&lab.cgroup).in_netns(&netns);
        let listens = format!("ListenAddress={}:{}", Self::ADDRESS, Self::PORT);
        let options = [options, &[&listens]].concat();
        let server = start_server(&lab, &place, directory.path(), &options)?;
        Ok(Self {
            server,
            lab,
            netns,
            directory,
        })
    }

    /// Logs in from outside the cgroup to a shell on a terminal. `options` as in `ssh_config(5)`.
    ///
    /// # Errors
    ///
    /// Fails if the login fails.
    pub fn login(&self, name: &str, options: &[&str]) -> Result<Login> {
        let mut command = self.client("ssh", options)?;
        command.args(["-tt", &Self::account(Self::ADDRESS)]);
        Login::new(Program::client(name, command)?)
    }

    /// Logs in to the host behind this one, through this one, as `ProxyJump` does. `first` are options of the
    /// connection to this host.
    ///
    /// # Errors
    ///
    /// Fails if the login fails.
    pub fn login_behind(&self, name: &str, first: &[&str]) -> Result<Login> {
        let mut jump = self.client("ssh", first)?;
        jump.args(["-W", "%h:%p", &Self::account(Self::ADDRESS)]);
        let words = [jump.get_program()].into_iter().chain(jump.get_args());
        let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
        let through = format!("ProxyCommand={}", words.join(" "));
        let mut command = self.client("ssh", &[&through])?;
        command.args(["-tt", &Self::account(Self::BEHIND)]);
        Login::new(Program::client(name, command)?)
    }

    /// Starts a server for the host behind this one: outside the cgroup, at [`Self::BEHIND`].
    ///
    /// # Errors
    ///
    /// Fails with the log if it does not start.
    pub fn start_behind(&self) -> Result<Program> {
        let listens = format!("ListenAddress={}:{}", Self::BEHIND, Self::PORT);
        let place = Place::here().in_netns(&self.netns);
        start_server(&self.lab, &place, self.directory.path(), &[&listens])
    }

    /// Forwards a port of 127.0.0.1 to a port of the server's host.
    ///
    /// # Errors
    ///
    /// Fails if ssh is not installed.
    pub fn forward(&self, name: &str, [port, to]: [u16; 2]) -> Result<Program> {
        let mut command = self.client("ssh", &["ExitOnForwardFailure=yes"])?;
        let forward = format!("127.0.0.1:{port}:127.0.0.1:{to}");
        command.args(["-v", "-N", "-L", &forward, &Self::account(Self::ADDRESS)]);
        let mut forwarding = Program::client(name, command)?;
        forwarding.wait_for("Local forwarding listening on")?;
        Ok(forwarding)
    }

    /// Starts an sftp that reads commands and transfers at most this number of bytes per second. It requests
    /// four blocks of 16 kB ahead. Its default of 64 blocks of 256 kB would be a whole test file.
    ///
    /// # Errors
    ///
    /// Fails if sftp is not installed.
    pub fn sftp(&self, name: &str, bytes_per_second: u32) -> Result<Program> {
        let mut command = self.client("sftp", &[])?;
        let kilobits = (bytes_per_second * 8 / 1_000).to_string();
        command.args([
            "-B",
            "16384",
            "-R",
            "4",
            "-l",
            &kilobits,
            &Self::account(Self::ADDRESS),
        ]);
        Program::client(name, command)
    }

    /// Starts a Python script on the server's host, outside the cgroup.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed.
    pub fn python(&self, name: &str, script: &str, args: &[&str]) -> Result<Program> {
        let python = program::find(PYTHON, "python3", &[])?;
        let place = Place::here().in_netns(&self.netns);
        let mut command = place.command(self.lab.agent_binary(), python);
        command.args(["-u", "-c", script]).args(args);
        Program::client(name, command)
    }

    /// The home directory of the account.
    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    fn account(address: &str) -> String {
        format!("tester@{address}")
    }

    /// A command for an OpenSSH client outside the cgroup, without its last argument, the host.
    fn client(&self, program: &str, options: &[&str]) -> Result<Command> {
        let place = Place::here().in_netns(&self.netns);
        let client = program::find(program, "openssh-client", &[])?;
        let mut command = place.command(self.lab.agent_binary(), client);
        let file = |name: &str| self.directory.path().join(name);
        command.args(["-F", "none", "-i"]).arg(file("user_key"));
        let known_hosts = format!("UserKnownHostsFile={}", file("known_hosts").display());
        let port = format!("Port={}", Self::PORT);
        let defaults = [
            &known_hosts,
            &port,
            "GlobalKnownHostsFile=none",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "TCPKeepAlive=yes",
            "UpdateHostKeys=no",
            // ssh 9.5 and later hides keystrokes by sending additional data for a while.
            "IgnoreUnknown=ObscureKeystrokeTiming",
            "ObscureKeystrokeTiming=no",
        ];
        for option in options.iter().chain(&defaults) {
            command.args(["-o", option]);
        }
        command
            .env_remove("SSH_AUTH_SOCK")
            .env("LC_ALL", "C")
            .env("TERM", "dumb");
        Ok(command)
    }

    /// The server's log.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// The number of keepalive probes that the kernel has sent in the server's network namespace.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not report it.
    pub fn keepalive_probes(&self) -> Result<u64> {
        let shown = in_netns(&self.lab, &self.netns, "cat /proc/net/netstat")?;
        let mut lines = shown
            .lines()
            .filter_map(|line| line.strip_prefix("TcpExt: "));
        let (names, values) = (
            lines.next().context(shown.clone())?,
            lines.next().context(shown.clone())?,
        );
        let mut both = names.split(' ').zip(values.split(' '));
        let (_, value) = both
            .find(|(name, _)| *name == "TCPKeepAlive")
            .context("no TCPKeepAlive")?;
        Ok(value.parse()?)
    }
}

/// A login to a shell.
#[derive(Debug)]
pub struct Login {
    /// The ssh process, which reads commands.
    pub client: Program,
    /// The PID of the shell.
    pub shell: u64,
    /// The client's port.
    pub port: u16,
    typed: u64,
}

impl Login {
    fn new(mut client: Program) -> Result<Self> {
        // The variable has the client's address and port and the server's address and port. The prompt is
        // empty, because it would be payload after the answer.
        client.say("PS1=; set -- $SSH_CONNECTION; echo shell: $$ $2")?;
        let [shell, port] = client.numbers_after("shell:")?;
        Ok(Self {
            client,
            shell,
            port: port.try_into()?,
            typed: 0,
        })
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    ///
    /// Fails if the login has ended.
    pub fn round_trip(&mut self) -> Result<()> {
        self.typed += 1;
        let typed = self.typed;
        self.client.say(&format!("echo answer-$(({typed})):"))?;
        self.client.wait_for(&format!("answer-{typed}:\r\n"))
    }
}

/// Starts a server with these additional options.
fn start_server(lab: &Lab, place: &Place, directory: &Path, options: &[&str]) -> Result<Program> {
    let mut sshd = place.command(lab.agent_binary(), "unshare");
    let private = ["--mount", "--propagation", "private"];
    sshd.args(private)
        .args(["sh", "-c", IN_OWN_MOUNTS, "sh"])
        .arg(directory);
    sshd.arg(program::find("sshd", "openssh-server", &[])?);
    sshd.args(["-D", "-e", "-f"])
        .arg(directory.join("sshd_config"));
    for option in options {
        sshd.args(["-o", option]);
    }
    Program::server("sshd", sshd, READY)
}

fn probe_every_second(lab: &Lab, netns: &Netns) -> Result<()> {
    let script = "cd /proc/sys/net/ipv4; echo 1 >tcp_keepalive_time; echo 1 >tcp_keepalive_intvl";
    in_netns(lab, netns, script).map(drop)
}

fn in_netns(lab: &Lab, netns: &Netns, script: &str) -> Result<String> {
    let mut shell = Place::here()
        .in_netns(netns)
        .command(lab.agent_binary(), "sh");
    shell.args(["-e", "-c", script]);
    succeed(shell)
}

/// Creates keys, configuration and account.
fn furnish(directory: &Path) -> Result<()> {
    // The server reads the user's keys as the user.
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    let path = |name: &str| directory.join(name);
    let write =
        |name: &str, text: &str| fs::write(path(name), text).with_context(|| name.to_owned());
    for key in ["host_key", "user_key"] {
        let mut keygen = Command::new(program::find("ssh-keygen", "openssh-client", &[])?);
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(path(key));
        succeed(keygen)?;
    }
    fs::copy(path("user_key.pub"), path("authorized_keys"))?;
    let host_key = fs::read_to_string(path("host_key.pub"))?;
    let hosts = format!("{},{}", OpenSsh::ADDRESS, OpenSsh::BEHIND);
    write("known_hosts", &format!("{hosts} {host_key}"))?;
    let home = path("home");
    fs::create_dir(&home)?;
    write(
        "passwd",
        &PASSWD.replace("{home}", &home.display().to_string()),
    )?;
    write("shadow", SHADOW)?;
    write("sshd_config", &configuration(directory))
}

/// The kernel's keepalives are on, and those of SSH are off. SSH's keepalives are encrypted payload, which
/// only the two ends can distinguish from keystrokes.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "HostKey {directory}/host_key\n\
         AuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\nPidFile none\n\
         UsePAM no\nUseDNS no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         AllowUsers tester\nPrintMotd no\nPrintLastLog no\n\
         Subsystem sftp internal-sftp\n\
         TCPKeepAlive yes\nClientAliveInterval 0\nLogLevel VERBOSE\n",
    )
}
