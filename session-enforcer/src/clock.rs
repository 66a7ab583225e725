//! The clocks. STUB
use nix::time::{ClockId, clock_getres, clock_gettime};
/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 { let t = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("clock"); t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64 }
/// tick
pub fn coarse_tick_ns() -> u64 { let t = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).expect("clock"); t.tv_nsec() as u64 }
