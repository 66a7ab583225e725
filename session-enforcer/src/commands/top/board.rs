//! The state of `top`, and the effects of keys. Pure.

use std::time::Instant;

use anyhow::Result;
use ratatui::{
    crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    widgets::TableState,
};

use crate::report::control::{Row, SortKey, Status};

/// The daemon's status and sessions at one moment.
pub(super) struct Fetched {
    pub(super) status: Status,
    pub(super) rows: Vec<Row<'static>>,
    pub(super) at: Instant,
}

/// Rates per second between the last two fetches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) opened: f64,
    pub(super) closed: f64,
    pub(super) terminated: f64,
}

/// The action that an event requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    Refresh,
    Kill(u64),
    Quit,
}

/// The displayed state.
pub(super) struct Board {
    sort: SortKey,
    filter: String,
    pub(super) is_typing: bool,
    pub(super) last: Option<Fetched>,
    pub(super) rates: Rates,
    /// The error, if the daemon does not answer.
    pub(super) error: Option<String>,
    /// The session that ended last, and the reason.
    pub(super) ended: Option<String>,
    /// The result of the user's last request.
    pub(super) message: Option<String>,
    /// The session whose reset awaits confirmation.
    pub(super) question: Option<u64>,
    /// The ID of the selected session, which stays selected while the order changes.
    selected: Option<u64>,
    pub(super) table: TableState,
}

impl Board {
    pub(super) fn new(sort: SortKey) -> Self {
        Self {
            sort,
            filter: String::new(),
            is_typing: false,
            last: None,
            rates: Rates::default(),
            error: None,
            ended: None,
            message: None,
            question: None,
            selected: None,
            table: TableState::default(),
        }
    }

    pub(super) fn sort(&self) -> SortKey {
        self.sort
    }

    pub(super) fn filter(&self) -> &str {
        &self.filter
    }

    pub(super) fn rows(&self) -> &[Row<'static>] {
        self.last.as_ref().map_or(&[], |last| &last.rows)
    }

    /// Applies a new fetch.
    pub(super) fn take(&mut self, fetched: Result<Fetched>) {
        let now = match fetched {
            Ok(now) => now,
            Err(error) => {
                self.error = Some(format!("{error:#}"));
                return;
            }
        };
        self.error = None;
        if let Some(before) = &self.last {
            self.rates = rates(before, &now);
        }
        let place = self
            .selected
            .and_then(|id| now.rows.iter().position(|row| row.id == id));
        let place = place.or(self.table.selected()).unwrap_or(0);
        self.last = Some(now);
        self.select(place);
    }

    pub(super) fn ended(&mut self, line: String) {
        self.ended = Some(line);
    }

    pub(super) fn killed(&mut self, line: String) {
        self.message = Some(line);
    }

    fn select(&mut self, place: usize) {
        let last = self.rows().len().checked_sub(1);
        let place = last.map(|last| place.min(last));
        self.selected = place
            .and_then(|place| self.rows().get(place))
            .map(|row| row.id);
        self.table.select(place);
    }

    fn select_by(&mut self, step: isize) {
        let place = self.table.selected().unwrap_or(0);
        self.select(place.saturating_add_signed(step));
    }

    /// Handles an event of the terminal.
    pub(super) fn event(&mut self, event: &Event) -> Action {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.key(*key),
            _ => Action::Nothing,
        }
    }

    fn key(&mut self, key: KeyEvent) -> Action {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Action::Quit;
        }
        if let Some(id) = self.question.take() {
            return match key.code {
                KeyCode::Char('y' | 'Y') => Action::Kill(id),
                _ => Action::Nothing,
            };
        }
        self.message = None;
        if self.is_typing {
            return self.type_filter(key.code);
        }
        match key.code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                return Action::Refresh;
            }
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Esc if !self.filter.is_empty() => {
                self.filter.clear();
                return Action::Refresh;
            }
            KeyCode::Char('k') | KeyCode::Delete => self.question = self.selected,
            KeyCode::Up => self.select_by(-1),
            KeyCode::Down => self.select_by(1),
            KeyCode::PageUp => self.select_by(-10),
            KeyCode::PageDown => self.select_by(10),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        Action::Nothing
    }

    fn type_filter(&mut self, code: KeyCode) -> Action {
        match code {
            KeyCode::Char(c) => self.filter.push(c),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            _ => return Action::Nothing,
        }
        Action::Refresh
    }
}

fn rates(before: &Fetched, now: &Fetched) -> Rates {
    let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
    // A restarted daemon counts from zero.
    let rate = |count: fn(&Status) -> u64| {
        let more = count(&now.status).saturating_sub(count(&before.status));
        if seconds > 0.0 {
            more as f64 / seconds
        } else {
            0.0
        }
    };
    Rates {
        opened: rate(|status| status.opened_total),
        closed: rate(|status| status.closed_total),
        terminated: rate(terminations),
    }
}

fn terminations(status: &Status) -> u64 {
    let counts = status.rules.iter().flat_map(|rule| &rule.terminations);
    let ended = counts.filter(|one| one.result == "reset");
    ended.map(|one| one.count).sum()
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        commands::columns::tests::row,
        report::control::{ConfigInForce, RuleStatus, TerminationCount},
    };

    pub(in crate::commands::top) fn status(opened: u64, resets: u64) -> Status {
        Status {
            version: "0.2.0".to_owned(),
            kernel: "6.1.0".to_owned(),
            pid: 7,
            started: "2026-01-01T12:00:00Z".to_owned(),
            ready: true,
            degraded: Vec::new(),
            mode: "enforce".to_owned(),
            cgroup: "/sys/fs/cgroup".to_owned(),
            attached: true,
            config: ConfigInForce {
                file: None,
                sha256: None,
                since: "2026-01-01T12:00:00Z".to_owned(),
                last_reload_successful: true,
                last_reload_error: None,
            },
            sessions: 214,
            max_sessions: 262_144,
            opened_total: opened,
            closed_total: opened / 2,
            quarantined: 0,
            audit_records: 2,
            audit_records_lost: 0,
            rules: vec![RuleStatus {
                name: "postgres".to_owned(),
                mode: "enforce".to_owned(),
                in_force: true,
                sessions: 214,
                terminations: vec![TerminationCount {
                    reason: "idle_timeout".to_owned(),
                    result: "reset".to_owned(),
                    count: resets,
                }],
            }],
        }
    }

    /// A fetch some seconds after the first.
    pub(in crate::commands::top) fn look(start: Instant, after_s: u64, ids: &[u64]) -> Fetched {
        Fetched {
            status: status(100 * after_s, 10 * after_s),
            rows: ids.iter().map(|id| row(*id)).collect(),
            at: start + Duration::from_secs(after_s),
        }
    }

    fn press(board: &mut Board, code: KeyCode) -> Action {
        board.event(&Event::Key(KeyEvent::from(code)))
    }

    fn selected(board: &Board) -> Option<u64> {
        let place = board.table.selected()?;
        Some(board.rows().get(place)?.id)
    }

    #[test]
    fn the_selected_session_stays_selected_while_others_come_and_go() {
        let start = Instant::now();
        let mut board = Board::new(SortKey::Left);
        assert_eq!(press(&mut board, KeyCode::Char('k')), Action::Nothing);
        assert_eq!(board.question, None);
        board.take(Ok(look(start, 0, &[1, 2, 3])));
        assert_eq!(selected(&board), Some(1));
        press(&mut board, KeyCode::Down);
        board.take(Ok(look(start, 1, &[9, 8, 1, 2, 3])));
        assert_eq!(selected(&board), Some(2));
        // Session 2 has ended, so the session at its position is selected.
        board.take(Ok(look(start, 2, &[9, 8, 1, 3])));
        assert_eq!(selected(&board), Some(3));
        press(&mut board, KeyCode::End);
        press(&mut board, KeyCode::PageDown);
        assert_eq!(selected(&board), Some(3));
        press(&mut board, KeyCode::Home);
        press(&mut board, KeyCode::Up);
        assert_eq!(selected(&board), Some(9));
        board.take(Ok(look(start, 3, &[])));
        assert_eq!(selected(&board), None);
    }

    #[test]
    fn a_session_is_ended_after_a_question_only() {
        let mut board = Board::new(SortKey::Left);
        board.take(Ok(look(Instant::now(), 0, &[4_711])));
        press(&mut board, KeyCode::Char('k'));
        assert_eq!(board.question, Some(4_711));
        assert_eq!(press(&mut board, KeyCode::Char('n')), Action::Nothing);
        assert_eq!(board.question, None);
        press(&mut board, KeyCode::Char('k'));
        assert_eq!(press(&mut board, KeyCode::Char('y')), Action::Kill(4_711));
        assert_eq!(press(&mut board, KeyCode::Char('y')), Action::Nothing);
    }

    #[test]
    fn letters_are_a_filter_while_one_types_and_commands_otherwise() {
        let mut board = Board::new(SortKey::Left);
        press(&mut board, KeyCode::Char('/'));
        for c in "sqk".chars() {
            assert_eq!(press(&mut board, KeyCode::Char(c)), Action::Refresh);
        }
        press(&mut board, KeyCode::Backspace);
        assert_eq!((board.filter(), board.sort()), ("sq", SortKey::Left));
        press(&mut board, KeyCode::Enter);
        assert_eq!(press(&mut board, KeyCode::Char('s')), Action::Refresh);
        assert_eq!((board.filter(), board.sort()), ("sq", SortKey::Idle));
        assert_eq!(press(&mut board, KeyCode::Esc), Action::Refresh);
        assert_eq!(board.filter(), "");
        assert_eq!(press(&mut board, KeyCode::Char('q')), Action::Quit);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        press(&mut board, KeyCode::Char('/'));
        assert_eq!(board.event(&Event::Key(control_c)), Action::Quit);
    }

    #[test]
    fn rates_are_of_the_last_two_looks_and_a_daemon_that_is_gone_is_told() {
        let start = Instant::now();
        let mut board = Board::new(SortKey::Left);
        board.take(Ok(look(start, 0, &[1])));
        assert_eq!(board.rates, Rates::default());
        board.take(Ok(look(start, 2, &[1])));
        let rates = Rates {
            opened: 100.0,
            closed: 50.0,
            terminated: 10.0,
        };
        assert_eq!(board.rates, rates);
        board.take(Err(anyhow::anyhow!("no daemon answers")));
        assert_eq!(board.error.as_deref(), Some("no daemon answers"));
        board.take(Ok(look(start, 1, &[1])));
        assert_eq!(
            (board.error.as_deref(), board.rates),
            (None, Rates::default())
        );
    }
}
