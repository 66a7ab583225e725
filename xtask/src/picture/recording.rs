//! Renders a program's terminal output as the terminal would show it, and draws it.

use std::num::NonZero;

use anyhow::{Context as _, Result, bail, ensure};
use vt100::{Cell, Color, Parser};

use super::svg::Svg;

/// The number of terminal rows. It exceeds the output, so that nothing scrolls away.
const ROWS: NonZero<u16> = NonZero::new(400).expect("not 0");

/// Sizes in pixels: a character, and the margin.
const WIDTH: u32 = 8;
const HEIGHT: u32 = 18;
const MARGIN: u32 = 16;

/// The names of the first eight colours by number.
const COLOURS: [&str; 8] = [
    "dim", "red", "green", "yellow", "blue", "magenta", "cyan", "",
];

/// The content of a terminal, row by row.
pub(super) struct Recording {
    rows: Vec<Vec<Span>>,
}

/// Adjacent characters of the same style.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    column: u16,
    columns: u16,
    /// One or more CSS classes of the picture.
    class: String,
    text: String,
}

impl Recording {
    /// Renders a program's output on a terminal of this width.
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

    /// The rows from the one that starts with `from` up to, but without, the one that starts with `to`.
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
                // Leave room for descenders below the baseline.
                let line = y + HEIGHT - 5;
                svg.text(x, line, Some(width), class.trim_end(), &span.text);
            }
        }
        Ok(svg.finish())
    }
}

/// Splits a row into spans of one style. Two spaces also end a span, because the reader's font may have
/// another width.
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

/// The CSS classes of a character. Backgrounds are not drawn, because no command uses them.
fn class(cell: &Cell) -> Result<String> {
    let mut classes = match cell.fgcolor() {
        Color::Default => vec![],
        // Bright colours are drawn like the normal ones, because the picture has a dark background.
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
    fn a_recording_that_cannot_be_drawn_is_refused_with_the_reason() {
        let error = recorded("\x1b[38;5;123mx", 10).err().expect("no class");
        assert!(error.to_string().contains("Idx(123)"), "{error}");
        let error = recording("a\n", 10).part("b", "c").err().expect("no row");
        assert!(error.to_string().contains("\"b\""), "{error}");
        let error = recorded(&"x\n".repeat(400), 10).err().expect("too long");
        assert!(error.to_string().contains("400 rows"), "{error}");
    }
}
