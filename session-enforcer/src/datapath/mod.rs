//! The kernel programs and their maps: load, attach, pin, take over, read. The only module that uses aya.

mod attach;
mod attachable;
mod bpf_error;
mod bpffs;
mod events;
mod inherit;
mod larger_table;
mod pin_error;
mod pinned_set;
mod pins;
mod port_filter;
mod reset_journal;
mod session_reader;
mod session_table;
mod sys;

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage},
};
use aya_log::EbpfLogger;
use session_enforcer_common::{
    Ancestors, ErrorKind, Limits, MAX_MATCH_ENTRIES, MAX_RULES, MatchEntry, Owner, PacketDirection,
    RULE_EXEMPT, RuleCounters, Session, Table,
    table::{Key, TableHead, WAYS, buckets_for},
};
use tokio::io::unix::AsyncFd;

pub use bpf_error::{BpfError, Holder};
pub use bpffs::{Bpffs, find as find_bpffs};
pub use events::{Events, KernelLog};
pub use inherit::Inherited;
pub use larger_table::{Larger, Loading};
pub use pin_error::PinError;
pub use pins::PinDir;
pub use port_filter::Narrowing;
pub use reset_journal::{Journal, JournalSlot};
pub use session_reader::{Cursor, SessionReader, TableInUse};

use attach::Attached;
use inherit::Pins;
use larger_table::{Before, Loader, Next};
use port_filter::Ports;
use session_table::SessionTable;

/// The object that `build.rs` builds from `session-enforcer-ebpf`.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/session-enforcer-ebpf"));

// Flag of `linux/bpf.h`.
const BPF_NOEXIST: u64 = 1;

/// Options of the programs.
#[derive(Debug)]
pub struct Options {
    /// Maximum number of sessions in the session table.
    pub max_sessions: u32,
    /// The only network namespace to track; `None` tracks all.
    pub only_netns: Option<u64>,
    /// Whether socket owners are recorded from the attachment on.
    pub notes_owners: bool,
    /// Whether the programs log their actions as well as their errors.
    pub verbose: bool,
}

/// Load-time parameters of the programs of one table.
#[derive(Clone, Copy, Debug)]
struct LoadOptions {
    /// Maximum number of sessions in the table.
    capacity: u32,
    /// Key of the assignment of cookies to buckets.
    key: Key,
    /// Generation of the daemon's first policy.
    first_generation: u32,
    /// The only network namespace to track; 0 tracks all.
    only_netns: u64,
    log_level: aya_log::Level,
}

/// Whether the kernel has MPTCP; then each network namespace has this directory.
fn has_mptcp() -> bool {
    Path::new("/proc/sys/net/mptcp").exists()
}

/// Result of inserting a session of the daemon into the session table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// The session was inserted.
    Inserted,
    /// The table already has the session.
    Known,
    /// The table has no slot for a session of the rule, or both buckets of the cookie are full.
    Full,
    /// The rule has reached its `max_sessions`.
    RuleFull,
}

/// The loaded programs and their maps.
pub struct Datapath {
    ebpf: Ebpf,
    options: Options,
    attached: Vec<Attached>,
    /// `None` if nothing shall outlive the daemon.
    pins: Option<Pins>,
    /// The load options of the running programs.
    load_options: LoadOptions,
    /// The maps that the programs of a larger table share.
    shared: Vec<(String, OwnedFd)>,
    /// `None` if the table has its full size or cannot grow.
    loader: Option<Loader>,
    /// Whether the last attempt to grow has failed.
    has_not_grown: bool,
    next: Option<Next>,
    before: Option<Before>,
    sessions: SessionTable,
    in_use: Arc<TableInUse>,
    table: Array<MapData, TableHead>,
    rule_counters: PerCpuArray<MapData, RuleCounters>,
    errors: PerCpuArray<MapData, u64>,
    gate_drops: PerCpuArray<MapData, u64>,
    match_entries: Array<MapData, MatchEntry>,
    match_tables: Array<MapData, Table>,
    active_table: Array<MapData, u32>,
    policies: Array<MapData, Limits>,
    ports: Ports,
    /// Slots that a rule which holds its share leaves to the other rules.
    reserve: u32,
    owners: SkStorage<MapData, Owner>,
    ancestors: HashMap<MapData, u64, Ancestors>,
    journal: Arc<Journal>,
    /// Index of the active match table.
    active: u32,
    /// Number of rule ids in use.
    rule_ids: u32,
    /// Number of policies that were put into force.
    policies_put: u64,
}

impl Datapath {
    /// Loads maps and programs without attaching them. With a pin directory, the programs use the sessions that an
    /// earlier daemon left there.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses a map, a program or a pin.
    pub fn load(options: Options, directory: Option<PinDir>) -> Result<Self, BpfError> {
        let pins = directory.map(Pins::inspect).transpose()?;
        let first_generation = pins.as_ref().map_or(0, Pins::generation).saturating_add(1);
        // Without pins the programs of a larger table cannot share the existing maps, so the table gets its full size.
        let capacity = match &pins {
            Some(pins) => pins.capacity(options.max_sessions),
            None => options.max_sessions,
        };
        // The key of the inherited table, or a random key for a new table.
        let key = match pins.as_ref().and_then(|pins| pins.key(capacity)) {
            Some(key) => key,
            None => random_key()?,
        };
        let load_options = LoadOptions {
            capacity,
            key,
            first_generation,
            only_netns: options.only_netns.unwrap_or(0),
            log_level: if options.verbose {
                aya_log::Level::Debug
            } else {
                aya_log::Level::Warn
            },
        };
        let shared = pins.iter().flat_map(|pins| pins.shared(capacity));
        let mut ebpf = load_object(&load_options, shared)?;
        if let Some(pins) = &pins {
            pins.pin_maps(&ebpf)?;
        }
        let loader = match &pins {
            Some(_) if capacity < options.max_sessions => Some(Loader::start()?),
            _ => None,
        };
        let shared = larger_table::shared_maps(&ebpf)?;
        let sessions = table_of(&mut ebpf, capacity)?;
        let mut datapath = Self {
            shared,
            in_use: Arc::new(TableInUse::new(reader_of(&ebpf, &sessions, key)?)),
            sessions,
            table: take_map(&mut ebpf, session_table::TABLE)?,
            rule_counters: take_map(&mut ebpf, "RULE_COUNTERS")?,
            errors: take_map(&mut ebpf, "ERRORS")?,
            gate_drops: take_map(&mut ebpf, "GATE_DROPS")?,
            match_entries: take_map(&mut ebpf, "MATCH_ENTRIES")?,
            match_tables: take_map(&mut ebpf, "MATCH_TABLES")?,
            active_table: take_map(&mut ebpf, "ACTIVE_TABLE")?,
            policies: take_map(&mut ebpf, "POLICIES")?,
            ports: Ports::new(take_map(&mut ebpf, port_filter::SECTION)?),
            reserve: 0,
            owners: take_map(&mut ebpf, "OWNERS")?,
            ancestors: take_map(&mut ebpf, "ANCESTORS")?,
            journal: take_journal(&mut ebpf)?,
            active: 0,
            rule_ids: 0,
            policies_put: 0,
            ebpf,
            options,
            load_options,
            attached: Vec::new(),
            pins,
            loader,
            has_not_grown: false,
            next: None,
            before: None,
        };
        // Tests the session table before anything depends on it. A socket's cookie is never 0.
        datapath.session(0)?;
        datapath.copy_sessions()?;
        Ok(datapath)
    }

    /// Puts a policy into force: the match table of this generation, and the limits by rule id. A connection or packet
    /// never meets a part of it or a rule without limits. The programs then see every packet until
    /// [`narrow_ports`](Self::narrow_ports).
    ///
    /// # Errors
    ///
    /// Fails if the policy is too large or the kernel refuses a write; the previous policy then stays in force.
    pub fn put_policy(
        &mut self,
        generation: u32,
        entries: &[MatchEntry],
        policies: &[Limits],
    ) -> Result<(), BpfError> {
        let count = u32::try_from(entries.len())
            .ok()
            .filter(|count| *count <= MAX_MATCH_ENTRIES)
            .ok_or(BpfError::TooManyEntries(entries.len()))?;
        let rule_ids = u32::try_from(policies.len())
            .ok()
            .filter(|ids| *ids <= MAX_RULES)
            .ok_or(BpfError::TooManyRules(policies.len()))?;
        let next = (self.active + 1) % Table::COUNT;
        self.policies_put += 1;
        self.ports.announce(next, entries)?;
        for (index, entry) in (next * MAX_MATCH_ENTRIES..).zip(entries) {
            let entries = &mut self.match_entries;
            entries
                .set(index, entry, 0)
                .map_err(map_error("MATCH_ENTRIES"))?;
        }
        // Rules that are removed or exempt track no sessions and get no share.
        let mut tracking: Vec<u16> = entries.iter().map(|entry| entry.rule).collect();
        tracking.retain(|rule| *rule != RULE_EXEMPT);
        tracking.sort_unstable();
        tracking.dedup();
        let (share, reserve) = Table::shares(tracking.len() as u32, self.load_options.capacity);
        let table = Table {
            generation,
            entries: count,
            share,
            reserve,
        };
        self.reserve = reserve;
        // During growth the records of the two tables are not merged yet, so no gate may judge by one of them.
        let has_gates = self.before.is_none();
        let tables = &mut self.match_tables;
        tables
            .set(next, table, 0)
            .map_err(map_error("MATCH_TABLES"))?;
        for (index, policy) in (next * MAX_RULES..).zip(policies) {
            let gate = if has_gates { policy.gate } else { 0 };
            let (map, policy) = (&mut self.policies, Limits { gate, ..*policy });
            map.set(index, policy, 0).map_err(map_error("POLICIES"))?;
        }
        // The tables must be written before the index that activates them, also as seen from other processors. System
        // calls alone do not guarantee that order.
        fence(Ordering::Release);
        let active = &mut self.active_table;
        active.set(0, next, 0).map_err(map_error("ACTIVE_TABLE"))?;
        (self.active, self.rule_ids) = (next, rule_ids);
        Ok(())
    }

    /// Takes the ring buffer of events; possible once.
    ///
    /// # Errors
    ///
    /// Fails if it was taken already or cannot be watched.
    pub fn take_events(&mut self) -> Result<Events, BpfError> {
        let ring: RingBuf<MapData> = take_map(&mut self.ebpf, "EVENTS")?;
        // SAFETY: the ring buffer owns its descriptor and returns the same one until it is dropped.
        let ring = unsafe { AsyncFd::register(ring) }.map_err(|e| BpfError::Watch(e.into()))?;
        Ok(Events { ring })
    }

    /// Takes the channel of the programs' log; possible once.
    ///
    /// # Errors
    ///
    /// Fails if it was taken already or cannot be watched.
    pub fn take_log(&mut self) -> Result<KernelLog, BpfError> {
        let logger =
            EbpfLogger::init(&mut self.ebpf).map_err(|_| BpfError::Missing("map AYA_LOGS"))?;
        // SAFETY: the logger's ring buffer owns its descriptor, as above.
        let logger = unsafe { AsyncFd::register(logger) }.map_err(|e| BpfError::Watch(e.into()))?;
        Ok(KernelLog { logger })
    }

    /// Maximum number of sessions after all growth.
    pub fn max_sessions(&self) -> u32 {
        self.options.max_sessions
    }

    /// Maximum number of sessions in the current table.
    pub fn capacity(&self) -> usize {
        self.load_options.capacity as usize
    }

    /// Maximum number of sessions of a single rule in the current table.
    pub fn common_capacity(&self) -> usize {
        self.load_options.capacity.saturating_sub(self.reserve) as usize
    }

    /// Sets rule and generation of sessions, each identified by cookie and time of establishment.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn decide(&mut self, sessions: &[(u64, Session)]) -> Result<(), BpfError> {
        if let Some(larger) = self.larger() {
            larger.decide(sessions)?;
        }
        self.sessions.decide(sessions)
    }

    /// Number of sessions in the session table, as the programs count them.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn session_count(&self) -> Result<u64, BpfError> {
        let head = self
            .table
            .get(&0, 0)
            .map_err(map_error(session_table::TABLE))?;
        // Briefly negative if the pinned count was too low.
        Ok(head.sessions.cast_signed().max(0).cast_unsigned())
    }

    /// The session table for another thread, which only reads it.
    pub fn table_in_use(&self) -> Arc<TableInUse> {
        Arc::clone(&self.in_use)
    }

    /// The journal of resets.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// The current record of the session.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let mut session = [self.sessions.session(cookie)?];
        self.merge_all(&[cookie], &mut session)?;
        Ok(session[0])
    }

    /// The current records of the sessions, in the order of the cookies. Many are read in one system call.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn sessions(&self, cookies: &[u64]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut sessions = self.sessions.sessions(cookies)?;
        self.merge_all(cookies, &mut sessions)?;
        Ok(sessions)
    }

    /// Shuts the gates of sessions that are to be reset, each identified by cookie and time of establishment, and then
    /// reads their records. The records are in the order of the sessions, `None` for one that does not exist. A packet
    /// whose stamp is not in the returned record is dropped, until the session is [reopened](Self::reopen).
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation. Some gates may then be shut.
    pub fn shut(&self, sessions: &[(u64, u64)]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut shut = self.sessions.shut(sessions)?;
        let cookies: Vec<u64> = sessions.iter().map(|(cookie, _)| *cookie).collect();
        self.merge_all(&cookies, &mut shut)?;
        // A session that is not in the larger table yet is copied later with its gate shut.
        if let Some(larger) = self.larger() {
            larger.shut(sessions)?;
        }
        Ok(shut)
    }

    /// Reopens the gate of a session that was [shut](Self::shut), if the session still exists.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn reopen(&self, cookie: u64, established_ns: u64) -> Result<(), BpfError> {
        if let Some(larger) = self.larger() {
            larger.reopen(cookie, established_ns)?;
        }
        self.sessions.reopen(cookie, established_ns)
    }

    /// The cookies of all sessions in the session table, without duplicates.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        self.sessions.cookies()
    }

    /// Inserts a session that the table does not have. An existing record is not changed: overwriting it could lose the
    /// stamp of a packet that passes at the same time.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn adopt(&mut self, cookie: u64, session: &Session) -> Result<Adoption, BpfError> {
        let adopted = self.sessions.adopt(&[(cookie, *session)])?;
        Ok(adopted[0])
    }

    /// As [`adopt`](Self::adopt) for many sessions. Returns the result for each, in their order.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn adopt_all(&mut self, sessions: &[(u64, Session)]) -> Result<Vec<Adoption>, BpfError> {
        self.sessions.adopt(sessions)
    }

    /// Updates an existing session; returns whether it still exists. Activity since the session was read is kept
    /// ([`Session::merge_activity`]).
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn update(&mut self, cookie: u64, session: &Session) -> Result<bool, BpfError> {
        if let Some(larger) = self.larger() {
            larger.update(cookie, session)?;
        }
        self.sessions.update(cookie, session)
    }

    /// Removes the session established at `established_ns`, but not a later session of the same socket. Returns whether
    /// it existed.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn remove(&mut self, cookie: u64, established_ns: u64) -> Result<bool, BpfError> {
        if let Some(larger) = self.larger() {
            larger.remove(cookie, established_ns)?;
        }
        self.sessions.remove(cookie, established_ns)
    }

    /// Stores the owner of a socket that is older than the programs. An owner that the kernel has recorded is not
    /// changed.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation.
    pub fn note_owner(&mut self, socket: &impl AsRawFd, owner: &Owner) -> Result<(), BpfError> {
        match self.owners.insert(socket, owner, BPF_NOEXIST) {
            Err(source) if os_error(&source) != Some(libc::EEXIST) => {
                Err(map_error("OWNERS")(source))
            }
            _ => Ok(()),
        }
    }

    /// The ancestors of a cgroup, if the kernel has recorded them.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn ancestors(&self, cgroup_id: u64) -> Result<Option<Ancestors>, BpfError> {
        match self.ancestors.get(&cgroup_id, 0) {
            Ok(ancestors) => Ok(Some(ancestors)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(map_error("ANCESTORS")(source)),
        }
    }

    /// Stores the ancestors of a cgroup, for sessions that are older than the programs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written.
    pub fn note_ancestors(
        &mut self,
        cgroup_id: u64,
        ancestors: &Ancestors,
    ) -> Result<(), BpfError> {
        let map = &mut self.ancestors;
        map.insert(cgroup_id, ancestors, 0)
            .map_err(map_error("ANCESTORS"))
    }

    /// Session counters by rule id.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn rule_counters(&self) -> Result<Vec<RuleCounters>, BpfError> {
        let sum = |rule| {
            let per_cpu = self
                .rule_counters
                .get(&rule, 0)
                .map_err(map_error("RULE_COUNTERS"))?;
            Ok(per_cpu
                .iter()
                .fold(RuleCounters::default(), |sum, c| RuleCounters {
                    opened: sum.opened + c.opened,
                    closed: sum.closed + c.closed,
                }))
        };
        (0..self.rule_ids).map(sum).collect()
    }

    /// Error counters of the programs, by [`ErrorKind`].
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn errors(&self) -> Result<[u64; ErrorKind::COUNT as usize], BpfError> {
        let mut counts = [0; ErrorKind::COUNT as usize];
        for kind in ErrorKind::ALL {
            counts[kind as usize] = self.error_count(kind)?;
        }
        Ok(counts)
    }

    /// Packets that the gate dropped, by [`PacketDirection`].
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn gate_drops(&self) -> Result<[u64; PacketDirection::COUNT as usize], BpfError> {
        let mut counts = [0; PacketDirection::COUNT as usize];
        for way in PacketDirection::ALL {
            let per_cpu = self
                .gate_drops
                .get(&(way as u32), 0)
                .map_err(map_error("GATE_DROPS"))?;
            counts[way as usize] = per_cpu.iter().sum();
        }
        Ok(counts)
    }

    /// Error counter of one kind.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn error_count(&self, kind: ErrorKind) -> Result<u64, BpfError> {
        let per_cpu = self
            .errors
            .get(&(kind as u32), 0)
            .map_err(map_error("ERRORS"))?;
        Ok(per_cpu.iter().sum())
    }
}

/// Loads the programs and maps; maps with an entry in `pins` are opened from or created at that path.
fn load_object<'a>(
    options: &LoadOptions,
    pins: impl Iterator<Item = (&'a str, PathBuf)>,
) -> Result<Ebpf, BpfError> {
    let bucket_count = buckets_for(options.capacity);
    let (has_mptcp, log_level) = (u8::from(has_mptcp()), options.log_level as u8);
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(session_table::BUCKETS, bucket_count)
        .map_max_entries(session_table::SESSIONS, bucket_count * WAYS)
        .override_global("MAX_SESSIONS", &options.capacity, true)
        .override_global("BUCKET_COUNT", &bucket_count, true)
        .override_global("TABLE_KEY", &options.key, true)
        .override_global("ONLY_NETNS", &options.only_netns, true)
        .override_global("HAS_MPTCP", &has_mptcp, true)
        .override_global("FIRST_GENERATION", &options.first_generation, true)
        .override_global(aya_log::LEVEL, &log_level, true);
    for (name, path) in pins {
        loader.map_pin_path(name, path);
    }
    let mut ebpf = loader.load(OBJECT)?;
    attach::load(&mut ebpf)?;
    begin_table(&mut ebpf, options.capacity, options.key)?;
    Ok(ebpf)
}

fn take_map<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, BpfError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(BpfError::Missing(name))?;
    M::try_from(map).map_err(map_error(name))
}

fn random_key() -> Result<Key, BpfError> {
    let mut random = [0; 8];
    // SAFETY: the buffer has the given length. The kernel returns up to 256 bytes in one piece.
    let read = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    if usize::try_from(read) != Ok(random.len()) {
        return Err(BpfError::Table(io::Error::last_os_error()));
    }
    Ok(Key(u64::from_ne_bytes(random)))
}

/// Initialises the head of a new table.
fn begin_table(ebpf: &mut Ebpf, capacity: u32, key: Key) -> Result<(), BpfError> {
    let map = ebpf.map_mut(session_table::TABLE);
    let map = map.ok_or(BpfError::Missing(session_table::TABLE))?;
    let error = map_error(session_table::TABLE);
    let mut heads: Array<_, TableHead> = Array::try_from(map).map_err(&error)?;
    let before = heads.get(&0, 0).map_err(&error)?;
    // An inherited table has its head already, and running programs may be changing its count.
    if before.capacity == 0 {
        let head = TableHead {
            sessions: 0,
            capacity: u64::from(capacity),
            key,
        };
        heads.set(0, head, 0).map_err(&error)?;
    }
    Ok(())
}

/// The session table of these programs, with this capacity.
fn table_of(ebpf: &mut Ebpf, capacity: u32) -> Result<SessionTable, BpfError> {
    let bucket_count = buckets_for(capacity);
    let program = attach::program_fd(ebpf, attachable::TABLE_OPS)?;
    let program = program.as_fd().try_clone_to_owned();
    let mut take = |name| match ebpf.take_map(name) {
        Some(Map::Array(map)) => Ok(map),
        _ => Err(BpfError::Missing(name)),
    };
    let (exchanges, buckets) = (take("EXCHANGES")?, take(session_table::BUCKETS)?);
    program
        .and_then(|program| SessionTable::new(program, &exchanges, buckets, bucket_count))
        .map_err(BpfError::Table)
}

/// A reader of this table.
fn reader_of(ebpf: &Ebpf, table: &SessionTable, key: Key) -> Result<SessionReader, BpfError> {
    let Some(Map::Array(records)) = ebpf.map(session_table::SESSIONS) else {
        return Err(BpfError::Missing(session_table::SESSIONS));
    };
    let records = records.fd().as_fd().try_clone_to_owned();
    let (buckets, records) = (
        table.buckets_fd().map_err(BpfError::Table)?,
        records.map_err(BpfError::Table)?,
    );
    SessionReader::new(buckets, records, key)
}

fn take_journal(ebpf: &mut Ebpf) -> Result<Arc<Journal>, BpfError> {
    match ebpf.take_map(reset_journal::JOURNAL) {
        Some(Map::Array(map)) => Journal::new(map.fd().as_fd()).map_err(BpfError::Table),
        _ => Err(BpfError::Missing(reset_journal::JOURNAL)),
    }
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}

/// The error number of the kernel, if there is one.
fn os_error(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(call) => call.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}
