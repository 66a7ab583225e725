//! `session-enforcer events`: prints the audit records live.

use std::io::Write;

use anyhow::Result;
use bytes::Bytes;
use hyper::Method;
use serde_json::Value;

use super::{
    columns::printable,
    daemon_client::{DaemonClient, block_on, parse},
    unless_closed,
};
use crate::cli::WatchArgs;

/// Prints audit records until the daemon stops or the reader of the output is gone.
///
/// # Errors
///
/// Fails if no daemon answers, if the client fell behind and was cut off, or if `out` cannot be written.
pub fn events(args: &WatchArgs, out: &mut impl Write) -> Result<()> {
    let client = DaemonClient::new(&args.daemon.socket);
    block_on(async {
        let mut lines = client
            .lines(Method::GET, "/v1/events", Bytes::new())
            .await?;
        while let Some(line) = lines.next().await? {
            let record: Value = parse(line)?;
            if let Some(error) = record.get("error").and_then(Value::as_str) {
                anyhow::bail!("{}", printable(error));
            }
            let printed = if args.json {
                out.write_all(line).and_then(|()| out.write_all(b"\n"))
            } else {
                writeln!(out, "{}", printable(&words(&record)))
            };
            if let Err(error) = printed.and_then(|()| out.flush()) {
                return unless_closed(error);
            }
        }
        Ok(())
    })
}

/// Formats a record as one line.
pub(super) fn words(record: &Value) -> String {
    let text = |path: &str| {
        record
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let end = |name: &str| {
        let end = record.get(name)?;
        let ip = end.get("ip")?.as_str()?.parse().ok()?;
        let port = u16::try_from(end.get("port")?.as_u64()?).ok()?;
        Some(std::net::SocketAddr::new(ip, port).to_string())
    };
    let time = text("/@timestamp");
    // Milliseconds are precise enough for people.
    let time = time
        .get(..23)
        .map_or_else(|| time.to_owned(), |time| format!("{time}Z"));
    let mut parts = vec![time, text("/event/action").to_owned()];
    parts.extend([
        text("/rule/name").to_owned(),
        text("/event/reason").to_owned(),
    ]);
    if let Some(id) = record.pointer("/session_enforcer/id") {
        let result = text("/session_enforcer/result");
        parts.push(format!("{result} {id}"));
    }
    if let (Some(source), Some(destination)) = (end("source"), end("destination")) {
        parts.push(format!("{source} -> {destination}"));
    }
    let user = text("/session_enforcer/requested_by/user");
    if !user.is_empty() {
        parts.push(format!("asked for by {user}"));
    }
    parts.push(text("/error/message").to_owned());
    parts.retain(|part| !part.trim().is_empty());
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_is_a_line_for_people() {
        let record = json!({
            "@timestamp": "2026-01-01T12:00:00.000120000Z",
            "event": {"action": "session-terminated", "reason": "admin"},
            "rule": {"name": "postgres"},
            "source": {"ip": "2001:db8::7", "port": 51234},
            "destination": {"ip": "2001:db8::5", "port": 5432},
            "session_enforcer": {"id": 4711, "result": "reset", "requested_by": {"user": "root"}},
        });
        assert_eq!(
            words(&record),
            "2026-01-01T12:00:00.000Z  session-terminated  postgres  admin  reset 4711  \
             [2001:db8::7]:51234 -> [2001:db8::5]:5432  asked for by root"
        );
        let started = json!({"@timestamp": "x", "event": {"action": "enforcer-started"}});
        assert_eq!(words(&started), "x  enforcer-started");
    }
}
