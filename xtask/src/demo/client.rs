//! One client at play: a connection whose both ends the show holds.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use session_enforcer_tests::{End, Moment, Pair, Record, keep_alive};

use super::cast::{Fate, Habit, IDLE_TIMEOUT, MAX_LIFETIME, Role};
use super::stage::Stage;

/// Time between two messages of a busy client.
const PAUSE: Duration = Duration::from_millis(500);

/// A client that is, or was, connected.
pub(super) struct Client {
    pub(super) role: &'static Role,
    pub(super) pair: Pair,
    /// Whether its connection has ended.
    pub(super) ended: bool,
    /// Whether the audit has recorded that it would have been reset.
    pub(super) recorded: bool,
    last_round_trip: Moment,
    round_trips: u32,
    /// When it sends next, while it is busy.
    next: Option<Instant>,
    /// What a message met in place of its answer.
    failure: Option<Errno>,
}

/// What is worth telling of a busy client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// It has made this many round trips, and lives.
    Lives(u32),
    /// It has made this many, and will make no more.
    FallsSilent(u32),
}

impl Client {
    /// Connects and says hello.
    pub(super) fn connect(role: &'static Role, stage: &Stage) -> Result<Self> {
        let pair = stage.connect(role.server())?;
        if role.habit == Habit::Probing {
            keep_alive(&pair.client, Duration::from_secs(1))?;
        }
        let last_round_trip = pair.round_trip()?;
        // Half a pause off, so that no message meets a deadline, all of which are full seconds.
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

    /// `client -> server`, as addresses.
    pub(super) fn route(&self) -> String {
        format!(
            "{} -> {}",
            self.pair.client_address, self.pair.server_address
        )
    }

    /// Whether what has to become of it has happened.
    pub(super) fn is_settled(&self) -> bool {
        match self.role.fate {
            Fate::ResetWhenIdle | Fate::ResetWhenOld => self.ended,
            Fate::Recorded => self.recorded,
            Fate::Untouched => true,
        }
    }

    /// From when its limit counts, by the clock of the show, and the limit.
    fn limit(&self) -> Option<(Moment, Duration)> {
        match self.role.fate {
            Fate::ResetWhenIdle | Fate::Recorded => Some((self.last_round_trip, IDLE_TIMEOUT)),
            Fate::ResetWhenOld => Some((self.pair.opened, MAX_LIFETIME)),
            Fate::Untouched => None,
        }
    }

    /// How long ago its limit was reached.
    pub(super) fn overdue(&self) -> Duration {
        let since_due = |(since, limit): (Moment, Duration)| since.elapsed().saturating_sub(limit);
        self.limit().map(since_due).unwrap_or_default()
    }

    /// From when its limit counts to this end, at the most.
    pub(super) fn time_to(&self, end: &End) -> Duration {
        let until_end = |(since, _): (Moment, _)| end.seen.at - since.earliest.at;
        self.limit().map(until_end).unwrap_or_default()
    }

    /// Time since its last payload, in either direction.
    pub(super) fn silent_for(&self) -> Duration {
        self.last_round_trip.elapsed()
    }

    /// When it sends next, while it is busy.
    pub(super) fn sends_at(&self) -> Option<Instant> {
        self.next
    }

    /// Sends, where it is a busy one whose time has come.
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
                // The connection has just ended: that is looked at, and told, by the caller.
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

    /// The end, as the client and as the server see it.
    pub(super) fn ends(&self) -> Result<[End; 2]> {
        let ends = self.pair.ends()?;
        // The kernel tells a socket's error once: a message that met it has it.
        Ok(ends.map(|end| End {
            error: end.error.or(self.failure),
            ..end
        }))
    }

    /// Why it has to be reset, as the audit puts it.
    pub(super) fn reason(&self) -> Result<&'static str> {
        match self.role.fate {
            Fate::ResetWhenIdle => Ok("idle_timeout"),
            Fate::ResetWhenOld => Ok("max_lifetime"),
            Fate::Recorded | Fate::Untouched => {
                bail!("{} was to be left alone, and has ended", self.role.name)
            }
        }
    }

    /// Fails where its end is not the one that it has to come to.
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

    /// Fails where the audit says anything else than that it would have been reset.
    pub(super) fn check_record(&self, record: &Record) -> Result<()> {
        self.check_labels(record, [self.role.rule, "idle_timeout", "observe", "none"])?;
        self.check_time(&[], record)
    }

    /// Fails where it was not reset when somebody asked for it.
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

    /// Fails where the audit does not say that somebody asked for it.
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

    /// By the daemon's clock, and by the one of whoever holds the sockets.
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
