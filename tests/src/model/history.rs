//! What the test did to a connection and observed of it. Pure.

use std::{fmt, time::Duration};

use nix::errno::Errno;

use super::{book::End, timeline::Span};

/// The payload of one send call at one end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    pub(super) from: End,
    pub(super) bytes: u64,
    /// The number of bytes that this end has sent so far, including these.
    pub(super) through: u64,
    /// Whether all earlier payload had arrived, so that this payload has a packet of its own.
    pub(super) alone: bool,
    /// The time of the call.
    pub(super) written: Span,
    /// The time when the test saw it at the other end.
    pub(super) arrived: Option<Duration>,
}

/// An action of the test.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Payload(Payload),
    /// Shut down the sending direction.
    Finished(End, Span),
    /// Closed the socket, with nothing unread.
    Closed(End, Span),
    /// Closed the socket in a way that resets the connection.
    Aborted,
    /// Kept the socket locked. The lock's own send is a separate payload.
    Locked(End, Span),
    /// A forged segment was sent to this end.
    Forged(End, Span),
    /// Another socket took over the connection at the server's end.
    Restored(Span),
}

/// The state of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is open.
    Open,
    /// The test closed it.
    Closed(Span),
    /// Both directions were shut down normally.
    Ended(Span),
    /// It was reset: the socket's error and the time.
    Broken(Errno, Span),
}

/// One connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// The destination port, by index of the rules.
    pub(super) port: usize,
    /// Which ends are inside the cgroup.
    pub(super) inside: [bool; 2],
    /// The port numbers of both ends.
    pub(super) ports: [u16; 2],
    pub(super) opened: Span,
    pub(super) events: Vec<Event>,
    pub(super) fates: [Fate; 2],
}

impl Connection {
    pub(super) fn payloads(&self) -> impl Iterator<Item = &Payload> + Clone {
        self.events.iter().filter_map(|event| match event {
            Event::Payload(payload) => Some(payload),
            _ => None,
        })
    }

    pub(super) fn fate(&self, end: End) -> Fate {
        self.fates[end as usize]
    }

    /// The times when an end was locked.
    pub(super) fn locks(&self, end: End) -> impl Iterator<Item = Span> {
        self.events.iter().filter_map(move |event| match event {
            Event::Locked(locked, span) if *locked == end => Some(*span),
            _ => None,
        })
    }

    /// The times when another socket took over an end.
    pub(super) fn restores(&self, end: End) -> impl Iterator<Item = Span> {
        self.events.iter().filter_map(move |event| match event {
            Event::Restored(span) if end == End::Server => Some(*span),
            _ => None,
        })
    }

    /// The ends inside the cgroup.
    pub(super) fn sessions(&self) -> impl Iterator<Item = End> {
        End::BOTH
            .into_iter()
            .filter(|end| self.inside[*end as usize])
    }

    /// The open ends inside the cgroup.
    pub(super) fn open_sessions(&self) -> impl Iterator<Item = End> {
        self.sessions().filter(|end| self.fate(*end) == Fate::Open)
    }

    /// The latest time until which an end can have lived.
    pub(super) fn lived_until(&self, end: End) -> Duration {
        match self.fate(end) {
            Fate::Open => Duration::MAX,
            Fate::Closed(_) if self.is_held_up() => self.broken().map_or(Duration::MAX, |b| b.to),
            Fate::Closed(when) | Fate::Ended(when) | Fate::Broken(_, when) => when.to,
        }
    }

    /// The time when payload passed both ends.
    pub(super) fn passing(&self, payload: &Payload) -> Span {
        let lived = End::BOTH.map(|end| self.lived_until(end));
        Span {
            from: payload.written.from,
            to: payload.arrived.unwrap_or(lived[0].max(lived[1])),
        }
    }

    /// Whether an end is still open.
    pub(super) fn is_open(&self) -> bool {
        self.fates.contains(&Fate::Open)
    }

    /// Whether payload from this end may be in flight.
    pub(super) fn has_pending(&self, end: End) -> bool {
        self.payloads()
            .any(|payload| payload.from == end && payload.arrived.is_none())
    }

    /// Whether a closed end may still exist, until its payload is delivered or its FIN is acknowledged. If
    /// the gate drops a packet of the peer, the acknowledgement in it is lost too.
    pub(super) fn is_held_up(&self) -> bool {
        End::BOTH.into_iter().any(|end| self.has_pending(end))
    }

    /// The time when the first end was reset.
    pub(super) fn broken(&self) -> Option<Span> {
        let spans = self.fates.iter().filter_map(|fate| match fate {
            Fate::Broken(_, span) => Some(*span),
            _ => None,
        });
        spans.min_by_key(|span| span.to)
    }

    /// Whether an end may not notice the destruction of the other one. That happens if both have shut down
    /// their direction and payload of the other is in flight: the kernel sends no RST from `LAST_ACK`.
    pub(super) fn may_stay_open(&self, end: End) -> bool {
        let is_finished = |by: End| {
            let finished = |event: &Event| matches!(event, Event::Finished(end, _) if *end == by);
            self.events.iter().any(finished) || matches!(self.fate(by), Fate::Closed(_))
        };
        End::BOTH.into_iter().all(is_finished) && self.has_pending(end.peer())
    }

    /// Whether an action of the test may have reset the connection: an abort, or payload to a closed end.
    pub(super) fn may_have_reset_itself(&self) -> bool {
        self.events.iter().any(|event| match event {
            Event::Aborted => true,
            Event::Closed(end, when) => self.payloads().any(|payload| {
                payload.from == end.peer() && payload.arrived.is_none_or(|at| at >= when.from)
            }),
            _ => false,
        })
    }
}

/// Prints the last events for a failure message.
impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        writeln!(
            f,
            "{:?} to port {} ({:?}), below the cgroup: {:?}, opened {:?}",
            self.ports, self.port, self.opened, self.inside, self.fates
        )?;
        let skipped = self.events.len().saturating_sub(SHOWN);
        for event in self.events.iter().skip(skipped) {
            writeln!(f, "  {event:?}")?;
        }
        Ok(())
    }
}
