//! A HAProxy that forwards connections with an idle timeout.

use std::{fs, path::Path};

use anyhow::Result;
use tempfile::TempDir;

use super::program::{self, Program};
use crate::{agent::Place, process::pin_to_cpu};

/// Starts a HAProxy on this processor. It forwards from `port` to `backend`, both on 127.0.0.1 of the place,
/// and uses the directory alone. `agent` is the path of the agent's binary.
///
/// # Errors
///
/// Fails with its output if HAProxy is not installed or does not start.
pub fn haproxy(
    agent: &Path,
    place: &Place,
    cpu: usize,
    [port, backend]: [u16; 2],
) -> Result<(Program, TempDir)> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("haproxy.cfg");
    fs::write(&file, configuration(port, backend))?;
    let haproxy = program::find("haproxy", "haproxy", &[])?;
    let mut command = place.command(agent, haproxy);
    // Run one process in the foreground, which ends with the caller.
    command.args(["-db", "-f"]).arg(&file);
    pin_to_cpu(&mut command, cpu)?;
    let server = Program::listening("haproxy", command, port)?;
    Ok((server.quiet(), directory))
}

fn configuration(port: u16, backend: u16) -> String {
    format!(
        "global\n    nbthread 1\n    maxconn 4000\n\
         listen proxy\n    mode tcp\n    bind 127.0.0.1:{port}\n    timeout connect 5s\n    \
         timeout client 15m\n    timeout server 15m\n    server backend 127.0.0.1:{backend}\n"
    )
}
