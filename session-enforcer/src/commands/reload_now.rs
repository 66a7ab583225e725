//! `session-enforcer reload`: lets the daemon read its configuration again and prints the result.

use std::io::Write;

use anyhow::{Context as _, Result};
use hyper::Method;
use serde_json::json;

use super::daemon_client::{DaemonClient, block_on};
use crate::{cli::WatchArgs, exit::causes, report::control::PolicyChange};

/// Requests a reload, waits for it, and prints its effect on the sessions. With `--json`, prints an error too.
///
/// # Errors
///
/// Fails if no daemon answers, the configuration is refused (status 78, with the reason), or `out` cannot be
/// written.
pub fn reload(args: &WatchArgs, out: &mut impl Write) -> Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    let reloaded = block_on(client.value::<PolicyChange>(Method::POST, "/v1/reload"));
    let printed = match &reloaded {
        Ok(change) if args.json => writeln!(out, "{}", serde_json::to_string(change)?),
        Ok(change) => writeln!(
            out,
            "{} rule(s) in force; of the sessions {} kept, {} released, {} expired, {} adopted",
            change.rules, change.kept, change.released, change.expired, change.adopted
        ),
        Err(error) if args.json => writeln!(out, "{}", json!({ "error": causes(error) })),
        Err(_) => Ok(()),
    };
    printed.context("printing the result of the reload")?;
    reloaded.map(drop)
}
