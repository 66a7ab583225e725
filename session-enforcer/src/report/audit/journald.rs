//! Writes audit records to systemd's journal through its native protocol, one entry for each record.
//!
//! An entry has the record's fields under names of its own, so that journalctl(1) can match each of them, and
//! a message in plain English. `packaging/session-enforcer.catalog` explains each kind of entry.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixDatagram,
};

use libsystemd::logging::{self, Priority};
use serde_json::Value;

use super::sink::Sink;

/// The socket on which journald receives entries.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// The prefix of each field name. journald allows names of 64 bytes.
const PREFIX: &str = "SESSION_ENFORCER_";

const IDENTIFIER: &str = "session-enforcer";

/// The journal's properties of a kind of record.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// The value of `event.action`.
    action: &'static str,
    /// The value of `event.reason`, if it distinguishes the kind.
    reason: Option<&'static str>,
    /// The message ID, which names the entry's explanation in the catalogue.
    message_id: &'static str,
    priority: Priority,
}

const fn kind(action: &'static str, message_id: &'static str, priority: Priority) -> Kind {
    Kind {
        action,
        reason: None,
        message_id,
        priority,
    }
}

const fn kind_of_reason(reason: &'static str, kind: Kind) -> Kind {
    Kind {
        reason: Some(reason),
        ..kind
    }
}

/// A record has the first kind that fits.
const KINDS: [Kind; 7] = [
    kind_of_reason(
        "admin",
        kind(
            "session-terminated",
            "e09c16c04e2e4e329c95112d5a7957e7",
            Priority::Notice,
        ),
    ),
    kind(
        "session-terminated",
        "017b46323ed34cb1954f2badf2abb0b6",
        Priority::Notice,
    ),
    kind(
        "session-would-terminate",
        "606e2356a2334ba7b890d55e44e68ae7",
        Priority::Info,
    ),
    kind(
        "session-termination-failed",
        "6c67c70568f7421eab10f0cc253d8416",
        Priority::Warning,
    ),
    kind(
        "policy-loaded",
        "d371a5e019594dd896a1b262ef3952d6",
        Priority::Info,
    ),
    kind(
        "enforcer-started",
        "3e5d0308e9834d00a8002b6ea273abf0",
        Priority::Info,
    ),
    kind(
        "enforcer-stopped",
        "f1ca5fd74b674beb99cf71fe440b4f26",
        Priority::Info,
    ),
];

impl Kind {
    fn fits(&self, record: &Value) -> bool {
        let reason = text(record, "/event/reason");
        text(record, "/event/action") == self.action && self.reason.is_none_or(|it| it == reason)
    }
}

/// Checks that journald accepts connections on its socket.
pub(super) fn check() -> io::Result<()> {
    UnixDatagram::unbound()?.connect(SOCKET)
}

/// The journal as a sink. Each write must contain whole records.
pub(super) struct Journald;

impl Write for Journald {
    /// Sends the first of the records. Blocks while journald does not read.
    fn write(&mut self, records: &[u8]) -> io::Result<usize> {
        let end = records.iter().position(|byte| *byte == b'\n');
        let end = end.map_or(records.len(), |end| end + 1);
        let (record, _) = records.split_at(end);
        let entry = Entry::of(&serde_json::from_slice(record)?);
        entry.send()?;
        Ok(end)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Journald {
    /// journald does not report when entries are on the disk. `audit.sync` with the journal is refused
    /// earlier.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A journal entry.
#[derive(Debug)]
struct Entry {
    priority: Priority,
    message: String,
    fields: Vec<(String, String)>,
}

impl Entry {
    fn of(record: &Value) -> Self {
        let kind = KINDS.iter().find(|kind| kind.fits(record));
        let mut fields = vec![("SYSLOG_IDENTIFIER".to_owned(), IDENTIFIER.to_owned())];
        fields.extend(kind.map(|kind| ("MESSAGE_ID".to_owned(), kind.message_id.to_owned())));
        flatten("", record, &mut fields);
        Self {
            priority: kind.map_or(Priority::Info, |kind| kind.priority),
            message: message(record),
            fields,
        }
    }

    fn send(&self) -> io::Result<()> {
        let fields = self.fields.iter().map(|(name, value)| (name, value));
        let sent = logging::journal_send(self.priority, &self.message, fields);
        sent.map_err(io::Error::other)
    }
}

/// Adds the values of an object, each under its path in capitals: `source.ip` becomes
/// `SESSION_ENFORCER_SOURCE_IP`.
fn flatten(path: &str, value: &Value, fields: &mut Vec<(String, String)>) {
    if let Value::Object(object) = value {
        for (key, value) in object {
            flatten(&below(path, key), value, fields);
        }
        return;
    }
    let name = format!("{PREFIX}{path}");
    fields.push((name, plain(value)));
}

/// The field path of a key in an object. The object `session_enforcer` adds no name to it, and a rule's
/// `name` becomes the rule.
fn below(path: &str, key: &str) -> String {
    let key = key.trim_start_matches('@').to_ascii_uppercase();
    match (path, key.as_str()) {
        ("", "SESSION_ENFORCER") => String::new(),
        ("", _) => key,
        ("RULE", "NAME") => path.to_owned(),
        _ => format!("{path}_{key}"),
    }
}

/// The value without quotes. A list is one value, because journald limits the number of fields.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// The message of a record.
fn message(record: &Value) -> String {
    let action = text(record, "/event/action");
    match action {
        "enforcer-started" => "The enforcement begins".to_owned(),
        "enforcer-stopped" => "The enforcement ends".to_owned(),
        "policy-loaded" => {
            let rules = record.pointer("/session_enforcer/rules");
            let count = rules.and_then(Value::as_array).map_or(0, Vec::len);
            let mode = text(record, "/session_enforcer/mode");
            format!("{count} rule(s) in force, mode {mode}")
        }
        _ => termination(action, record),
    }
}

fn termination(action: &str, record: &Value) -> String {
    let what = match (action, text(record, "/session_enforcer/result")) {
        ("session-terminated", "gone") => "had closed by itself".to_owned(),
        ("session-terminated", _) => "was reset".to_owned(),
        ("session-would-terminate", _) => "would be reset".to_owned(),
        ("session-termination-failed", _) => {
            format!("cannot be reset ({})", text(record, "/error/message"))
        }
        _ => action.to_owned(),
    };
    let (source, destination) = (end(record, "source"), end(record, "destination"));
    let rule = text(record, "/rule/name");
    let why = match text(record, "/event/reason") {
        "admin" => {
            let user = text(record, "/session_enforcer/requested_by/user");
            format!("asked for by {user}, rule {rule}")
        }
        reason => format!("{reason} of rule {rule}"),
    };
    format!("{source} -> {destination} {what}: {why}")
}

/// An endpoint of the connection in the format of `ss`.
fn end(record: &Value, which: &str) -> String {
    let ip = text(record, &format!("/{which}/ip")).parse::<IpAddr>();
    let port = record.pointer(&format!("/{which}/port"));
    let port = port.and_then(Value::as_u64).map(u16::try_from);
    match (ip, port) {
        (Ok(ip), Some(Ok(port))) => SocketAddr::new(ip, port).to_string(),
        _ => "?".to_owned(),
    }
}

fn text<'a>(record: &'a Value, pointer: &str) -> &'a str {
    let value = record.pointer(pointer);
    value.and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use session_enforcer_common::Reason;

    use super::*;
    use crate::{
        config::Mode,
        host::clock::WallClock,
        report::audit::{
            End, RecordId, RequestedBy, Requester, Termination, record,
            tests::{session, termination},
        },
    };

    const CATALOGUE: &str = include_str!("../../../packaging/session-enforcer.catalog");
    const CLOCK: WallClock = WallClock::pair(1_767_268_800_000_000_000, 901_004_000_000);
    const RECORD_ID: RecordId<'_> = RecordId {
        boot: "b007",
        run_ns: 255,
        sequence: 7,
    };

    fn entry(write: impl FnOnce(&mut Vec<u8>)) -> Entry {
        let mut line = Vec::new();
        write(&mut line);
        Entry::of(&serde_json::from_slice(&line).unwrap())
    }

    fn entry_of(termination: &Termination<'_>) -> Entry {
        entry(|out| termination.write_json(&RECORD_ID, &CLOCK, out))
    }

    /// One entry of each kind.
    fn each() -> Vec<Entry> {
        let session = session();
        let ended = |end| Termination {
            end,
            ..termination(&session)
        };
        let rules = ["a".to_owned(), "b".to_owned()];
        let requester = Requester {
            uid: 1000,
            pid: 12,
            command: "curl".to_owned(),
        };
        let own =
            |action, kind| entry(|out| record::lifecycle(action, kind, &RECORD_ID, &CLOCK, out));
        vec![
            entry_of(&termination(&session)),
            entry_of(&ended(End::Gone)),
            entry_of(&ended(End::Observed)),
            entry_of(&ended(End::Failed("EPERM"))),
            own("enforcer-started", "start"),
            entry(|out| record::policy(Mode::Enforce, &rules, None, &RECORD_ID, &CLOCK, out)),
            own("enforcer-stopped", "end"),
            entry_of(&Termination {
                reason: Reason::Admin,
                limit: None,
                requested_by: Some(RequestedBy {
                    requester: &requester,
                    user: Some("mia"),
                }),
                ..termination(&session)
            }),
        ]
    }

    #[test]
    fn a_termination_is_this_entry() {
        let entry = entry_of(&termination(&session()));
        assert_eq!(
            entry.message,
            "10.0.0.7:51234 -> 10.0.0.5:5432 was reset: idle_timeout of rule postgres"
        );
        let fields: BTreeMap<&str, &str> = entry
            .fields
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        assert_eq!(fields.len(), entry.fields.len(), "{entry:?}");
        for (name, value) in [
            ("SYSLOG_IDENTIFIER", "session-enforcer"),
            ("MESSAGE_ID", "017b46323ed34cb1954f2badf2abb0b6"),
            (
                "SESSION_ENFORCER_TIMESTAMP",
                "2026-01-01T12:00:00.000000000Z",
            ),
            ("SESSION_ENFORCER_EVENT_CATEGORY", "network"),
            ("SESSION_ENFORCER_EVENT_ID", "b007-1267-3b9aca00-0"),
            ("SESSION_ENFORCER_EVENT_REASON", "idle_timeout"),
            ("SESSION_ENFORCER_RULE", "postgres"),
            ("SESSION_ENFORCER_SOURCE_IP", "10.0.0.7"),
            ("SESSION_ENFORCER_SOURCE_PORT", "51234"),
            ("SESSION_ENFORCER_USER_ID", "113"),
            ("SESSION_ENFORCER_ID", "4711"),
            ("SESSION_ENFORCER_IDLE_SECONDS", "900.001"),
            ("SESSION_ENFORCER_LIMIT_SECONDS", "900.0"),
            ("SESSION_ENFORCER_QUEUED_BYTES_SEND", "11"),
        ] {
            assert_eq!(fields.get(name), Some(&value), "{name} in {fields:#?}");
        }
    }

    #[test]
    fn each_kind_says_what_happened() {
        let messages: Vec<String> = each().into_iter().map(|entry| entry.message).collect();
        let ends = "10.0.0.7:51234 -> 10.0.0.5:5432";
        let why = "idle_timeout of rule postgres";
        assert_eq!(
            messages,
            [
                format!("{ends} was reset: {why}"),
                format!("{ends} had closed by itself: {why}"),
                format!("{ends} would be reset: {why}"),
                format!("{ends} cannot be reset (EPERM): {why}"),
                "The enforcement begins".to_owned(),
                "2 rule(s) in force, mode enforce".to_owned(),
                "The enforcement ends".to_owned(),
                format!("{ends} was reset: asked for by mia, rule postgres"),
            ]
        );
        let policy = each().remove(5);
        let rules = ("SESSION_ENFORCER_RULES".to_owned(), "a,b".to_owned());
        assert!(policy.fields.contains(&rules), "{policy:?}");
    }

    #[test]
    fn the_journal_takes_the_name_of_each_field() {
        let is_allowed = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        for (name, _) in each().iter().flat_map(|entry| &entry.fields) {
            assert!(name.len() <= 64 && name.chars().all(is_allowed), "{name}");
            assert!(name.starts_with(|c: char| c.is_ascii_uppercase()), "{name}");
        }
    }

    /// The sections of a catalogue: `-- ID`, headers, an empty line, the text.
    fn sections() -> BTreeMap<&'static str, &'static str> {
        let sections = CATALOGUE.split("\n-- ").skip(1);
        sections
            .map(|section| section.split_once('\n').unwrap())
            .collect()
    }

    #[test]
    fn the_catalogue_explains_each_kind_and_nothing_else() {
        let kinds: BTreeSet<&str> = KINDS.iter().map(|kind| kind.message_id).collect();
        assert_eq!(kinds.len(), KINDS.len());
        let sections = sections();
        let explained: BTreeSet<&str> = sections.keys().copied().collect();
        assert_eq!(kinds, explained);
        for (id, section) in &sections {
            assert!(section.starts_with("Subject: "), "{id}");
            assert!(section.contains("\nDefined-By: session-enforcer\n"), "{id}");
        }
        let entries = each();
        for kind in KINDS {
            let is_of_kind = |entry: &&Entry| {
                let id = ("MESSAGE_ID".to_owned(), kind.message_id.to_owned());
                entry.fields.contains(&id)
            };
            assert!(entries.iter().any(|entry| is_of_kind(&entry)), "{kind:?}");
        }
    }

    /// journalctl(1) prints a placeholder unchanged if the entry lacks its field.
    #[test]
    fn the_catalogue_names_fields_that_every_entry_of_the_kind_has() {
        let sections = sections();
        for entry in each() {
            let field = |name: &str| {
                let found = entry.fields.iter().find(|(field, _)| field == name);
                found.map(|(_, value)| value.as_str())
            };
            let section = sections[field("MESSAGE_ID").unwrap()];
            for name in section.split('@').skip(1).step_by(2) {
                assert!(field(name).is_some(), "{name} in {section}");
            }
        }
    }
}
