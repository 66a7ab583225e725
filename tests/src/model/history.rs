//! What the test did to a connection, and what it saw of it. Pure.

use std::{fmt, time::Duration};

use nix::errno::Errno;

use super::{book::End, timeline::Span};

/// Payload that one end was given to send, in one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    pub(super) from: End,
    pub(super) bytes: u64,
    /// Bytes that this end was given so far, these included.
    pub(super) through: u64,
    /// Whether all that was sent before had arrived: nothing can share a packet with it.
    pub(super) alone: bool,
    /// When the call was made.
    pub(super) written: Span,
    /// When the test saw it at the other end.
    pub(super) arrived: Option<Duration>,
}

/// What the test did.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Payload(Payload),
    /// Shut the sending direction.
    Finished(End),
    /// Closed it, with nothing unread.
    Closed(End, Span),
    /// Closed it in a way that resets the connection.
    Aborted,
    /// Kept it locked. What it has sent then is payload of its own.
    Locked(End, Span),
    /// A forged segment was sent to this end.
    Forged(End, Span),
    /// Another socket has taken it over at the server's end.
    Restored(Span),
}

/// What became of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is open.
    Open,
    /// The test closed it.
    Closed(Span),
    /// Both directions were shut in the orderly way.
    Ended(Span),
    /// It was reset: what its socket said, and when.
    Broken(Errno, Span),
}

/// One connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// Which port it is to, by number of the rules.
    pub(super) port: usize,
    /// Which ends are below the cgroup.
    pub(super) inside: [bool; 2],
    /// Port numbers of both ends.
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

    /// When an end was locked.
    pub(super) fn locks(&self, end: End) -> impl Iterator<Item = Span> {
        self.events.iter().filter_map(move |event| match event {
            Event::Locked(locked, span) if *locked == end => Some(*span),
            _ => None,
        })
    }

    /// When another socket has taken over an end.
    pub(super) fn restores(&self, end: End) -> impl Iterator<Item = Span> {
        self.events.iter().filter_map(move |event| match event {
            Event::Restored(span) if end == End::Server => Some(*span),
            _ => None,
        })
    }

    /// The ends that are below the cgroup.
    pub(super) fn sessions(&self) -> impl Iterator<Item = End> {
        End::BOTH
            .into_iter()
            .filter(|end| self.inside[*end as usize])
    }

    /// Those of them that are open.
    pub(super) fn open_sessions(&self) -> impl Iterator<Item = End> {
        self.sessions().filter(|end| self.fate(*end) == Fate::Open)
    }

    /// The latest that an end can have lived.
    pub(super) fn lived_until(&self, end: End) -> Duration {
        match self.fate(end) {
            Fate::Open => Duration::MAX,
            Fate::Closed(_) if self.is_held_up() => self.broken().map_or(Duration::MAX, |b| b.to),
            Fate::Closed(when) | Fate::Ended(when) | Fate::Broken(_, when) => when.to,
        }
    }

    /// When payload passed both ends, if it did.
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

    /// Whether payload from this end may be on its way.
    pub(super) fn has_pending(&self, end: End) -> bool {
        self.payloads()
            .any(|payload| payload.from == end && payload.arrived.is_none())
    }

    /// Whether an end that was closed may live on, until payload of its own is delivered, or until the
    /// other end acknowledges its FIN: with payload that is refused, the acknowledgement is, too.
    pub(super) fn is_held_up(&self) -> bool {
        End::BOTH.into_iter().any(|end| self.has_pending(end))
    }

    /// When the first end to be reset was reset.
    pub(super) fn broken(&self) -> Option<Span> {
        let spans = self.fates.iter().filter_map(|fate| match fate {
            Fate::Broken(_, span) => Some(*span),
            _ => None,
        });
        spans.min_by_key(|span| span.to)
    }

    /// Whether nothing tells an end when the other one is destroyed: both have shut their direction, and
    /// payload of the other is on its way. From the state `LAST_ACK` the kernel sends no RST.
    pub(super) fn may_stay_open(&self, end: End) -> bool {
        let is_finished = |by: End| {
            let finished = |event: &Event| matches!(event, Event::Finished(end) if *end == by);
            self.events.iter().any(finished) || matches!(self.fate(by), Fate::Closed(_))
        };
        End::BOTH.into_iter().all(is_finished) && self.has_pending(end.peer())
    }

    /// Whether what the test did may have reset it: an abort, or payload for an end that was closed.
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

/// For a failure: the last of what happened.
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
