//! Take-over of an earlier daemon's pins, and the pins that this daemon leaves to the next.

use std::{collections::HashMap, fs, iter, os::fd::AsFd, path::PathBuf};

use aya::Ebpf;
use session_enforcer_common::table::Key;

use super::{
    Adoption, BpfError, Datapath, PinDir, PinError,
    pinned_set::{self, FoundLink, MAPS, PinnedSet, TORN},
    pins,
    session_reader::SessionReader,
    session_table::{BUCKETS, SESSIONS, TABLE},
    sys::{self, Kind},
};
use crate::host::{clock::monotonic_ns, grace_period, sockets};

/// Capacity of the first table on an idle host: about 4 MB.
const FIRST_CAPACITY: u32 = 16_384;

/// State in which an earlier daemon's sessions were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// There are none.
    Nothing,
    /// The programs ran without the daemon; the sessions are up to date.
    Running,
    /// No program was attached. Packets, closes and establishments in that time were not seen.
    Stopped,
}

/// The pins of the earlier daemon and of this one.
pub(super) struct Pins {
    directory: PinDir,
    found: Option<PinnedSet>,
    state: Inherited,
    /// See [`Datapath::inherited_generation`].
    generation: u32,
    /// The directory of this daemon's pins.
    set: PathBuf,
    /// Whether that set has not replaced the one in use yet.
    is_staged: bool,
    /// The earlier daemon's session table, if this daemon has another one.
    previous: Option<PreviousTable>,
}

/// An earlier daemon's session table that is being replaced.
struct PreviousTable {
    sessions: SessionReader,
    /// The sessions that were copied from it, with their times of establishment.
    copied: HashMap<u64, u64>,
}

/// Capacity of the first table: twice the number of the host's TCP sockets, within bounds.
fn first_capacity(max_sessions: u32) -> u32 {
    let sockets = sockets::allocated().unwrap_or(0);
    let wanted = sockets.saturating_mul(2).max(FIRST_CAPACITY);
    wanted.min(max_sessions)
}

impl Pins {
    /// Examines the pin directory and creates a new set in it.
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
                // A partial attachment does not track its sessions completely.
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

    /// Whether the table of a stopped daemon holds as many sessions as its count says. Too low a count overfills the
    /// table; too high a count wastes capacity.
    fn is_counted(&self) -> Result<bool, BpfError> {
        let Some(PinnedSet { set, table, .. }) = &self.found else {
            return Ok(true);
        };
        let there = SessionReader::open(set, table.key)?.cookies()?.len();
        let is_counted = table.sessions == there as u64;
        if !is_counted {
            tracing::warn!(
                "the pins in {} cannot be used: the session table counts {} sessions and has {there}; the daemon \
                 adopts the connections again",
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
                    "{} is of another version, whose records this one does not read; the daemon adopts the \
                     connections again",
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

    /// Capacity of the table. An inherited larger table is kept.
    pub(super) fn capacity(&self, max_sessions: u32) -> u32 {
        let found = self.found.as_ref().map(|found| found.table.capacity);
        let found = found.and_then(|found| u32::try_from(found).ok());
        let first = first_capacity(max_sessions);
        found.map_or(first, |found| found.max(first).min(max_sessions))
    }

    /// The key of the inherited table, if this daemon uses that table.
    pub(super) fn key(&self, capacity: u32) -> Option<Key> {
        let found = self.found.as_ref();
        found
            .filter(|found| found.fits(capacity))
            .map(|found| found.table.key)
    }

    /// The pins of the maps that this daemon's programs share.
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

    /// Whether this daemon's programs can replace the attached ones in place, one link at a time. In that case the set
    /// in use becomes this daemon's.
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

    /// The ids of the programs whose links are pinned in the directory by daemons of any version.
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

    /// Takes the link of an earlier daemon's program.
    pub(super) fn take_link(&mut self, name: &str) -> Option<FoundLink> {
        let links = &mut self.found.as_mut()?.links;
        let index = links.iter().position(|link| link.name == name)?;
        Some(links.swap_remove(index))
    }

    pub(super) fn pin_link(&self, link: &impl AsFd, name: &str) -> Result<(), PinError> {
        let path = self.set.join(name);
        sys::pin(link, &path).map_err(PinError::io("pinning", &path))
    }

    /// Removes the pin of a link, if it exists.
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

    /// Creates a directory for the maps of a larger table.
    pub(super) fn stage(&self) -> Result<PathBuf, PinError> {
        self.directory.stage()
    }

    /// The path of that directory.
    pub(super) fn staged(&self) -> PathBuf {
        self.directory.staged()
    }

    /// Removes that directory and the `TORN` pin.
    pub(super) fn end_staging(&self) -> Result<(), PinError> {
        pins::remove_set(&self.staged())?;
        self.unpin(TORN)
    }

    /// Creates the `TORN` pin: until [`end_staging`](Self::end_staging) the pinned table is not the one in use.
    pub(super) fn mark_torn(&self, any: &impl AsFd) -> Result<(), PinError> {
        self.pin_link(any, TORN)
    }

    /// Replaces the pin of this name with the staged one.
    pub(super) fn replace(&self, name: &str) -> Result<(), PinError> {
        let to = self.set.join(name);
        fs::rename(self.staged().join(name), &to).map_err(PinError::io("putting into place", &to))
    }

    /// Whether the earlier daemon's programs use a table of their own.
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
    /// State in which an earlier daemon's sessions were found.
    pub fn inherited(&self) -> Inherited {
        let pins = self.pins.as_ref();
        pins.map_or(Inherited::Nothing, |pins| pins.state)
    }

    /// Whether this daemon has the table of an earlier daemon. Otherwise it has copied the sessions for which there was
    /// room.
    pub fn keeps_table(&self) -> bool {
        let found = self.pins.as_ref().and_then(|pins| pins.found.as_ref());
        found.is_some_and(|found| found.fits(self.load_options.capacity))
    }

    /// A lower bound for this daemon's generations: no policy of an earlier daemon had a higher one. 0 if there was no
    /// earlier daemon.
    ///
    /// The last generation is pinned. An interrupted start may have left records of a policy whose pins are gone. The
    /// time since boot covers these too, because two starts never get that far within a tenth of a second.
    pub fn inherited_generation(&self) -> u32 {
        self.pins.as_ref().map_or(0, Pins::generation)
    }

    /// Copies the sessions of an earlier daemon's table, if this daemon has another table.
    pub(super) fn copy_sessions(&mut self) -> Result<(), BpfError> {
        let running = self.inherited() == Inherited::Running;
        let pins = self.pins.as_ref();
        let found = pins.and_then(|pins| pins.found.as_ref());
        let Some(found) = found.filter(|found| !found.fits(self.load_options.capacity)) else {
            return Ok(());
        };
        tracing::info!(
            "the session table is for {} sessions and was for {}: they are copied",
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

    /// Merges what passed between the copy of the sessions and the attachment of this daemon's programs. The earlier
    /// programs recorded it and are still running.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read or written.
    pub fn compare_sessions(&mut self) -> Result<(), BpfError> {
        let Some(previous) = self.pins.as_mut().and_then(|pins| pins.previous.take()) else {
            return Ok(());
        };
        // An earlier program may still be processing a packet.
        grace_period::wait_for_programs();
        for cookie in previous.sessions.cookies()? {
            let Some(before) = previous.sessions.session(cookie)? else {
                continue;
            };
            match self.session(cookie)? {
                Some(now) => self.bring_forward(cookie, &now, &before)?,
                None if !previous.copied.contains_key(&cookie) => {
                    self.adopt(cookie, &before)?;
                }
                // The session has ended since.
                None => {}
            }
        }
        for (cookie, established_ns) in &previous.copied {
            if previous.sessions.session(*cookie)?.is_none() {
                self.remove(*cookie, *established_ns)?;
            }
        }
        Ok(())
    }

    /// Ends the take-over: this daemon's pins replace the earlier set, and all other daemons' pins and attachments are
    /// removed.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
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
