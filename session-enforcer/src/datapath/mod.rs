//! The programs in the kernel and their maps: load, attach, pin, take over, read. The only user of
//! aya.

mod attach;
mod bpf_error;
mod bpffs;
mod events;
mod found;
mod inherit;
mod journal;
mod pin_error;
mod pins;
mod port_filter;
mod session_reader;
mod session_table;
mod sys;

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd},
    path::Path,
    sync::Arc,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage},
};
use aya_log::EbpfLogger;
use session_enforcer_common::{
    Ancestors, ErrorKind, MAX_MATCH_ENTRIES, MAX_RULES, MatchEntry, Owner, Policy, RULE_EXEMPT,
    RuleCounters, Session, Table, Way,
    table::{Key, TableHead, WAYS, buckets_for},
};
use tokio::io::unix::AsyncFd;

pub use bpf_error::{BpfError, Holder};
pub use bpffs::{Bpffs, find as find_bpffs};
pub use events::{Events, KernelLog};
pub use inherit::Inherited;
pub use journal::{Journal, Place};
pub use pin_error::PinError;
pub use pins::PinDir;
pub use port_filter::Narrowing;
pub use session_reader::{Cursor, SessionReader};

use attach::Attached;
use inherit::Pins;
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
    /// The table has no place for the rule's sessions, or both buckets of the cookie are full.
    Full,
    /// The sessions of its rule have as many places as it allows them.
    RuleFull,
}

/// The loaded programs and the maps that the daemon reads.
pub struct Kernel {
    ebpf: Ebpf,
    options: Options,
    attached: Vec<Attached>,
    /// None where nothing is to outlive the daemon.
    pins: Option<Pins>,
    sessions: SessionTable,
    table: Array<MapData, TableHead>,
    rule_counters: PerCpuArray<MapData, RuleCounters>,
    errors: PerCpuArray<MapData, u64>,
    gate_drops: PerCpuArray<MapData, u64>,
    match_entries: Array<MapData, MatchEntry>,
    match_tables: Array<MapData, Table>,
    active_table: Array<MapData, u32>,
    policies: Array<MapData, Policy>,
    ports: Ports,
    /// Places that rules whose sessions have many leave to the others.
    reserve: u32,
    owners: SkStorage<MapData, Owner>,
    ancestors: HashMap<MapData, u64, Ancestors>,
    journal: Arc<Journal>,
    /// Index of the match table in force.
    active: u32,
    /// Number of places of rules that are in use.
    places: u32,
    /// Policies that have come into force.
    policies_put: u64,
}

impl Kernel {
    /// Loads maps and programs; nothing is attached yet. With a pin directory, the programs work on
    /// the sessions that an earlier daemon left there.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a map, a program or a pin.
    pub fn load(options: Options, directory: Option<PinDir>) -> Result<Self, BpfError> {
        let pins = directory.map(Pins::look).transpose()?;
        let log_level = if options.verbose {
            aya_log::Level::Debug
        } else {
            aya_log::Level::Warn
        };
        let first_generation = pins.as_ref().map_or(0, Pins::generation).saturating_add(1);
        let (only_netns, log_level) = (options.only_netns.unwrap_or(0), log_level as u8);
        let has_mptcp = u8::from(has_mptcp());
        let bucket_count = buckets_for(options.max_sessions);
        // Where cookies lie in the table that is used on, or at random in a new one.
        let key = match pins
            .as_ref()
            .and_then(|pins| pins.key(options.max_sessions))
        {
            Some(key) => key,
            None => random_key()?,
        };
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries(session_table::BUCKETS, bucket_count)
            .map_max_entries(session_table::SESSIONS, bucket_count * WAYS)
            .override_global("MAX_SESSIONS", &options.max_sessions, true)
            .override_global("BUCKET_COUNT", &bucket_count, true)
            .override_global("TABLE_KEY", &key, true)
            .override_global("ONLY_NETNS", &only_netns, true)
            .override_global("HAS_MPTCP", &has_mptcp, true)
            .override_global("FIRST_GENERATION", &first_generation, true)
            .override_global(aya_log::LEVEL, &log_level, true);
        for (name, path) in pins
            .iter()
            .flat_map(|pins| pins.shared(options.max_sessions))
        {
            loader.map_pin_path(name, path);
        }
        let mut ebpf = loader.load(OBJECT)?;
        attach::load(&mut ebpf)?;
        begin_table(&mut ebpf, options.max_sessions, key)?;
        if let Some(pins) = &pins {
            pins.pin_maps(&ebpf)?;
        }
        let mut kernel = Self {
            sessions: session_table(&mut ebpf, bucket_count)?,
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
            places: 0,
            policies_put: 0,
            ebpf,
            options,
            attached: Vec::new(),
            pins,
        };
        // Tried before anything depends on it. A socket's cookie is never 0.
        kernel.session(0)?;
        kernel.copy_sessions()?;
        Ok(kernel)
    }

    /// Puts a policy into force: the match table of this generation, and the limits by place of the
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
        policies: &[Policy],
    ) -> Result<(), BpfError> {
        let count = u32::try_from(entries.len())
            .ok()
            .filter(|count| *count <= MAX_MATCH_ENTRIES)
            .ok_or(BpfError::TooManyEntries(entries.len()))?;
        let places = u32::try_from(policies.len())
            .ok()
            .filter(|places| *places <= MAX_RULES)
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
        let (share, reserve) = Table::shares(tracking.len() as u32, self.options.max_sessions);
        let table = Table {
            generation,
            entries: count,
            share,
            reserve,
        };
        self.reserve = reserve;
        let tables = &mut self.match_tables;
        tables
            .set(next, table, 0)
            .map_err(map_error("MATCH_TABLES"))?;
        for (index, policy) in (next * MAX_RULES..).zip(policies) {
            let map = &mut self.policies;
            map.set(index, policy, 0).map_err(map_error("POLICIES"))?;
        }
        let active = &mut self.active_table;
        active.set(0, next, 0).map_err(map_error("ACTIVE_TABLE"))?;
        (self.active, self.places) = (next, places);
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

    /// Sessions that the session map can hold.
    pub fn capacity(&self) -> usize {
        self.options.max_sessions as usize
    }

    /// Sessions that the session map can hold where they are of one rule.
    pub fn common_capacity(&self) -> usize {
        self.options.max_sessions.saturating_sub(self.reserve) as usize
    }

    /// Gives sessions, each named by cookie and time of establishment, their rule and generation.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn decide(&mut self, sessions: &[(u64, Session)]) -> Result<(), BpfError> {
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
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn session_reader(&self) -> Result<SessionReader, BpfError> {
        let head = self
            .table
            .get(&0, 0)
            .map_err(map_error(session_table::TABLE))?;
        let records = match self.ebpf.map(session_table::SESSIONS) {
            Some(Map::Array(map)) => map.fd().as_fd().try_clone_to_owned(),
            _ => return Err(BpfError::Missing(session_table::SESSIONS)),
        };
        let buckets = self.sessions.buckets_fd();
        let (buckets, records) = (
            buckets.map_err(BpfError::Table)?,
            records.map_err(BpfError::Table)?,
        );
        SessionReader::new(buckets, records, head.key)
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
        self.sessions.session(cookie)
    }

    /// The sessions of these cookies as the kernel has them now, in their order: for many, in a fraction
    /// of the time.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn sessions(&self, cookies: &[u64]) -> Result<Vec<Option<Session>>, BpfError> {
        self.sessions.sessions(cookies)
    }

    /// Shuts the gate of sessions that are to be reset, each named by cookie and time of establishment, and
    /// reads their records after that; in their order, none where one is not there. A packet whose stamp is
    /// not in the record that this returns does not pass, until the session is [reopened](Self::reopen).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses. Some gates may be shut then.
    pub fn shut(&self, sessions: &[(u64, u64)]) -> Result<Vec<Option<Session>>, BpfError> {
        self.sessions.shut(sessions)
    }

    /// Opens the gate of a session that was [shut](Self::shut), if it is there and was established then.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn reopen(&self, cookie: u64, established_ns: u64) -> Result<(), BpfError> {
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
    /// session was read stays in the record ([`Session::join`]).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn amend(&mut self, cookie: u64, session: &Session) -> Result<bool, BpfError> {
        self.sessions.amend(cookie, session)
    }

    /// Removes the session of this cookie that was established at this time, and none that has begun
    /// since on the same socket; returns whether it was there.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn remove(&mut self, cookie: u64, established_ns: u64) -> Result<bool, BpfError> {
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
        (0..self.places).map(sum).collect()
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

    /// Packets that the gate dropped, by [`Way`].
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn gate_drops(&self) -> Result<[u64; Way::COUNT as usize], BpfError> {
        let mut counts = [0; Way::COUNT as usize];
        for way in Way::ALL {
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
fn begin_table(ebpf: &mut Ebpf, max_sessions: u32, key: Key) -> Result<(), BpfError> {
    let map = ebpf.map_mut(session_table::TABLE);
    let map = map.ok_or(BpfError::Missing(session_table::TABLE))?;
    let error = map_error(session_table::TABLE);
    let mut heads: Array<_, TableHead> = Array::try_from(map).map_err(&error)?;
    let before = heads.get(&0, 0).map_err(&error)?;
    // In a table that is used on it stands already, and the programs count meanwhile.
    if before.capacity == 0 {
        let head = TableHead {
            sessions: 0,
            capacity: u64::from(max_sessions),
            key,
        };
        heads.set(0, head, 0).map_err(&error)?;
    }
    Ok(())
}

fn session_table(ebpf: &mut Ebpf, bucket_count: u32) -> Result<SessionTable, BpfError> {
    let program = attach::program_fd(ebpf, attach::SERVE)?;
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

fn take_journal(ebpf: &mut Ebpf) -> Result<Arc<Journal>, BpfError> {
    match ebpf.take_map(journal::JOURNAL) {
        Some(Map::Array(map)) => Journal::new(&map).map_err(BpfError::Table),
        _ => Err(BpfError::Missing(journal::JOURNAL)),
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
