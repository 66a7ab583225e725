//! The packages of npm's that the tests use as clients, in a folder of the target directory.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::packages::Missing;
use crate::process::{run, say};
use crate::workspace::Workspace;

/// Where they are named, from the root of the workspace.
const NAMED: &str = "tests/clients/node";
/// Where they are put, in the target directory; the tests look there.
const FOLDER: &str = "node-clients";
const LOCK: &str = "package-lock.json";

/// Makes sure that they are there, in the versions of the lock file.
pub(crate) fn ensure(workspace: &Workspace, policy: Missing) -> Result<()> {
    let named = workspace.root().join(NAMED);
    let folder = workspace.target().join(FOLDER);
    let wanted = fs::read(named.join(LOCK)).context("reading the lock file of npm")?;
    // Written when all is there.
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
