//! Builds the JSON records. Pure.

use std::{borrow::Cow, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize, Serializer};
use session_enforcer_common::{Direction, Reason, Session};

use super::{End, Outcome, Process, RecordId, RequestedBy, Termination, mode_name, reason_name};
use crate::{
    config::Mode,
    host::clock::{Moment, WallClock, monotonic_ns},
    reaper::diag::Queued,
};

#[derive(Serialize)]
struct Record<'a> {
    #[serde(rename = "@timestamp")]
    timestamp: Moment,
    event: EventFields,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<RuleFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkFields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<EndFields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<EndFields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<UserFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorFields<'a>>,
    session_enforcer: Own<'a>,
}

#[derive(Serialize)]
struct EventFields {
    kind: &'static str,
    category: [&'static str; 1],
    r#type: [&'static str; 1],
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// Nanoseconds from establishment to this record.
    #[serde(skip_serializing_if = "Option::is_none")]
    duration: Option<u64>,
    id: String,
    sequence: u64,
}

#[derive(Serialize)]
struct RuleFields<'a> {
    name: &'a str,
}

#[derive(Serialize)]
struct NetworkFields {
    transport: &'static str,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
}

#[derive(Serialize)]
struct EndFields {
    ip: IpAddr,
    port: u16,
    bytes: u64,
}

#[derive(Serialize)]
struct ProcessFields<'a> {
    pid: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    name: Cow<'a, str>,
}

#[derive(Serialize)]
struct UserFields<'a> {
    #[serde(serialize_with = "as_text")]
    id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
}

/// The fields that ECS does not define.
#[derive(Serialize)]
#[serde(untagged)]
enum Own<'a> {
    Termination(TerminationFields<'a>),
    Lifecycle {
        version: &'static str,
    },
    Limits {
        version: &'static str,
        mode: &'static str,
        rules: &'a [String],
        #[serde(skip_serializing_if = "Option::is_none")]
        requested_by: Option<RequestFields<'a>>,
    },
}

#[derive(Serialize)]
struct RequestFields<'a> {
    user: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    command: &'a str,
}

#[derive(Serialize)]
struct TerminationFields<'a> {
    id: u64,
    mode: &'static str,
    result: &'static str,
    netns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup_id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    established: Option<Moment>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_received: Option<Moment>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_sent: Option<Moment>,
    #[serde(skip_serializing_if = "Option::is_none")]
    counted_from: Option<Moment>,
    deadline: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit_seconds: Option<f64>,
    idle_seconds: f64,
    lateness_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    queued_bytes: Option<Queued>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requested_by: Option<RequestFields<'a>>,
}

/// Builds the record of a session's end.
pub(super) fn termination(
    t: &Termination<'_>,
    record_id: &RecordId<'_>,
    clock: &WallClock,
    out: &mut Vec<u8>,
) {
    let session = t.session;
    let (action, outcome, kind) = match t.end.outcome() {
        Outcome::Reset | Outcome::Gone => ("session-terminated", Some("success"), "end"),
        Outcome::Failed => ("session-termination-failed", Some("failure"), "error"),
        // No reset was tried, so the record has no outcome.
        Outcome::Observed => ("session-would-terminate", None, "info"),
    };
    let number = match t.end.outcome() {
        Outcome::Reset | Outcome::Gone => 0,
        Outcome::Failed | Outcome::Observed => t.answered_ns,
    };
    let (source, destination) = ends(session);
    let record = Record {
        timestamp: clock.at(t.answered_ns),
        event: EventFields {
            kind: "event",
            category: ["network"],
            r#type: [kind],
            action,
            outcome,
            reason: Some(reason_name(t.reason)),
            duration: established_ns(t).map(|then| t.answered_ns.saturating_sub(then)),
            id: termination_id(record_id.boot, t.cookie, session.established_ns, number),
            sequence: record_id.sequence,
        },
        rule: Some(RuleFields { name: t.rule }),
        network: Some(network(session)),
        source: Some(source),
        destination: Some(destination),
        process: t.process.as_ref().map(process),
        user: session.owner.is_known().then_some(UserFields {
            id: session.owner.uid,
            name: t.user,
        }),
        error: match t.end {
            End::Failed(message) => Some(ErrorFields { message }),
            _ => None,
        },
        session_enforcer: Own::Termination(termination_fields(t, clock)),
    };
    write(&record, out);
}

/// The ID of a session's record. The record of its end has the number 0, whichever daemon writes it.
pub(super) fn termination_id(boot: &str, cookie: u64, established_ns: u64, number: u64) -> String {
    format!("{boot}-{cookie:x}-{established_ns:x}-{number:x}")
}

/// Parses the ID of a written record.
pub(super) fn id(line: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Written {
        event: Event,
    }
    #[derive(Deserialize)]
    struct Event {
        id: String,
    }
    let written: Written = serde_json::from_slice(line).ok()?;
    Some(written.event.id)
}

fn termination_fields<'a>(t: &Termination<'a>, clock: &WallClock) -> TerminationFields<'a> {
    let session = t.session;
    let established_ns = established_ns(t);
    let passed = |bytes, stamp_ns| {
        let passed_ns = passed_ns(established_ns, bytes, stamp_ns);
        passed_ns.map(|then| clock.at(then))
    };
    TerminationFields {
        id: t.cookie,
        mode: mode_name(t.mode),
        result: t.end.outcome().name(),
        netns: session.netns_cookie,
        cgroup: t.cgroup,
        cgroup_id: (session.owner.cgroup_id != 0).then_some(session.owner.cgroup_id),
        established: established_ns.map(|then| clock.at(then)),
        last_received: passed(session.bytes_received, session.last_received_ns),
        last_sent: passed(session.bytes_sent, session.last_sent_ns),
        counted_from: t.limit.map(|limit| clock.at(before(t.deadline_ns, limit))),
        deadline: clock.at(t.deadline_ns),
        limit_seconds: t.limit.map(|limit| seconds(limit.as_nanos())),
        idle_seconds: seconds_between(t.idle_since_ns, t.answered_ns),
        lateness_seconds: seconds_between(t.deadline_ns, t.answered_ns),
        queued_bytes: match t.end {
            End::Reset(queued) => queued,
            _ => None,
        },
        requested_by: t.requested_by.map(request),
    }
}

fn request(by: RequestedBy<'_>) -> RequestFields<'_> {
    let requester = by.requester;
    RequestFields {
        user: by
            .user
            .map_or_else(|| Cow::Owned(requester.uid.to_string()), Cow::Borrowed),
        pid: (requester.pid != 0).then_some(requester.pid),
        command: &requester.command,
    }
}

fn process(process: &Process) -> ProcessFields<'_> {
    let name = process.name.split(|byte| *byte == 0).next();
    ProcessFields {
        pid: process.pid,
        name: String::from_utf8_lossy(name.unwrap_or_default()),
    }
}

fn as_text<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

/// The time when the session was established, if known. It is unknown for a connection that is older than the daemon or
/// was never tracked. [`Session::established_ns`] then holds only the latest possible time.
fn established_ns(t: &Termination<'_>) -> Option<u64> {
    let is_known = !t.session.end_is_unreported() && t.reason != Reason::Untracked;
    is_known.then_some(t.session.established_ns)
}

/// The time when counted payload last passed in a direction. `None` if none has passed. Until then the stamp equals the
/// time of establishment. A socket that took over its connection (`TCP_REPAIR`) inherits the stamps of the old socket
/// but starts its byte counts at zero, so the byte count decides only if the time of establishment is unknown.
pub(crate) fn passed_ns(established_ns: Option<u64>, bytes: u64, stamp_ns: u64) -> Option<u64> {
    let is_stamped = match established_ns {
        Some(established_ns) => stamp_ns != established_ns,
        None => bytes > 0,
    };
    is_stamped.then_some(stamp_ns)
}

fn before(deadline_ns: u64, limit: Duration) -> u64 {
    let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    deadline_ns.saturating_sub(limit_ns)
}

/// `Duration::as_secs_f64` rounds twice and makes 1.5899999999999999 of 1.59 s.
fn seconds(nanoseconds: u128) -> f64 {
    nanoseconds as f64 / 1e9
}

/// Negative if `to_ns` is earlier than `from_ns`, so that a reset before its deadline shows.
fn seconds_between(from_ns: u64, to_ns: u64) -> f64 {
    let seconds = seconds(from_ns.abs_diff(to_ns).into());
    if to_ns < from_ns { -seconds } else { seconds }
}

fn network(session: &Session) -> NetworkFields {
    NetworkFields {
        transport: "tcp",
        r#type: if session.remote.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        },
        direction: match Direction::from_number(session.direction) {
            Some(Direction::Inbound) => Some("inbound"),
            Some(Direction::Outbound) => Some("outbound"),
            None => None,
        },
    }
}

/// Returns the endpoint that connected and the endpoint that accepted.
fn ends(session: &Session) -> (EndFields, EndFields) {
    let here = EndFields {
        ip: session.local.into(),
        port: session.local_port,
        bytes: session.bytes_sent,
    };
    let there = EndFields {
        ip: session.remote.into(),
        port: session.remote_port,
        bytes: session.bytes_received,
    };
    if Direction::from_number(session.direction) == Some(Direction::Outbound) {
        (here, there)
    } else {
        (there, here)
    }
}

/// Builds the record of the daemon's start or stop.
pub(super) fn lifecycle(
    action: &'static str,
    kind: &'static str,
    record_id: &RecordId<'_>,
    clock: &WallClock,
    out: &mut Vec<u8>,
) {
    let own = Own::Lifecycle {
        version: env!("CARGO_PKG_VERSION"),
    };
    write(
        &own_record("process", action, kind, record_id, clock, own),
        out,
    );
}

/// Builds the record of a policy that comes into force.
pub(super) fn policy(
    mode: Mode,
    rules: &[String],
    requested_by: Option<RequestedBy<'_>>,
    record_id: &RecordId<'_>,
    clock: &WallClock,
    out: &mut Vec<u8>,
) {
    let own = Own::Limits {
        version: env!("CARGO_PKG_VERSION"),
        mode: mode_name(mode),
        rules,
        requested_by: requested_by.map(request),
    };
    let record = own_record(
        "configuration",
        "policy-loaded",
        "change",
        record_id,
        clock,
        own,
    );
    write(&record, out);
}

fn own_record<'a>(
    category: &'static str,
    action: &'static str,
    kind: &'static str,
    record_id: &RecordId<'_>,
    clock: &WallClock,
    own: Own<'a>,
) -> Record<'a> {
    Record {
        timestamp: clock.at(monotonic_ns()),
        event: EventFields {
            kind: "event",
            category: [category],
            r#type: [kind],
            action,
            outcome: Some("success"),
            reason: None,
            duration: None,
            id: format!(
                "{}-{:x}-{:x}",
                record_id.boot, record_id.run_ns, record_id.sequence
            ),
            sequence: record_id.sequence,
        },
        rule: None,
        network: None,
        source: None,
        destination: None,
        process: None,
        user: None,
        error: None,
        session_enforcer: own,
    }
}

/// Appends the record as one line of JSON.
fn write(record: &Record<'_>, out: &mut Vec<u8>) {
    // Serialization cannot fail: the record has only strings, numbers and lists of them (a number that is not
    // finite becomes null), and a write to a `Vec` does not fail.
    let _ = serde_json::to_writer(&mut *out, record);
    out.push(b'\n');
}
