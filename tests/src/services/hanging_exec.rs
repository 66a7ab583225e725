//! A process at which the kernel hangs.

use std::process::Command;

use anyhow::Result;

use super::program::{self, PYTHON, Program};

/// A process that hangs in `execve(2)` until this is dropped: its file system, a FUSE one, does not answer. Whoever looks
/// at its namespaces or descriptors below `/proc` hangs as well.
#[derive(Debug)]
pub struct HangingExec {
    _file_system: Program,
}

impl HangingExec {
    /// Starts the process and waits until it hangs.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed or the kernel has no FUSE.
    pub fn start() -> Result<Self> {
        let mut python = Command::new(program::find(PYTHON, "python3", &[])?);
        python.args(["-c", include_str!("../../clients/hanging_exec.py")]);
        let file_system = Program::server("the process that hangs", python, "hangs")?;
        Ok(Self {
            _file_system: file_system,
        })
    }
}
