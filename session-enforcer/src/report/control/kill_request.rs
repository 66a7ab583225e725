//! Parses a request to reset sessions: its query and its body.

use std::{collections::BTreeSet, fmt};

use serde_json::Value;

use super::Selection;

/// The maximum number of session IDs in the log.
const SHOWN: usize = 100;

/// The sessions to reset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KillSelection {
    /// The filters of the request.
    pub selection: Selection,
    /// If given, only sessions with these IDs.
    pub ids: Option<BTreeSet<u64>>,
}

impl KillSelection {
    /// Parses a request. The body may be empty, or an object with `ids`, `dry_run` and the filters of the
    /// query.
    ///
    /// # Errors
    ///
    /// Fails if a part is invalid, or if there are neither filters nor IDs: no request resets all sessions.
    pub fn parse(query: &str, body: &[u8]) -> Result<Self, String> {
        let mut kill = Self {
            selection: Selection::parse(query)?,
            ids: None,
        };
        if kill.selection.first.is_some() {
            return Err("sort, limit: are not for a kill, which has no order".to_owned());
        }
        if !body.is_empty() {
            let body = serde_json::from_slice(body)
                .map_err(|error| format!("the body is not JSON: {error}"))?;
            kill.read(body)?;
        }
        if kill.ids.is_none() && kill.selection.filter.is_empty() {
            return Err(
                "name sessions by \"ids\" or by a filter; \"older_than\": \"0s\" means all"
                    .to_owned(),
            );
        }
        Ok(kill)
    }

    fn read(&mut self, body: Value) -> Result<(), String> {
        let Value::Object(fields) = body else {
            return Err("the body is not an object, such as {\"ids\": [4711]}".to_owned());
        };
        for (key, value) in fields {
            match (&*key, value) {
                ("ids", Value::Array(ids)) => {
                    let numbers = ids.iter().map(Value::as_u64);
                    let ids = numbers.collect::<Option<BTreeSet<u64>>>();
                    self.ids = Some(ids.ok_or("ids: a list of numbers is allowed")?);
                }
                ("dry_run", Value::Bool(dry_run)) => self.selection.dry_run = dry_run,
                ("dry_run", _) => return Err("dry_run: true or false is allowed".to_owned()),
                ("ids", _) => return Err("ids: a list of numbers is allowed".to_owned()),
                (key, Value::String(text)) => self.filter(key, &text)?,
                (key, Value::Number(number)) => self.filter(key, &number.to_string())?,
                (key, _) if super::FILTER_KEYS.contains(&key) => {
                    return Err(format!("{key}: a text or a number is allowed"));
                }
                (key, _) => self.filter(key, "")?,
            }
        }
        Ok(())
    }

    fn filter(&mut self, key: &str, value: &str) -> Result<(), String> {
        if self.selection.filter.add(key, value)? {
            return Ok(());
        }
        let known = super::FILTER_KEYS.join(", ");
        Err(format!(
            "{key}: there is no such key; allowed: ids, dry_run, {known}"
        ))
    }
}

impl fmt::Display for KillSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the sessions")?;
        if let Some(ids) = &self.ids {
            let shown: Vec<String> = ids.iter().take(SHOWN).map(ToString::to_string).collect();
            write!(f, " {}", shown.join(", "))?;
            if ids.len() > SHOWN {
                write!(f, " and {} more", ids.len() - SHOWN)?;
            }
        }
        let filter = &self.selection.filter;
        if !filter.is_empty() {
            write!(f, " with {filter}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_prints_as_plain_words() {
        for (query, body, words) in [
            ("", "{\"ids\":[4712,4711]}", "the sessions 4711, 4712"),
            (
                "rule=ssh&older_than=90s",
                "",
                "the sessions with rule=ssh, older_than=1m30s",
            ),
            (
                "text=a%1bb&user=root",
                "{\"ids\":[7]}",
                "the sessions 7 with user=root, text=a\\u{1b}b",
            ),
        ] {
            let kill = KillSelection::parse(query, body.as_bytes()).unwrap();
            assert_eq!(kill.to_string(), words);
        }
        let ids: Vec<u64> = (0..102).collect();
        let kill =
            KillSelection::parse("", serde_json::json!({ "ids": ids }).to_string().as_bytes());
        assert!(kill.unwrap().to_string().ends_with(", 99 and 2 more"));
    }

    #[test]
    fn ids_filters_or_both_are_a_selection() {
        let ids = KillSelection::parse("", b"{\"ids\":[7,3,7]}").unwrap();
        assert_eq!(ids.ids, Some(BTreeSet::from([3, 7])));
        assert!(ids.selection.filter.is_empty() && !ids.selection.dry_run);
        let filters = KillSelection::parse("rule=ssh&dry_run=true", b"").unwrap();
        assert_eq!(
            (filters.selection.filter.rule(), filters.ids),
            (Some("ssh"), None)
        );
        assert!(filters.selection.dry_run);
        let body = b"{\"ids\":[1],\"rule\":\"ssh\",\"local_port\":22,\"dry_run\":true}";
        let both = KillSelection::parse("", body).unwrap();
        let query = Selection::parse("rule=ssh&local_port=22&dry_run=true").unwrap();
        assert_eq!(
            (both.selection, both.ids),
            (query, Some(BTreeSet::from([1])))
        );
    }

    #[test]
    fn an_empty_or_invalid_selection_is_refused() {
        for (query, body, message) in [
            ("", "", "name sessions"),
            ("dry_run=true", "{}", "name sessions"),
            ("", "[1]", "the body is not an object"),
            ("", "{", "the body is not JSON"),
            ("", "{\"ids\":[-1]}", "ids: "),
            ("", "{\"ids\":1}", "ids: a list of numbers"),
            ("", "{\"id\":[1]}", "id: there is no such key"),
            ("", "{\"rule\":[1]}", "rule: a text or a number"),
            ("text=", "", "text: at least one character"),
            ("rule=a", "{\"rule\":\"b\"}", "rule: is given twice"),
            ("", "{\"ids\":[1],\"rulez\":\"a\"}", "rulez: "),
            ("", "{\"ids\":[1],\"dry_run\":\"yes\"}", "dry_run: true or"),
            ("rule=a&limit=1", "", "sort, limit: "),
        ] {
            let error = KillSelection::parse(query, body.as_bytes()).unwrap_err();
            assert!(error.starts_with(message), "{query} {body}: {error}");
        }
    }
}
