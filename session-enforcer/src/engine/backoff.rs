//! The times of comparisons between sessions and sockets. Pure.

use std::time::Duration;

/// Minimum pause between two comparisons, in nanoseconds.
const MIN_PAUSE_NS: u64 = 1_000_000_000;

/// The pause after a comparison is at least this multiple of its processor time, so comparisons use at most a tenth of
/// a processor.
const REST: u32 = 10;

/// Why a comparison is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// No problem is known.
    Routine,
    /// A problem is known that a comparison repairs.
    Mend,
    /// A problem is known that the last comparison did not repair; the next one may fail too.
    TryAgain,
}

/// The pauses between comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backoff {
    interval_ns: u64,
    ended_ns: u64,
    pause_ns: u64,
    /// Number of consecutive comparisons that did not repair everything.
    in_vain: u32,
}

impl Backoff {
    /// Starts as if a comparison had ended at `now_ns`.
    pub(super) fn from(now_ns: u64) -> Self {
        Self {
            interval_ns: u64::MAX,
            ended_ns: now_ns,
            pause_ns: MIN_PAUSE_NS,
            in_vain: 0,
        }
    }

    /// Sets the interval of routine comparisons.
    pub(super) fn set_interval(&mut self, interval: Duration) {
        self.interval_ns = nanoseconds(interval);
    }

    /// Notes the end of a comparison, the processor time that it used, and whether everything is repaired.
    pub(super) fn ended(&mut self, now_ns: u64, used: Duration, all_mended: bool) {
        self.ended_ns = now_ns;
        self.pause_ns = nanoseconds(used * REST).max(MIN_PAUSE_NS);
        self.in_vain = if all_mended {
            0
        } else {
            self.in_vain.saturating_add(1)
        };
    }

    /// When the next comparison begins.
    pub(super) fn next_ns(&self, need: Need) -> u64 {
        let after_ns = match need {
            Need::Routine => self.interval_ns,
            Need::Mend => self.pause_ns,
            Need::TryAgain => {
                let pause_ns = self
                    .pause_ns
                    .saturating_mul(1 << self.in_vain.min(u64::BITS - 2));
                pause_ns.min(self.interval_ns).max(self.pause_ns)
            }
        };
        self.ended_ns.saturating_add(after_ns)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn backoff() -> Backoff {
        let mut backoff = Backoff::from(100 * S);
        backoff.set_interval(Duration::from_secs(600));
        backoff
    }

    #[test]
    fn without_a_problem_the_next_sync_comes_after_the_interval() {
        let mut backoff = backoff();
        assert_eq!(backoff.next_ns(Need::Routine), 700 * S);
        backoff.ended(701 * S, Duration::from_millis(5), true);
        assert_eq!(backoff.next_ns(Need::Routine), 1_301 * S);
    }

    #[test]
    fn a_problem_is_repaired_soon_and_a_long_comparison_is_followed_by_a_long_rest() {
        let mut backoff = backoff();
        assert_eq!(backoff.next_ns(Need::Mend), 101 * S);
        backoff.ended(101 * S, Duration::from_millis(50), true);
        assert_eq!(backoff.next_ns(Need::Mend), 102 * S);
        backoff.ended(105 * S, Duration::from_secs(2), true);
        assert_eq!(backoff.next_ns(Need::Mend), 125 * S);
    }

    #[test]
    fn a_problem_that_stays_is_retried_at_growing_intervals_up_to_the_routine_one() {
        let mut backoff = backoff();
        let mut waits = Vec::new();
        let mut now_ns = 100 * S;
        for _ in 0..100 {
            backoff.ended(now_ns, Duration::ZERO, false);
            let next_ns = backoff.next_ns(Need::TryAgain);
            waits.push((next_ns - now_ns) / S);
            now_ns = next_ns;
        }
        assert_eq!(waits[..4], [2, 4, 8, 16]);
        assert_eq!(waits[99], 600);
        // A problem that can be repaired is not delayed.
        assert_eq!(backoff.next_ns(Need::Mend), backoff.ended_ns + S);
        backoff.ended(now_ns, Duration::ZERO, true);
        assert_eq!(backoff.next_ns(Need::TryAgain), now_ns + S);
    }

    #[test]
    fn a_short_interval_does_not_shorten_the_rest() {
        let mut backoff = backoff();
        backoff.set_interval(Duration::from_secs(1));
        backoff.ended(S, Duration::from_secs(1), false);
        assert_eq!(backoff.next_ns(Need::TryAgain), 11 * S);
    }
}
