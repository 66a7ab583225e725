//! Shared code of the kernel programs and the daemon: the records in BPF maps, and the two pure decisions.
//! [`matches`](fn@matches) decides whether a rule's entry applies to a connection; [`expiry`] decides whether a session
//! is past its limits. The [`packet`] parser of the kernel programs is here too, so it can be tested on the host.
//!
//! Both sides compile the same functions, so they cannot disagree. The crate has no I/O and reads no clock: time is an
//! argument, in nanoseconds of `CLOCK_BOOTTIME`, so every decision can be tested without waiting.
#![cfg_attr(not(test), no_std)]

mod counters;
mod event;
mod expiry;
mod journal;
mod layout;
mod matching;
mod owner;
pub mod packet;
mod ports;
mod restored;
mod session;
pub mod table;

pub use counters::{ErrorKind, PacketDirection, RuleCounters};
pub use event::{Event, EventError, EventKind};
pub use expiry::{Activity, Expiry, Limits, Reason, expiry};
pub use journal::{JournalEntry, MAX_JOURNAL, MAX_RULE_NAME};
pub use layout::LAYOUT;
pub use matching::{
    Facts, MatchEntry, PortRange, Prefix, RULE_EXEMPT, Table, first_possible, matches,
};
pub use owner::{Ancestors, MAX_CGROUP_LEVELS, MAX_CGROUPS, Owner};
pub use ports::{PortFilter, PortFilters};
pub use restored::{Clocks, Ends, MAX_REMEMBERED};
pub use session::{Address, Choice, Direction, SHORTEST_LIMIT_NS, Session, Traffic, flags};

/// Maximum number of entries in one match table. A rule has one entry for each combination of its prefixes, port ranges
/// and owners.
pub const MAX_MATCH_ENTRIES: u32 = 4096;

/// Maximum number of rules in a configuration.
pub const MAX_RULES: u32 = 1024;
