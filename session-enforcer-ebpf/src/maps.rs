//! All maps of the programs, with the reason for each type and capacity.

use core::{cell::UnsafeCell, ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_CLONE, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    },
    btf_maps::{Array, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use session_enforcer_common::{
    Ancestors, Clocks, Ends, ErrorKind, Event, JournalEntry, Limits, MAX_CGROUPS, MAX_JOURNAL,
    MAX_MATCH_ENTRIES, MAX_REMEMBERED, MAX_RULES, MatchEntry, Owner, PacketDirection, PortFilters,
    RuleCounters, Session, Table,
    table::{Bucket, Key, MAX_REQUESTS, TableHead, TableRequest},
};

/// The tags of the session table; see `session_enforcer_common::table`. The daemon sets the number of buckets at load,
/// from the table's session capacity, and reads the tags through a mapping.
#[btf_map]
pub(crate) static BUCKETS: Array<Bucket, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The records of the session table, one for each tag.
///
/// An array is allocated when it is created, so an insertion in softirq context never allocates. An LRU map would evict
/// the idle sessions, which are the ones to enforce.
#[btf_map]
pub(crate) static SESSIONS: Array<Session, 1> = Array::new();

/// The head of the session table: session count, capacity and hash key.
#[btf_map]
pub(crate) static TABLE: Array<TableHead, 1> = Array::new();

/// Number of sessions in the table, by rule id.
#[btf_map]
pub(crate) static HELD: Array<u64, { MAX_RULES as usize }> = Array::new();

/// Request buffer of `table_ops`. The daemon writes requests and reads answers through a mapping.
#[btf_map]
pub(crate) static EXCHANGES: Array<
    TableRequest,
    { MAX_REQUESTS as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

/// Journal of the resets in progress; it outlives the daemon. The programs do not access it.
#[btf_map]
pub(crate) static JOURNAL: Array<
    JournalEntry,
    { MAX_JOURNAL as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

/// The entries of both match tables, one table after the other. The entries of a table follow the order of the rules;
/// the first entry that matches decides.
#[btf_map]
pub(crate) static MATCH_ENTRIES: Array<
    MatchEntry,
    { (Table::COUNT * MAX_MATCH_ENTRIES) as usize },
> = Array::new();

/// Generation, number of entries and session shares of each match table in [`MATCH_ENTRIES`].
#[btf_map]
pub(crate) static MATCH_TABLES: Array<Table, { Table::COUNT as usize }> = Array::new();

/// Index of the active table in [`MATCH_ENTRIES`] and [`POLICIES`]; one element. The daemon fills the inactive table
/// and then changes this index, so every connection and packet uses a complete policy.
#[btf_map]
pub(crate) static ACTIVE_TABLE: Array<u32, 1> = Array::new();

/// The limits of each rule, in two tables selected by [`ACTIVE_TABLE`]. The kernel does not copy an array element
/// atomically, so the daemon never overwrites limits that the gate may be reading.
#[btf_map]
pub(crate) static POLICIES: Array<Limits, { (Table::COUNT * MAX_RULES) as usize }> = Array::new();

/// Sessions opened and closed, by rule. Per CPU, so counting needs no atomic operation.
#[btf_map]
pub(crate) static RULE_COUNTERS: PerCpuArray<RuleCounters, { MAX_RULES as usize }> =
    PerCpuArray::new();

/// Errors of the programs, by [`ErrorKind`].
#[btf_map]
pub(crate) static ERRORS: PerCpuArray<u64, { ErrorKind::COUNT as usize }> = PerCpuArray::new();

/// Packets that the gate dropped, by [`PacketDirection`].
#[btf_map]
pub(crate) static GATE_DROPS: PerCpuArray<u64, { PacketDirection::COUNT as usize }> =
    PerCpuArray::new();

/// Session events for the daemon's schedule. 1 MiB holds 21,800 events (40 bytes plus an 8-byte header), which is 0.2 s
/// at 100,000 events/s. The daemon reads at least every 100 ms.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { 1 << 20 }> = RingBuf::new();

/// The owner of each TCP socket that is not established yet.
#[btf_map]
pub(crate) static OWNERS: ClonedSkStorage<Owner> = ClonedSkStorage::new();

/// The ancestor cgroups of each cgroup, by cgroup id; the owner of a session only has its own cgroup id. An LRU map is
/// sufficient: the next socket of the cgroup inserts an evicted entry again, and the daemon can resolve the ancestors
/// itself.
#[btf_map]
pub(crate) static ANCESTORS: LruHashMap<u64, Ancestors, { MAX_CGROUPS as usize }> =
    LruHashMap::new();

/// The clocks of connections whose sockets closed without a FIN. An LRU map is sufficient: an eviction does not extend
/// a session's life, see `repaired`.
#[btf_map]
pub(crate) static RESTORED: LruHashMap<Ends, Clocks, { MAX_REMEMBERED as usize }> =
    LruHashMap::new();

/// Session capacity, number of buckets and hash key of the session table. The daemon sets all three at load, to the
/// values with which the maps were created.
#[unsafe(no_mangle)]
pub(crate) static MAX_SESSIONS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static BUCKET_COUNT: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
pub(crate) static TABLE_KEY: Global<Key> = Global::new(Key(0));

/// Cookie of the only network namespace to track; 0 tracks all namespaces. The daemon sets it at load.
#[unsafe(no_mangle)]
pub(crate) static ONLY_NETNS: Global<u64> = Global::new(0);

/// Generation of this daemon's first policy. In a session of an earlier generation the rule id belongs to another
/// daemon and has no meaning here. The daemon sets it at load.
#[unsafe(no_mangle)]
pub(crate) static FIRST_GENERATION: Global<u32> = Global::new(0);

/// 1 if the kernel supports MPTCP, else 0. The daemon sets it at load.
#[unsafe(no_mangle)]
pub(crate) static HAS_MPTCP: Global<u8> = Global::new(0);

/// The ports of the connections that a rule can match. The section becomes a map of one element, whose address the
/// loader puts into the programs, so they need no map lookup.
#[unsafe(link_section = ".bss.ports")]
pub(crate) static PORTS: WrittenOutside<PortFilters> =
    WrittenOutside(UnsafeCell::new(PortFilters::NONE));

/// A value that the daemon writes while the programs run. Reads must be volatile, because the compiler sees no writer.
#[repr(transparent)]
pub(crate) struct WrittenOutside<T>(UnsafeCell<T>);

// SAFETY: the programs only read it, with volatile accesses.
unsafe impl<T> Sync for WrittenOutside<T> {}

impl<T> WrittenOutside<T> {
    #[inline(always)]
    pub(crate) const fn as_ptr(&self) -> *const T {
        self.0.get()
    }
}

/// Socket storage that accepted sockets inherit (`BPF_F_CLONE`). aya-ebpf's `SkStorage` has fixed flags, so this
/// repeats the layout of its map definitions, from which the loader reads the types.
#[repr(C)]
pub(crate) struct ClonedSkStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: programs never access the fields; the kernel's helpers take the address and do their own locking.
unsafe impl<T> Sync for ClonedSkStorage<T> {}

impl<T> ClonedSkStorage<T> {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// The map's address, as the kernel's helpers expect it.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

/// Index of the active table.
#[inline(always)]
pub(crate) fn active_table() -> u32 {
    ACTIVE_TABLE
        .get(0)
        .map_or(0, |active| active % Table::COUNT)
}

/// The limits of a rule; `None` for `RULE_EXEMPT`.
#[inline(always)]
pub(crate) fn limits_of(rule: u16) -> Option<&'static Limits> {
    let rule = u32::from(rule);
    if rule >= MAX_RULES {
        return None;
    }
    POLICIES.get(active_table() * MAX_RULES + rule)
}
