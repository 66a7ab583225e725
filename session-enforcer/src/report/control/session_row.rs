//! The listed form of a live session.

use std::{borrow::Cow, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};
use session_enforcer_common::{Address, Direction, Expiry, Limits, Reason, Session, expiry};

use crate::{
    config::Mode,
    host::clock::WallClock,
    report::audit::{mode_name, passed_ns, reason_name},
};

/// A rule in force.
#[derive(Clone, Copy, Debug)]
pub struct RuleInForce<'a> {
    /// The rule's place in the order of names.
    pub name_rank: u16,
    /// The rule's name.
    pub name: &'a str,
    /// The rule's mode.
    pub mode: Mode,
    /// The rule's limits.
    pub limits: &'a Limits,
}

/// A listed session. Unknown fields are omitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row<'a> {
    /// The socket's cookie.
    pub id: u64,
    /// The name of the session's rule.
    #[serde(borrow)]
    pub rule: Cow<'a, str>,
    /// `enforce` or `observe`.
    #[serde(borrow)]
    pub mode: Cow<'a, str>,
    /// `open`, `half_closed` (one side has sent its FIN), or `ending` (a reset is under way).
    #[serde(borrow)]
    pub state: Cow<'a, str>,
    /// `inbound` or `outbound`.
    #[serde(borrow, default, skip_serializing_if = "str::is_empty")]
    pub direction: Cow<'a, str>,
    /// This host's endpoint.
    pub local: End,
    /// The peer's endpoint.
    pub remote: End,
    /// The cookie of the network namespace.
    pub netns: u64,
    /// The user who owns the socket.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub user: Option<Owner<'a>>,
    /// The path of the owner's cgroup.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cow<'a, str>>,
    /// The time of establishment. Omitted if the connection is older than the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub established: Option<String>,
    /// The time of the last received payload that counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_received: Option<String>,
    /// The time of the last sent payload that counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sent: Option<String>,
    /// Seconds since the establishment; the minimum age if that time is unknown.
    pub age_seconds: f64,
    /// Seconds since the activity that the rule counts.
    pub idle_seconds: f64,
    /// The limit that the session reaches first, as an audit reason.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Cow<'a, str>>,
    /// The time when it reaches that limit if no payload passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// Seconds until then; negative if the deadline has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_seconds: Option<f64>,
    /// Payload bytes.
    pub bytes: Carried,
}

impl Row<'_> {
    /// Converts borrowed text into owned text.
    pub fn into_owned(self) -> Row<'static> {
        let own = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Row {
            id: self.id,
            rule: own(self.rule),
            mode: own(self.mode),
            state: own(self.state),
            direction: own(self.direction),
            user: self.user.map(|user| Owner {
                id: own(user.id),
                name: user.name.map(own),
            }),
            cgroup: self.cgroup.map(own),
            clock: self.clock.map(own),
            local: self.local,
            remote: self.remote,
            netns: self.netns,
            established: self.established,
            last_received: self.last_received,
            last_sent: self.last_sent,
            age_seconds: self.age_seconds,
            idle_seconds: self.idle_seconds,
            deadline: self.deadline,
            left_seconds: self.left_seconds,
            bytes: self.bytes,
        }
    }
}

/// An endpoint of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The IP address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
}

impl End {
    pub(super) fn of(address: Address, port: u16) -> Self {
        Self {
            ip: address.into(),
            port,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::net::SocketAddr::new(self.ip, self.port).fmt(f)
    }
}

/// The user who owns a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner<'a> {
    /// The UID as text.
    #[serde(borrow)]
    pub id: Cow<'a, str>,
    /// The user name, if the UID has one.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Cow<'a, str>>,
}

impl Owner<'_> {
    /// The user name, or the UID if it has none.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }
}

/// Payload bytes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Bytes received by this host.
    pub received: u64,
    /// Bytes sent by this host.
    pub sent: u64,
}

/// A session of the table with its rule and the names of its owner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed<'a> {
    pub(super) id: u64,
    pub(super) session: &'a Session,
    pub(super) rule: RuleInForce<'a>,
    pub(super) user: Option<&'a str>,
    pub(super) cgroup: Option<&'a str>,
}

/// The limit that a session reaches first if no payload passes, and its deadline. `None` without a limit.
pub(super) fn deadline(session: &Session, limits: &Limits) -> Option<(Reason, u64)> {
    // At the end of time every limit is exceeded, so the decision names the earliest one.
    match expiry(session, limits, u64::MAX) {
        Expiry::Expired {
            reason,
            deadline_ns,
        } => Some((reason, deadline_ns)),
        Expiry::Alive { .. } => None,
    }
}

impl<'a> Listed<'a> {
    /// Converts the session into its listed form at this time.
    pub(super) fn row(&self, clock: &WallClock, now_ns: u64) -> Row<'a> {
        let session = self.session;
        let deadline = deadline(session, self.rule.limits);
        let at = |ns: u64| clock.at(ns).to_string();
        let is_younger = !session.end_is_unreported();
        let established_ns = is_younger.then_some(session.established_ns);
        let passed = |bytes: u64, ns: u64| passed_ns(established_ns, bytes, ns).map(at);
        Row {
            id: self.id,
            rule: Cow::Borrowed(self.rule.name),
            mode: Cow::Borrowed(mode_name(self.rule.mode)),
            state: Cow::Borrowed(state(session)),
            direction: Cow::Borrowed(direction(session)),
            local: End::of(session.local, session.local_port),
            remote: End::of(session.remote, session.remote_port),
            netns: session.netns_cookie,
            user: session.owner.is_known().then(|| Owner {
                id: Cow::Owned(session.owner.uid.to_string()),
                name: self.user.map(Cow::Borrowed),
            }),
            cgroup: self.cgroup.map(Cow::Borrowed),
            established: established_ns.map(at),
            last_received: passed(session.bytes_received, session.last_received_ns),
            last_sent: passed(session.bytes_sent, session.last_sent_ns),
            age_seconds: seconds(session.established_ns, now_ns),
            idle_seconds: seconds(self.rule.limits.idle_since(session), now_ns),
            clock: deadline.map(|(reason, _)| Cow::Borrowed(reason_name(reason))),
            deadline: deadline.map(|(_, ns)| at(ns)),
            left_seconds: deadline.map(|(_, ns)| seconds(now_ns, ns)),
            bytes: Carried {
                received: session.bytes_received,
                sent: session.bytes_sent,
            },
        }
    }
}

fn state(session: &Session) -> &'static str {
    if session.is_shut() {
        "ending"
    } else if session.half_closed_ns != Session::NOT_HALF_CLOSED {
        "half_closed"
    } else {
        "open"
    }
}

fn direction(session: &Session) -> &'static str {
    match Direction::from_number(session.direction) {
        Some(Direction::Inbound) => "inbound",
        Some(Direction::Outbound) => "outbound",
        None => "",
    }
}

/// Seconds, rounded to milliseconds; negative if `to_ns` is earlier than `from_ns`.
fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    let apart = Duration::from_nanos(from_ns.abs_diff(to_ns));
    let seconds = apart.as_millis() as f64 / 1_000.0;
    if to_ns < from_ns { -seconds } else { seconds }
}
