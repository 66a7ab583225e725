//! An OpenSSH server of the test's own.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::program::{self, Program, succeed};
use crate::{agent::Place, lab::Lab, netns::Netns};

/// Debian's sshd insists on a directory in `/run`, on accounts of the system, and writes logins to
/// `/var/log`. In a mount namespace of its own it finds and writes the test's.
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

/// The ids are those of nobody and the one before, which every user namespace maps.
const PASSWD: &str = "\
root:x:0:0::/:/bin/sh
sshd:x:65533:65534::/:/bin/false
tester:x:65534:65534::{home}:/bin/sh
";
const SHADOW: &str = "root:*::0:99999:7:::\nsshd:*::0:99999:7:::\ntester:*::0:99999:7:::\n";

const READY: &str = "Server listening on";

/// A running sshd, on 127.0.0.1 in a network namespace of its own, where the kernel's keepalive
/// probes go out every second.
#[derive(Debug)]
pub struct OpenSsh {
    server: Program,
    /// The cgroup that it is in.
    pub lab: Lab,
    netns: Netns,
    directory: TempDir,
}

impl OpenSsh {
    /// Its port.
    pub const PORT: u16 = 22;

    /// Makes keys and an account, and starts a server in a new cgroup. `agent` as for
    /// [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Where OpenSSH is not installed or does not start, with its log.
    pub fn start(agent: impl AsRef<Path>) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let netns = Netns::new()?;
        let directory = tempfile::tempdir()?;
        probe_every_second(&lab, &netns)?;
        furnish(directory.path())?;
        let place = Place::here().in_cgroup(&lab.cgroup).in_netns(&netns);
        let mut sshd = place.command(lab.agent_binary(), "unshare");
        sshd.args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            IN_OWN_MOUNTS,
            "sh",
        ]);
        sshd.arg(directory.path())
            .arg(program::find("sshd", "openssh-server", &[])?);
        sshd.args(["-D", "-e", "-f"])
            .arg(directory.path().join("sshd_config"));
        let server = Program::server("sshd", sshd, READY)?;
        Ok(Self {
            server,
            lab,
            netns,
            directory,
        })
    }

    /// Logs in, from outside of the cgroup, to a shell on a terminal. `options` as in
    /// `ssh_config(5)`.
    ///
    /// # Errors
    ///
    /// Where the login fails.
    pub fn login(&self, name: &str, options: &[&str]) -> Result<Login> {
        let place = Place::here().in_netns(&self.netns);
        let ssh = program::find("ssh", "openssh-client", &[])?;
        let mut command = place.command(self.lab.agent_binary(), ssh);
        let file = |name: &str| self.directory.path().join(name);
        command
            .args(["-tt", "-F", "none", "-i"])
            .arg(file("user_key"));
        let known_hosts = format!("UserKnownHostsFile={}", file("known_hosts").display());
        let defaults = [
            &known_hosts,
            "GlobalKnownHostsFile=none",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "TCPKeepAlive=yes",
            "UpdateHostKeys=no",
            // From 9.5 on, ssh hides when one types by sending for a while what nobody typed.
            "IgnoreUnknown=ObscureKeystrokeTiming",
            "ObscureKeystrokeTiming=no",
        ];
        for option in options.iter().chain(&defaults) {
            command.args(["-o", option]);
        }
        command.args(["-p", &Self::PORT.to_string(), "tester@127.0.0.1"]);
        command
            .env_remove("SSH_AUTH_SOCK")
            .env("LC_ALL", "C")
            .env("TERM", "dumb");
        let client = Program::client(name, command)?;
        Login::new(client)
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// The keepalive probes that the kernel has sent in its network namespace.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell.
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
    /// The ssh, to be typed to.
    pub client: Program,
    /// Process id of the shell.
    pub shell: u64,
    /// The client's port.
    pub port: u16,
    typed: u64,
}

impl Login {
    fn new(mut client: Program) -> Result<Self> {
        // The variable is: address and port of the client, address and port of the server. There
        // is no prompt, which would be payload after the answer.
        client.say("PS1=; set -- $SSH_CONNECTION; echo shell: $$ $2")?;
        let [shell, port] = client.numbers_after("shell:")?;
        Ok(Self {
            client,
            shell,
            port: port.try_into()?,
            typed: 0,
        })
    }

    /// Types a command, and waits for its answer.
    ///
    /// # Errors
    ///
    /// Where the login has ended.
    pub fn round_trip(&mut self) -> Result<()> {
        self.typed += 1;
        let typed = self.typed;
        self.client.say(&format!("echo answer-$(({typed})):"))?;
        self.client.wait_for(&format!("answer-{typed}:\r\n"))
    }
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

/// Keys, configuration and account.
fn furnish(directory: &Path) -> Result<()> {
    // The server reads the user's keys with the user's rights.
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
    write("known_hosts", &format!("127.0.0.1 {host_key}"))?;
    let home = path("home");
    fs::create_dir(&home)?;
    write(
        "passwd",
        &PASSWD.replace("{home}", &home.display().to_string()),
    )?;
    write("shadow", SHADOW)?;
    write("sshd_config", &configuration(directory))
}

/// The keepalives of the kernel are on, those of SSH off: those are payload, encrypted like all
/// the rest, and nobody between the two ends can tell them from somebody typing.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host_key\n\
         AuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\nPidFile none\n\
         UsePAM no\nUseDNS no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         AllowUsers tester\nPrintMotd no\nPrintLastLog no\n\
         TCPKeepAlive yes\nClientAliveInterval 0\nLogLevel VERBOSE\n",
        port = OpenSsh::PORT,
    )
}
