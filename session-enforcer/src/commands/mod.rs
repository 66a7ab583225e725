//! The commands of the program, one file each.
//!
//! A command takes the arguments that [`cli`](crate::cli) has parsed, prints its output, and returns the
//! basis of the exit status. Only `main` calls commands. This module takes no decision about a session.

pub mod check;
mod columns;
mod daemon_client;
pub mod detach;
pub mod doctor;
pub mod explain;
pub mod follow;
pub mod kill;
pub mod last_good;
pub mod list;
mod probe;
pub mod reload_now;
pub mod run;
pub mod status;
pub mod top;

use std::io::{self, Write};

use anyhow::{Context as _, Result};

/// Runs a command that prints to `out`, and reports if its output cannot be written.
///
/// # Errors
///
/// Fails as the command does, or if `out` cannot be written.
pub fn printed<T, W: Write>(
    out: W,
    command: impl FnOnce(&mut io::BufWriter<W>) -> Result<T>,
) -> Result<T> {
    let mut out = io::BufWriter::new(out);
    let done = command(&mut out)?;
    out.flush().or_else(unless_closed)?;
    Ok(done)
}

/// Ignores a broken pipe: the reader has closed the output.
fn unless_closed(error: io::Error) -> Result<()> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error).context("printing the result"),
    }
}
