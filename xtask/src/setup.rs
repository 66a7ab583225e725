//! `cargo xtask setup`: prepares the toolchain of the eBPF programs.
//!
//! A stable toolchain lacks two parts: the sources of `core` (there is no prebuilt `core` for the bpf target)
//! and a BPF linker.

use std::fs::{self, File};

use anyhow::{Context as _, Result};

use crate::process::say;
use crate::rustc::Rustc;
use crate::workspace::Workspace;
use crate::{core_sources, linker};

/// Prepares the eBPF toolchain if it is not ready.
pub(crate) fn setup(workspace: &Workspace) -> Result<()> {
    let rustc = Rustc::find()?;
    let _lock = lock(workspace)?;
    core_sources::ensure(workspace, &rustc)?;
    linker::ensure(workspace, &rustc)
}

/// Prevents a second xtask (such as a test run beside a build) from creating the same files at the same time.
pub(crate) fn lock(workspace: &Workspace) -> Result<File> {
    let folder = workspace.toolchain();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    if file.try_lock().is_err() {
        say!("waiting for another xtask that is setting up the eBPF toolchain");
        file.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}
