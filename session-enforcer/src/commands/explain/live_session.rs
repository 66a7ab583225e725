//! `explain --session`: which rule limits a live session, why, and when the session ends.

use std::{io::Write, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use hyper::Method;
use session_enforcer_common::Direction;

use super::describe;
use crate::{
    cli::{Circumstances, Ends, ExplainArgs},
    commands::{
        columns::{bytes, left, printable, short},
        daemon_client::{DaemonClient, block_on},
    },
    config::{Config, parse_user},
    report::control::{Row, Status},
};

pub(super) fn explain(args: &ExplainArgs, id: u64, out: &mut impl Write) -> anyhow::Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    let (session, status) = block_on(async {
        let session: serde_json::Value = client
            .value(Method::GET, &format!("/v1/sessions/{id}"))
            .await?;
        let status: Status = client.value(Method::GET, "/v1/status").await?;
        Ok((session, status))
    })?;
    let session = session.to_string();
    let row: Row<'_> = serde_json::from_str(&session).context("reading the daemon's answer")?;
    write_session(&row, out).context(NOT_WRITTEN)?;
    let file = args
        .config
        .clone()
        .or(status.config.file.map(PathBuf::from));
    let Some(file) = file else {
        let text = "\nThe daemon's only rule comes from its command line.";
        return writeln!(out, "{text}").context(NOT_WRITTEN);
    };
    let config = Config::load(&file)?;
    let is_in_force =
        config.file.as_ref().map(|file| &file.sha256) == status.config.sha256.as_ref();
    if !is_in_force {
        writeln!(
            out,
            "\nThe file {} is not what the daemon has in force; `session-enforcer reload` puts it into force.",
            file.display()
        )
        .context(NOT_WRITTEN)?;
    }
    writeln!(out).context(NOT_WRITTEN)?;
    let end = |end: crate::report::control::End| SocketAddr::new(end.ip, end.port);
    let ends = Ends::new(end(row.local), end(row.remote))?;
    let user = row.user.as_ref().map(|owner| parse_user(owner.label()));
    let circumstances = Circumstances {
        direction: match &*row.direction {
            "inbound" => Some(Direction::Inbound),
            "outbound" => Some(Direction::Outbound),
            _ => None,
        },
        user: user.transpose().ok().flatten(),
        cgroup: row.cgroup.as_ref().map(ToString::to_string),
    };
    describe(&config, &ends, &circumstances, out).context(NOT_WRITTEN)
}

const NOT_WRITTEN: &str = "the explanation cannot be written";

fn write_session(row: &Row<'_>, out: &mut impl Write) -> std::io::Result<()> {
    let (rule, mode) = (&row.rule, &row.mode);
    writeln!(
        out,
        "Session {}, limited by rule \"{rule}\", mode {mode}, {}:",
        row.id, row.state
    )?;
    let since = row.established.as_deref();
    let since = since.map_or_else(|| "at least".to_owned(), |time| format!("since {time},"));
    writeln!(out, "  established {since} {}", short(row.age_seconds))?;
    let passed = |time: &Option<String>| time.clone().unwrap_or_else(|| "never".to_owned());
    let (received, sent) = (bytes(row.bytes.received), bytes(row.bytes.sent));
    writeln!(
        out,
        "  received    {received} bytes, last {}",
        passed(&row.last_received)
    )?;
    writeln!(
        out,
        "  sent        {sent} bytes, last {}",
        passed(&row.last_sent)
    )?;
    writeln!(
        out,
        "  idle        {}, as its rule counts",
        short(row.idle_seconds)
    )?;
    if let Some(user) = &row.user {
        writeln!(out, "  user        {}", printable(user.label()))?;
    }
    if let Some(cgroup) = &row.cgroup {
        writeln!(out, "  cgroup      {}", printable(cgroup))?;
    }
    match (&row.clock, &row.deadline) {
        (Some(clock), Some(deadline)) => writeln!(
            out,
            "  ends        at {deadline}, in {}, by {clock}, if nothing passes",
            left(row)
        ),
        _ => writeln!(out, "  ends        never by this rule"),
    }
}
