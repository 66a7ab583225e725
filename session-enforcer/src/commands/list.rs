//! `session-enforcer list`: the live sessions.

use std::{
    cmp::Ordering,
    io::{self, IsTerminal as _, Write},
};

use anyhow::Result;
use bytes::Bytes;
use hyper::Method;

use super::{
    columns::{table, write_stable},
    daemon_client::{DaemonClient, Lines, block_on, parse, with_query},
};
use crate::{
    cli::ListArgs,
    report::control::{Row, SortKey},
};

/// The longest list that the daemon sorts.
const MAX_SORTED: u64 = 10_000;

/// The width of a terminal that does not tell it.
const WIDTH: usize = 80;

/// Prints the sessions: a table on a terminal, else columns with tabs between them, or JSON.
///
/// # Errors
///
/// Where no daemon answers, something asked for is not understood, or `out` does not take the text.
pub fn list(args: &ListArgs, out: &mut (impl Write + TerminalOrNot)) -> Result<()> {
    let limit = args.limit.map(|limit| limit.to_string());
    let mut pairs = args.filter.pairs();
    if let Some(limit) = limit
        .as_deref()
        .filter(|_| args.limit.is_some_and(|n| n <= MAX_SORTED))
    {
        pairs.extend([("sort", args.sort.name()), ("limit", limit)]);
    }
    let path = with_query("/v1/sessions", &pairs);
    let client = DaemonClient::new(&args.daemon.socket);
    let rows = block_on(async {
        let lines = client.lines(Method::GET, &path, Bytes::new()).await?;
        collect(lines).await
    })?;
    let mut rows: Vec<(Row<'_>, &[u8])> = rows
        .iter()
        .map(|line| Ok((parse(line)?, &**line)))
        .collect::<Result<_>>()?;
    rows.sort_by(|(a, _), (b, _)| compare(args.sort, a, b));
    let most = args.limit.and_then(|limit| usize::try_from(limit).ok());
    rows.truncate(most.unwrap_or(usize::MAX));
    print(args, &rows, out).or_else(unless_closed)
}

/// Whoever reads has had enough.
pub(super) fn unless_closed(error: io::Error) -> Result<()> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(anyhow::Error::new(error).context("printing the sessions")),
    }
}

async fn collect(mut lines: Lines) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    while let Some(line) = lines.next().await? {
        all.push(line.to_vec());
    }
    Ok(all)
}

fn print(
    args: &ListArgs,
    rows: &[(Row<'_>, &[u8])],
    out: &mut (impl Write + TerminalOrNot),
) -> io::Result<()> {
    if args.json {
        for (_, line) in rows {
            out.write_all(line)?;
            out.write_all(b"\n")?;
        }
    } else if let Some(width) = out.width() {
        let rows: Vec<Row<'_>> = rows.iter().map(|(row, _)| row.clone()).collect();
        out.write_all(table(&rows, width).as_bytes())?;
    } else {
        for (row, _) in rows {
            write_stable(row, out)?;
        }
    }
    out.flush()
}

/// The order of a list. What has no such number comes last.
pub(super) fn compare(sort: SortKey, a: &Row<'_>, b: &Row<'_>) -> Ordering {
    let left = |row: &Row<'_>| row.left_seconds.unwrap_or(f64::INFINITY);
    let by = match sort {
        SortKey::Left => left(a).total_cmp(&left(b)),
        SortKey::Idle => b.idle_seconds.total_cmp(&a.idle_seconds),
        SortKey::Age => b.age_seconds.total_cmp(&a.age_seconds),
        SortKey::Bytes => {
            let carried = |row: &Row<'_>| row.bytes.received.saturating_add(row.bytes.sent);
            carried(b).cmp(&carried(a))
        }
        SortKey::Rule => a.rule.cmp(&b.rule).then(left(a).total_cmp(&left(b))),
        SortKey::Id => Ordering::Equal,
    };
    by.then(a.id.cmp(&b.id))
}

/// Where text is printed to.
pub trait TerminalOrNot {
    /// How many characters a line of the terminal has; none where it is no terminal.
    fn width(&self) -> Option<usize>;
}

impl TerminalOrNot for io::BufWriter<io::StdoutLock<'_>> {
    fn width(&self) -> Option<usize> {
        self.get_ref().is_terminal().then(|| {
            let table = comfy_table::Table::new();
            table.width().map_or(WIDTH, usize::from)
        })
    }
}
