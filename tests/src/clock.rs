//! Times of events, as precise as a test can know them.

use std::{
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};

/// One instant on two clocks: the one of the deadlines (`CLOCK_MONOTONIC`, which `Instant` reads on Linux)
/// and the one of the audit.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// The time on the monotonic clock.
    pub at: Instant,
    /// The time since the epoch.
    pub wall: Duration,
}

impl Time {
    /// The present instant.
    pub fn now() -> Self {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            at: Instant::now(),
            wall,
        }
    }
}

/// The time of an event as an interval between two readings of the clock. On a busy machine the interval is
/// long, but conclusions from it stay valid.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The event was not earlier.
    pub earliest: Time,
    /// The event was not later.
    pub latest: Time,
}

impl Moment {
    /// Runs an action and returns its moment and its value.
    ///
    /// # Errors
    ///
    /// The errors of the action.
    pub fn of<T>(action: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let earliest = Time::now();
        let value = action()?;
        Ok((
            Self {
                earliest,
                latest: Time::now(),
            },
            value,
        ))
    }

    /// A moment this long ago, with a tolerance of `error`.
    pub fn before_now(age: Duration, error: Duration) -> Self {
        let now = Time::now();
        let ago = |age| Time {
            at: now.at - age,
            wall: now.wall.saturating_sub(age),
        };
        Self {
            earliest: ago(age + error),
            latest: ago(age.saturating_sub(error)),
        }
    }

    /// The moment from the start of this one to the end of the other.
    #[must_use]
    pub fn until(self, other: Self) -> Self {
        Self {
            latest: other.latest,
            ..self
        }
    }

    /// The minimum time since this moment.
    pub fn elapsed(&self) -> Duration {
        self.latest.at.elapsed()
    }

    /// Waits until at least this time has passed since the moment.
    pub fn wait(&self, duration: Duration) {
        thread::sleep(duration.saturating_sub(self.elapsed()));
    }
}

/// Waits until `look` finds something. `what` names it in the error.
///
/// # Errors
///
/// The errors of `look`, or a timeout after `bound`.
pub fn eventually<T>(
    what: &str,
    bound: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > bound {
            bail!("waited {bound:?} in vain: {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
