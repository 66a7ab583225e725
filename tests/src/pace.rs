//! The speed of the machine. `cargo xtask vm` sets in the environment how many times slower its machines are
//! than real ones. Every time limit that depends on it is here.

use std::{env, sync::LazyLock, time::Duration};

/// This variable has the factor.
const SLOWER: &str = "SESSION_ENFORCER_SLOWER";

/// The maximum delay of an emulated machine's clock ticks, divided by its factor. The kernel's time stamps
/// lag by the same amount. 140 ms were measured on a machine that was ten times slower.
const LATE_TICKS: Duration = Duration::from_millis(25);

static FACTOR: LazyLock<Option<u32>> = LazyLock::new(|| {
    let text = env::var(SLOWER).ok()?;
    Some(
        text.parse()
            .expect("SESSION_ENFORCER_SLOWER is a whole number"),
    )
});

/// The time limit for an expected event. It suffices for a busy machine and ends a test that would hang.
pub fn patience() -> Duration {
    scaled(Duration::from_secs(20))
}

/// Scales another upper bound by the factor.
pub fn scaled(bound: Duration) -> Duration {
    bound * FACTOR.unwrap_or(1)
}

/// Scales a limit within which a test acts once or repeatedly. A machine that stalls for a second needs a
/// longer limit, but not by the whole factor.
pub fn unhurried(limit: Duration) -> Duration {
    limit * FACTOR.map_or(1, |factor| factor.div_ceil(3))
}

/// A limit that exceeds the start of a daemon, for sessions that must survive a start. Beside compilers and five other
/// daemons that started, a start took up to 3.3 s on two processors.
pub fn longer_than_a_start() -> Duration {
    Duration::from_secs(2) + scaled(Duration::from_secs(3))
}

/// The maximum lag of the kernel's time stamps beyond the daemon's own tolerance. It is zero unless the
/// machine's processors do not run all the time.
pub fn late_ticks() -> Duration {
    FACTOR.map_or(Duration::ZERO, |factor| LATE_TICKS * factor)
}
