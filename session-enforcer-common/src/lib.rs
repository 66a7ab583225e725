//! What the kernel programs and the daemon share: the records that lie in BPF maps, and the two
//! pure decisions, [`matches`](fn@matches) (does a rule's entry apply to a connection?) and [`expiry`] (has a
//! session outlived its limits?). The kernel programs' reading of [`packet`]s is here too, where it
//! can be tested.
//!
//! Both sides compile the same functions, so they cannot disagree. There is no I/O and no clock
//! here: time is an argument, in nanoseconds of `CLOCK_BOOTTIME`, so that every decision can be
//! tested without waiting.
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
pub use session::{Address, Choice, Direction, Session, Traffic, flags};

/// Entries that one match table holds: the rules of a configuration after every combination of
/// their prefixes and port ranges is written out.
pub const MAX_MATCH_ENTRIES: u32 = 4096;

/// Rules that one configuration may have.
pub const MAX_RULES: u32 = 1024;
