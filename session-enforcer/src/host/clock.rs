//! The clocks. `CLOCK_BOOTTIME` serves every decision; the wall clock is only for people.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_getres, clock_gettime},
};
use serde::{Serialize, Serializer};

/// The tick length if the kernel does not report it: that of the slowest configuration, `HZ=100`.
const LONGEST_TICK_NS: u64 = 10_000_000;

/// `CLOCK_BOOTTIME` in nanoseconds, the clock of the eBPF programs' time stamps. It is monotonic and
/// continues during suspend, so a suspended night counts as idle time.
pub fn monotonic_ns() -> u64 {
    // The clock exists on every Linux, so the call cannot fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, nanoseconds)
}

/// Whether `CLOCK_BOOTTIME` of this process is the host's, by which the kernel stamps packets. In a time namespace it
/// can have an offset (`/proc/pid/timens_offsets`).
pub fn is_of_host() -> bool {
    // The file does not exist if the kernel has no time namespaces.
    has_no_offset(&std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default())
}

fn has_no_offset(offsets: &str) -> bool {
    let boottime = offsets
        .lines()
        .find_map(|line| line.strip_prefix("boottime"));
    boottime.is_none_or(|offset| offset.split_whitespace().all(|number| number == "0"))
}

/// `CLOCK_MONOTONIC` in nanoseconds, which systemd's protocol requires.
pub fn awake_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, nanoseconds)
}

/// The processor time that all threads of this process have used, in nanoseconds.
pub fn processor_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(0, nanoseconds)
}

/// The processor time that the calling thread has used, in nanoseconds.
pub fn thread_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(0, nanoseconds)
}

/// The maximum error of an age that the kernel measures in coarse time, as for a connection older than the
/// daemon: two ticks. Coarse time advances at each tick, by whole ticks of the clock source. Those ticks have
/// another phase, so the clock can lag by one tick right after an update. With ticks of 4 ms a lag of 6.8 ms
/// was measured (Linux 6.18). A delayed tick increases the lag by its delay.
pub fn coarse_lag_ns() -> u64 {
    2 * clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_or(LONGEST_TICK_NS, nanoseconds)
}

fn nanoseconds(time: TimeSpec) -> u64 {
    u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX)
}

/// The wall clock and the monotonic clock at one moment, for converting monotonic times. The wall clock can
/// be set at any time, so a pair is valid only for the records of that moment.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    realtime_ns: i128,
    monotonic_ns: u64,
}

impl WallClock {
    /// Reads both clocks.
    pub fn now() -> Self {
        let realtime = clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, nanoseconds);
        Self {
            realtime_ns: i128::from(realtime),
            monotonic_ns: monotonic_ns(),
        }
    }

    /// Converts a monotonic time to a wall-clock time.
    pub fn at(&self, monotonic_ns: u64) -> Moment {
        let distance = i128::from(monotonic_ns) - i128::from(self.monotonic_ns);
        let time = Timestamp::from_nanosecond(self.realtime_ns + distance);
        Moment(time.unwrap_or(Timestamp::UNIX_EPOCH))
    }
}

/// A wall-clock time. It prints as RFC 3339 in UTC with nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Moment(Timestamp);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.9}", self.0)
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
impl WallClock {
    pub(crate) const fn pair(realtime_ns: i128, monotonic_ns: u64) -> Self {
        Self {
            realtime_ns,
            monotonic_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    #[test]
    fn an_offset_of_a_time_namespace_is_noticed() {
        assert!(is_of_host());
        let offsets =
            |boottime| format!("monotonic           0         0\nboottime   {boottime}\n");
        assert!(has_no_offset(&offsets("        0         0")));
        assert!(!has_no_offset(&offsets("   100000         0")));
        assert!(!has_no_offset(&offsets("       -1 500000000")));
        assert!(has_no_offset(""));
    }

    #[test]
    fn moments_before_and_after_the_pair_are_told() {
        let clock = WallClock::pair(1_767_268_800_000_000_000, 5_000_000_000);
        assert_eq!(
            clock.at(5_000_000_000).to_string(),
            "2026-01-01T12:00:00.000000000Z"
        );
        assert_eq!(
            clock.at(5_000_000_001).to_string(),
            "2026-01-01T12:00:00.000000001Z"
        );
        assert_eq!(
            clock.at(3_999_000_000).to_string(),
            "2026-01-01T11:59:58.999000000Z"
        );
    }

    /// The files of a directory tree.
    fn files(directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap();
        let below = entries.map(|entry| entry.unwrap().path());
        below
            .flat_map(|path| {
                if path.is_dir() {
                    files(&path)
                } else {
                    vec![path]
                }
            })
            .collect()
    }

    /// The wall clock can be set back and forth. Only times for people may use it: those in audit records and
    /// the time of the last reload.
    #[test]
    fn nothing_is_decided_by_a_clock_that_can_be_set() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let all = [
            "src",
            "../session-enforcer-common/src",
            "../session-enforcer-ebpf/src",
        ];
        let sources = all
            .into_iter()
            .flat_map(|source| files(&package.join(source)));
        let settable = [
            "REALTIME",
            "SystemTime",
            "Timestamp::now",
            "Zoned::now",
            "get_tai",
        ];
        let reads = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap();
            settable.iter().any(|clock| text.contains(clock))
        };
        let mut found: Vec<PathBuf> = sources.filter(reads).collect();
        found.sort();
        let known = ["src/host/clock.rs", "src/report/metrics/groups.rs"];
        assert_eq!(found, known.map(|path| package.join(path)));
    }

    /// The eBPF programs and the daemon must use the same clock: `CLOCK_MONOTONIC` differs from
    /// `CLOCK_BOOTTIME` by the time that the host was suspended.
    #[test]
    fn nothing_is_decided_by_a_clock_that_stands_still_while_the_host_sleeps() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let sleeps = ["bpf_ktime_get_ns", "CLOCK_MONOTONIC)", "awake_ns()"];
        let sources =
            ["src", "../session-enforcer-ebpf/src"].map(|source| files(&package.join(source)));
        let reads = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap();
            sleeps.iter().any(|clock| text.contains(clock))
        };
        let mut found: Vec<PathBuf> = sources.into_iter().flatten().filter(reads).collect();
        found.sort();
        let known = ["src/host/clock.rs", "src/report/service_manager.rs"];
        assert_eq!(found, known.map(|path| package.join(path)));
    }

    #[test]
    fn the_clocks_go_on_and_the_lag_is_some_ticks() {
        let before = monotonic_ns();
        assert!(before > 0 && monotonic_ns() >= before);
        assert!((100_000..=2 * LONGEST_TICK_NS).contains(&coarse_lag_ns()));
    }
}
