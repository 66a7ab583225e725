//! Walks the tables of the text and knows the position and the key of each value, so that every error names
//! both.

use std::cell::RefCell;
use std::path::Path;

use session_enforcer_common::MAX_MATCH_ENTRIES;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Location, Position, quoted};
use super::{ConfigError, Problem};

/// The text of a configuration, its file name, and the errors found so far.
pub(super) struct Document<'a> {
    file: &'a Path,
    text: &'a str,
    /// In the order of their discovery.
    errors: RefCell<Vec<ConfigError>>,
}

impl<'a> Document<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        let errors = RefCell::default();
        Self { file, text, errors }
    }

    /// Parses the text into tables. `None` if it is not TOML: the parser's reading of the rest of an invalid
    /// text could only mislead.
    pub(super) fn tables(&self) -> Option<DeTable<'a>> {
        let (parsed, errors) = DeTable::parse_recoverable(self.text);
        let errors: Vec<_> = errors.iter().map(|error| self.syntax(error)).collect();
        if errors.is_empty() {
            return Some(parsed.into_inner());
        }
        self.errors.borrow_mut().extend(errors);
        None
    }

    /// Returns the value, or notes the error and returns `None`, so that reading continues.
    pub(super) fn keep<T>(&self, read: Result<T, ConfigError>) -> Option<T> {
        read.map_err(|error| self.errors.borrow_mut().push(error))
            .ok()
    }

    /// The number of errors found so far.
    pub(super) fn error_count(&self) -> usize {
        self.errors.borrow().len()
    }

    /// All errors, in the order of the text.
    pub(super) fn into_errors(self) -> Vec<ConfigError> {
        let mut errors = self.errors.into_inner();
        let place = |error: &ConfigError| {
            let at = error.location.position;
            // Errors about the whole file come last.
            (at.is_none(), at.map(|at| (at.line, at.column)))
        };
        errors.sort_by_key(place);
        errors
    }

    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let span = error.span().unwrap_or_default();
        let text = self.text.get(span.clone()).unwrap_or_default();
        // The parser's message is one of these two words or a sentence. Only the wording depends on it.
        if error.message() == "duplicate key" {
            let problem = match text {
                "rule" => Problem::SingleRule,
                _ => Problem::DuplicateKey,
            };
            return self.error(Some(span.start), Some(text.to_owned()), problem);
        }
        let rest = self.text.get(span.start..).unwrap_or_default();
        let line = rest.lines().next().unwrap_or_default().trim();
        let found = match (text.is_empty(), line.is_empty()) {
            (false, _) => quoted(text),
            (true, false) => quoted(line),
            (true, true) => "the end of the line".to_owned(),
        };
        let message = error.message().to_owned();
        self.error(Some(span.start), None, Problem::Syntax { message, found })
    }

    /// Creates an error at this byte of the text.
    pub(super) fn error(
        &self,
        offset: Option<usize>,
        key: Option<String>,
        problem: Problem,
    ) -> ConfigError {
        let location = self.location(offset, key);
        ConfigError { location, problem }
    }

    /// The location of this byte of the text.
    pub(super) fn location(&self, offset: Option<usize>, key: Option<String>) -> Location {
        Location {
            file: self.file.to_owned(),
            position: offset.map(|offset| position(self.text.as_bytes(), offset)),
            key,
        }
    }
}

/// The line and column of a byte of the text, which must be valid UTF-8 up to there.
pub(super) fn position(text: &[u8], offset: usize) -> Position {
    let before = &text[..offset.min(text.len())];
    let newlines = before.iter().filter(|b| **b == b'\n').count();
    let line_start = before
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |n| n + 1);
    let line = String::from_utf8_lossy(&before[line_start..]);
    let from_one = |count: usize| u32::try_from(count + 1).unwrap_or(u32::MAX);
    Position {
        line: from_one(newlines),
        column: from_one(line.chars().count()),
    }
}

/// The keys of one table.
pub(super) struct Keys {
    /// The table's header.
    pub(super) header: &'static str,
    /// Its keys.
    pub(super) known: &'static [&'static str],
}

impl Keys {
    /// The problem with a key of this table, if any. `others` are the other tables.
    fn problem(&self, key: &str, others: &'static [Self]) -> Option<Problem> {
        if self.known.contains(&key) {
            return None;
        }
        let elsewhere = others.iter().find(|other| other.known.contains(&key));
        Some(match elsewhere {
            Some(other) => Problem::MisplacedKey {
                under: other.header,
            },
            None => Problem::UnknownKey {
                nearest: nearest(key, self.known),
                known: self.known,
            },
        })
    }
}

/// The known key that this one probably misspells.
fn nearest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    let distances = known.iter().map(|name| (distance(key, name), *name));
    let (edits, name) = distances.min_by_key(|(edits, _)| *edits)?;
    (edits <= 2 && edits <= name.len() / 2).then_some(name)
}

/// The number of characters to insert, remove or replace to turn one text into the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

/// One table of the document.
pub(super) struct Section<'a> {
    pub(super) document: &'a Document<'a>,
    /// The prefix of key names in messages: empty, or for example `daemon.` or `rule "x": `.
    pub(super) label: String,
    pub(super) table: &'a DeTable<'a>,
    /// The start of the table.
    pub(super) offset: usize,
}

impl<'a> Section<'a> {
    /// Reports each key that does not belong to this table.
    pub(super) fn check_keys(&self, keys: &Keys, others: &'static [Keys]) {
        for key in self.table.keys() {
            if let Some(problem) = keys.problem(key.get_ref(), others) {
                let name = Some(format!("{}{}", self.label, key.get_ref()));
                let start = Some(key.span().start);
                self.keep::<()>(Err(self.document.error(start, name, problem)));
            }
        }
    }

    /// Calls [`Document::keep`].
    pub(super) fn keep<T>(&self, read: Result<T, ConfigError>) -> Option<T> {
        self.document.keep(read)
    }

    /// The value of a key as `read` parses it, if it is present and valid.
    pub(super) fn read<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Field<'a>) -> Result<T, ConfigError>,
    ) -> Option<T> {
        self.field(name).and_then(|field| self.keep(read(&field)))
    }

    /// Whether the key is present, valid or not.
    pub(super) fn has(&self, name: &str) -> bool {
        self.table.contains_key(name)
    }

    /// The value of a key, if it is present.
    pub(super) fn field(&self, name: &str) -> Option<Field<'a>> {
        let value = self.table.get(name)?;
        let key = format!("{}{name}", self.label);
        Some(Field::new(self.document, key, value))
    }

    /// Creates an error about the whole table.
    pub(super) fn error(&self, problem: Problem) -> ConfigError {
        let label = self.label.trim_end_matches([':', '.', ' ']).to_owned();
        self.document.error(Some(self.offset), Some(label), problem)
    }
}

/// One value of the document, and its key.
pub(super) struct Field<'a> {
    pub(super) document: &'a Document<'a>,
    pub(super) key: String,
    pub(super) offset: usize,
    /// The value's source text.
    written: &'a str,
    value: &'a DeValue<'a>,
}

impl<'a> Field<'a> {
    fn new(document: &'a Document<'a>, key: String, value: &'a Spanned<DeValue<'a>>) -> Self {
        Self {
            document,
            key,
            offset: value.span().start,
            written: document.text.get(value.span()).unwrap_or_default(),
            value: value.get_ref(),
        }
    }

    /// Creates an error about this value.
    pub(super) fn error(&self, problem: Problem) -> ConfigError {
        ConfigError {
            location: self.location(),
            problem,
        }
    }

    /// The location of this value.
    pub(super) fn location(&self) -> Location {
        self.document
            .location(Some(self.offset), Some(self.key.clone()))
    }

    /// Creates the error that the value is not allowed.
    pub(super) fn not_allowed(&self, allowed: &'static str) -> ConfigError {
        let found = describe(self.value);
        self.error(Problem::NotAllowed { found, allowed })
    }

    /// The line of the value.
    pub(super) fn line(&self) -> u32 {
        position(self.document.text.as_bytes(), self.offset).line
    }

    /// The value as text.
    pub(super) fn text(&self, allowed: &'static str) -> Result<&'a str, ConfigError> {
        self.value.as_str().ok_or_else(|| self.not_allowed(allowed))
    }

    /// Refuses a path in double quotes that contains an escape such as `\x2d`. TOML 1.1 decodes it, but
    /// systemd's unit names contain it literally.
    pub(super) fn check_path_is_literal(&self) -> Result<(), ConfigError> {
        if has_byte_escape(self.written) {
            return Err(self.error(Problem::ByteEscape));
        }
        Ok(())
    }

    /// The value as an integer, if it is one. `i128::MAX` if it is too large.
    pub(super) fn integer(&self) -> Option<i128> {
        let integer = self.value.as_integer()?;
        Some(i128::from_str_radix(integer.as_str(), integer.radix()).unwrap_or(i128::MAX))
    }

    /// The value as a boolean.
    pub(super) fn truth(&self) -> Result<bool, ConfigError> {
        let truth = self.value.as_bool();
        truth.ok_or_else(|| self.not_allowed("true or false"))
    }

    /// The value as text that `parse` accepts.
    pub(super) fn parse<T>(
        &self,
        allowed: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Problem>,
    ) -> Result<T, ConfigError> {
        parse(self.text(allowed)?).map_err(|problem| self.error(problem))
    }

    /// The value as one of these texts.
    pub(super) fn choice<T: Copy>(
        &self,
        allowed: &'static str,
        choices: &[(&str, T)],
    ) -> Result<T, ConfigError> {
        let text = self.text(allowed)?;
        let choice = choices.iter().find(|(name, _)| *name == text);
        choice
            .map(|(_, value)| *value)
            .ok_or_else(|| self.not_allowed(allowed))
    }

    /// The elements of the value, which must be a list. Each gets the list's key.
    pub(super) fn elements(&self, allowed: &'static str) -> Result<Vec<Self>, ConfigError> {
        let array = self
            .value
            .as_array()
            .ok_or_else(|| self.not_allowed(allowed))?;
        let found = array.len();
        if found > MAX_MATCH_ENTRIES as usize {
            return Err(self.error(Problem::LongList { found }));
        }
        let element = |value| Self::new(self.document, self.key.clone(), value);
        Ok(array.iter().map(element).collect())
    }

    /// The value as a table. The label prefixes its keys.
    pub(super) fn section(
        &self,
        label: String,
        allowed: &'static str,
    ) -> Result<Section<'a>, ConfigError> {
        let table = self
            .value
            .as_table()
            .ok_or_else(|| self.not_allowed(allowed))?;
        Ok(Section {
            document: self.document,
            label,
            table,
            offset: self.offset,
        })
    }
}

/// Whether text in double quotes contains an escape of two hexadecimal digits.
fn has_byte_escape(written: &str) -> bool {
    let mut chars = written.chars();
    if chars.next() != Some('"') {
        return false;
    }
    while let Some(c) = chars.next() {
        if c == '\\' && chars.next() == Some('x') {
            return true;
        }
    }
    false
}

fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quoted(text),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(truth) => truth.to_string(),
        DeValue::Datetime(date) => format!("the date {date}"),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}
