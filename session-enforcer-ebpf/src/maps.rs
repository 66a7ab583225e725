//! Every map, its capacity and why.

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use session_enforcer_common::{
    ErrorKind, Event, MAX_MATCH_ENTRIES, MAX_RULES, MatchEntry, Policy, RuleCounters, Session,
    Table,
};

/// The sessions by socket cookie. Preallocated, so that an insert in softirq context never waits
/// for memory, and never LRU: the victim of an LRU map is the idle session, the one to enforce.
/// The daemon sets the capacity at load, from `daemon.max_sessions`.
#[btf_map]
pub(crate) static SESSIONS: HashMap<u64, Session, 262_144> = HashMap::new();

/// The entries of both match tables, one behind the other, each in the order of the rules: the
/// first that applies decides.
#[btf_map]
pub(crate) static MATCH_ENTRIES: Array<
    MatchEntry,
    { (Table::COUNT * MAX_MATCH_ENTRIES) as usize },
> = Array::new();

/// Describes the tables of [`MATCH_ENTRIES`].
#[btf_map]
pub(crate) static MATCH_TABLES: Array<Table, { Table::COUNT as usize }> = Array::new();

/// Index of the table in force; one element. The daemon fills the other table and then changes this
/// one number, so that no connection ever meets half a policy.
#[btf_map]
pub(crate) static ACTIVE_TABLE: Array<u32, 1> = Array::new();

/// The limits of each rule, for the packet path.
#[btf_map]
pub(crate) static POLICIES: Array<Policy, { MAX_RULES as usize }> = Array::new();

/// Sessions opened and closed, by rule. Per CPU, so that counting needs no atomic operation.
#[btf_map]
pub(crate) static RULE_COUNTERS: PerCpuArray<RuleCounters, { MAX_RULES as usize }> =
    PerCpuArray::new();

/// Errors by [`ErrorKind`].
#[btf_map]
pub(crate) static ERRORS: PerCpuArray<u64, { ErrorKind::COUNT as usize }> = PerCpuArray::new();

/// Openings and closings of tracked sessions, for the daemon's schedule. 1 MiB holds 26,000 events
/// (32 bytes and a header of 8): a quarter of a second at 100,000 events a second, while the
/// daemon reads every 100 ms at the latest.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { 1 << 20 }> = RingBuf::new();

/// Cookie of the only network namespace to track, or 0 for every one. Set by the daemon at load.
#[unsafe(no_mangle)]
pub(crate) static ONLY_NETNS: Global<u64> = Global::new(0);

/// Generation of this daemon's first policy. A session of an earlier one was written under another
/// daemon, and the place of its rule means nothing here. Set by the daemon at load.
#[unsafe(no_mangle)]
pub(crate) static FIRST_GENERATION: Global<u32> = Global::new(0);
