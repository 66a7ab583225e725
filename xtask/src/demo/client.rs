//! One client of the show: a connection of which the show holds both ends.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use session_enforcer_tests::{End, Moment, Pair, Record, keep_alive};

use super::cast::{Fate, Habit, IDLE_TIMEOUT, MAX_LIFETIME, Role};
use super::stage::Stage;

/// The interval of a busy client's messages.
const PAUSE: Duration = Duration::from_millis(500);

/// A client that is or was connected.
pub(super) struct Client {
    pub(super) role: &'static Role,
    pub(super) pair: Pair,
    /// Whether the connection has ended.
    pub(super) ended: bool,
    /// Whether the audit has recorded that it would have been reset.
    pub(super) recorded: bool,
    last_round_trip: Moment,
    round_trips: u32,
    /// The time of the next message of a busy client.
    next: Option<Instant>,
    /// The error that a message returned.
    failure: Option<Errno>,
}

/// A reportable event of a busy client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The client has made this many round trips and continues.
    Lives(u32),
    /// The client has made this many round trips and stops.
    FallsSilent(u32),
}

impl Client {
    /// Connects and exchanges the first message.
    pub(super) fn connect(role: &'static Role, stage: &Stage) -> Result<Self> {
        let pair = stage.connect(role.server())?;
        if role.habit == Habit::Probing {
            keep_alive(&pair.client, Duration::from_secs(1))?;
        }
        let last_round_trip = pair.round_trip()?;
        // The offset of half a pause keeps messages away from the deadlines, which are at full seconds.
        let next = matches!(role.habit, Habit::Busy(_)).then(|| Instant::now() + PAUSE / 2);
        Ok(Self {
            role,
            pair,
            ended: false,
            recorded: false,
            last_round_trip,
            round_trips: 0,
            next,
            failure: None,
        })
    }

    /// The addresses as `client -> server`.
    pub(super) fn route(&self) -> String {
        format!(
            "{} -> {}",
            self.pair.client_address, self.pair.server_address
        )
    }

    /// Whether the expected outcome has happened.
    pub(super) fn is_settled(&self) -> bool {
        match self.role.fate {
            Fate::ResetWhenIdle | Fate::ResetWhenOld => self.ended,
            Fate::Recorded => self.recorded,
            Fate::Untouched => true,
        }
    }

    /// The start of the client's limit, by the clock of the show, and the limit.
    fn limit(&self) -> Option<(Moment, Duration)> {
        match self.role.fate {
            Fate::ResetWhenIdle | Fate::Recorded => Some((self.last_round_trip, IDLE_TIMEOUT)),
            Fate::ResetWhenOld => Some((self.pair.opened, MAX_LIFETIME)),
            Fate::Untouched => None,
        }
    }

    /// The time since the client reached its limit.
    pub(super) fn overdue(&self) -> Duration {
        let since_due = |(since, limit): (Moment, Duration)| since.elapsed().saturating_sub(limit);
        self.limit().map(since_due).unwrap_or_default()
    }

    /// An upper bound of the time from the start of the limit to this end.
    pub(super) fn time_to(&self, end: &End) -> Duration {
        let until_end = |(since, _): (Moment, _)| end.seen.at - since.earliest.at;
        self.limit().map(until_end).unwrap_or_default()
    }

    /// The time since the last payload in either direction.
    pub(super) fn silent_for(&self) -> Duration {
        self.last_round_trip.elapsed()
    }

    /// The time of the next message of a busy client.
    pub(super) fn sends_at(&self) -> Option<Instant> {
        self.next
    }

    /// Sends a message if the client is busy and its next message is due.
    pub(super) fn talk(&mut self) -> Option<Said> {
        let (Some(next), Habit::Busy(period)) = (self.next, self.role.habit) else {
            return None;
        };
        if self.ended || Instant::now() < next {
            return None;
        }
        self.next = Some(next + PAUSE).filter(|next| *next < self.pair.opened.latest.at + period);
        match self.pair.round_trip() {
            Ok(moment) => self.last_round_trip = moment,
            Err(error) => {
                // The connection has just ended. The caller detects and reports it.
                self.failure = errno_of(&error);
                return None;
            }
        }
        self.round_trips += 1;
        match (self.next, self.round_trips) {
            (None, count) => Some(Said::FallsSilent(count)),
            (Some(_), count @ 10) => Some(Said::Lives(count)),
            _ => None,
        }
    }

    /// The end of the connection as seen by the client and by the server.
    pub(super) fn ends(&self) -> Result<[End; 2]> {
        let ends = self.pair.ends()?;
        // The kernel reports a socket error only once, so a failed message has consumed it.
        Ok(ends.map(|end| End {
            error: end.error.or(self.failure),
            ..end
        }))
    }

    /// The expected reason of the reset, as in the audit.
    pub(super) fn reason(&self) -> Result<&'static str> {
        match self.role.fate {
            Fate::ResetWhenIdle => Ok("idle_timeout"),
            Fate::ResetWhenOld => Ok("max_lifetime"),
            Fate::Recorded | Fate::Untouched => {
                bail!("{} was to be left alone, and has ended", self.role.name)
            }
        }
    }

    /// Fails unless the client ended as expected.
    pub(super) fn check_reset(&self, ends: &[End; 2], record: &Record) -> Result<()> {
        let name = self.role.name;
        let [client, server] = ends.map(|end| end.error);
        ensure!(
            (client, server) == (Some(Errno::ECONNRESET), Some(Errno::ECONNABORTED)),
            "{name} was to be reset; its client sees {client:?}, its server {server:?}"
        );
        let reason = self.reason()?;
        let was_busy = self.next.is_some() && self.role.fate == Fate::ResetWhenIdle;
        ensure!(!was_busy, "{name} was reset while it was busy");
        self.check_labels(record, [self.role.rule, reason, "enforce", "reset"])?;
        self.check_time(ends, record)
    }

    /// Fails unless the audit records that the client would have been reset.
    pub(super) fn check_record(&self, record: &Record) -> Result<()> {
        self.check_labels(record, [self.role.rule, "idle_timeout", "observe", "none"])?;
        self.check_time(&[], record)
    }

    /// Fails unless the client was reset on request.
    pub(super) fn check_killed(&self, ends: &[End; 2], asked: &Moment) -> Result<()> {
        let name = self.role.name;
        let [client, server] = ends.map(|end| end.error);
        ensure!(
            (client, server) == (Some(Errno::ECONNRESET), Some(Errno::ECONNABORTED)),
            "{name} was to be reset by hand; its client sees {client:?}, its server {server:?}"
        );
        ensure!(
            ends[0].seen.at >= asked.earliest.at,
            "{name} ended before that was asked for"
        );
        Ok(())
    }

    /// Fails unless the audit records the request.
    pub(super) fn check_kill_record(&self, record: &Record) -> Result<()> {
        self.check_labels(record, [self.role.rule, "admin", "enforce", "reset"])?;
        let by = record.text("session_enforcer.requested_by.user");
        ensure!(
            !by.is_empty(),
            "{}: the audit has not who asked",
            self.role.name
        );
        Ok(())
    }

    fn check_labels(&self, record: &Record, wanted: [&str; 4]) -> Result<()> {
        let (name, labels) = (self.role.name, record.labels());
        ensure!(
            labels == wanted,
            "{name}: the audit says {labels:?} and not {wanted:?}"
        );
        Ok(())
    }

    /// Checks the lateness by the daemon's clock and by that of the socket's owner.
    fn check_time(&self, ends: &[End], record: &Record) -> Result<()> {
        let name = self.role.name;
        let lateness = record.number("session_enforcer.lateness_seconds");
        ensure!(lateness >= 0.0, "{name} was reset {} s early", -lateness);
        let limit = self.limit().map_or(Duration::ZERO, |(_, limit)| limit);
        for end in ends {
            let time = self.time_to(end);
            ensure!(time >= limit, "{name} was reset {:?} early", limit - time);
        }
        Ok(())
    }
}

fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    let error = error.downcast_ref::<io::Error>()?;
    error.raw_os_error().map(Errno::from_raw)
}
