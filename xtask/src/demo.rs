//! `cargo xtask demo`: shows the real daemon with real connections in under half a minute.
//!
//! The user builds everything. For the show, xtask starts itself again as root, because the show needs
//! network namespaces, a cgroup and eBPF. The daemon is attached only to that cgroup, and all traffic stays
//! within those namespaces.

mod cast;
mod client;
mod screen;
mod show;
mod stage;

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use session_enforcer_tests::BINARY;

use crate::build::{Profile, daemon};
use crate::process::{as_root, find_program, is_root, run as run_program, say};
use crate::setup::setup;
use crate::workspace::Workspace;

/// The harness's agent, which opens sockets in the show's namespaces and cgroup.
const AGENT: &str = "session-enforcer-test-agent";

/// The script that installs packages; see `packages.rs`.
const INSTALLER: &str = include_str!("install.sh");

/// Arguments of `demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The show alone: root's part, with this agent and the daemon that the environment names.
    #[arg(long, hide = true, value_name = "AGENT")]
    show: Option<PathBuf>,
}

/// Builds the programs, then replaces this process with the show.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    if let Some(agent) = &args.show {
        return show::show(agent);
    }
    let mut show = prepare(workspace)?;
    Err(show.exec()).context("cannot start the show")
}

/// Builds the programs and returns the command of the show.
pub(crate) fn prepare(workspace: &Workspace) -> Result<Command> {
    let ip = ip()?;
    setup(workspace)?;
    let daemon = daemon(workspace, Profile::Release)?;
    let agent = agent(workspace)?;
    if !is_root()? {
        say!("continuing as root, with sudo: namespaces, a cgroup and eBPF require it");
    }
    let mut command = as_root("env")?;
    command.args(environment(&daemon, &ip));
    let own = env::current_exe().context("cannot determine the path of this program")?;
    command.arg(&own).args(["demo", "--show"]).arg(agent);
    Ok(command)
}

/// The path of iproute2's `ip`. Installs it if it is missing.
fn ip() -> Result<PathBuf> {
    let find = || find_program("ip", &[]);
    if let Some(path) = find() {
        return Ok(path);
    }
    let why = "`ip` (package iproute2) is missing; the demo creates its network namespaces with it";
    if find_program("apt-get", &[]).is_none() {
        bail!("{why}. This system has no apt-get: install iproute2 with its package manager");
    }
    say!("{why}: installing it");
    run_program(as_root("sh")?.args(["-c", INSTALLER, "install.sh", "iproute2"]))
        .context("cannot install; remedy: `apt-get install iproute2`")?;
    find().context("iproute2 is installed, but `ip` is still missing")
}

fn agent(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    cargo.args([
        "build",
        "--package",
        "session-enforcer-tests",
        "--bin",
        AGENT,
    ]);
    run_program(&mut cargo)?;
    Ok(workspace.target().join("debug").join(AGENT))
}

/// The variables that the show needs and that sudo would drop, as arguments of env(1).
fn environment(daemon: &Path, ip: &Path) -> Vec<OsString> {
    let variable = |name: &str, value: &Path| {
        let mut word = OsString::from(format!("{name}="));
        word.push(value);
        word
    };
    // The show looks up no program but `ip`.
    let folder = ip.parent().unwrap_or(Path::new("/usr/sbin"));
    let mut words = vec![variable(BINARY, daemon), variable("PATH", folder)];
    if let Some(value) = env::var_os("NO_COLOR") {
        words.push(variable("NO_COLOR", Path::new(&value)));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_show_finds_ip_where_it_was_found() {
        let words = environment(Path::new("/t/release/daemon"), Path::new("/usr/sbin/ip"));
        assert_eq!(words[0], "SESSION_ENFORCER_BIN=/t/release/daemon");
        assert_eq!(words[1], "PATH=/usr/sbin");
    }
}
