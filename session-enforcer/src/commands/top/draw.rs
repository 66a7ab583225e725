//! Draws `top`. Pure: from the state to terminal cells.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Paragraph, Row, Table},
};

use super::board::Board;
use crate::{
    commands::columns::{fit, printable},
    report::control::Status,
};

/// Sessions with less time left than this are highlighted.
const SOON_S: f64 = 60.0;
const VERY_SOON_S: f64 = 10.0;

const KEYS: &str = "up/down select  k reset  / filter  s sort  q quit";

pub(super) fn draw(frame: &mut Frame<'_>, board: &mut Board, colour: bool) {
    let parts = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(1),
    ];
    let [head, totals, ended, filter, sessions, foot] = Layout::vertical(parts).areas(frame.area());
    let paint = Paint { colour };
    frame.render_widget(head_line(board, paint), head);
    frame.render_widget(totals_line(board), totals);
    let last = board
        .ended
        .as_deref()
        .unwrap_or("no session was reset since top started");
    frame.render_widget(Line::from(format!("last: {}", printable(last))), ended);
    frame.render_widget(filter_line(board, paint), filter);
    let table = table(board, usize::from(sessions.width), paint);
    frame.render_stateful_widget(table, sessions, &mut board.table);
    frame.render_widget(Paragraph::new(foot_line(board, paint)), foot);
}

/// Styles with or without colours.
#[derive(Clone, Copy)]
struct Paint {
    colour: bool,
}

impl Paint {
    fn bold() -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// Bold replaces the colour if colours are off.
    fn coloured(self, colour: Color) -> Style {
        if self.colour {
            Style::new().fg(colour)
        } else {
            Self::bold()
        }
    }
}

fn head_line(board: &Board, paint: Paint) -> Line<'static> {
    let Some(last) = &board.last else {
        return Line::from("session-enforcer");
    };
    let status = &last.status;
    let what = match (&board.error, status.degraded.first()) {
        (Some(error), _) => Span::styled(printable(error), paint.coloured(Color::Red)),
        (None, Some(first)) => {
            let text = format!("not ready: {}", printable(&first.what));
            Span::styled(text, paint.coloured(Color::Red))
        }
        (None, None) => Span::styled("ready", paint.coloured(Color::Green)),
    };
    let name = format!("session-enforcer {}  {}  ", status.version, status.mode);
    Line::from(vec![Span::styled(name, Paint::bold()), what])
}

fn totals_line(board: &Board) -> Line<'static> {
    let Some(last) = &board.last else {
        return Line::default();
    };
    let Status {
        sessions,
        max_sessions,
        quarantined,
        ..
    } = last.status;
    let rates = board.rates;
    let hangs = match quarantined {
        0 => String::new(),
        count => format!("  {count} resets hang"),
    };
    Line::from(format!(
        "{sessions} of {max_sessions} sessions  opened {:.1}/s  closed {:.1}/s  reset {:.1}/s{hangs}",
        rates.opened, rates.closed, rates.terminated
    ))
}

fn filter_line(board: &Board, paint: Paint) -> Line<'static> {
    let sort = format!("sorted by {}", board.sort().name());
    if board.filter().is_empty() && !board.is_typing {
        return Line::from(sort);
    }
    let cursor = if board.is_typing { "_" } else { "" };
    let filter = format!("{}{cursor}", printable(board.filter()));
    Line::from(vec![
        Span::from(format!("{sort}  filter: ")),
        Span::styled(filter, paint.coloured(Color::Cyan)),
    ])
}

fn foot_line(board: &Board, paint: Paint) -> Line<'static> {
    if let Some(id) = board.question {
        let row = board.rows().iter().find(|row| row.id == id);
        let what = row.map_or_else(String::new, |row| {
            format!(" of {} with {}", row.rule, row.remote)
        });
        let text = format!("Reset session {id}{what}? [y/N]");
        return Line::styled(
            text,
            paint.coloured(Color::Yellow).add_modifier(Modifier::BOLD),
        );
    }
    match &board.message {
        Some(message) => Line::styled(printable(message), Paint::bold()),
        None => Line::from(KEYS),
    }
}

fn table(board: &Board, width: usize, paint: Paint) -> Table<'static> {
    let rows = board.rows();
    let fitted = fit(rows, width);
    let aligned = |text: String, is_number: bool| {
        let alignment = if is_number {
            Alignment::Right
        } else {
            Alignment::Left
        };
        Line::from(text).alignment(alignment)
    };
    let title =
        |(title, is_number): (&&'static str, &bool)| aligned((*title).to_owned(), *is_number);
    let titles = fitted.titles.iter().zip(&fitted.is_number).map(title);
    let lines = rows.iter().zip(fitted.rows).map(|(row, cells)| {
        let cells = cells.into_iter().zip(&fitted.is_number);
        let line = Row::new(cells.map(|(cell, is_number)| aligned(cell, *is_number)));
        match row.left_seconds {
            Some(left) if left < VERY_SOON_S => line.style(paint.coloured(Color::Red)),
            Some(left) if left < SOON_S && paint.colour => {
                line.style(paint.coloured(Color::Yellow))
            }
            _ => line,
        }
    });
    let widths = fitted
        .widths
        .iter()
        .map(|width| Constraint::Length(u16::try_from(*width).unwrap_or(u16::MAX)));
    Table::new(lines, widths)
        .header(Row::new(titles).style(Paint::bold()))
        .column_spacing(2)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::{
        Terminal,
        backend::TestBackend,
        buffer::Cell,
        crossterm::event::{Event, KeyCode, KeyEvent},
    };

    use super::{super::board::tests::look, *};
    use crate::report::control::{Degradation, SortKey};

    fn board() -> Board {
        let start = Instant::now();
        let mut board = Board::new(SortKey::Left);
        board.take(Ok(look(start, 0, &[7, 4_711])));
        board.take(Ok(look(start, 2, &[7, 4_711])));
        board.ended("12:00:00  session-terminated  postgres  idle_timeout".to_owned());
        board
    }

    /// The lines of a terminal of this size, and which cells are coloured or reversed.
    fn drawn(
        board: &mut Board,
        width: u16,
        height: u16,
        colour: bool,
    ) -> (Vec<String>, usize, usize) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, board, colour)).unwrap();
        let buffer = terminal.backend().buffer();
        let cells = || buffer.content.iter();
        let lines = buffer.content.chunks(usize::from(width));
        let lines = lines.map(|line| line.iter().map(Cell::symbol).collect::<String>());
        let coloured = cells().filter(|cell| cell.fg != Color::Reset).count();
        let reversed = cells()
            .filter(|cell| cell.modifier.contains(Modifier::REVERSED))
            .count();
        let lines = lines.map(|line| line.trim_end().to_owned()).collect();
        (lines, coloured, reversed)
    }

    fn press(board: &mut Board, code: KeyCode) {
        board.event(&Event::Key(KeyEvent::from(code)));
    }

    #[test]
    fn eighty_columns_and_twenty_four_lines_are_enough() {
        let (lines, coloured, reversed) = drawn(&mut board(), 80, 24, true);
        assert_eq!(
            lines[..7],
            [
                "session-enforcer 0.2.0  enforce  ready",
                "214 of 262144 sessions  opened 100.0/s  closed 50.0/s  reset 10.0/s",
                "last: 12:00:00  session-terminated  postgres  idle_timeout",
                "sorted by left",
                "  ID  RULE      LOCAL          REMOTE            AGE   IDLE    LEFT",
                "   7  postgres  10.0.0.5:5432  10.0.0.7:51234  1h06m  1m01s  13m59s",
                "4711  postgres  10.0.0.5:5432  10.0.0.7:51234  1h06m  1m01s  13m59s",
            ]
        );
        assert_eq!(lines[23], KEYS);
        assert!(coloured > 0 && reversed == 80, "{coloured} {reversed}");
    }

    #[test]
    fn without_colours_the_selection_is_still_seen() {
        let mut board = board();
        let (_, coloured, reversed) = drawn(&mut board, 80, 24, false);
        assert_eq!((coloured, reversed), (0, 80));
    }

    #[test]
    fn the_question_the_answer_and_the_filter_have_their_places() {
        let mut board = board();
        press(&mut board, KeyCode::Down);
        press(&mut board, KeyCode::Char('k'));
        let (lines, ..) = drawn(&mut board, 80, 24, true);
        let question = "Reset session 4711 of postgres with 10.0.0.7:51234? [y/N]";
        assert_eq!(lines[23], question);
        press(&mut board, KeyCode::Char('y'));
        board.killed("session 4711: reset".to_owned());
        assert_eq!(drawn(&mut board, 80, 24, true).0[23], "session 4711: reset");
        press(&mut board, KeyCode::Char('/'));
        press(&mut board, KeyCode::Char('p'));
        let (lines, ..) = drawn(&mut board, 80, 24, true);
        assert_eq!(
            (&*lines[3], &*lines[23]),
            ("sorted by left  filter: p_", KEYS)
        );
    }

    #[test]
    fn top_shows_the_degraded_cause_first() {
        let mut board = board();
        let mut look = look(Instant::now(), 3, &[]);
        look.status.ready = false;
        look.status.degraded.push(Degradation {
            cause: "audit".to_owned(),
            what: "audit records are lost".to_owned(),
        });
        board.take(Ok(look));
        let first = |board: &mut Board| drawn(board, 80, 24, true).0[0].clone();
        assert!(first(&mut board).ends_with("not ready: audit records are lost"));
        board.take(Err(anyhow::anyhow!("no daemon answers\x1b[2J")));
        assert!(first(&mut board).ends_with("no daemon answers?[2J"));
    }

    #[test]
    fn every_size_can_be_drawn() {
        let mut empty = Board::new(SortKey::Left);
        for (width, height) in [(1, 1), (10, 3), (40, 10), (80, 24), (300, 80)] {
            drawn(&mut empty, width, height, true);
            let (lines, ..) = drawn(&mut board(), width, height, true);
            assert_eq!(lines.len(), usize::from(height));
        }
        // A wider terminal shows more columns.
        assert!(drawn(&mut board(), 200, 24, true).0[4].contains("OWNER"));
    }
}
