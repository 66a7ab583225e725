//! What a daemon takes over from an earlier one, and leaves to the next.

use std::{collections::HashMap, fs, iter, os::fd::AsFd, path::PathBuf};

use aya::Ebpf;
use session_enforcer_common::table::Key;

use super::{
    Adoption, BpfError, Datapath, PinDir, PinError, larger_table,
    pinned_set::{self, FoundLink, MAPS, PinnedSet, TORN},
    pins,
    session_reader::SessionReader,
    session_table::{BUCKETS, SESSIONS, TABLE},
    sys::{self, Kind},
};
use crate::host::{clock::monotonic_ns, grace_period};

/// How often two maps are compared that both change. Each time fewer sessions differ: those that
/// had a packet in the moment of the comparison.
const MAX_COMPARISONS: usize = 8;

/// In which state an earlier daemon's sessions were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// There are none.
    Nothing,
    /// The programs have gone on without the daemon: the sessions are as they should be.
    Running,
    /// Nothing was attached: packets passed, and sessions ended and began, that nobody saw.
    Stopped,
}

/// The pins of a daemon: those that it found, and those that it makes.
pub(super) struct Pins {
    directory: PinDir,
    found: Option<PinnedSet>,
    state: Inherited,
    /// See [`Datapath::inherited_generation`].
    generation: u32,
    /// Where the pins of this daemon are.
    set: PathBuf,
    /// Whether that set has yet to take its place.
    is_staged: bool,
    /// The earlier daemon's sessions, where the map of this one is another.
    previous: Option<PreviousTable>,
}

/// A session map that another one takes the place of.
struct PreviousTable {
    sessions: SessionReader,
    /// What was copied from it, and when it was established.
    copied: HashMap<u64, u64>,
}

impl Pins {
    /// Looks at what is in the directory, and makes a set beside it.
    pub(super) fn inspect(directory: PinDir) -> Result<Self, BpfError> {
        let set = directory.stage()?;
        let mut pins = Self {
            found: None,
            state: Inherited::Nothing,
            generation: 0,
            set,
            is_staged: true,
            previous: None,
            directory,
        };
        pins.found = pinned_set::examine(&pins.directory.current())?;
        pins.state = match &mut pins.found {
            None => Inherited::Nothing,
            Some(found) if found.is_running() => Inherited::Running,
            Some(found) => {
                // What is left of an attachment in parts tracks nothing whole.
                for link in std::mem::take(&mut found.links) {
                    pins::remove_pin(&found.set.join(link.name))?;
                }
                Inherited::Stopped
            }
        };
        if pins.state == Inherited::Stopped && !pins.is_counted()? {
            (pins.found, pins.state) = (None, Inherited::Nothing);
        }
        if let Some(found) = &pins.found {
            pins.generation = found.generation.max(tenths_since_boot());
        }
        pins.tell_of_others()?;
        Ok(pins)
    }

    /// Whether the table of a daemon that has stopped has as many sessions as it says. Too few counted
    /// ones would fill it beyond its room, too many would keep room that nobody has.
    fn is_counted(&self) -> Result<bool, BpfError> {
        let Some(PinnedSet { set, table, .. }) = &self.found else {
            return Ok(true);
        };
        let there = SessionReader::open(set, table.key)?.cookies()?.len();
        let is_counted = table.sessions == there as u64;
        if !is_counted {
            tracing::warn!(
                "what is pinned in {} cannot be taken over: the session table says that it has {} \
                 sessions and has {there}; connections are adopted anew",
                set.display(),
                table.sessions
            );
        }
        Ok(is_counted)
    }

    fn tell_of_others(&self) -> Result<(), PinError> {
        for set in self.directory.others()? {
            if set != self.set {
                tracing::warn!(
                    "{} is of another version, whose records this one does not read: its sessions \
                     are adopted anew",
                    set.display()
                );
            }
        }
        Ok(())
    }

    /// See [`Datapath::inherited_generation`].
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// For how many sessions the table is made: a larger one than is needed by now stays.
    pub(super) fn capacity(&self, max_sessions: u32) -> u32 {
        let found = self.found.as_ref().map(|found| found.table.capacity);
        let found = found.and_then(|found| u32::try_from(found).ok());
        let first = larger_table::first_capacity(max_sessions);
        found.map_or(first, |found| found.max(first).min(max_sessions))
    }

    /// Where cookies lie in the earlier daemon's table, if this one's programs work on with that.
    pub(super) fn key(&self, capacity: u32) -> Option<Key> {
        let found = self.found.as_ref();
        found
            .filter(|found| found.fits(capacity))
            .map(|found| found.table.key)
    }

    /// The pins of the maps that this daemon's programs work on, too.
    pub(super) fn shared(&self, capacity: u32) -> Vec<(&'static str, PathBuf)> {
        let Some(found) = &self.found else {
            return Vec::new();
        };
        let is_table = |name| [BUCKETS, SESSIONS, TABLE].contains(&name);
        let fits = found.fits(capacity);
        MAPS.iter()
            .filter(|map| map.is_shared && (fits || !is_table(map.name)))
            .map(|map| (map.name, found.set.join(map.name)))
            .collect()
    }

    pub(super) fn pin_maps(&self, ebpf: &Ebpf) -> Result<(), BpfError> {
        for map in &MAPS {
            let loaded = ebpf.map(map.name).ok_or(BpfError::Missing(map.name))?;
            pinned_set::pin_map(loaded, &self.set.join(map.name))?;
        }
        Ok(())
    }

    /// Whether this daemon's programs can take the place of those that are attached, one by one.
    /// The set in use becomes this daemon's then.
    pub(super) fn decide(&mut self, cgroup_id: u64, capacity: u32) -> Result<bool, PinError> {
        let Some(found) = &self.found else {
            return Ok(false);
        };
        let is_same = found.fits(capacity)
            && !found.links.is_empty()
            && found
                .links
                .iter()
                .all(|link| link.info.cgroup_id == cgroup_id);
        if !is_same {
            return Ok(false);
        }
        for map in MAPS.iter().filter(|map| !map.is_shared) {
            let (from, to) = (self.set.join(map.name), found.set.join(map.name));
            fs::rename(&from, &to).map_err(PinError::io("putting into place", &to))?;
        }
        for unknown in &found.unknown {
            pins::remove_pin(unknown)?;
        }
        pins::remove_set(&self.set)?;
        self.set.clone_from(&found.set);
        self.is_staged = false;
        Ok(true)
    }

    /// The numbers of the programs whose links are pinned in the directory, by daemons of any version.
    pub(super) fn pinned_programs(&self) -> Vec<u32> {
        let others = self.directory.others().unwrap_or_default();
        let sets = iter::once(self.directory.current()).chain(others);
        let pins = sets.filter_map(|set| fs::read_dir(set).ok()).flatten();
        let program = |pin: PathBuf| -> Option<u32> {
            let object = sys::open_pin(&pin).ok()?;
            let is_link = sys::kind(&object).ok()? == Kind::Link;
            is_link
                .then(|| sys::link_info(&object).ok())?
                .map(|link| link.program_id)
        };
        pins.flatten()
            .filter_map(|pin| program(pin.path()))
            .collect()
    }

    /// The link of an earlier daemon's program.
    pub(super) fn take_link(&mut self, name: &str) -> Option<FoundLink> {
        let links = &mut self.found.as_mut()?.links;
        let index = links.iter().position(|link| link.name == name)?;
        Some(links.swap_remove(index))
    }

    pub(super) fn pin_link(&self, link: &impl AsFd, name: &str) -> Result<(), PinError> {
        let path = self.set.join(name);
        sys::pin(link, &path).map_err(PinError::io("pinning", &path))
    }

    /// Removes the pin of a link, if there is one.
    pub(super) fn unpin(&self, name: &str) -> Result<(), PinError> {
        let path = self.set.join(name);
        if path.exists() {
            pins::remove_pin(&path)?;
        }
        Ok(())
    }

    pub(super) fn is_staged(&self) -> bool {
        self.is_staged
    }

    /// Makes a directory for the maps of a larger table.
    pub(super) fn stage(&self) -> Result<PathBuf, PinError> {
        self.directory.stage()
    }

    /// That directory.
    pub(super) fn staged(&self) -> PathBuf {
        self.directory.staged()
    }

    /// Removes it, with what is left in it.
    pub(super) fn end_staging(&self) -> Result<(), PinError> {
        pins::remove_set(&self.staged())?;
        self.unpin(TORN)
    }

    /// From now on until the end of the staging the pinned table is not the one in use.
    pub(super) fn mark_torn(&self, any: &impl AsFd) -> Result<(), PinError> {
        self.pin_link(any, TORN)
    }

    /// Puts a staged pin into the place of the one of this name.
    pub(super) fn replace(&self, name: &str) -> Result<(), PinError> {
        let to = self.set.join(name);
        fs::rename(self.staged().join(name), &to).map_err(PinError::io("putting into place", &to))
    }

    /// Whether the earlier daemon's programs have a map of their own.
    pub(super) fn has_previous(&self) -> bool {
        self.previous.is_some()
    }
}

/// Wraps around after 13 years.
fn tenths_since_boot() -> u32 {
    (monotonic_ns() / 100_000_000) as u32
}

impl Drop for Pins {
    fn drop(&mut self) {
        if self.is_staged
            && let Err(error) = pins::remove_set(&self.set)
        {
            tracing::error!("{error}");
        }
    }
}

impl Datapath {
    /// In which state an earlier daemon's sessions were found.
    pub fn inherited(&self) -> Inherited {
        let pins = self.pins.as_ref();
        pins.map_or(Inherited::Nothing, |pins| pins.state)
    }

    /// A generation that no policy of an earlier daemon had; 0 where there was none.
    ///
    /// That of the last one is pinned. But a start that was cut short may have left records in the session
    /// map whose policy has gone with its pins: no two starts get so far within a tenth of a second.
    pub fn inherited_generation(&self) -> u32 {
        self.pins.as_ref().map_or(0, Pins::generation)
    }

    /// Fills the session map from that of an earlier daemon, where it is another.
    pub(super) fn copy_sessions(&mut self) -> Result<(), BpfError> {
        let running = self.inherited() == Inherited::Running;
        let pins = self.pins.as_ref();
        let found = pins.and_then(|pins| pins.found.as_ref());
        let Some(found) = found.filter(|found| !found.fits(self.load_options.capacity)) else {
            return Ok(());
        };
        tracing::info!(
            "the session map is for {} sessions and was for {}: they are copied",
            self.load_options.capacity,
            found.table.capacity
        );
        let sessions = SessionReader::open(&found.set, found.table.key)?;
        let mut previous = PreviousTable {
            sessions,
            copied: HashMap::new(),
        };
        for cookie in previous.sessions.cookies()? {
            if let Some(session) = previous.sessions.session(cookie)?
                && self.adopt(cookie, &session)? == Adoption::Inserted
            {
                previous.copied.insert(cookie, session.established_ns);
            }
        }
        if let Some(pins) = self.pins.as_mut().filter(|_| running) {
            pins.previous = Some(previous);
        }
        Ok(())
    }

    /// Makes up for what passed between the copying of the sessions and the attachment of this
    /// daemon's programs: the earlier ones have seen it, and still do.
    ///
    /// # Errors
    ///
    /// Where a map cannot be read or written.
    pub fn compare_sessions(&mut self) -> Result<(), BpfError> {
        let Some(previous) = self.pins.as_mut().and_then(|pins| pins.previous.take()) else {
            return Ok(());
        };
        for _ in 0..MAX_COMPARISONS {
            // The earlier programs may be at a packet.
            grace_period::wait_for_programs();
            if self.compare_once(&previous)? == 0 {
                break;
            }
        }
        for (cookie, established_ns) in &previous.copied {
            if previous.sessions.session(*cookie)?.is_none() {
                self.remove(*cookie, *established_ns)?;
            }
        }
        Ok(())
    }

    /// Returns how many sessions differed.
    fn compare_once(&mut self, previous: &PreviousTable) -> Result<usize, BpfError> {
        let mut differed = 0;
        for cookie in previous.sessions.cookies()? {
            let Some(before) = previous.sessions.session(cookie)? else {
                continue;
            };
            match self.session(cookie)? {
                Some(now) => {
                    // Each has the stamps of what it was there for.
                    let mut newest = now;
                    newest.merge_activity(&before.traffic());
                    if newest != now && self.update(cookie, &newest)? {
                        differed += 1;
                    }
                }
                None if !previous.copied.contains_key(&cookie) => {
                    let adopted = self.adopt(cookie, &before)?;
                    differed += usize::from(adopted == Adoption::Inserted);
                }
                // It has ended since.
                None => {}
            }
        }
        Ok(differed)
    }

    /// Ends the take-over: the pins of this daemon take their place, and what other daemons
    /// attached and pinned is removed.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn commit(&mut self) -> Result<(), BpfError> {
        let Some(pins) = &mut self.pins else {
            return Ok(());
        };
        if pins.is_staged {
            pins.directory.commit(&pins.set)?;
            pins.set = pins.directory.current();
            pins.is_staged = false;
        }
        pins.found = None;
        pins.directory.remove_others()?;
        Ok(())
    }
}
