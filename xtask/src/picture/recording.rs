//! What a program has written to a terminal, as the terminal shows it, and a picture of that.

use std::num::NonZero;

use anyhow::{Context as _, Result, bail, ensure};
use vt100::{Cell, Color, Parser};

use super::svg::Svg;

/// Rows of the terminal: more than is written, so that nothing scrolls away.
const ROWS: NonZero<u16> = NonZero::new(400).expect("not 0");

/// Pixels of a character, and around them all.
const WIDTH: u32 = 8;
const HEIGHT: u32 = 18;
const MARGIN: u32 = 16;

/// The names of the first eight colours, in the order of their numbers.
const COLOURS: [&str; 8] = [
    "dim", "red", "green", "yellow", "blue", "magenta", "cyan", "",
];

/// The screen of a terminal, row by row.
pub(super) struct Recording {
    rows: Vec<Vec<Span>>,
}

/// Characters side by side that look the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    column: u16,
    columns: u16,
    /// A class of the picture's, or several.
    class: String,
    text: String,
}

impl Recording {
    /// What a terminal of this width shows of a program's output.
    pub(super) fn of(output: &str, columns: NonZero<u16>) -> Result<Self> {
        let mut parser = Parser::new(ROWS, columns, 0);
        parser.process(output.replace('\n', "\r\n").as_bytes());
        let screen = parser.screen();
        let (columns, all_rows) = (columns.get(), ROWS.get());
        ensure!(
            screen.cursor_position().0 + 1 < all_rows,
            "the program has written more than {ROWS} rows: raise ROWS in recording.rs"
        );
        let rows = (0..all_rows).map(|row| {
            let cells = (0..columns).filter_map(|column| screen.cell(row, column));
            spans(&cells.collect::<Vec<_>>())
        });
        let rows = rows.collect::<Result<_>>()?;
        Ok(Self { rows })
    }

    /// The rows from the one that begins with `from` up to, and without, the one that begins with `to`.
    pub(super) fn part(mut self, from: &str, to: &str) -> Result<Self> {
        let start = self.find(from, 0)?;
        let end = self.find(to, start)?;
        self.rows.truncate(end);
        self.rows.drain(..start);
        while self.rows.last().is_some_and(Vec::is_empty) {
            self.rows.pop();
        }
        Ok(self)
    }

    fn find(&self, text: &str, after: usize) -> Result<usize> {
        let begins = |row: &Vec<Span>| row.first().is_some_and(|span| span.text.starts_with(text));
        let found = self.rows.iter().skip(after).position(begins);
        let found = found.with_context(|| {
            format!("no row begins with {text:?}: name another one in picture.rs")
        })?;
        Ok(after + found)
    }

    pub(super) fn svg(&self, title: &str) -> Result<String> {
        let rows = u32::try_from(self.rows.len())?;
        let ends = self.rows.iter().filter_map(|row| row.last());
        let columns = ends.map(|span| span.column + span.columns).max();
        let width = u32::from(columns.unwrap_or_default()) * WIDTH + 2 * MARGIN;
        let mut svg = Svg::new(width, rows * HEIGHT + 2 * MARGIN, title);
        for (y, row) in (MARGIN..).step_by(HEIGHT as usize).zip(&self.rows) {
            for span in row {
                let x = MARGIN + u32::from(span.column) * WIDTH;
                let width = u32::from(span.columns) * WIDTH;
                let class = format!("mono {}", span.class);
                // The line stands above the room for descenders.
                let line = y + HEIGHT - 5;
                svg.text(x, line, Some(width), class.trim_end(), &span.text);
            }
        }
        Ok(svg.finish())
    }
}

/// The spans of a row. Two spaces end one: a reader's font need not have the width of another's.
fn spans(cells: &[&Cell]) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::new();
    let mut blanks = 0;
    for (column, cell) in (0..).zip(cells) {
        if cell.is_wide_continuation() {
            if let Some(span) = spans.last_mut() {
                span.columns += 1;
            }
            continue;
        }
        if !cell.has_contents() || cell.contents() == " " {
            blanks += 1;
            continue;
        }
        let class = class(cell)?;
        match spans.last_mut() {
            Some(span) if span.class == class && blanks < 2 => {
                span.text.extend((blanks == 1).then_some(' '));
                span.text.push_str(cell.contents());
                span.columns += blanks + 1;
            }
            _ => spans.push(Span {
                column,
                columns: 1,
                class,
                text: cell.contents().to_owned(),
            }),
        }
        blanks = 0;
    }
    Ok(spans)
}

/// How a character looks, in the picture's classes. Backgrounds are not drawn: no command has any.
fn class(cell: &Cell) -> Result<String> {
    let mut classes = match cell.fgcolor() {
        Color::Default => vec![],
        // The bright ones are those of the picture, which has dark ground.
        Color::Idx(number) if number < 16 => vec![COLOURS[usize::from(number % 8)]],
        other => bail!("{other:?} is none of a terminal's 16 colours: svg.rs has no class for it"),
    };
    if cell.bold() {
        classes.push("bold");
    }
    if cell.dim() && classes.is_empty() {
        classes.push("dim");
    }
    classes.retain(|class| !class.is_empty());
    Ok(classes.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(output: &str, columns: u16) -> Result<Recording> {
        Recording::of(output, NonZero::new(columns).expect("not 0"))
    }

    fn recording(output: &str, columns: u16) -> Recording {
        recorded(output, columns).expect("few rows, ordinary colours")
    }

    #[test]
    fn a_row_is_cut_where_its_look_changes() {
        let output = "t=1  \x1b[1;31mRESET\x1b[0m  a b  c\n\x1b[2mold\r\x1b[2Knew\x1b[0m\n";
        let rows = recording(output, 20).rows;
        let span = |column, columns, class: &str, text: &str| Span {
            column,
            columns,
            class: class.to_owned(),
            text: text.to_owned(),
        };
        let first = [
            span(0, 3, "", "t=1"),
            span(5, 5, "red bold", "RESET"),
            span(12, 3, "", "a b"),
            span(17, 1, "", "c"),
        ];
        assert_eq!(rows[0], first);
        assert_eq!(rows[1], [span(0, 3, "dim", "new")]);
        assert!(rows[2].is_empty());
    }

    #[test]
    fn a_recording_gives_this_picture() {
        let output = "above\nfirst\n  \x1b[32ma<b\x1b[0m & c\n\nlast\n";
        let part = recording(output, 12).part("first", "last");
        let svg = part.expect("both rows").svg("what").expect("two rows");
        let body: Vec<_> = svg.lines().skip(3).collect();
        let stretched = "lengthAdjust=\"spacingAndGlyphs\"";
        assert_eq!(
            body,
            [
                "<rect x=\"0.5\" y=\"0.5\" width=\"103\" height=\"67\" rx=\"4\" fill=\"#161b22\" \
                 stroke=\"#57606a\"/>",
                &format!(
                    "<text x=\"16\" y=\"29\" textLength=\"40\" {stretched} class=\"mono\">first</text>"
                ),
                &format!(
                    "<text x=\"32\" y=\"47\" textLength=\"24\" {stretched} class=\"mono green\">a&lt;b</text>"
                ),
                &format!(
                    "<text x=\"64\" y=\"47\" textLength=\"24\" {stretched} class=\"mono\">&amp; c</text>"
                ),
                "</svg>",
            ]
        );
    }

    #[test]
    fn what_cannot_be_drawn_is_named() {
        let error = recorded("\x1b[38;5;123mx", 10).err().expect("no class");
        assert!(error.to_string().contains("Idx(123)"), "{error}");
        let error = recording("a\n", 10).part("b", "c").err().expect("no row");
        assert!(error.to_string().contains("\"b\""), "{error}");
        let error = recorded(&"x\n".repeat(400), 10).err().expect("too long");
        assert!(error.to_string().contains("400 rows"), "{error}");
    }
}
