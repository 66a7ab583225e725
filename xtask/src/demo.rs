//! `cargo xtask demo`. STUB: the lead replaces this file.

use anyhow::{Result, bail};

use crate::workspace::Workspace;

/// Shows session-enforcer at work.
///
/// At hand for it: `setup::setup`, `packages::ensure(Missing::Install)` for the servers and
/// clients, `build::daemon(workspace, Profile::Release)` for the binary, `process::as_root`.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let file = workspace.root().join("xtask/src/demo.rs");
    bail!("the demo is not written yet ({})", file.display());
}
