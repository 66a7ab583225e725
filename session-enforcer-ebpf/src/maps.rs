//! Every map, its capacity and why.

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

/// The tags of the session table; see `session_enforcer_common::table`. The daemon sets the number of
/// buckets at load, from the sessions that the table is made for, and reads them through a mapping.
#[btf_map]
pub(crate) static BUCKETS: Array<Bucket, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The records of the session table, one for each tag. As an array it has its memory from the start, so
/// that an insertion in softirq context never waits for any; and nothing is ever put out of it to make
/// room, as in an LRU map: that would be the idle session, the one to enforce.
#[btf_map]
pub(crate) static SESSIONS: Array<Session, 1> = Array::new();

/// What the session table knows of itself.
#[btf_map]
pub(crate) static TABLE: Array<TableHead, 1> = Array::new();

/// Sessions in the table, by the id of their rule.
#[btf_map]
pub(crate) static HELD: Array<u64, { MAX_RULES as usize }> = Array::new();

/// The daemon's requests to `table_ops`, which it writes and reads through a mapping.
#[btf_map]
pub(crate) static EXCHANGES: Array<
    TableRequest,
    { MAX_REQUESTS as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

/// What the daemon is about to reset, which outlives it. No program looks at it.
#[btf_map]
pub(crate) static JOURNAL: Array<
    JournalEntry,
    { MAX_JOURNAL as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

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

/// Index of the table in force, of [`MATCH_ENTRIES`] and of [`POLICIES`]; one element. The daemon
/// fills the other table and then changes this one number, so that no connection and no packet ever
/// meets half a policy.
#[btf_map]
pub(crate) static ACTIVE_TABLE: Array<u32, 1> = Array::new();

/// The limits of each rule, for the packet path, in two tables as above: the kernel does not copy an
/// element in one piece, and the gate must not judge by the half of one.
#[btf_map]
pub(crate) static POLICIES: Array<Limits, { (Table::COUNT * MAX_RULES) as usize }> = Array::new();

/// Sessions opened and closed, by rule. Per CPU, so that counting needs no atomic operation.
#[btf_map]
pub(crate) static RULE_COUNTERS: PerCpuArray<RuleCounters, { MAX_RULES as usize }> =
    PerCpuArray::new();

/// Errors by [`ErrorKind`].
#[btf_map]
pub(crate) static ERRORS: PerCpuArray<u64, { ErrorKind::COUNT as usize }> = PerCpuArray::new();

/// Packets that the gate dropped, by [`PacketDirection`].
#[btf_map]
pub(crate) static GATE_DROPS: PerCpuArray<u64, { PacketDirection::COUNT as usize }> =
    PerCpuArray::new();

/// What happens to tracked sessions, for the daemon's schedule. 1 MiB holds 21,800 events
/// (40 bytes and a header of 8): a fifth of a second at 100,000 events a second, while the
/// daemon reads every 100 ms at the latest.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { 1 << 20 }> = RingBuf::new();

/// Who made each TCP socket that is not established yet.
#[btf_map]
pub(crate) static OWNERS: ClonedSkStorage<Owner> = ClonedSkStorage::new();

/// By the identity of a cgroup, those above it: an owner tells only its own. LRU, unlike the
/// sessions: what is lost is noted again with the next socket, and the daemon finds it elsewhere.
#[btf_map]
pub(crate) static ANCESTORS: LruHashMap<u64, Ancestors, { MAX_CGROUPS as usize }> =
    LruHashMap::new();

/// The clocks of connections whose sockets closed without a word to the peer. LRU, unlike the sessions: who has it
/// forget a connection gains nothing, see `restored`.
#[btf_map]
pub(crate) static RESTORED: LruHashMap<Ends, Clocks, { MAX_REMEMBERED as usize }> =
    LruHashMap::new();

/// Sessions that the table may hold, its buckets, and where cookies lie in it. Set by the daemon at
/// load, to what the maps were made with.
#[unsafe(no_mangle)]
pub(crate) static MAX_SESSIONS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static BUCKET_COUNT: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
pub(crate) static TABLE_KEY: Global<Key> = Global::new(Key(0));

/// Cookie of the only network namespace to track, or 0 for every one. Set by the daemon at load.
#[unsafe(no_mangle)]
pub(crate) static ONLY_NETNS: Global<u64> = Global::new(0);

/// Generation of this daemon's first policy. A session of an earlier one was written under another
/// daemon, and the id of its rule means nothing here. Set by the daemon at load.
#[unsafe(no_mangle)]
pub(crate) static FIRST_GENERATION: Global<u32> = Global::new(0);

/// Whether the kernel has MPTCP; 0 or 1. Set by the daemon at load.
#[unsafe(no_mangle)]
pub(crate) static HAS_MPTCP: Global<u8> = Global::new(0);

/// The ports of the connections that a rule can match. In a section of its own, which is a map of one
/// element to the loader: the programs have its address, and need not look it up.
#[unsafe(link_section = ".bss.ports")]
pub(crate) static PORTS: WrittenOutside<PortFilters> =
    WrittenOutside(UnsafeCell::new(PortFilters::NONE));

/// What the daemon writes while the programs run. To be read volatile: the compiler sees nobody
/// write it.
#[repr(transparent)]
pub(crate) struct WrittenOutside<T>(UnsafeCell<T>);

// SAFETY: the programs never write it, and read it volatile alone.
unsafe impl<T> Sync for WrittenOutside<T> {}

impl<T> WrittenOutside<T> {
    #[inline(always)]
    pub(crate) const fn as_ptr(&self) -> *const T {
        self.0.get()
    }
}

/// Socket storage that accepted sockets inherit. `SkStorage` of aya-ebpf has other flags, and they
/// cannot be changed; the layout is that of its map definitions, from which the loader reads the
/// types.
#[repr(C)]
pub(crate) struct ClonedSkStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: never read or written; the kernel's helpers take its address and do their own locking.
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

    /// What the kernel's helpers take for the map.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}
