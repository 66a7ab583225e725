//! The pins of an earlier daemon, checked before use: aya takes over a pinned map without a check.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData};
use session_enforcer_common::{
    Ancestors, JournalEntry, MAX_CGROUPS, MAX_JOURNAL, Owner, Session, Table,
    table::{Bucket, TableHead, WAYS, buckets_for},
};

use super::{
    attachable::PROGRAMS,
    pin_error::PinError,
    reset_journal::JOURNAL,
    session_table::{self, BUCKETS, SESSIONS, TABLE},
    sys::{self, Kind, LinkInfo, MapInfo},
};

/// A map that outlives the daemon.
pub(super) struct PinnedMap {
    pub(super) name: &'static str,
    /// `enum bpf_map_type` of `linux/bpf.h`.
    map_type: u32,
    key_bytes: usize,
    value_bytes: usize,
    /// `BPF_F_*` flags of the map.
    flags: u32,
    /// Number of elements; `None` if it depends on the configuration.
    elements: Option<u32>,
    /// Whether the next daemon's programs use this map. The next daemon only reads the other maps and creates its own.
    pub(super) is_shared: bool,
}

const ARRAY: u32 = 2;
const LRU_HASH: u32 = 9;
const SK_STORAGE: u32 = 24;

/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 0x400;

/// `BPF_F_NO_PREALLOC` and `BPF_F_CLONE`.
const OWNERS_FLAGS: u32 = 0x201;

/// All pinned maps. The rule tables of an earlier daemon are not among them. The new programs use their own tables as
/// soon as they replace the old ones, so no rule id is ever looked up in another policy's tables.
pub(super) const MAPS: [PinnedMap; 7] = [
    PinnedMap {
        name: BUCKETS,
        map_type: ARRAY,
        key_bytes: size_of::<u32>(),
        value_bytes: size_of::<Bucket>(),
        flags: MMAPABLE,
        elements: None,
        is_shared: true,
    },
    PinnedMap {
        name: SESSIONS,
        map_type: ARRAY,
        key_bytes: size_of::<u32>(),
        value_bytes: size_of::<Session>(),
        flags: 0,
        elements: None,
        is_shared: true,
    },
    PinnedMap {
        name: TABLE,
        map_type: ARRAY,
        key_bytes: size_of::<u32>(),
        value_bytes: size_of::<TableHead>(),
        flags: 0,
        elements: Some(1),
        is_shared: true,
    },
    // The owners of sockets that are not established, including listeners.
    PinnedMap {
        name: "OWNERS",
        map_type: SK_STORAGE,
        key_bytes: size_of::<i32>(),
        value_bytes: size_of::<Owner>(),
        flags: OWNERS_FLAGS,
        elements: Some(0),
        is_shared: true,
    },
    PinnedMap {
        name: "ANCESTORS",
        map_type: LRU_HASH,
        key_bytes: size_of::<u64>(),
        value_bytes: size_of::<Ancestors>(),
        flags: 0,
        elements: Some(MAX_CGROUPS),
        is_shared: true,
    },
    PinnedMap {
        name: JOURNAL,
        map_type: ARRAY,
        key_bytes: size_of::<u32>(),
        value_bytes: size_of::<JournalEntry>(),
        flags: MMAPABLE,
        elements: Some(MAX_JOURNAL),
        is_shared: true,
    },
    // Holds the generations in use; the next daemon must choose different ones.
    PinnedMap {
        name: "MATCH_TABLES",
        map_type: ARRAY,
        key_bytes: size_of::<u32>(),
        value_bytes: size_of::<Table>(),
        flags: 0,
        elements: Some(Table::COUNT),
        is_shared: false,
    },
];

impl PinnedMap {
    /// Checks a map that is pinned under this name; the error describes the difference.
    fn check(&self, found: &MapInfo) -> Result<(), String> {
        let expected = MapInfo {
            map_type: self.map_type,
            key_bytes: self.key_bytes as u32,
            value_bytes: self.value_bytes as u32,
            capacity: self.elements.unwrap_or(found.capacity),
            flags: self.flags,
            ..*found
        };
        if *found == expected {
            return Ok(());
        }
        let words = |map: &MapInfo| {
            format!(
                "type {}, keys of {} and values of {} bytes, {} elements, flags {:#x}",
                map.map_type, map.key_bytes, map.value_bytes, map.capacity, map.flags
            )
        };
        Err(format!(
            "the map {} has {} instead of {}",
            self.name,
            words(found),
            words(&expected)
        ))
    }
}

/// A pin that exists while a larger table replaces the pinned one.
pub(super) const TORN: &str = "TORN";

/// A link of an earlier daemon.
pub(super) struct FoundLink {
    pub(super) name: &'static str,
    pub(super) link: OwnedFd,
    pub(super) info: LinkInfo,
}

/// A set of pins that this version can use.
pub(super) struct PinnedSet {
    pub(super) set: PathBuf,
    /// Head of its session table.
    pub(super) table: TableHead,
    /// Generation of its last policy.
    pub(super) generation: u32,
    /// Links of programs that this version has.
    pub(super) links: Vec<FoundLink>,
    /// Pins that this version does not know.
    pub(super) unknown: Vec<PathBuf>,
}

/// Checks a set. Returns `None` if there is none, or, after a warning, if it cannot be used.
pub(super) fn examine(set: &Path) -> Result<Option<PinnedSet>, PinError> {
    if !set.exists() {
        return Ok(None);
    }
    match PinnedSet::in_set(set) {
        Ok(found) => Ok(Some(found)),
        Err(Refusal::Unusable(why)) => {
            tracing::warn!(
                "the pins in {} cannot be used: {why}; the daemon adopts the connections again",
                set.display()
            );
            Ok(None)
        }
        Err(Refusal::Failed(error)) => Err(error),
    }
}

/// Why a set is not used.
enum Refusal {
    /// It is not a set that a daemon of this version has left.
    Unusable(String),
    /// It could not be read.
    Failed(PinError),
}

impl From<PinError> for Refusal {
    fn from(error: PinError) -> Self {
        Self::Failed(error)
    }
}

impl PinnedSet {
    fn in_set(set: &Path) -> Result<Self, Refusal> {
        let mut found = Self {
            set: set.to_owned(),
            table: TableHead::default(),
            generation: 0,
            links: Vec::new(),
            unknown: unknown(set)?,
        };
        let (mut buckets, mut slots) = (0, 0);
        for map in &MAPS {
            let object = open(set, map.name, Kind::Map)?
                .ok_or_else(|| Refusal::Unusable(format!("the map {} is missing", map.name)))?;
            let path = set.join(map.name);
            let info = sys::map_info(&object).map_err(PinError::io("looking at", &path))?;
            map.check(&info).map_err(Refusal::Unusable)?;
            match map.name {
                BUCKETS => buckets = info.capacity,
                SESSIONS => slots = info.capacity,
                TABLE => {
                    let head = session_table::head(object).map_err(io::Error::other);
                    found.table = head.map_err(PinError::io("reading", &path))?;
                }
                "MATCH_TABLES" => {
                    found.generation =
                        last_generation(object).map_err(PinError::io("reading", &path))?;
                }
                _ => {}
            }
        }
        check_table(&found.table, buckets, slots).map_err(Refusal::Unusable)?;
        for program in &PROGRAMS {
            if let Some(link) = open(set, program.name, Kind::Link)? {
                let path = set.join(program.name);
                let info = sys::link_info(&link).map_err(PinError::io("looking at", &path))?;
                let name = program.name;
                if info.attach_type != program.attach_type {
                    let why = format!("{name} is attached to something else");
                    return Err(Refusal::Unusable(why));
                }
                found.links.push(FoundLink { name, link, info });
            }
        }
        Ok(found)
    }

    /// Whether its session table has a capacity of `max_sessions`.
    pub(super) fn fits(&self, max_sessions: u32) -> bool {
        self.table.capacity == u64::from(max_sessions)
    }

    /// The link of a program.
    pub(super) fn link(&self, name: &str) -> Option<&FoundLink> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Whether its programs have tracked every packet and connection until now.
    pub(super) fn is_running(&self) -> bool {
        !self.set.join(TORN).exists()
            && PROGRAMS.iter().filter(|p| p.is_always_wanted).all(|p| {
                self.link(p.name)
                    .is_some_and(|link| link.info.cgroup_id != 0)
            })
    }
}

fn open(set: &Path, name: &str, expected: Kind) -> Result<Option<OwnedFd>, Refusal> {
    let path = set.join(name);
    let object = match sys::open_pin(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(PinError::io("opening", &path))?,
    };
    let kind = sys::kind(&object).map_err(PinError::io("looking at", &path))?;
    if kind != expected {
        return Err(Refusal::Unusable(format!(
            "{name} is a {kind:?} and not a {expected:?}"
        )));
    }
    Ok(Some(object))
}

fn unknown(set: &Path) -> Result<Vec<PathBuf>, PinError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(set).map_err(PinError::io("listing", set))? {
        let entry = entry.map_err(PinError::io("listing", set))?;
        let is = |name: &str| entry.file_name() == *name;
        let known = MAPS.iter().any(|m| is(m.name)) || PROGRAMS.iter().any(|p| is(p.name));
        if !known {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

/// Checks the sizes of a table's maps against its head; the error describes the difference.
fn check_table(head: &TableHead, buckets: u32, slots: u32) -> Result<(), String> {
    let expected = u32::try_from(head.capacity).map(buckets_for);
    if expected != Ok(buckets) || buckets.checked_mul(WAYS) != Some(slots) {
        return Err(format!(
            "a session table for {} sessions has {buckets} buckets and {slots} records",
            head.capacity
        ));
    }
    Ok(())
}

/// The highest generation in a daemon's match tables.
fn last_generation(tables: OwnedFd) -> io::Result<u32> {
    let map = MapData::from_fd(tables)
        .and_then(Map::from_map_data)
        .map_err(io::Error::other)?;
    let tables: Array<MapData, Table> = Array::try_from(map).map_err(io::Error::other)?;
    let generation = |index| tables.get(&index, 0).map(|table| table.generation);
    let of_all = (0..Table::COUNT)
        .map(generation)
        .collect::<Result<Vec<_>, _>>();
    Ok(of_all
        .map_err(io::Error::other)?
        .into_iter()
        .max()
        .unwrap_or(0))
}

/// Pins a map of this daemon.
pub(super) fn pin_map(map: &Map, path: &Path) -> Result<(), PinError> {
    map.pin(path)
        .map_err(|error| PinError::io("pinning", path)(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use session_enforcer_common::table::Key;

    use super::*;

    #[test]
    fn a_table_whose_parts_do_not_fit_is_told() {
        let head = TableHead {
            sessions: 3,
            capacity: 100,
            key: Key(7),
        };
        let buckets = buckets_for(100);
        assert_eq!(check_table(&head, buckets, buckets * WAYS), Ok(()));
        let told = check_table(&head, buckets + 1, (buckets + 1) * WAYS).unwrap_err();
        let wanted = format!("for 100 sessions has {} buckets", buckets + 1);
        assert!(told.contains(&wanted), "{told}");
        assert!(check_table(&head, buckets, buckets * WAYS + 1).is_err());
        let too_many = TableHead {
            capacity: 1 << 32,
            ..head
        };
        assert!(check_table(&too_many, buckets, buckets * WAYS).is_err());
    }
}
