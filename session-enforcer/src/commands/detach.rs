//! `detach`: takes out of the kernel what daemons of any version left there.

use std::{io::Write, path::Path};

use anyhow::Result;

use crate::{
    datapath::{PinDir, PinError},
    exit::Failure,
};

/// Removes every pin, and detaches what they keep attached. Where there is none, that is said and is
/// no error.
///
/// # Errors
///
/// Where a daemon holds the directory, the kernel refuses, or the output cannot be written.
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

/// The failure that an error of the pins ends the program with.
pub fn failure(error: &PinError) -> Failure {
    Failure::new(error.status(), format!("daemon.pin_dir: {error}"))
}
