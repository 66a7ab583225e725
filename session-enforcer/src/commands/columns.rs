//! Tables for people, and tab-separated columns for programs.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::NOTHING};

use crate::report::control::Row;

/// A column of the session table.
struct Column {
    title: &'static str,
    /// If the terminal is too narrow, columns are dropped from the highest number down. Columns with 0 stay.
    drop_order: u8,
    is_number: bool,
    value: fn(&Row<'_>) -> String,
}

/// The columns on a terminal. They are designed for at least 80 characters.
const COLUMNS: [Column; 12] = [
    column("ID", 0, true, |row| row.id.to_string()),
    column("RULE", 0, false, |row| row.rule.to_string()),
    column("DIRECTION", 7, false, |row| row.direction.to_string()),
    column("LOCAL", 2, false, |row| row.local.to_string()),
    column("REMOTE", 0, false, |row| row.remote.to_string()),
    column("OWNER", 4, false, owner),
    column("AGE", 3, true, |row| short(row.age_seconds)),
    column("IDLE", 1, true, |row| short(row.idle_seconds)),
    column("CLOCK", 5, false, |row| clock(row).to_owned()),
    column("LEFT", 0, true, left),
    column("RECEIVED", 6, true, |row| bytes(row.bytes.received)),
    column("SENT", 6, true, |row| bytes(row.bytes.sent)),
];

const fn column(
    title: &'static str,
    drop_order: u8,
    is_number: bool,
    value: fn(&Row<'_>) -> String,
) -> Column {
    Column {
        title,
        drop_order,
        is_number,
        value,
    }
}

/// The names of the columns for programs, in order.
pub(crate) const STABLE: [&str; 15] = [
    "id",
    "rule",
    "mode",
    "state",
    "direction",
    "local",
    "remote",
    "user",
    "cgroup",
    "age",
    "idle",
    "clock",
    "left",
    "received",
    "sent",
];

/// Writes a session for programs: columns separated by tabs, times in seconds, `-` for unknown values.
pub(crate) fn write_stable(row: &Row<'_>, out: &mut impl Write) -> io::Result<()> {
    let user = row.user.as_ref().map_or("-", |owner| owner.label());
    let left = row.left_seconds;
    let columns: [String; STABLE.len()] = [
        row.id.to_string(),
        row.rule.to_string(),
        row.mode.to_string(),
        row.state.to_string(),
        or_dash(&row.direction),
        row.local.to_string(),
        row.remote.to_string(),
        printable(user),
        printable(row.cgroup.as_deref().unwrap_or("-")),
        format!("{:.3}", row.age_seconds),
        format!("{:.3}", row.idle_seconds),
        clock(row).to_owned(),
        left.map_or_else(|| "-".to_owned(), |left| format!("{left:.3}")),
        row.bytes.received.to_string(),
        row.bytes.sent.to_string(),
    ];
    writeln!(out, "{}", columns.join("\t"))
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

/// Sessions as text, with the columns that fit the width.
pub(crate) struct Fitted {
    pub(crate) titles: Vec<&'static str>,
    /// The width of each column's widest cell.
    pub(crate) widths: Vec<usize>,
    pub(crate) is_number: Vec<bool>,
    pub(crate) rows: Vec<Vec<String>>,
}

/// Drops the columns with the highest numbers until the rest fits.
pub(crate) fn fit(rows: &[Row<'_>], width: usize) -> Fitted {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let cells = COLUMNS.iter().map(|column| (column.value)(row));
            cells.map(|cell| printable(&cell)).collect()
        })
        .collect();
    let widths: Vec<usize> = COLUMNS
        .iter()
        .enumerate()
        .map(|(index, column)| {
            let cells = cells.iter().filter_map(|row| row.get(index));
            let widest = cells.map(|cell| cell.chars().count()).max();
            widest.unwrap_or(0).max(column.title.len())
        })
        .collect();
    let shown = shown(&widths, width);
    let of_row = |row: Vec<String>| {
        let cells = shown.iter().filter_map(|index| row.get(*index));
        cells.cloned().collect()
    };
    Fitted {
        titles: shown.iter().map(|index| COLUMNS[*index].title).collect(),
        widths: shown.iter().map(|index| widths[*index]).collect(),
        is_number: shown
            .iter()
            .map(|index| COLUMNS[*index].is_number)
            .collect(),
        rows: cells.into_iter().map(of_row).collect(),
    }
}

/// Formats sessions as a table of at most this width, as far as columns can be dropped.
pub(crate) fn table(rows: &[Row<'_>], width: usize) -> String {
    let fitted = fit(rows, width);
    let mut table = plain();
    table.set_header(&fitted.titles);
    for row in &fitted.rows {
        table.add_row(row);
    }
    for (place, is_number) in fitted.is_number.iter().enumerate() {
        if let Some(column) = table.column_mut(place) {
            column.set_cell_alignment(match is_number {
                true => CellAlignment::Right,
                false => CellAlignment::Left,
            });
            let is_last = place + 1 == fitted.titles.len();
            column.set_padding((0, if is_last { 0 } else { GAP as u16 }));
        }
    }
    lines(&table)
}

/// The number of spaces between two columns.
const GAP: usize = 2;

/// The indexes of the columns that fit, in order.
fn shown(widths: &[usize], room: usize) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..widths.len()).collect();
    loop {
        let widths = shown.iter().filter_map(|index| widths.get(*index));
        let needed = widths.sum::<usize>() + GAP * shown.len().saturating_sub(1);
        let last = shown
            .iter()
            .copied()
            .max_by_key(|index| COLUMNS[*index].drop_order);
        match last {
            Some(last) if needed > room && COLUMNS[last].drop_order > 0 => {
                shown.retain(|index| *index != last);
            }
            _ => return shown,
        }
    }
}

/// A table without borders.
pub(crate) fn plain() -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// The lines of a table without trailing spaces.
pub(crate) fn lines(table: &Table) -> String {
    table
        .lines()
        .fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// Replaces control characters, so that foreign text cannot control the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn clock<'a>(row: &'a Row<'_>) -> &'a str {
    row.clock.as_deref().unwrap_or("-")
}

pub(crate) fn owner(row: &Row<'_>) -> String {
    let cgroup = row.cgroup.as_deref();
    let service = cgroup
        .and_then(|path| path.rsplit('/').next())
        .filter(|name| !name.is_empty());
    match (&row.user, service) {
        (Some(user), Some(service)) => {
            let service = service.trim_end_matches(".service");
            match user.label() == service {
                true => service.to_owned(),
                false => format!("{}@{service}", user.label()),
            }
        }
        (Some(user), None) => user.label().to_owned(),
        (None, Some(service)) => service.to_owned(),
        (None, None) => "-".to_owned(),
    }
}

pub(crate) fn left(row: &Row<'_>) -> String {
    match row.left_seconds {
        Some(left) if left < 0.0 => format!("-{}", short(-left)),
        Some(left) => short(left),
        None => "-".to_owned(),
    }
}

/// Formats a time in its two largest units.
pub(crate) fn short(seconds: f64) -> String {
    const UNITS: [(&str, u64); 3] = [("d", 86_400), ("h", 3_600), ("m", 60)];
    if seconds < 10.0 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    let smaller = [("h", 3_600), ("m", 60), ("s", 1)];
    let unit = UNITS
        .into_iter()
        .zip(smaller)
        .find(|((_, unit), _)| whole >= *unit);
    match unit {
        Some(((name, unit), (next, next_unit))) => {
            let rest = whole % unit / next_unit;
            format!("{}{name}{rest:02}{next}", whole / unit)
        }
        None => format!("{whole}s"),
    }
}

/// Formats a number of bytes with three digits.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
    if bytes < 1_000 {
        return bytes.to_string();
    }
    let mut value = bytes as f64 / 1_000.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1_000.0;
        unit += 1;
    }
    let digits = if value < 9.95 { 1 } else { 0 };
    format!("{value:.digits$}{}", UNITS[unit])
}

#[cfg(test)]
pub(crate) mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::report::control::{Carried, End, Owner};

    pub(crate) fn row(id: u64) -> Row<'static> {
        Row {
            id,
            rule: Cow::Borrowed("postgres"),
            mode: Cow::Borrowed("enforce"),
            state: Cow::Borrowed("open"),
            direction: Cow::Borrowed("inbound"),
            local: End {
                ip: "10.0.0.5".parse().unwrap(),
                port: 5432,
            },
            remote: End {
                ip: "10.0.0.7".parse().unwrap(),
                port: 51234,
            },
            netns: 3,
            user: Some(Owner {
                id: Cow::Borrowed("113"),
                name: Some(Cow::Borrowed("postgres")),
            }),
            cgroup: Some(Cow::Borrowed("/system.slice/postgresql.service")),
            established: None,
            last_received: None,
            last_sent: None,
            age_seconds: 4_000.25,
            idle_seconds: 61.0,
            clock: Some(Cow::Borrowed("idle_timeout")),
            deadline: None,
            left_seconds: Some(839.0),
            bytes: Carried {
                received: 120,
                sent: 4_096,
            },
        }
    }

    #[test]
    fn a_terminal_shows_as_many_columns_as_it_is_wide() {
        let rows = [row(7), row(4_711)];
        assert_eq!(
            table(&rows, 200),
            "  ID  RULE      DIRECTION  LOCAL          REMOTE          OWNER                  AGE   IDLE  \
             CLOCK           LEFT  RECEIVED  SENT\n   \
             7  postgres  inbound    10.0.0.5:5432  10.0.0.7:51234  postgres@postgresql  1h06m  1m01s  \
             idle_timeout  13m59s       120  4.1k\n\
             4711  postgres  inbound    10.0.0.5:5432  10.0.0.7:51234  postgres@postgresql  1h06m  1m01s  \
             idle_timeout  13m59s       120  4.1k\n"
        );
        for width in [40, 60, 80, 100, 120] {
            let table = table(&rows, width);
            let widest = table
                .lines()
                .map(|line| line.chars().count())
                .max()
                .unwrap();
            assert!(widest <= width.max(44), "{width}:\n{table}");
            assert!(
                table.contains("REMOTE") && table.contains("LEFT"),
                "{table}"
            );
        }
        assert!(table(&rows, 80).contains("IDLE") && table(&rows, 80).contains("LOCAL"));
        assert_eq!(table(&[], 80).lines().count(), 1);
    }

    #[test]
    fn programs_have_each_column_always() {
        let mut out = Vec::new();
        write_stable(&row(7), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "7\tpostgres\tenforce\topen\tinbound\t10.0.0.5:5432\t10.0.0.7:51234\tpostgres\t\
             /system.slice/postgresql.service\t4000.250\t61.000\tidle_timeout\t839.000\t120\t4096\n"
        );
        let mut out = Vec::new();
        let unknown = Row {
            user: None,
            cgroup: None,
            direction: Cow::Borrowed(""),
            clock: None,
            left_seconds: None,
            ..row(7)
        };
        write_stable(&unknown, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.split('\t').count(), STABLE.len());
        assert_eq!(text.matches("\t-\t").count(), 3, "{text}");
    }

    #[test]
    fn the_page_has_the_columns_of_programs_in_their_order() {
        let page = include_str!("../../docs/control.md");
        let words: Vec<&str> = page.split_whitespace().collect();
        let columns = STABLE.map(|column| format!("`{column}`")).join(", ");
        assert!(words.join(" ").contains(&columns), "{columns}");
    }

    #[test]
    fn times_and_bytes_are_short() {
        let times = [0.04, 9.94, 59.6, 61.0, 3_661.0, 90_000.0].map(short);
        assert_eq!(times, ["0.0s", "9.9s", "1m00s", "1m01s", "1h01m", "1d01h"]);
        let carried = [0, 999, 1_000, 9_949, 99_999, 999_499, 999_500, u64::MAX].map(bytes);
        assert_eq!(
            carried,
            ["0", "999", "1.0k", "9.9k", "100k", "999k", "1.0M", "18E"]
        );
    }

    #[test]
    fn a_name_has_no_control_over_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a?[2Jb?");
    }
}
