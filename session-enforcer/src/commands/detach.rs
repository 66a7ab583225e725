//! `detach`: removes everything that daemons of any version left in the kernel.

use std::{io::Write, path::Path};

use anyhow::Result;

use crate::{
    datapath::{PinDir, PinError},
    exit::Failure,
};

/// Removes every pin, which detaches the pinned programs. If there is no pin, says so and succeeds.
///
/// # Errors
///
/// Fails if a daemon holds the directory, the kernel refuses, or `out` cannot be written.
pub fn detach(directory: Option<&Path>, out: &mut impl Write) -> Result<()> {
    let Some(path) = directory else {
        writeln!(out, "daemon.pin_dir is \"\": nothing is pinned")?;
        return Ok(());
    };
    let held = PinDir::hold_existing(path).map_err(|error| failure(&error))?;
    let removed = held.map_or(Ok(0), PinDir::remove);
    match removed.map_err(|error| failure(&error))? {
        0 => writeln!(out, "nothing is pinned in {}", path.display())?,
        _ => writeln!(out, "removed what was pinned in {}", path.display())?,
    }
    Ok(())
}

/// Converts an error of the pins into the failure that ends the program.
pub fn failure(error: &PinError) -> Failure {
    Failure::new(error.status(), format!("daemon.pin_dir: {error}"))
}
