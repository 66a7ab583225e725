//! Audit records, with accessors for the tests.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{clock::Moment, pace::late_ticks};

/// The tolerance for times of the audit. The daemon converts them between two clocks, and the kernel counts
/// the ages of adopted sessions in ticks, which a busy machine delays.
const SLACK: Duration = Duration::from_millis(50);

/// The tolerance for the conversion alone.
const CONVERSION: Duration = Duration::from_millis(1);

/// One line of the audit.
#[derive(Clone, Debug)]
pub struct Record(Value);

impl Record {
    /// Parses a line.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let value = serde_json::from_str(line).with_context(|| format!("audit line {line:?}"))?;
        Ok(Self(value))
    }

    /// The value at a path such as `event.action`. Null if there is none.
    pub fn at(&self, path: &str) -> &Value {
        path.split('.').fold(&self.0, |value, key| &value[key])
    }

    /// The text at a path. Empty if there is none.
    pub fn text(&self, path: &str) -> &str {
        self.at(path).as_str().unwrap_or_default()
    }

    /// The number at a path.
    #[track_caller]
    pub fn number(&self, path: &str) -> f64 {
        let number = self.at(path).as_f64();
        number.unwrap_or_else(|| panic!("no number at {path} in {}", self.0))
    }

    /// Whether the record reports a termination: done, failed or only observed.
    pub fn is_termination(&self) -> bool {
        let actions = [
            "session-terminated",
            "session-would-terminate",
            "session-termination-failed",
        ];
        actions.contains(&self.text("event.action"))
    }

    /// Rule, reason, mode and result: the labels of the counter for the record.
    pub fn labels(&self) -> [&str; 4] {
        let paths = [
            "rule.name",
            "event.reason",
            "session_enforcer.mode",
            "session_enforcer.result",
        ];
        paths.map(|path| self.text(path))
    }

    /// Payload bytes sent by the connecting endpoint, and received by it.
    pub fn bytes(&self) -> [u64; 2] {
        ["source.bytes", "destination.bytes"].map(|path| self.at(path).as_u64().unwrap_or(0))
    }

    /// The ports of the connecting endpoint and of its peer.
    pub fn ports(&self) -> [u16; 2] {
        let port = |path| self.at(path).as_u64().and_then(|port| port.try_into().ok());
        ["source.port", "destination.port"].map(|path| port(path).unwrap_or(0))
    }

    /// Asserts that this session was reset for this reason, not before its deadline, and that its deadline is
    /// the limit after the moment.
    ///
    /// On a busy machine the reset may be late and the moment long. The check still proves that the daemon
    /// counted from the right event.
    #[track_caller]
    pub fn assert_reset(&self, reason: &str, since: &Moment, limit: Duration) {
        assert_eq!(
            self.text("event.action"),
            "session-terminated",
            "{}",
            self.0
        );
        assert_eq!(self.text("session_enforcer.result"), "reset", "{}", self.0);
        self.assert_due(reason, since, limit);
    }

    /// Asserts only the reason and the deadline, also for an observed session.
    #[track_caller]
    pub fn assert_due(&self, reason: &str, since: &Moment, limit: Duration) {
        assert_eq!(self.text("event.reason"), reason, "{}", self.0);
        assert!(
            self.number("session_enforcer.lateness_seconds") >= 0.0,
            "{}",
            self.0
        );
        let deadline = self.time("session_enforcer.deadline");
        // Only an adopted session has no time of establishment.
        let is_adopted = self.at("session_enforcer.established").is_null();
        let early = if is_adopted { SLACK } else { CONVERSION };
        let (earliest, latest) = (
            (since.earliest.wall + limit).saturating_sub(early + late_ticks()),
            since.latest.wall + limit + SLACK + late_ticks(),
        );
        assert!(
            earliest <= deadline && deadline <= latest,
            "the deadline {deadline:?} is not within {earliest:?} and {latest:?}: {}",
            self.0
        );
    }

    /// The time at a path, since the epoch.
    #[track_caller]
    pub fn time(&self, path: &str) -> Duration {
        let time = parse_time(self.text(path));
        time.unwrap_or_else(|| panic!("no time at {path} in {}", self.0))
    }
}

/// Parses `2026-01-01T12:00:00.000000000Z`.
fn parse_time(text: &str) -> Option<Duration> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(clock, ':')?;
    let nanos = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let seconds = days_since_epoch(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    Some(Duration::new(seconds, nanos))
}

fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let numbers: Option<Vec<u64>> = text.split(separator).map(|n| n.parse().ok()).collect();
    numbers?.try_into().ok()
}

/// The number of days in the Gregorian calendar since 1970.
fn days_since_epoch(year: u64, month: u64, day: u64) -> u64 {
    const DAYS_BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap_days_before = |year: u64| (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400;
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let leap_day = u64::from(is_leap && month > 2);
    (year - 1970) * 365 + leap_days_before(year) - leap_days_before(1970)
        + DAYS_BEFORE_MONTH[(month as usize - 1) % 12]
        + leap_day
        + (day - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_to_the_nanosecond() {
        // The expected values are from `date -ud ... +%s`.
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2000-02-29T12:00:00.5Z", 951_825_600, 500_000_000),
            ("2026-01-01T12:00:00.000000001Z", 1_767_268_800, 1),
            ("2100-03-01T00:00:00.000000000Z", 4_107_542_400, 0),
        ] {
            assert_eq!(
                parse_time(text),
                Some(Duration::new(seconds, nanos)),
                "{text}"
            );
        }
        assert_eq!(parse_time("yesterday"), None);
    }

    #[test]
    fn a_missing_field_is_null() {
        let record = Record::parse(r#"{"event":{"action":"session-terminated"}}"#).unwrap();
        assert!(record.is_termination());
        assert!(record.at("source.ip").is_null() && record.text("rule.name").is_empty());
    }
}
