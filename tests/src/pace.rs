//! How fast the machine is. `cargo xtask vm` says in the environment how many times slower than a
//! real one its machines are, and every bound that depends on it is here.

use std::{env, sync::LazyLock, time::Duration};

/// Names the factor.
const SLOWER: &str = "SESSION_ENFORCER_SLOWER";

/// By how much the clock ticks of a machine that is emulated may come late, divided by how many
/// times slower it is. The kernel's time stamps lag as far behind. 140 ms were measured on one that
/// was ten times slower.
const LATE_TICKS: Duration = Duration::from_millis(25);

static FACTOR: LazyLock<Option<u32>> = LazyLock::new(|| {
    let text = env::var(SLOWER).ok()?;
    Some(
        text.parse()
            .expect("SESSION_ENFORCER_SLOWER is a whole number"),
    )
});

/// How long a test waits for what must come: long enough for a busy machine, and an end for a
/// test that would hang.
pub fn patience() -> Duration {
    scaled(Duration::from_secs(20))
}

/// An upper bound of another kind, which a slower machine needs more of.
pub fn scaled(bound: Duration) -> Duration {
    bound * FACTOR.unwrap_or(1)
}

/// A limit within which a test does something, again and again or once. A machine that is held up for
/// a second needs a longer one, but not one as much longer as the machine is slower.
pub fn unhurried(limit: Duration) -> Duration {
    limit * FACTOR.map_or(1, |factor| factor.div_ceil(3))
}

/// A limit longer than a daemon takes to start, for what must live through a start: on two processors on which compilers ran
/// and five other daemons started, it took up to 3.3 s.
pub fn longer_than_a_start() -> Duration {
    Duration::from_secs(2) + scaled(Duration::from_secs(3))
}

/// How far the kernel's time stamps may lag behind the events beyond what the daemon allows for:
/// not at all, but where the processors of a machine do not run all the time.
pub fn late_ticks() -> Duration {
    FACTOR.map_or(Duration::ZERO, |factor| LATE_TICKS * factor)
}
