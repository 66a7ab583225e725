//! `cargo xtask setup`: what the eBPF programs are built with.
//!
//! A stable toolchain lacks two things for them: the sources of `core` (there is no built `core` for
//! the bpf target) and a linker for BPF.

use std::fs::{self, File};

use anyhow::{Context as _, Result};

use crate::process::say;
use crate::rustc::Rustc;
use crate::workspace::Workspace;
use crate::{core_sources, linker};

/// Makes the eBPF toolchain ready; does nothing where it is.
pub(crate) fn setup(workspace: &Workspace) -> Result<()> {
    let rustc = Rustc::find()?;
    let _lock = lock(workspace)?;
    core_sources::ensure(workspace, &rustc)?;
    linker::ensure(workspace, &rustc)
}

/// Keeps a second xtask (a test run beside a build) from making the same files at the same time.
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
