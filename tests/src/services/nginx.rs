//! An nginx that forwards connections with an idle timeout.

use std::{fs, path::Path};

use anyhow::Result;
use tempfile::TempDir;

use super::program::{self, Program};
use crate::{agent::Place, process::pin_to_cpu};

/// The module of Debian's package libnginx-mod-stream, which other builds have in the program.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Starts an nginx on this processor. It forwards from `port` to `backend`, both on 127.0.0.1 of the place,
/// and uses the directory alone. `agent` is the path of the agent's binary.
///
/// # Errors
///
/// Fails with its output if nginx or its stream module is not installed or does not start.
pub fn nginx(
    agent: &Path,
    place: &Place,
    cpu: usize,
    [port, backend]: [u16; 2],
) -> Result<(Program, TempDir)> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("nginx.conf");
    fs::write(&file, configuration(directory.path(), port, backend))?;
    let nginx = program::find("nginx", "libnginx-mod-stream", &[])?;
    let mut command = place.command(agent, nginx);
    command
        .args(["-e", "stderr", "-p"])
        .arg(directory.path())
        .arg("-c")
        .arg(&file);
    pin_to_cpu(&mut command, cpu)?;
    let server = Program::listening("nginx", command, port)?;
    Ok((server.quiet(), directory))
}

/// Runs one process in the foreground, which ends with the caller.
fn configuration(directory: &Path, port: u16, backend: u16) -> String {
    let module = if Path::new(STREAM_MODULE).exists() {
        format!("load_module {STREAM_MODULE};\n")
    } else {
        String::new()
    };
    let directory = directory.display();
    format!(
        "{module}daemon off;\nmaster_process off;\npid {directory}/pid;\n\
         events {{ worker_connections 4096; }}\n\
         stream {{\n    server {{\n        listen 127.0.0.1:{port};\n        \
         proxy_pass 127.0.0.1:{backend};\n        proxy_timeout 15m;\n    }}\n}}\n"
    )
}
