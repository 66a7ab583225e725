//! `session-enforcer list`: prints the live sessions.

use std::{
    cmp::Ordering,
    io::{self, IsTerminal as _, Write},
};

use anyhow::Result;
use bytes::Bytes;
use hyper::Method;
use serde::Deserialize;

use super::{
    columns::{table, write_stable},
    daemon_client::{DaemonClient, Lines, block_on, parse, with_query},
    unless_closed,
};
use crate::{
    cli::ListArgs,
    report::control::{Carried, MAX_SORTED, Row, SortKey},
};

/// The width of a terminal that does not report it.
const WIDTH: usize = 80;

/// Prints the sessions: a table on a terminal, otherwise tab-separated columns, or JSON.
///
/// # Errors
///
/// Fails if no daemon answers, an argument is invalid, or `out` cannot be written.
pub fn list(args: &ListArgs, out: &mut (impl Write + TerminalOrNot)) -> Result<()> {
    let few = args.limit.filter(|limit| *limit <= MAX_SORTED as u64);
    let few = few.map(|limit| limit.to_string());
    let mut pairs = args.filter.pairs();
    if let Some(limit) = &few {
        pairs.extend([("sort", args.sort.name()), ("limit", limit)]);
    }
    let path = with_query("/v1/sessions", &pairs);
    let client = DaemonClient::new(&args.daemon.socket);
    let mut listed = block_on(async {
        let lines = client.lines(Method::GET, &path, Bytes::new()).await?;
        collect(lines).await
    })?;
    // The daemon sorts by nanoseconds, of which its answer has only milliseconds.
    if few.is_none() {
        listed.sort_unstable_by(|a, b| compare(args.sort, &a.numbers, &b.numbers));
    }
    let most = args.limit.and_then(|limit| usize::try_from(limit).ok());
    listed.truncate(most.unwrap_or(usize::MAX));
    print(args, &listed, out)
}

/// A session of the daemon's answer. The complete line is parsed again only if its other fields are printed.
struct Listed {
    numbers: Numbers,
    line: Box<[u8]>,
}

/// The fields of a [`Row`] that a list can be sorted by.
#[derive(Deserialize)]
struct Numbers {
    id: u64,
    rule: Box<str>,
    age_seconds: f64,
    idle_seconds: f64,
    left_seconds: Option<f64>,
    bytes: Carried,
}

/// Parses each line when it arrives, while the daemon produces the next ones.
async fn collect(mut lines: Lines) -> Result<Vec<Listed>> {
    let mut all = Vec::new();
    while let Some(line) = lines.next().await? {
        all.push(Listed {
            numbers: parse(line)?,
            line: line.into(),
        });
    }
    Ok(all)
}

fn print(args: &ListArgs, listed: &[Listed], out: &mut (impl Write + TerminalOrNot)) -> Result<()> {
    if args.json {
        return print_lines(listed, out).or_else(unless_closed);
    }
    let rows = listed.iter().map(|one| parse(&one.line));
    let rows: Vec<Row<'_>> = rows.collect::<Result<_>>()?;
    print_columns(&rows, out).or_else(unless_closed)
}

fn print_lines(listed: &[Listed], out: &mut impl Write) -> io::Result<()> {
    for one in listed {
        out.write_all(&one.line)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

fn print_columns(rows: &[Row<'_>], out: &mut (impl Write + TerminalOrNot)) -> io::Result<()> {
    match out.width() {
        Some(width) => out.write_all(table(rows, width).as_bytes())?,
        None => rows.iter().try_for_each(|row| write_stable(row, out))?,
    }
    out.flush()
}

/// Compares sessions in this order. A session without a deadline sorts last.
fn compare(sort: SortKey, a: &Numbers, b: &Numbers) -> Ordering {
    let left = |row: &Numbers| row.left_seconds.unwrap_or(f64::INFINITY);
    let by = match sort {
        SortKey::Left => left(a).total_cmp(&left(b)),
        SortKey::Idle => b.idle_seconds.total_cmp(&a.idle_seconds),
        SortKey::Age => b.age_seconds.total_cmp(&a.age_seconds),
        SortKey::Bytes => {
            let carried = |row: &Numbers| row.bytes.received.saturating_add(row.bytes.sent);
            carried(b).cmp(&carried(a))
        }
        SortKey::Rule => a.rule.cmp(&b.rule).then(left(a).total_cmp(&left(b))),
        SortKey::Id => Ordering::Equal,
    };
    by.then(a.id.cmp(&b.id))
}

/// An output that may be a terminal.
pub trait TerminalOrNot {
    /// The width of the terminal in characters, or `None` if the output is no terminal.
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
