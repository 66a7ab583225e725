//! Runs cargo-deny on the dependencies: their licences, sources and known vulnerabilities. The rules are in
//! `deny.toml`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{find_program, output_of, run, say};
use crate::setup::lock;
use crate::workspace::{Workspace, cargo_install};

const NAME: &str = "cargo-deny";

/// The version that is built if none is installed.
const VERSION: &str = "0.20.2";

/// Checks both workspaces.
pub(super) fn check(workspace: &Workspace, no_install: bool) -> Result<()> {
    if no_install && find_program(NAME, &[]).is_none() {
        say!("{NAME} is not installed: the dependencies are not checked");
        return Ok(());
    }
    let deny = ensure(workspace)?;
    let manifests = [workspace.root(), &workspace.fuzz_crate()].map(|it| it.join("Cargo.toml"));
    let [own, _] = &manifests;
    let is_fetched = output_of(command(&deny, workspace, own).args(["fetch", "db"])).is_ok();
    if !is_fetched {
        say!("the advisory database cannot be downloaded: advisories are not checked");
    }
    for manifest in &manifests {
        let mut check = command(&deny, workspace, manifest);
        check.args(["check", "--hide-inclusion-graph"]);
        check.args(["bans", "licenses", "sources"]);
        if is_fetched {
            check.arg("advisories");
        }
        run(&mut check)?;
    }
    Ok(())
}

fn command(deny: &Path, workspace: &Workspace, manifest: &Path) -> Command {
    let mut command = Command::new(deny);
    command
        .args(["--log-level", "error", "--all-features", "--locked"])
        .arg("--config")
        .arg(workspace.root().join("deny.toml"))
        .arg("--manifest-path")
        .arg(manifest)
        .current_dir(workspace.root());
    command
}

/// The installed cargo-deny of any version, otherwise one in the target directory.
fn ensure(workspace: &Workspace) -> Result<PathBuf> {
    let _lock = lock(workspace)?;
    let folder = workspace.target().join("lint-tools");
    let own = folder.join("bin").join(NAME);
    if let Some(installed) = find_program(NAME, &[]) {
        return Ok(installed);
    }
    let stands = output_of(Command::new(&own).arg("--version"))
        .is_ok_and(|printed| printed.trim().ends_with(VERSION));
    if !stands {
        say!("building {NAME} {VERSION}, which checks the dependencies (some minutes)");
        build(&folder)?;
    }
    Ok(own)
}

/// Builds without optimisation: it runs for seconds, but an optimised build takes minutes.
fn build(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let scratch = folder.join("build");
    run(cargo_install(NAME, VERSION, folder, &scratch).arg("--debug"))
        .with_context(|| format!("cannot build {NAME}, which comes from the crates registry"))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}
