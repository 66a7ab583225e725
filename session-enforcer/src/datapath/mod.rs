//! The programs in the kernel and their maps: load, attach, pin, take over, read. The only user of
//! aya.

mod attach;
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

/// The object that `build.rs` makes of `session-enforcer-ebpf`.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/session-enforcer-ebpf"));

// Of `linux/bpf.h`.
const BPF_NOEXIST: u64 = 1;

/// What the programs are loaded with.
#[derive(Debug)]
pub struct Options {
    /// Sessions that the session map may hold.
    pub max_sessions: u32,
    /// The only network namespace to track; `None` for every one.
    pub only_netns: Option<u64>,
    /// Whether who makes a socket is noted from the attachment on.
    pub notes_owners: bool,
    /// Whether the programs report what they do, besides what goes wrong.
    pub verbose: bool,
}

/// What the programs of one table are loaded with.
#[derive(Clone, Copy, Debug)]
struct LoadOptions {
    /// Sessions that the table can hold.
    capacity: u32,
    /// Where cookies lie in it.
    key: Key,
    /// Of the daemon's first policy.
    first_generation: u32,
    /// The only network namespace to track; 0 for every one.
    only_netns: u64,
    log_level: aya_log::Level,
}

/// Each network namespace has this directory where the kernel is built with MPTCP.
fn has_mptcp() -> bool {
    Path::new("/proc/sys/net/mptcp").exists()
}

/// What became of a session that the daemon offered to the session map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// It is in the map now.
    Inserted,
    /// The kernel had it already.
    Known,
    /// The table has no slot for the rule's sessions, or both buckets of the cookie are full.
    Full,
    /// The sessions of its rule have as many slots as it allows them.
    RuleFull,
}

/// The loaded programs and the maps that the daemon reads.
pub struct Datapath {
    ebpf: Ebpf,
    options: Options,
    attached: Vec<Attached>,
    /// None where nothing is to outlive the daemon.
    pins: Option<Pins>,
    /// With what the programs that run were loaded.
    load_options: LoadOptions,
    /// The maps that the programs of a larger table work on too.
    shared: Vec<(String, OwnedFd)>,
    /// None where the table has its full size, or cannot grow.
    loader: Option<Loader>,
    /// Whether the last attempt to make it larger has failed.
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
    /// Slots that rules whose sessions have many leave to the others.
    reserve: u32,
    owners: SkStorage<MapData, Owner>,
    ancestors: HashMap<MapData, u64, Ancestors>,
    journal: Arc<Journal>,
    /// Index of the match table in force.
    active: u32,
    /// Numbers of rules that are in use.
    rule_ids: u32,
    /// Policies that have come into force.
    policies_put: u64,
}

impl Datapath {
    /// Loads maps and programs; nothing is attached yet. With a pin directory, the programs work on
    /// the sessions that an earlier daemon left there.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a map, a program or a pin.
    pub fn load(options: Options, directory: Option<PinDir>) -> Result<Self, BpfError> {
        let pins = directory.map(Pins::inspect).transpose()?;
        let first_generation = pins.as_ref().map_or(0, Pins::generation).saturating_add(1);
        // Without pins, the programs of a larger table could not be given the maps of those before.
        let capacity = match &pins {
            Some(pins) => pins.capacity(options.max_sessions),
            None => options.max_sessions,
        };
        // Where cookies lie in the table that is used on, or at random in a new one.
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
        let mut kernel = Self {
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
        // Tried before anything depends on it. A socket's cookie is never 0.
        kernel.session(0)?;
        kernel.copy_sessions()?;
        Ok(kernel)
    }

    /// Puts a policy into force: the match table of this generation, and the limits by the number of the
    /// rule. At no moment does a connection or a packet meet a part of it, or a rule without limits.
    /// The programs see every packet then, until [`narrow_ports`](Self::narrow_ports).
    ///
    /// # Errors
    ///
    /// Where it is too large, or the kernel refuses; the policy before stays in force then.
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
        // Those that are no more, or exempt, track nothing.
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
        // The records of two tables are not compared yet: no gate is to judge by one of them.
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
        // The tables are written before the number that says which are in force, for the programs on other processors
        // too: system calls alone do not order that.
        fence(Ordering::Release);
        let active = &mut self.active_table;
        active.set(0, next, 0).map_err(map_error("ACTIVE_TABLE"))?;
        (self.active, self.rule_ids) = (next, rule_ids);
        Ok(())
    }

    /// The channel of events; can be taken once.
    ///
    /// # Errors
    ///
    /// Where it was taken or cannot be watched.
    pub fn take_events(&mut self) -> Result<Events, BpfError> {
        let ring: RingBuf<MapData> = take_map(&mut self.ebpf, "EVENTS")?;
        // SAFETY: the ring buffer owns its descriptor and gives the same one until it is dropped.
        let ring = unsafe { AsyncFd::register(ring) }.map_err(|e| BpfError::Watch(e.into()))?;
        Ok(Events { ring })
    }

    /// The channel of the programs' log; can be taken once.
    ///
    /// # Errors
    ///
    /// Where it was taken or cannot be watched.
    pub fn take_log(&mut self) -> Result<KernelLog, BpfError> {
        let logger =
            EbpfLogger::init(&mut self.ebpf).map_err(|_| BpfError::Missing("map AYA_LOGS"))?;
        // SAFETY: the logger's ring buffer owns its descriptor, as above.
        let logger = unsafe { AsyncFd::register(logger) }.map_err(|e| BpfError::Watch(e.into()))?;
        Ok(KernelLog { logger })
    }

    /// Sessions that the session table may come to hold.
    pub fn max_sessions(&self) -> u32 {
        self.options.max_sessions
    }

    /// Sessions that the session table can hold now.
    pub fn capacity(&self) -> usize {
        self.load_options.capacity as usize
    }

    /// Sessions that the session table can hold now where they are of one rule.
    pub fn common_capacity(&self) -> usize {
        self.load_options.capacity.saturating_sub(self.reserve) as usize
    }

    /// Gives sessions, each named by cookie and time of establishment, their rule and generation.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn decide(&mut self, sessions: &[(u64, Session)]) -> Result<(), BpfError> {
        if let Some(larger) = self.larger() {
            larger.decide(sessions)?;
        }
        self.sessions.decide(sessions)
    }

    /// Sessions in the session map, as its programs count them.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn session_count(&self) -> Result<u64, BpfError> {
        let head = self
            .table
            .get(&0, 0)
            .map_err(map_error(session_table::TABLE))?;
        // Below 0 for a moment where what is pinned counts too few.
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

    /// The session as the kernel has it now.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let mut session = [self.sessions.session(cookie)?];
        self.merge_all(&[cookie], &mut session)?;
        Ok(session[0])
    }

    /// The sessions of these cookies as the kernel has them now, in their order: for many, in a fraction
    /// of the time.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn sessions(&self, cookies: &[u64]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut sessions = self.sessions.sessions(cookies)?;
        self.merge_all(cookies, &mut sessions)?;
        Ok(sessions)
    }

    /// Shuts the gate of sessions that are to be reset, each named by cookie and time of establishment, and
    /// reads their records after that; in their order, none where one is not there. A packet whose stamp is
    /// not in the record that this returns does not pass, until the session is [reopened](Self::reopen).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses. Some gates may be shut then.
    pub fn shut(&self, sessions: &[(u64, u64)]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut shut = self.sessions.shut(sessions)?;
        let cookies: Vec<u64> = sessions.iter().map(|(cookie, _)| *cookie).collect();
        self.merge_all(&cookies, &mut shut)?;
        // For a session that is not there yet, the copy is of one that is shut.
        if let Some(larger) = self.larger() {
            larger.shut(sessions)?;
        }
        Ok(shut)
    }

    /// Opens the gate of a session that was [shut](Self::shut), if it is there and was established then.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn reopen(&self, cookie: u64, established_ns: u64) -> Result<(), BpfError> {
        if let Some(larger) = self.larger() {
            larger.reopen(cookie, established_ns)?;
        }
        self.sessions.reopen(cookie, established_ns)
    }

    /// The cookie of every session in the session map, once.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        self.sessions.cookies()
    }

    /// Inserts a session that the kernel does not have. What the kernel has is left alone: an
    /// update could lose the stamp of a packet that passes meanwhile.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn adopt(&mut self, cookie: u64, session: &Session) -> Result<Adoption, BpfError> {
        let adopted = self.sessions.adopt(&[(cookie, *session)])?;
        Ok(adopted[0])
    }

    /// As [`adopt`](Self::adopt), for many sessions; what became of each, in their order.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn adopt_all(&mut self, sessions: &[(u64, Session)]) -> Result<Vec<Adoption>, BpfError> {
        self.sessions.adopt(sessions)
    }

    /// Writes a session that the kernel has; returns whether it still had it. What has passed since the
    /// session was read stays in the record ([`Session::merge_activity`]).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn update(&mut self, cookie: u64, session: &Session) -> Result<bool, BpfError> {
        if let Some(larger) = self.larger() {
            larger.update(cookie, session)?;
        }
        self.sessions.update(cookie, session)
    }

    /// Removes the session of this cookie that was established at this time, and none that has begun
    /// since on the same socket; returns whether it was there.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn remove(&mut self, cookie: u64, established_ns: u64) -> Result<bool, BpfError> {
        if let Some(larger) = self.larger() {
            larger.remove(cookie, established_ns)?;
        }
        self.sessions.remove(cookie, established_ns)
    }

    /// Notes the owner of a socket that is older than the programs. What the kernel has noted is
    /// left alone.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn note_owner(&mut self, socket: &impl AsRawFd, owner: &Owner) -> Result<(), BpfError> {
        match self.owners.insert(socket, owner, BPF_NOEXIST) {
            Err(source) if os_error(&source) != Some(libc::EEXIST) => {
                Err(map_error("OWNERS")(source))
            }
            _ => Ok(()),
        }
    }

    /// The cgroups above one, as far as the kernel has noted them.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn ancestors(&self, cgroup_id: u64) -> Result<Option<Ancestors>, BpfError> {
        match self.ancestors.get(&cgroup_id, 0) {
            Ok(ancestors) => Ok(Some(ancestors)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(map_error("ANCESTORS")(source)),
        }
    }

    /// Notes the cgroups above one, for sessions that are older than the programs.
    ///
    /// # Errors
    ///
    /// Where the map refuses.
    pub fn note_ancestors(
        &mut self,
        cgroup_id: u64,
        ancestors: &Ancestors,
    ) -> Result<(), BpfError> {
        let map = &mut self.ancestors;
        map.insert(cgroup_id, ancestors, 0)
            .map_err(map_error("ANCESTORS"))
    }

    /// Sessions opened and closed, by rule.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
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

    /// Errors of the programs, by [`ErrorKind`].
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
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
    /// Where the map cannot be read.
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

    /// Errors of one kind.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn error_count(&self, kind: ErrorKind) -> Result<u64, BpfError> {
        let per_cpu = self
            .errors
            .get(&(kind as u32), 0)
            .map_err(map_error("ERRORS"))?;
        Ok(per_cpu.iter().sum())
    }
}

/// The programs, loaded, and their maps, of which these are pinned.
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
    // SAFETY: as many bytes as are there. So few come in one piece.
    let read = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    if usize::try_from(read) != Ok(random.len()) {
        return Err(BpfError::Table(io::Error::last_os_error()));
    }
    Ok(Key(u64::from_ne_bytes(random)))
}

/// Notes in a new table what a daemon has to know that will work on with it.
fn begin_table(ebpf: &mut Ebpf, capacity: u32, key: Key) -> Result<(), BpfError> {
    let map = ebpf.map_mut(session_table::TABLE);
    let map = map.ok_or(BpfError::Missing(session_table::TABLE))?;
    let error = map_error(session_table::TABLE);
    let mut heads: Array<_, TableHead> = Array::try_from(map).map_err(&error)?;
    let before = heads.get(&0, 0).map_err(&error)?;
    // In a table that is used on it stands already, and the programs count meanwhile.
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

/// The session table for so many sessions that these programs work on.
fn table_of(ebpf: &mut Ebpf, capacity: u32) -> Result<SessionTable, BpfError> {
    let bucket_count = buckets_for(capacity);
    let program = attach::program_fd(ebpf, attach::TABLE_OPS)?;
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

/// For who only reads this table.
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
        Some(Map::Array(map)) => Journal::new(&map).map_err(BpfError::Table),
        _ => Err(BpfError::Missing(reset_journal::JOURNAL)),
    }
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}

/// The error number that the kernel gave, where it gave one.
fn os_error(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(call) => call.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}
