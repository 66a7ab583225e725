//! The programs in the kernel and their maps: load, attach, read. The only user of aya.

use std::{io, os::fd::AsRawFd, path::Path};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, Program, ProgramError,
        SockOps,
    },
};
use aya_log::EbpfLogger;
use session_enforcer_common::{
    Ancestors, ErrorKind, Event, EventError, EventKind, MAX_MATCH_ENTRIES, MAX_RULES, MatchEntry,
    Owner, Policy, RuleCounters, Session, Table, Way,
};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;

/// The object that `build.rs` makes of `session-enforcer-ebpf`.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/session-enforcer-ebpf"));

const BPF_NOEXIST: u64 = 1;

/// What can go wrong with the programs and their maps.
#[derive(Debug, Error)]
pub enum BpfError {
    /// The object or its maps could not be loaded.
    #[error("loading the eBPF maps: {}", chain(.0))]
    Load(#[from] EbpfError),
    /// The kernel refused a program.
    #[error("loading the eBPF program {name}: {}", chain(.source))]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel or the verifier said.
        source: ProgramError,
    },
    /// The kernel refused an attachment.
    #[error("attaching the eBPF program {name}: {}", chain(.source))]
    Attach {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
    /// A map could not be used.
    #[error("the eBPF map {name}: {}", chain(.source))]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The object lacks a map or program: it was built from another version.
    #[error("the eBPF object has no {0}; build the daemon again")]
    Missing(&'static str),
    /// The log or event channel could not be watched.
    #[error("watching a ring buffer: {0}")]
    Watch(io::Error),
    /// More rules than a map can have.
    #[error("{0} rules are too many")]
    TooManyRules(usize),
    /// More match entries than the table holds.
    #[error("{0} match entries, the table holds {MAX_MATCH_ENTRIES}")]
    TooManyEntries(usize),
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    // The verifier's log has many lines; its last one says why.
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .join(" | ")
}

/// What the programs are loaded with.
#[derive(Debug)]
pub struct Options {
    /// Capacity of the session map.
    pub max_sessions: u32,
    /// The only network namespace to track; `None` for every one.
    pub only_netns: Option<u64>,
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
    /// The map is full.
    Full,
}

/// The loaded programs and the maps that the daemon reads.
pub struct Kernel {
    ebpf: Ebpf,
    sessions: HashMap<MapData, u64, Session>,
    rule_counters: PerCpuArray<MapData, RuleCounters>,
    errors: PerCpuArray<MapData, u64>,
    gate_drops: PerCpuArray<MapData, u64>,
    match_entries: Array<MapData, MatchEntry>,
    match_tables: Array<MapData, Table>,
    active_table: Array<MapData, u32>,
    policies: Array<MapData, Policy>,
    owners: SkStorage<MapData, Owner>,
    ancestors: HashMap<MapData, u64, Ancestors>,
    /// Index of the match table in force.
    active: u32,
    /// Number of places of rules that are in use.
    places: u32,
}

impl Kernel {
    /// Loads maps and programs; nothing is attached yet.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a map or a program.
    pub fn load(options: &Options) -> Result<Self, BpfError> {
        let log_level = if options.verbose {
            aya_log::Level::Debug
        } else {
            aya_log::Level::Warn
        };
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("SESSIONS", options.max_sessions)
            .override_global("ONLY_NETNS", &options.only_netns.unwrap_or(0), true)
            .override_global("HAS_MPTCP", &u8::from(has_mptcp()), true)
            .override_global(aya_log::LEVEL, &(log_level as u8), true)
            .load(OBJECT)?;
        load_program::<CgroupSock>(&mut ebpf, "note_owner", CgroupSock::load)?;
        load_program::<SockOps>(&mut ebpf, "track_lifecycle", SockOps::load)?;
        load_program::<CgroupSkb>(&mut ebpf, "track_ingress", CgroupSkb::load)?;
        load_program::<CgroupSkb>(&mut ebpf, "track_egress", CgroupSkb::load)?;
        Ok(Self {
            sessions: take_map(&mut ebpf, "SESSIONS")?,
            rule_counters: take_map(&mut ebpf, "RULE_COUNTERS")?,
            errors: take_map(&mut ebpf, "ERRORS")?,
            gate_drops: take_map(&mut ebpf, "GATE_DROPS")?,
            match_entries: take_map(&mut ebpf, "MATCH_ENTRIES")?,
            match_tables: take_map(&mut ebpf, "MATCH_TABLES")?,
            active_table: take_map(&mut ebpf, "ACTIVE_TABLE")?,
            policies: take_map(&mut ebpf, "POLICIES")?,
            owners: take_map(&mut ebpf, "OWNERS")?,
            ancestors: take_map(&mut ebpf, "ANCESTORS")?,
            active: 0,
            places: 0,
            ebpf,
        })
    }

    /// Puts a policy into force: the match table of this generation, and the limits by place of the
    /// rule. At no moment does a connection or a packet meet a part of it, or a rule without limits.
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
        for (index, entry) in (next * MAX_MATCH_ENTRIES..).zip(entries) {
            let entries = &mut self.match_entries;
            entries
                .set(index, entry, 0)
                .map_err(map_error("MATCH_ENTRIES"))?;
        }
        let table = Table {
            generation,
            entries: count,
        };
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

    /// Attaches the programs to the cgroup. From then on each new connection below it is tracked.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses. What was attached before that is detached on drop.
    pub fn attach(&mut self, cgroup: &Cgroup) -> Result<(), BpfError> {
        // Owners first: no connection is decided about whose owner could not be noted.
        let name = "note_owner";
        program::<CgroupSock>(&mut self.ebpf, name)?
            .attach(cgroup.file(), CgroupAttachMode::Single)
            .map_err(|source| BpfError::Attach { name, source })?;
        // Packets next: no session is in the map before the programs that stamp it run.
        for (name, way) in [
            ("track_ingress", CgroupSkbAttachType::Ingress),
            ("track_egress", CgroupSkbAttachType::Egress),
        ] {
            // `Single` is the mode that works with links, and allows other programs beside.
            program::<CgroupSkb>(&mut self.ebpf, name)?
                .attach(cgroup.file(), way, CgroupAttachMode::Single)
                .map_err(|source| BpfError::Attach { name, source })?;
        }
        let name = "track_lifecycle";
        program::<SockOps>(&mut self.ebpf, name)?
            .attach(cgroup.file(), CgroupAttachMode::Single)
            .map_err(|source| BpfError::Attach { name, source })?;
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

    /// The session as the kernel has it now.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        match self.sessions.get(&cookie, 0) {
            Ok(session) => Ok(Some(session)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(sessions_error(source)),
        }
    }

    /// Every cookie in the session map.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        self.sessions
            .keys()
            .collect::<Result<_, _>>()
            .map_err(sessions_error)
    }

    /// Inserts a session that the kernel does not have. What the kernel has is left alone: an
    /// update could lose the stamp of a packet that passes meanwhile.
    ///
    /// # Errors
    ///
    /// Where the map refuses for another reason than being full.
    pub fn adopt(&mut self, cookie: u64, session: &Session) -> Result<Adoption, BpfError> {
        match self.sessions.insert(cookie, session, BPF_NOEXIST) {
            Ok(()) => Ok(Adoption::Inserted),
            Err(source) => match os_error(&source) {
                Some(libc::EEXIST) => Ok(Adoption::Known),
                Some(libc::E2BIG) => Ok(Adoption::Full),
                _ => Err(sessions_error(source)),
            },
        }
    }

    /// Removes a session; returns whether it was there.
    ///
    /// # Errors
    ///
    /// Where the map refuses.
    pub fn remove(&mut self, cookie: u64) -> Result<bool, BpfError> {
        match self.sessions.remove(&cookie) {
            Ok(()) => Ok(true),
            Err(source) if os_error(&source) == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(sessions_error(source)),
        }
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

/// Events of the kernel, in the order in which they happened.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    /// Waits until the kernel has added to a channel that was read to its end.
    ///
    /// # Errors
    ///
    /// Where the channel cannot be watched any more.
    pub async fn wait(&mut self) -> io::Result<()> {
        let mut guard = self.ring.readable_mut().await?;
        guard.clear_ready();
        Ok(())
    }

    /// The next event, or `None` at the end. A record that is none is an error; the next call goes
    /// on behind it.
    pub fn read(&mut self) -> Option<Result<(EventKind, Event), EventError>> {
        let item = self.ring.get_mut().next()?;
        Some(Event::parse(&item))
    }
}

/// The programs' log, which goes to `tracing`.
pub struct KernelLog {
    logger: AsyncFd<EbpfLogger<&'static dyn log::Log>>,
}

impl KernelLog {
    /// Waits for log records and writes them out.
    ///
    /// # Errors
    ///
    /// Where the channel cannot be watched any more.
    pub async fn forward(&mut self) -> io::Result<()> {
        let mut guard = self.logger.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
        Ok(())
    }
}

fn take_map<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, BpfError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(BpfError::Missing(name))?;
    M::try_from(map).map_err(map_error(name))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(BpfError::Missing(name))?
        .try_into()
        .map_err(|source| BpfError::Program { name, source })
}

fn load_program<P>(
    ebpf: &mut Ebpf,
    name: &'static str,
    load: impl FnOnce(&mut P) -> Result<(), ProgramError>,
) -> Result<(), BpfError>
where
    for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    load(program::<P>(ebpf, name)?).map_err(|source| BpfError::Program { name, source })
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}

fn sessions_error(source: MapError) -> BpfError {
    map_error("SESSIONS")(source)
}

/// The error number that the kernel gave, where it gave one.
fn os_error(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(call) => call.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}
