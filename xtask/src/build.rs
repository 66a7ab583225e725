//! `cargo xtask build`: builds the daemon with the embedded eBPF programs.

use std::path::PathBuf;

use anyhow::Result;

use crate::arch::Arch;
use crate::process::run;
use crate::setup::setup;
use crate::workspace::Workspace;

/// Arguments of `build`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build with optimisation, as for an installation (the default).
    #[arg(long, conflicts_with = "debug")]
    release: bool,
    /// Build quickly and with debug assertions, as for the tests. The eBPF programs are always optimised.
    #[arg(long)]
    debug: bool,
}

/// The build profile of the daemon.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    Release,
    Debug,
}

/// Builds the daemon and prints the path of its binary.
pub(crate) fn build(workspace: &Workspace, args: &Args) -> Result<()> {
    setup(workspace)?;
    let profile = if args.debug {
        Profile::Debug
    } else {
        Profile::Release
    };
    println!("{}", daemon(workspace, profile)?.display());
    Ok(())
}

/// Builds the daemon with a prepared eBPF toolchain and returns the path of its binary.
pub(crate) fn daemon(workspace: &Workspace, profile: Profile) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--package", "session-enforcer"]);
    let folder = match profile {
        Profile::Release => {
            cargo.arg("--release");
            "release"
        }
        Profile::Debug => "debug",
    };
    run(&mut cargo)?;
    Ok(workspace.target().join(folder).join("session-enforcer"))
}

/// Builds a static binary for the tests on an architecture and returns its path.
pub(crate) fn static_daemon(workspace: &Workspace, arch: Arch) -> Result<PathBuf> {
    let mut cargo = workspace.cargo_for(arch)?;
    run(cargo.args(["build", "--package", "session-enforcer"]))?;
    Ok(workspace.target_for(arch).join("debug/session-enforcer"))
}
