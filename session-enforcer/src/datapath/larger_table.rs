//! Growth: a larger session table replaces the one in use while the programs run. `docs/design/session-table.md`
//! describes the steps and their reasons.

use std::{
    cmp::Ordering,
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::mpsc,
    thread,
};

use aya::{
    Ebpf,
    maps::{Map, MapData},
};
use session_enforcer_common::{Session, table::TableHead};
use tokio::sync::oneshot;

use super::{
    Adoption, BpfError, Datapath, LoadOptions, PinError,
    inherit::Pins,
    load_object, pinned_set,
    port_filter::{self, Ports},
    random_key, reader_of,
    session_table::{BUCKETS, SESSIONS, SessionTable, TABLE},
    sys, table_of, take_map,
};
use crate::host::privilege;

/// Factor by which the table grows.
const GROWTH: u32 = 4;

/// Maps that belong to one table or to the programs of one table. The old and the new programs share all other maps.
/// aya initialises the sections of globals when it loads the object, so the port filters' section is not shared either.
const OF_ONE_TABLE: [&str; 6] = [
    BUCKETS,
    SESSIONS,
    TABLE,
    "HELD",
    "EXCHANGES",
    port_filter::SECTION,
];

/// The maps that the programs of a larger table share.
pub(super) fn shared_maps(ebpf: &Ebpf) -> Result<Vec<(String, OwnedFd)>, BpfError> {
    let mut shared = Vec::new();
    for (name, map) in ebpf.maps() {
        if OF_ONE_TABLE.contains(&name) || name.starts_with(".rodata") {
            continue;
        }
        let (Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::LruHashMap(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)) = map
        else {
            return Err(BpfError::Unexpected(name.to_owned()));
        };
        let fd = data.fd().as_fd().try_clone_to_owned();
        shared.push((name.to_owned(), fd.map_err(BpfError::Table)?));
    }
    Ok(shared)
}

/// The thread that loads the programs of larger tables; it keeps the capabilities for that.
pub(super) struct Loader {
    jobs: mpsc::Sender<Job>,
}

/// A request to load the programs of a larger table.
struct Job {
    options: LoadOptions,
    pins: Vec<(String, PathBuf)>,
    done: oneshot::Sender<Result<Ebpf, BpfError>>,
}

impl Loader {
    /// Starts the thread. Must be called before the daemon gives up its capabilities.
    pub(super) fn start() -> Result<Self, BpfError> {
        let (jobs, received) = mpsc::channel::<Job>();
        let work = move || {
            if let Err(error) = privilege::confine_loader() {
                tracing::warn!("the session table does not grow: {error:#}");
                return;
            }
            privilege::give_way();
            for job in received {
                let pins = job
                    .pins
                    .iter()
                    .map(|(name, path)| (name.as_str(), path.clone()));
                // The send fails if the daemon is stopping.
                let _ = job.done.send(load_object(&job.options, pins));
            }
        };
        let builder = thread::Builder::new().name("load-larger".to_owned());
        builder.spawn(work).map_err(BpfError::Table)?;
        Ok(Self { jobs })
    }
}

/// A larger table whose programs are being loaded.
#[derive(Debug)]
pub struct Loading {
    options: LoadOptions,
    done: oneshot::Receiver<Result<Ebpf, BpfError>>,
}

/// The larger table while it is being filled.
pub(super) struct Next {
    ebpf: Ebpf,
    options: LoadOptions,
    sessions: SessionTable,
    copied: HashMap<u64, u64>,
}

/// The previous table and its programs.
pub(super) struct Before {
    sessions: SessionTable,
    /// The sessions that were copied to the table in use, with their times of establishment.
    copied: HashMap<u64, u64>,
    _programs: Ebpf,
}

impl Loading {
    /// Waits for the verifier to accept the programs.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses a map or a program, usually for lack of memory.
    pub async fn finished(self) -> Result<Larger, BpfError> {
        let Self { options, done } = self;
        let loaded = done.await.map_err(|_| BpfError::NoLoader)?;
        Ok(Larger {
            ebpf: loaded?,
            options,
        })
    }
}

/// A larger, empty table with its programs.
pub struct Larger {
    ebpf: Ebpf,
    options: LoadOptions,
}

impl Datapath {
    /// Whether growth is possible. False after an attempt has failed.
    pub fn can_grow(&self) -> bool {
        let is_pinned = self.pins.as_ref().is_some_and(|pins| !pins.is_staged());
        let is_larger_allowed = self.load_options.capacity < self.options.max_sessions;
        is_pinned && self.loader.is_some() && is_larger_allowed && !self.has_not_grown
    }

    /// Starts to load a larger table.
    ///
    /// # Errors
    ///
    /// Fails if the table cannot grow or the kernel refuses a pin.
    pub fn load_larger(&self) -> Result<Loading, BpfError> {
        let (Some(pins), Some(loader)) = (&self.pins, &self.loader) else {
            return Err(BpfError::NoLoader);
        };
        let before = &self.load_options;
        let options = LoadOptions {
            capacity: before
                .capacity
                .saturating_mul(GROWTH)
                .min(self.options.max_sessions),
            key: random_key()?,
            ..*before
        };
        let staged = pins.stage()?;
        let mut shared = Vec::new();
        for (index, (name, map)) in self.shared.iter().enumerate() {
            // bpffs does not allow the dot in some of the names.
            let path = staged.join(format!("shared{index}"));
            sys::pin(map, &path).map_err(PinError::io("pinning", &path))?;
            shared.push((name.clone(), path));
        }
        let (sender, done) = oneshot::channel();
        let job = Job {
            options,
            pins: shared,
            done: sender,
        };
        loader.jobs.send(job).map_err(|_| BpfError::NoLoader)?;
        Ok(Loading { options, done })
    }

    /// Starts to fill the larger table. From now on the daemon changes sessions in both tables.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn begin_growth(&mut self, larger: Larger) -> Result<(), BpfError> {
        let Larger { mut ebpf, options } = larger;
        let pins = self.pins.as_ref().ok_or(BpfError::NoLoader)?;
        for name in [BUCKETS, SESSIONS, TABLE] {
            let map = ebpf.map(name).ok_or(BpfError::Missing(name))?;
            pinned_set::pin_map(map, &pins.staged().join(name))?;
        }
        let sessions = table_of(&mut ebpf, options.capacity)?;
        let copied = HashMap::new();
        self.next = Some(Next {
            ebpf,
            options,
            sessions,
            copied,
        });
        Ok(())
    }

    /// Discards the larger table.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be removed.
    pub fn give_up_growth(&mut self) -> Result<(), BpfError> {
        self.next = None;
        self.has_not_grown = true;
        Ok(self.pins.iter().try_for_each(Pins::end_staging)?)
    }

    /// Copies sessions to the larger table, or updates those that are there.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn copy_to_larger(&mut self, cookies: &[u64]) -> Result<(), BpfError> {
        let Some(next) = &mut self.next else {
            return Ok(());
        };
        let from = self.sessions.sessions(cookies)?;
        carry_over(cookies, &from, &next.sessions, &mut next.copied)
    }

    /// Replaces the running programs with those of the larger table, one link after the other. From then on the larger
    /// table is in use, and [`sessions`](Self::sessions) merges the records of both tables until
    /// [`end_growth`](Self::end_growth). If the daemon is killed in between, the next daemon updates the sessions from
    /// their sockets.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation. Old and new programs then run side by side.
    pub fn change_over(&mut self) -> Result<(), BpfError> {
        let (Some(next), Some(pins)) = (self.next.take(), &self.pins) else {
            return Ok(());
        };
        let Next {
            mut ebpf,
            options,
            sessions,
            copied,
        } = next;
        let ports = Ports::seeing_all(take_map(&mut ebpf, port_filter::SECTION)?)?;
        let table = take_map::<aya::maps::Array<MapData, TableHead>>(&mut ebpf, TABLE)?;
        let (_, any) = self.shared.first().ok_or(BpfError::NoLoader)?;
        pins.mark_torn(any)?;
        self.update_links(&ebpf)?;
        self.ports = ports;
        self.table = table;
        self.load_options = options;
        self.has_not_grown = false;
        let before = std::mem::replace(&mut self.sessions, sessions);
        let programs = std::mem::replace(&mut self.ebpf, ebpf);
        self.before = Some(Before {
            sessions: before,
            copied,
            _programs: programs,
        });
        self.in_use
            .set(reader_of(&self.ebpf, &self.sessions, options.key)?);
        self.compare_cookies()
    }

    /// Removes sessions from the table in use that have ended in the previous table, and inserts those that have begun
    /// there.
    fn compare_cookies(&mut self) -> Result<(), BpfError> {
        let Some(before) = &mut self.before else {
            return Ok(());
        };
        let cookies = before.sessions.cookies()?;
        let is_there = |cookie: &u64| cookies.binary_search(cookie).is_ok();
        let ended: Vec<(u64, u64)> = before
            .copied
            .extract_if(|cookie, _| !is_there(cookie))
            .collect();
        for (cookie, established_ns) in ended {
            self.sessions.remove(cookie, established_ns)?;
        }
        let mut begun = cookies;
        begun.retain(|cookie| !before.copied.contains_key(cookie));
        let from = before.sessions.sessions(&begun)?;
        let there = |(cookie, session): (u64, Option<Session>)| Some((cookie, session?));
        let begun: Vec<_> = begun.into_iter().zip(from).filter_map(there).collect();
        self.sessions.adopt(&begun)?;
        // Sessions that were refused are recorded too, so the next comparison does not try them again.
        let established = begun
            .iter()
            .map(|(cookie, session)| (*cookie, session.established_ns));
        before.copied.extend(established);
        Ok(())
    }

    /// The cookies of the sessions in the previous table.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn cookies_before(&mut self) -> Result<Vec<u64>, BpfError> {
        self.compare_cookies()?;
        self.before
            .as_ref()
            .map_or(Ok(Vec::new()), |before| before.sessions.cookies())
    }

    /// Merges what the previous programs have recorded. Must be called when none of those programs runs any more.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn merge_previous(&mut self, cookies: &[u64]) -> Result<(), BpfError> {
        let Some(before) = &self.before else {
            return Ok(());
        };
        let from = before.sessions.sessions(cookies)?;
        let now = self.sessions.sessions(cookies)?;
        for ((cookie, from), now) in cookies.iter().zip(from).zip(now) {
            if let (Some(from), Some(now)) = (from, now) {
                self.bring_forward(*cookie, &now, &from)?;
            }
        }
        Ok(())
    }

    /// Brings a record forward to what the previous programs have recorded since it was copied.
    pub(super) fn bring_forward(
        &self,
        cookie: u64,
        now: &Session,
        before: &Session,
    ) -> Result<(), BpfError> {
        let joined = merged(*now, before);
        if joined.established_ns != now.established_ns {
            self.sessions.remove(cookie, now.established_ns)?;
            self.sessions.adopt(&[(cookie, joined)])?;
        } else if joined != *now {
            self.sessions.update(cookie, &joined)?;
        }
        Ok(())
    }

    /// Drops the previous table.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be replaced.
    pub fn end_growth(&mut self) -> Result<(), BpfError> {
        let (Some(_), Some(pins)) = (self.before.take(), &self.pins) else {
            return Ok(());
        };
        for name in [BUCKETS, SESSIONS, TABLE] {
            pins.replace(name)?;
        }
        Ok(pins.end_staging()?)
    }

    /// Merges the records of the previous table into `sessions`, while there is one.
    pub(super) fn merge_all(
        &self,
        cookies: &[u64],
        sessions: &mut [Option<Session>],
    ) -> Result<(), BpfError> {
        let Some(before) = &self.before else {
            return Ok(());
        };
        for (now, from) in sessions.iter_mut().zip(before.sessions.sessions(cookies)?) {
            if let (Some(now), Some(from)) = (now, from) {
                *now = merged(*now, &from);
            }
        }
        Ok(())
    }

    /// The larger table while it is being filled; changes of the table in use must be applied to it too.
    pub(super) fn larger(&self) -> Option<&SessionTable> {
        self.next.as_ref().map(|next| &next.sessions)
    }
}

/// Merges the record of the previous table. If the socket was connected again after its record was copied, the session
/// of the previous table is the later one.
fn merged(mut now: Session, before: &Session) -> Session {
    match before.established_ns.cmp(&now.established_ns) {
        Ordering::Less => {}
        Ordering::Equal => now.merge_activity(&before.traffic()),
        Ordering::Greater => now = *before,
    }
    now
}

/// Copies sessions to a table that no program uses yet, and updates those that are there.
fn carry_over(
    cookies: &[u64],
    from: &[Option<Session>],
    to: &SessionTable,
    copied: &mut HashMap<u64, u64>,
) -> Result<(), BpfError> {
    let there = to.sessions(cookies)?;
    let mut missing = Vec::new();
    for ((cookie, from), there) in cookies.iter().zip(from).zip(there) {
        match (from, there) {
            (Some(from), Some(there)) if there.established_ns == from.established_ns => {
                if there != *from {
                    to.update(*cookie, from)?;
                }
            }
            (Some(from), there) => {
                if let Some(there) = there {
                    to.remove(*cookie, there.established_ns)?;
                }
                missing.push((*cookie, *from));
            }
            (None, _) => {}
        }
    }
    for ((cookie, session), answer) in missing.iter().zip(to.adopt(&missing)?) {
        if answer == Adoption::Inserted {
            copied.insert(*cookie, session.established_ns);
        }
    }
    Ok(())
}
