//! The bpf(2) calls of the benchmarks: minimal programs, the kernel's run statistics, and entries in the
//! daemon's maps.

use std::{
    fs::{self, File},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use session_enforcer_common::{
    Session,
    table::{Key, WAYS, prefers_second},
};
use session_enforcer_tests::bpf_calls::{
    Instruction, attached_programs, bpf, link_program, load_program, number, open,
};

// `enum bpf_cmd` of `linux/bpf.h`.
const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_GET_FD_BY_ID: libc::c_long = 14;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BTF_LOAD: libc::c_long = 18;
const ENABLE_STATS: libc::c_long = 32;

/// A hook that the daemon uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Each packet to a socket.
    Ingress,
    /// Each packet from a socket.
    Egress,
    /// Each new socket.
    SocketMade,
    /// The establishment and the end of each connection.
    Lifecycle,
}

impl Hook {
    /// All hooks.
    const ALL: [Self; 4] = [
        Self::Ingress,
        Self::Egress,
        Self::SocketMade,
        Self::Lifecycle,
    ];

    /// `enum bpf_attach_type`.
    const fn attach_type(self) -> u32 {
        match self {
            Self::Ingress => 0,
            Self::Egress => 1,
            Self::SocketMade => 2,
            Self::Lifecycle => 3,
        }
    }

    /// `enum bpf_prog_type`.
    const fn program_type(self) -> u32 {
        const CGROUP_SKB: u32 = 8;
        const CGROUP_SOCK: u32 = 9;
        const SOCK_OPS: u32 = 13;
        match self {
            Self::Ingress | Self::Egress => CGROUP_SKB,
            Self::SocketMade => CGROUP_SOCK,
            Self::Lifecycle => SOCK_OPS,
        }
    }
}

/// The kernel measures every run of a program while this value lives.
pub(crate) struct Statistics(#[expect(dead_code, reason = "ends on drop")] OwnedFd);

impl Statistics {
    /// Enables the statistics.
    pub(crate) fn on() -> Result<Self> {
        const RUN_TIME: u32 = 0;
        let enabled = open(ENABLE_STATS, &mut { RUN_TIME });
        Ok(Self(enabled.context("the kernel's statistics")?))
    }
}

/// The work of a comparison program for each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// No work.
    Nothing,
    /// Reads the precise clock.
    Clock,
    /// Reads the coarse clock.
    CoarseClock,
    /// Reads the socket's cookie.
    Cookie,
    /// Reads the cookie and looks it up in a map of the daemon's size without finding it.
    LookUp,
    /// Looks up the socket storage without finding an entry.
    StorageMissed,
    /// Looks up the socket storage and finds an entry.
    StorageFound,
    /// Reads the cookie, the socket's counters and the time. Every program that measures a session's idle time
    /// needs these calls of kernel functions.
    Calls,
    /// The same. In addition, an entry is stored with each new socket and deleted when the socket is established,
    /// as is needed to find a session's owner.
    OwnerCalls,
}

impl Body {
    /// Those that differ in the work for a packet, without `Nothing`.
    pub(crate) const ALL: [Self; 7] = [
        Self::Clock,
        Self::CoarseClock,
        Self::Cookie,
        Self::LookUp,
        Self::StorageMissed,
        Self::StorageFound,
        Self::Calls,
    ];
}

/// Programs on the hooks of a cgroup that let everything pass and do only the work of `body`. Dropping them
/// detaches them.
#[derive(Debug)]
pub(crate) struct PlainPrograms(#[expect(dead_code, reason = "detached on drop")] Vec<OwnedFd>);

impl PlainPrograms {
    /// Loads and attaches the programs.
    pub(crate) fn attach(cgroup: &Path, body: Body) -> Result<Self> {
        let directory = File::open(cgroup)?;
        let map = match body {
            Body::StorageMissed | Body::StorageFound | Body::OwnerCalls => socket_storage()?,
            _ => empty_map()?,
        };
        let attach = |hook: Hook| -> Result<OwnedFd> {
            let (program_type, attach_type) = (hook.program_type(), hook.attach_type());
            let instructions = instructions(body, hook, &map);
            let program = load_program(program_type, attach_type, "bench_plain", &instructions);
            let program = program.with_context(|| format!("a program for the hook {hook:?}"))?;
            link_program(&program, &directory, attach_type).context("attaching a program")
        };
        // Like the daemon, which has no program for new sockets if no rule names an owner.
        let is_used = |hook: &Hook| *hook != Hook::SocketMade || body == Body::OwnerCalls;
        let hooks = Hook::ALL.into_iter().filter(is_used);
        Ok(Self(hooks.map(attach).collect::<Result<_>>()?))
    }
}

/// A map like that of the sessions, for lookups that find nothing.
fn empty_map() -> Result<OwnedFd> {
    const HASH: u32 = 1;
    // Type, bytes of a key and of a value, capacity, flags.
    let mut attributes = [HASH, 8, size_of::<Session>() as u32, 1 << 18, 0];
    open(MAP_CREATE, &mut attributes).context("making a map")
}

/// A map of socket storage with entries of 8 bytes, which accepted sockets inherit.
fn socket_storage() -> Result<OwnedFd> {
    const SK_STORAGE: u32 = 24;
    const NO_PREALLOC: u32 = 1;
    const CLONE: u32 = 1 << 9;
    let types = load_types()?;
    let mut attributes = [0_u32; 15];
    attributes[..5].copy_from_slice(&[SK_STORAGE, 4, 8, 0, NO_PREALLOC | CLONE]);
    // After the name: the BTF object, and its types of the key and of the value.
    attributes[12..].copy_from_slice(&[number(&types), 1, 2]);
    open(MAP_CREATE, &mut attributes).context("making a map of socket storage")
}

/// Loads the two BTF types that socket storage requires: `int` and `u64`.
fn load_types() -> Result<OwnedFd> {
    const INT: u32 = 1 << 24;
    const SIGNED: u32 = 1 << 24;
    const NAMES: &[u8] = b"\0int\0u64\0";
    #[repr(C)]
    struct Attributes {
        types: u64,
        log: u64,
        types_bytes: u32,
        log_bytes: u32,
        log_level: u32,
        padding: u32,
    }
    // The header has magic number and version, its own length, and the offsets and lengths of types and
    // names. Each type has its name, kind, size and bits.
    let header = [0x0001_eb9f, 24, 0, 32, 32, NAMES.len() as u32];
    let types = [[1, INT, 4, SIGNED | 32], [5, INT, 8, 64]];
    let words = header.iter().chain(types.as_flattened());
    let mut bytes: Vec<u8> = words.flat_map(|word: &u32| word.to_ne_bytes()).collect();
    bytes.extend(NAMES);
    let mut attributes = Attributes {
        types: bytes.as_ptr() as u64,
        log: 0,
        types_bytes: bytes.len() as u32,
        log_bytes: 0,
        log_level: 0,
        padding: 0,
    };
    open(BTF_LOAD, &mut attributes).context("loading types")
}

fn instructions(body: Body, hook: Hook, map: &OwnedFd) -> Vec<Instruction> {
    // r0 = bpf_get_socket_cookie(r1); the program starts with the context in r1
    const COOKIE: Instruction = [0x85, 0, 0, 0, 46, 0, 0, 0];
    // *(u64 *)(r10 - 8) = r0; r2 = r10; r2 += -8
    const KEY: [Instruction; 3] = [
        [0x7b, 0x0a, 0xf8, 0xff, 0, 0, 0, 0],
        [0xbf, 0xa2, 0, 0, 0, 0, 0, 0],
        [0x07, 0x02, 0, 0, 0xf8, 0xff, 0xff, 0xff],
    ];
    // r2 = r1->sk; if it is 0, skip the next five
    const SOCKET: [Instruction; 2] = [
        [0x79, 0x12, 168, 0, 0, 0, 0, 0],
        [0x15, 0x02, 5, 0, 0, 0, 0, 0],
    ];
    // r6 = r1
    const KEEP: Instruction = [0xbf, 0x16, 0, 0, 0, 0, 0, 0];
    // r1 = r6->sk; if it is not 0, r0 = bpf_tcp_sock(r1)
    const COUNTERS: [Instruction; 3] = [
        [0x79, 0x61, 168, 0, 0, 0, 0, 0],
        [0x15, 0x01, 1, 0, 0, 0, 0, 0],
        [0x85, 0, 0, 0, 96, 0, 0, 0],
    ];
    // r0 = bpf_ktime_get_boot_ns()
    const CLOCK: Instruction = [0x85, 0, 0, 0, 125, 0, 0, 0];
    // r0 = bpf_ktime_get_coarse_ns()
    const COARSE_CLOCK: Instruction = [0x85, 0, 0, 0, 160, 0, 0, 0];
    // r2 = r1; in a program for new sockets r1 is the socket
    const NEW_SOCKET: Instruction = [0xbf, 0x12, 0, 0, 0, 0, 0, 0];
    // r0 = r1->op; if it is BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB or the next value, r2 = r1->sk; otherwise, or
    // if r2 is 0, skip the next three
    const ESTABLISHED: [Instruction; 5] = [
        [0x61, 0x10, 0, 0, 0, 0, 0, 0],
        [0xa5, 0x00, 6, 0, 4, 0, 0, 0],
        [0x25, 0x00, 5, 0, 5, 0, 0, 0],
        [0x79, 0x12, 184, 0, 0, 0, 0, 0],
        [0x15, 0x02, 3, 0, 0, 0, 0, 0],
    ];
    // r0 = bpf_sk_storage_delete(r1, r2)
    const DELETE: Instruction = [0x85, 0, 0, 0, 108, 0, 0, 0];
    // r0 = bpf_map_lookup_elem(r1, r2)
    const LOOK_UP: Instruction = [0x85, 0, 0, 0, 1, 0, 0, 0];
    // r0 = 1, which lets everything pass at each hook; exit
    const PASS: [Instruction; 2] = [[0xb7, 0, 0, 0, 1, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    // r1 = the map, as an instruction of two halves
    let [a, b, c, d] = number(map).to_ne_bytes();
    let map: [Instruction; 2] = [[0x18, 0x11, 0, 0, a, b, c, d], [0; 8]];
    let mut code = match (body, hook) {
        (Body::OwnerCalls, Hook::SocketMade) => [&[NEW_SOCKET][..], &map, &storage(1)].concat(),
        (Body::OwnerCalls, Hook::Lifecycle) => [&ESTABLISHED[..], &map, &[DELETE]].concat(),
        (Body::Nothing, _) | (_, Hook::SocketMade | Hook::Lifecycle) => Vec::new(),
        (Body::Clock, _) => vec![CLOCK],
        (Body::CoarseClock, _) => vec![COARSE_CLOCK],
        (Body::Cookie, _) => vec![COOKIE],
        (Body::LookUp, _) => [&[COOKIE][..], &KEY, &map, &[LOOK_UP]].concat(),
        (Body::StorageMissed, _) => [&SOCKET[..], &map, &storage(0)].concat(),
        (Body::StorageFound, _) => [&SOCKET[..], &map, &storage(1)].concat(),
        (Body::Calls | Body::OwnerCalls, _) => [&[KEEP, COOKIE][..], &COUNTERS, &[CLOCK]].concat(),
    };
    code.extend(PASS);
    code
}

/// r0 = `bpf_sk_storage_get`(r1, r2, 0, flags); the flag 1 creates a missing entry.
const fn storage(flags: u8) -> [Instruction; 3] {
    [
        [0xb7, 3, 0, 0, 0, 0, 0, 0],
        [0xb7, 4, 0, 0, flags, 0, 0, 0],
        [0x85, 0, 0, 0, 107, 0, 0, 0],
    ]
}

/// The cost so far of the programs of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    /// The time in the programs.
    pub(crate) nanoseconds: u64,
    /// The number of runs.
    pub(crate) runs: u64,
}

impl Spent {
    /// The cost after `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds - before.nanoseconds,
            runs: self.runs - before.runs,
        }
    }

    /// Nanoseconds per run; 0 without runs.
    pub(crate) fn per_run(self) -> f64 {
        self.nanoseconds as f64 / self.runs.max(1) as f64
    }
}

/// The used part of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    head: [u32; 13],
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
    middle: [u64; 14],
    run_nanoseconds: u64,
    run_count: u64,
}

/// The start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_bytes: u32,
    value_bytes: u32,
    capacity: u32,
    flags: u32,
    name: [u8; 16],
}

fn info<T>(object: &OwnedFd, found: &mut T) -> Result<(), Errno> {
    #[repr(C)]
    struct Attributes {
        fd: u32,
        info_bytes: u32,
        info: u64,
    }
    let mut attributes = Attributes {
        fd: number(object),
        info_bytes: size_of::<T>() as u32,
        info: std::ptr::from_mut(found) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(())
}

/// The programs that are attached to a cgroup.
#[derive(Debug)]
pub(crate) struct Programs(Vec<(Hook, OwnedFd)>);

impl Programs {
    /// The cgroup's programs, at most one per hook. If no rule names owners, the hook for new sockets has
    /// none.
    pub(crate) fn of(cgroup: &Path) -> Result<Self> {
        let directory = File::open(cgroup)?;
        let mut programs = Vec::new();
        for hook in Hook::ALL {
            if let Some(program) = attached(&directory, hook)? {
                programs.push((hook, program));
            }
        }
        ensure!(!programs.is_empty(), "no program is attached");
        Ok(Self(programs))
    }

    /// The cost of the program on this hook while the statistics were enabled.
    pub(crate) fn spent(&self, hook: Hook) -> Result<Spent> {
        let Some(program) = self.program(hook) else {
            return Ok(Spent::default());
        };
        let mut found = ProgramInfo::default();
        info(program, &mut found).context("a program's statistics")?;
        Ok(Spent {
            nanoseconds: found.run_nanoseconds,
            runs: found.run_count,
        })
    }

    /// All maps that these programs use.
    pub(crate) fn maps(&self) -> Result<Vec<Map>> {
        let mut ids = Vec::new();
        for (_, program) in &self.0 {
            let mut used = [0_u32; 64];
            let mut found = ProgramInfo {
                map_count: used.len() as u32,
                map_ids: used.as_mut_ptr() as u64,
                ..ProgramInfo::default()
            };
            info(program, &mut found).context("a program's maps")?;
            ids.extend_from_slice(&used[..found.map_count as usize]);
        }
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().map(Map::open).collect()
    }

    /// The session table.
    pub(crate) fn sessions(&self) -> Result<Sessions> {
        let mut maps = self.maps()?;
        let mut take = |name| {
            let place = maps.iter().position(|map| map.name == name);
            let place = place.with_context(|| format!("the programs have no map named {name}"))?;
            anyhow::Ok(maps.swap_remove(place))
        };
        Ok(Sessions {
            buckets: take("BUCKETS")?,
            records: take("SESSIONS")?,
            head: take("TABLE")?,
        })
    }

    fn program(&self, hook: Hook) -> Option<&OwnedFd> {
        let found = self.0.iter().find(|(own, _)| *own == hook)?;
        Some(&found.1)
    }
}

/// The only program of a hook, if there is one.
fn attached(cgroup: &File, hook: Hook) -> Result<Option<OwnedFd>> {
    let ids = attached_programs(cgroup, hook.attach_type());
    match ids.context("asking for the cgroup's programs")?[..] {
        [] => Ok(None),
        [id] => by_id(PROG_GET_FD_BY_ID, id).map(Some),
        [..] => bail!("several programs on the hook {hook:?}"),
    }
}

fn by_id(command: libc::c_long, id: u32) -> Result<OwnedFd> {
    // The ID, the next ID of a walk, flags.
    Ok(open(command, &mut [id, 0_u32, 0])?)
}

/// A map in the kernel.
#[derive(Debug)]
pub(crate) struct Map {
    fd: OwnedFd,
    /// The map's name.
    pub(crate) name: String,
    /// The maximum number of elements.
    capacity: u32,
    value_bytes: usize,
}

/// `union bpf_attr` for the commands on an element.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Map {
    fn open(id: u32) -> Result<Self> {
        let fd = by_id(MAP_GET_FD_BY_ID, id).context("opening a map")?;
        let mut found = MapInfo::default();
        info(&fd, &mut found).context("a map's sizes")?;
        let name = found.name.split(|byte| *byte == 0).next();
        Ok(Self {
            fd,
            name: String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
            capacity: found.capacity,
            value_bytes: found.value_bytes as usize,
        })
    }

    /// The kernel memory of the map in bytes, as the kernel reports it.
    pub(crate) fn memory(&self) -> Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = fs::read_to_string(path)?;
        let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
        Ok(line.context("memlock in fdinfo")?.trim().parse()?)
    }

    /// The value of an array element.
    fn get(&self, index: u32) -> Result<Vec<u8>> {
        let mut value = vec![0; self.value_bytes];
        let mut attributes = self.element(&index, &mut value);
        bpf(MAP_LOOKUP_ELEM, &mut attributes).context("reading an element")?;
        Ok(value)
    }

    fn set(&self, index: u32, value: &[u8]) -> Result<()> {
        ensure!(value.len() == self.value_bytes, "a value of another size");
        let mut value = value.to_vec();
        let mut attributes = self.element(&index, &mut value);
        bpf(MAP_UPDATE_ELEM, &mut attributes).context("writing an element")?;
        Ok(())
    }

    /// An array element as numbers.
    fn numbers(&self, index: u32) -> Result<Vec<u64>> {
        let value = self.get(index)?;
        let (numbers, _) = value.as_chunks();
        Ok(numbers.iter().map(|n| u64::from_ne_bytes(*n)).collect())
    }

    fn set_numbers(&self, index: u32, numbers: &[u64]) -> Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
        self.set(index, &bytes)
    }

    fn element(&self, index: &u32, value: &mut [u8]) -> Element {
        Element {
            map: number(&self.fd),
            padding: 0,
            key: std::ptr::from_ref(index) as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        }
    }
}

/// The session table of a daemon; see `session_enforcer_common::table`.
#[derive(Debug)]
pub(crate) struct Sessions {
    buckets: Map,
    records: Map,
    head: Map,
}

impl Sessions {
    /// The kernel memory of the table in bytes, as the kernel reports it.
    pub(crate) fn memory(&self) -> Result<u64> {
        Ok(self.buckets.memory()? + self.records.memory()? + self.head.memory()?)
    }

    /// The record of any session.
    pub(crate) fn some_record(&self) -> Result<Vec<u8>> {
        for bucket in 0..self.buckets.capacity {
            let tags = self.buckets.numbers(bucket)?;
            if let Some(way) = tags.iter().position(|tag| *tag != 0) {
                return self.records.get(bucket * WAYS + way as u32);
            }
        }
        bail!("there is no session")
    }

    /// Adds this number of sessions with this record, under cookies that no socket can have. Nothing else may
    /// change the table at the same time.
    pub(crate) fn invent(&self, count: u64, record: &[u8]) -> Result<()> {
        // The kernel numbers cookies from 1.
        const FIRST: u64 = 1 << 62;
        let head = self.head.numbers(0)?;
        let &[sessions, capacity, key] = head.as_slice() else {
            bail!("the head of the table is another one");
        };
        let key_of_table = Key(key);
        for cookie in FIRST..FIRST + count {
            let room = |bucket| {
                let tags = self.buckets.numbers(bucket)?;
                let free = tags.iter().filter(|tag| **tag == 0).count();
                anyhow::Ok((u32::try_from(free)?, bucket, tags))
            };
            let [one, other] = key_of_table
                .buckets(cookie, self.buckets.capacity)
                .map(room);
            let (one, other) = (one?, other?);
            let (_, bucket, mut tags) = if prefers_second(one.0, other.0) {
                other
            } else {
                one
            };
            let way = tags.iter().position(|tag| *tag == 0).context("no room")?;
            self.records.set(bucket * WAYS + way as u32, record)?;
            tags[way] = cookie;
            self.buckets.set_numbers(bucket, &tags)?;
        }
        self.head.set_numbers(0, &[sessions + count, capacity, key])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layouts_are_those_of_the_kernel() {
        // The offsets are those that `pahole` shows for `struct bpf_prog_info` and `struct bpf_map_info`.
        assert_eq!(std::mem::offset_of!(ProgramInfo, map_ids), 56);
        assert_eq!(std::mem::offset_of!(ProgramInfo, run_nanoseconds), 192);
        assert_eq!(std::mem::offset_of!(MapInfo, name), 24);
    }

    #[test]
    fn the_time_of_a_program_is_reported_per_run() {
        let spent = |nanoseconds, runs| Spent { nanoseconds, runs };
        let since = spent(1_000, 30).since(spent(400, 10));
        assert_eq!(since, spent(600, 20));
        assert_eq!(since.per_run(), 30.0);
        assert_eq!(spent(0, 0).per_run(), 0.0);
    }
}
