//! `cargo xtask run`: builds the daemon and runs it as root.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::build::{Profile, daemon};
use crate::process::as_root;
use crate::setup::setup;
use crate::workspace::Workspace;

/// Arguments of `run`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments for session-enforcer.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Builds the daemon and replaces this process with it, so that it gets signals and its exit status is the
/// command's.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    setup(workspace)?;
    let binary = daemon(workspace, Profile::Release)?;
    let error = as_root(&binary)?.args(&args.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", binary.display()))
}
