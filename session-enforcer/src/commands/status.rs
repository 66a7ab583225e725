//! `session-enforcer status`: prints the status of the running daemon.

use std::io::Write;

use anyhow::{Context as _, Result};
use hyper::Method;

use super::{
    columns::{lines, plain, printable},
    daemon_client::{DaemonClient, block_on},
};
use crate::{
    cli::WatchArgs,
    report::control::{RuleStatus, Status},
};

/// Prints the status of the daemon.
///
/// # Errors
///
/// Fails if no daemon answers, or `out` cannot be written.
pub fn status(args: &WatchArgs, out: &mut impl Write) -> Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    let status: Status = block_on(client.value(Method::GET, "/v1/status"))?;
    let text = if args.json {
        serde_json::to_string_pretty(&status)? + "\n"
    } else {
        format_status(&status)
    };
    out.write_all(text.as_bytes())
        .context("printing the status")
}

fn format_status(status: &Status) -> String {
    let config = match (&status.config.file, &status.config.sha256) {
        (Some(file), Some(sha256)) => format!("{} (SHA-256 {sha256})", printable(file)),
        _ => "from the command line".to_owned(),
    };
    let attached = if status.attached {
        "attached to"
    } else {
        "not attached to"
    };
    let ready = if status.ready { "ready" } else { "not ready" };
    let mut text = format!(
        "session-enforcer {}, process {}, on Linux {}: {ready}\n",
        status.version, status.pid, status.kernel
    );
    for degradation in &status.degraded {
        text += &format!(
            "  {}: {}\n",
            degradation.cause,
            printable(&degradation.what)
        );
    }
    let mode = match &*status.mode {
        "observe" => "observe: nothing is reset at a limit",
        mode => mode,
    };
    text += &format!("  started        {}\n", status.started);
    text += &format!("  mode           {mode}\n");
    text += &format!(
        "  programs       {attached} {}\n",
        printable(&status.cgroup)
    );
    text += &format!("  configuration  {config}\n");
    text += &format!("  in force since {}\n", status.config.since);
    if let Some(error) = &status.config.last_reload_error {
        text += &format!("  last reload    refused: {}\n", printable(error));
    }
    text += &format!(
        "  sessions       {} of {}\n",
        status.sessions, status.max_sessions
    );
    if status.quarantined > 0 {
        text += &format!(
            "  resets         {} hang on locked sockets\n",
            status.quarantined
        );
    }
    text += &format!(
        "  audit          {} records, {} lost\n\n",
        status.audit_records, status.audit_records_lost
    );
    let mut table = plain();
    table.set_header(["RULE", "MODE", "SESSIONS", "TERMINATIONS"]);
    for rule in &status.rules {
        let mode = if rule.in_force { &rule.mode } else { "gone" };
        let sessions = rule.sessions.to_string();
        table.add_row([&rule.name, mode, &sessions, &terminations(rule)]);
    }
    text + &lines(&table)
}

fn terminations(rule: &RuleStatus) -> String {
    let counts = rule.terminations.iter().map(|one| {
        let result = match &*one.result {
            "reset" => "",
            "none" => " (observed)",
            "gone" => " (gone)",
            _ => " (failed)",
        };
        format!("{} {}{result}", one.count, one.reason)
    });
    let counts: Vec<String> = counts.collect();
    if counts.is_empty() {
        return "none".to_owned();
    }
    counts.join(", ")
}
