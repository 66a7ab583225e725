//! The npm packages that the tests use as clients, in a folder of the target directory.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::packages::Missing;
use crate::process::{run, say};
use crate::workspace::Workspace;

/// The folder of `package.json`, from the root of the workspace.
const NAMED: &str = "tests/clients/node";
/// The folder of the installed packages in the target directory, where the tests look for them.
const FOLDER: &str = "node-clients";
const LOCK: &str = "package-lock.json";

/// Ensures that the packages are installed in the versions of the lock file.
pub(crate) fn ensure(workspace: &Workspace, policy: Missing) -> Result<()> {
    let named = workspace.root().join(NAMED);
    let folder = workspace.target().join(FOLDER);
    let wanted = fs::read(named.join(LOCK)).context("reading the lock file of npm")?;
    // This file is written last.
    let done = folder.join("installed");
    if fs::read(&done).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if matches!(policy, Missing::Refuse) {
        bail!(
            "the packages of {NAMED}/package.json are missing; remedy: `cargo xtask test`, which has npm put them into {}",
            folder.display()
        );
    }
    say!("npm puts clients for the tests into {}", folder.display());
    fs::create_dir_all(&folder)?;
    for file in ["package.json", LOCK] {
        fs::copy(named.join(file), folder.join(file))?;
    }
    run(Command::new("npm").current_dir(&folder).args([
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
    ]))?;
    Ok(fs::write(done, wanted)?)
}
