//! `cargo xtask build`: builds the daemon with the embedded eBPF programs.

use std::path::PathBuf;

use anyhow::Result;

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

impl Profile {
    pub(crate) const fn debug_if(debug: bool) -> Self {
        if debug { Self::Debug } else { Self::Release }
    }

    /// cargo's name of the profile.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "dev",
        }
    }

    /// The folder of its binaries, below that of the target.
    pub(crate) const fn folder(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "debug",
        }
    }
}

/// Builds the daemon and prints the path of its binary.
pub(crate) fn build(workspace: &Workspace, args: &Args) -> Result<()> {
    setup(workspace)?;
    let profile = Profile::debug_if(args.debug);
    println!("{}", daemon(workspace, profile)?.display());
    Ok(())
}

/// Builds the daemon with a prepared eBPF toolchain and returns the path of its binary.
pub(crate) fn daemon(workspace: &Workspace, profile: Profile) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--package", "session-enforcer"]);
    run(cargo.args(["--profile", profile.name()]))?;
    let folder = workspace.target().join(profile.folder());
    Ok(folder.join("session-enforcer"))
}

/// An integration test in the daemon's package.
pub(crate) const TEST_OF_DAEMON: &str = "fuzz_seeds";

/// Builds the daemon of the tests, by the build of `cargo test`: that of an integration test includes the binaries of
/// its package. cargo chooses the features of all dependencies by what it builds, so `cargo build` would build many of
/// them, and the daemon, a second time.
pub(crate) fn daemon_of_tests(workspace: &Workspace) -> Result<PathBuf> {
    run(workspace
        .cargo()
        .args(["test", "--no-run", "--test", TEST_OF_DAEMON]))?;
    Ok(workspace.target().join("debug/session-enforcer"))
}
