//! `session-enforcer reload`: has the daemon read its configuration, and says what became of it.

use std::io::Write;

use anyhow::{Context as _, Result};
use hyper::Method;

use super::daemon_client::{DaemonClient, block_on};
use crate::{cli::WatchArgs, report::control::PolicyChange};

/// Reloads, waits, and prints what became of the sessions.
///
/// # Errors
///
/// Where no daemon answers, the configuration is refused (status 78, with the reason), or `out` does not take the text.
pub fn reload(args: &WatchArgs, out: &mut impl Write) -> Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    let change: PolicyChange = block_on(client.value(Method::POST, "/v1/reload"))?;
    let printed = if args.json {
        writeln!(out, "{}", serde_json::to_string(&change)?)
    } else {
        writeln!(
            out,
            "{} rule(s) in force; of the sessions {} kept, {} released, {} expired, {} adopted",
            change.rules, change.kept, change.released, change.expired, change.adopted
        )
    };
    printed.context("printing what became of the sessions")
}
