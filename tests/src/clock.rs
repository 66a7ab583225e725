//! When something happened, as exactly as a test can know it.

use std::{
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};

/// One instant, on the clock that deadlines are reckoned with (`CLOCK_MONOTONIC`, which `Instant`
/// reads on Linux) and on the clock that the audit writes.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// On the monotonic clock.
    pub at: Instant,
    /// Time since the epoch.
    pub wall: Duration,
}

impl Time {
    /// This instant.
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

/// When something happened: between two readings of the clock. On a busy machine they lie far
/// apart, and what is reckoned from them is still true.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Not before this.
    pub earliest: Time,
    /// Not after this.
    pub latest: Time,
}

impl Moment {
    /// The moment of an action, with what it returns.
    ///
    /// # Errors
    ///
    /// Those of the action.
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

    /// This long ago, give or take `error`.
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

    /// From the beginning of this one to the end of the other.
    #[must_use]
    pub fn until(self, other: Self) -> Self {
        Self {
            latest: other.latest,
            ..self
        }
    }

    /// Time from this moment to now, at least.
    pub fn elapsed(&self) -> Duration {
        self.latest.at.elapsed()
    }

    /// Waits until this much time has certainly passed since.
    pub fn wait(&self, duration: Duration) {
        thread::sleep(duration.saturating_sub(self.elapsed()));
    }
}

/// Waits until `look` finds something. `what` is for the error.
///
/// # Errors
///
/// Those of `look`, and where it finds nothing for as long as `bound`.
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
