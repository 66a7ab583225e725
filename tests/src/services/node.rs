//! Node clients from npm packages.

use std::{env, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::program::{self, Program};
use crate::{agent::Place, lab::Lab, netns::Netns};

const SCRIPT: &str = include_str!("../../clients/node/clients.js");
/// The folder in the target directory in which `cargo xtask test` installs the packages.
const FOLDER: &str = "node-clients/node_modules";

/// Starts a client outside the cgroup, at the place of the test or in a namespace, and waits until it is
/// connected.
///
/// # Errors
///
/// Fails if Node or its packages are not installed, or if the client cannot connect.
pub fn node_client(
    lab: &Lab,
    netns: Option<&Netns>,
    [name, host, port]: [&str; 3],
) -> Result<Program> {
    let own = env::current_exe()?;
    let target = own.ancestors().nth(3);
    let modules = target.context("no target directory")?.join(FOLDER);
    ensure!(
        modules.is_dir(),
        "{} is not there: `cargo xtask test` has npm put it there",
        modules.display()
    );
    let node = program::find("node", "nodejs", &[])?;
    let place = netns.map_or_else(Place::here, |netns| Place::here().in_netns(netns));
    let mut command: Command = place.command(lab.agent_binary(), node);
    command.args(["-e", SCRIPT, name, host, port]);
    command.env("NODE_PATH", modules);
    let mut client = Program::client(name, command)?;
    client.wait_for("ready\n")?;
    Ok(client)
}
