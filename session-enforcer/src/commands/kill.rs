//! `session-enforcer kill`: resets sessions now.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use hyper::Method;
use serde_json::json;

use super::{
    columns::{printable, table},
    daemon_client::{DaemonClient, block_on, parse, with_query},
    unless_closed,
};
use crate::{
    cli::KillArgs,
    exit::{ExitStatus, Failure},
    report::control::{KillLine, KillOutcome, Row},
};

/// The maximum number of session IDs in one request, whose length is limited.
const IDS_AT_ONCE: usize = 10_000;

/// The number of sessions that are shown before the confirmation.
const SHOWN: usize = 10;

/// Resets sessions and prints the result of each.
///
/// # Errors
///
/// Fails if no daemon answers, an argument is invalid, some sessions were not reset (status 75), or `out`
/// cannot be written.
pub fn kill(args: &KillArgs, out: &mut impl Write) -> Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    block_on(async {
        let ids = match asks_first(args) {
            true => match confirmed(args, &client).await? {
                Some(ids) => ids,
                None => return Ok(()),
            },
            false => args.ids.clone(),
        };
        reset(args, &client, &ids, out).await
    })
}

/// Whether to ask for confirmation: a person is at the terminal.
fn asks_first(args: &KillArgs) -> bool {
    !args.yes && !args.dry_run && io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// The IDs of the sessions to reset, after a confirmation if there are several. `None` if the user declines.
async fn confirmed(args: &KillArgs, client: &DaemonClient) -> Result<Option<Vec<u64>>> {
    if args.ids.len() == 1 {
        return Ok(Some(args.ids.clone()));
    }
    let path = with_query("/v1/sessions", &args.filter.pairs());
    let mut lines = client.lines(Method::GET, &path, Bytes::new()).await?;
    let (mut ids, mut shown) = (Vec::new(), Vec::new());
    while let Some(line) = lines.next().await? {
        let row: Row<'_> = parse(line)?;
        if !args.ids.is_empty() && !args.ids.contains(&row.id) {
            continue;
        }
        ids.push(row.id);
        if shown.len() < SHOWN {
            shown.push(line.to_vec());
        }
    }
    // The daemon reports IDs without a session as not found.
    let missing = args.ids.iter().filter(|id| !ids.contains(id));
    let missing: Vec<u64> = missing.copied().collect();
    if ids.len() > 1 {
        let rows = shown.iter().map(|line| parse(line));
        let rows: Vec<Row<'_>> = rows.collect::<Result<_>>()?;
        if !ask(&rows, ids.len())? {
            return Ok(None);
        }
    }
    ids.extend(missing);
    if ids.is_empty() {
        eprintln!("no session matches");
        return Ok(None);
    }
    Ok(Some(ids))
}

fn ask(rows: &[Row<'_>], count: usize) -> Result<bool> {
    let width = comfy_table::Table::new().width().map_or(80, usize::from);
    let mut terminal = io::stderr().lock();
    let more = count - rows.len();
    let question = || -> io::Result<String> {
        terminal.write_all(table(rows, width).as_bytes())?;
        if more > 0 {
            writeln!(terminal, "and {more} more")?;
        }
        write!(terminal, "Reset these {count} sessions? [y/N] ")?;
        terminal.flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = { question }().context("asking on the terminal")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn reset(
    args: &KillArgs,
    client: &DaemonClient,
    ids: &[u64],
    out: &mut impl Write,
) -> Result<()> {
    let dry_run = if args.dry_run { "true" } else { "false" };
    let mut pairs = args.filter.pairs();
    pairs.push(("dry_run", dry_run));
    let path = with_query("/v1/sessions/kill", &pairs);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut undone = 0;
    let requests: Vec<Bytes> = match ids {
        [] => vec![Bytes::new()],
        ids => ids
            .chunks(IDS_AT_ONCE)
            .map(|some| json!({ "ids": some }).to_string().into())
            .collect(),
    };
    for body in requests {
        let mut lines = client.lines(Method::POST, &path, body).await?;
        while let Some(text) = lines.next().await? {
            let line: KillLine = parse(text)?;
            *counts.entry(line.result.name()).or_default() += 1;
            undone += usize::from(!line.result.is_done());
            let printed = if args.json {
                out.write_all(text).and_then(|()| out.write_all(b"\n"))
            } else {
                print(&line, out)
            };
            printed.and_then(|()| out.flush()).or_else(unless_closed)?;
        }
    }
    let all: usize = counts.values().sum();
    if all == 0 {
        eprintln!("no session matches");
    } else if all > 1 {
        let words: Vec<String> = counts
            .iter()
            .map(|(name, count)| format!("{count} {}", name.replace('_', " ")))
            .collect();
        eprintln!("{}", words.join(", "));
    }
    if undone > 0 {
        let what = if args.dry_run { "found" } else { "reset" };
        let message =
            format!("{undone} of {all} sessions were not {what}; the line of each says why");
        return Err(Failure::new(ExitStatus::Partly, message).into());
    }
    Ok(())
}

fn print(line: &KillLine, out: &mut impl Write) -> io::Result<()> {
    let result = match line.result {
        KillOutcome::NotFound => "not found",
        KillOutcome::WouldReset => "would reset",
        result => result.name(),
    };
    write!(out, "{}\t{result}", line.id)?;
    if let (Some(rule), Some(local), Some(remote)) = (&line.rule, line.local, line.remote) {
        write!(out, "\t{rule}\t{local}\t{remote}")?;
    }
    if let Some(error) = &line.error {
        write!(out, "\t{}", printable(error))?;
    }
    writeln!(out)
}
