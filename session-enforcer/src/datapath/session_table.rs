//! The daemon's access to the session table through the program `table_ops`. `session_enforcer_common::table` describes
//! the table's layout.

use std::{
    hint, io,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData, MapError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use session_enforcer_common::{
    Session,
    table::{CLAIMED, MAX_REQUESTS, TableHead, TableOp, TableRequest, WAYS, answer},
};

use super::{Adoption, BpfError, sys};

/// The maps of a session table, by their names in the object and of their pins.
pub(super) const BUCKETS: &str = "BUCKETS";
/// The records.
pub(super) const SESSIONS: &str = "SESSIONS";
/// The head of the table.
pub(super) const TABLE: &str = "TABLE";

/// Wait between shutting a gate and reading the record. A packet checks the gate after its stamp without a barrier, so
/// its processor may read the gate before the stamp is visible to others. The stamp becomes visible within this time;
/// `docs/design/exact-deadlines.md` has the measurement.
const STAMP_VISIBLE: Duration = Duration::from_micros(20);

/// This daemon's session table. All changes are made by a program in the kernel, which runs to its end, so a killed
/// daemon leaves no partial change.
pub(super) struct SessionTable {
    program: OwnedFd,
    exchanges: Mapping<TableRequest>,
    buckets: MapData,
    bucket_count: u32,
}

impl SessionTable {
    /// Uses the loaded maps and the program `table_ops`.
    pub(super) fn new(
        program: OwnedFd,
        exchanges: &MapData,
        buckets: MapData,
        bucket_count: u32,
    ) -> io::Result<Self> {
        let writable = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Self {
            program,
            exchanges: Mapping::new(exchanges.fd().as_fd(), MAX_REQUESTS as usize, writable)?,
            buckets,
            bucket_count,
        })
    }

    /// A descriptor of the buckets for a reader.
    pub(super) fn buckets_fd(&self) -> io::Result<OwnedFd> {
        self.buckets.fd().as_fd().try_clone_to_owned()
    }

    /// The current record of the session.
    pub(super) fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let request = self.ask(cookie, TableOp::Read, None)?;
        Ok((request.answer == answer::DONE).then_some(request.session))
    }

    /// The current records of the sessions, in the order of the cookies.
    pub(super) fn sessions(&self, cookies: &[u64]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut sessions = Vec::with_capacity(cookies.len());
        for cookies in cookies.chunks(MAX_REQUESTS as usize) {
            for (index, cookie) in cookies.iter().enumerate() {
                self.put(index, *cookie, TableOp::Read, None);
            }
            self.run(cookies.len())?;
            for (index, cookie) in cookies.iter().enumerate() {
                let request = self.answered(index, *cookie, TableOp::Read)?;
                sessions.push((request.answer == answer::DONE).then_some(request.session));
            }
        }
        Ok(sessions)
    }

    /// Inserts sessions that are not in the table. Returns the result for each, in their order.
    pub(super) fn adopt(&self, sessions: &[(u64, Session)]) -> Result<Vec<Adoption>, BpfError> {
        let mut adopted = Vec::with_capacity(sessions.len());
        for sessions in sessions.chunks(MAX_REQUESTS as usize) {
            for (index, (cookie, session)) in sessions.iter().enumerate() {
                self.put(index, *cookie, TableOp::Adopt, Some(session));
            }
            self.run(sessions.len())?;
            for (index, (cookie, _)) in sessions.iter().enumerate() {
                let request = self.answered(index, *cookie, TableOp::Adopt)?;
                adopted.push(match request.answer {
                    answer::DONE => Adoption::Inserted,
                    answer::PRESENT => Adoption::Known,
                    answer::RULE_FULL => Adoption::RuleFull,
                    _ => Adoption::Full,
                });
            }
        }
        Ok(adopted)
    }

    /// Updates an existing session; returns whether it exists.
    pub(super) fn update(&self, cookie: u64, session: &Session) -> Result<bool, BpfError> {
        let request = self.ask(cookie, TableOp::Update, Some(session))?;
        Ok(request.answer == answer::DONE)
    }

    /// Sets rule and generation of sessions, each identified by cookie and time of establishment.
    pub(super) fn decide(&self, sessions: &[(u64, Session)]) -> Result<(), BpfError> {
        for sessions in sessions.chunks(MAX_REQUESTS as usize) {
            for (index, (cookie, session)) in sessions.iter().enumerate() {
                self.put(index, *cookie, TableOp::Decide, Some(session));
            }
            self.run(sessions.len())?;
            for (index, (cookie, _)) in sessions.iter().enumerate() {
                self.answered(index, *cookie, TableOp::Decide)?;
            }
        }
        Ok(())
    }

    /// Removes the session established at `established_ns`; returns whether it existed.
    pub(super) fn remove(&self, cookie: u64, established_ns: u64) -> Result<bool, BpfError> {
        // SAFETY: as in `put`.
        unsafe { (*self.exchanges.at(0)).session.established_ns = established_ns };
        let request = self.ask(cookie, TableOp::Remove, None)?;
        Ok(request.answer == answer::DONE)
    }

    /// Shuts the gates of sessions, each identified by cookie and time of establishment, and then reads their records.
    /// A packet whose stamp is not in the returned record is dropped. The result is `None` for a session that does not
    /// exist.
    pub(super) fn shut(&self, sessions: &[(u64, u64)]) -> Result<Vec<Option<Session>>, BpfError> {
        let mut shut = Vec::with_capacity(sessions.len());
        for sessions in sessions.chunks(MAX_REQUESTS as usize) {
            self.set_gates(sessions, TableOp::Shut)?;
            let shut_at = Instant::now();
            while shut_at.elapsed() < STAMP_VISIBLE {
                hint::spin_loop();
            }
            let cookies: Vec<u64> = sessions.iter().map(|(cookie, _)| *cookie).collect();
            let read = self.sessions(&cookies)?.into_iter().zip(sessions);
            shut.extend(read.map(|(session, (_, established_ns))| {
                session.filter(|session| session.established_ns == *established_ns)
            }));
        }
        Ok(shut)
    }

    /// Reopens the gate of a session, if the session exists.
    pub(super) fn reopen(&self, cookie: u64, established_ns: u64) -> Result<(), BpfError> {
        self.set_gates(&[(cookie, established_ns)], TableOp::Reopen)
    }

    fn set_gates(&self, sessions: &[(u64, u64)], op: TableOp) -> Result<(), BpfError> {
        for (index, (cookie, established_ns)) in sessions.iter().enumerate() {
            // SAFETY: as in `put`.
            unsafe { (*self.exchanges.at(index)).session.established_ns = *established_ns };
            self.put(index, *cookie, op, None);
        }
        self.run(sessions.len())?;
        for (index, (cookie, _)) in sessions.iter().enumerate() {
            self.answered(index, *cookie, op)?;
        }
        Ok(())
    }

    /// The cookies of all sessions, without duplicates.
    pub(super) fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        cookies(&self.buckets, self.bucket_count).map_err(BpfError::Table)
    }

    fn ask(
        &self,
        cookie: u64,
        op: TableOp,
        session: Option<&Session>,
    ) -> Result<TableRequest, BpfError> {
        self.put(0, cookie, op, session);
        self.run(1)?;
        self.answered(0, cookie, op)
    }

    fn put(&self, index: usize, cookie: u64, op: TableOp, session: Option<&Session>) {
        let at = self.exchanges.at(index);
        // SAFETY: within the mapping, which nothing accesses at the same time: the program only runs within `run`, and
        // `Mapping` confines this value to one thread.
        unsafe {
            (*at).cookie = cookie;
            (*at).op = op as u32;
            (*at).answer = 0;
            if let Some(session) = session {
                (*at).session = *session;
            }
        }
    }

    fn run(&self, requests: usize) -> Result<(), BpfError> {
        sys::run_raw_tracepoint(&self.program, requests as u64).map_err(BpfError::Table)
    }

    fn answered(&self, index: usize, cookie: u64, op: TableOp) -> Result<TableRequest, BpfError> {
        // SAFETY: as in `put`; any bit pattern is valid.
        let request = unsafe { self.exchanges.at(index).read() };
        if request.cookie == cookie && is_answer(op, request.answer) {
            Ok(request)
        } else {
            Err(BpfError::NoAnswer {
                op,
                answer: request.answer,
            })
        }
    }
}

/// Whether a program of this version can give this answer to the operation.
fn is_answer(op: TableOp, given: u32) -> bool {
    match op {
        TableOp::Read
        | TableOp::Update
        | TableOp::Remove
        | TableOp::Shut
        | TableOp::Reopen
        | TableOp::Decide => {
            matches!(given, answer::DONE | answer::MISSING)
        }
        TableOp::Adopt => matches!(
            given,
            answer::DONE | answer::PRESENT | answer::FULL | answer::RULE_FULL
        ),
    }
}

/// Reads the head of a table.
pub(super) fn head(map: OwnedFd) -> Result<TableHead, MapError> {
    let map = MapData::from_fd(map).and_then(Map::from_map_data)?;
    Array::try_from(map)?.get(&0, 0)
}

/// Reads the tags through a temporary mapping, which would otherwise count as the daemon's memory.
fn cookies(buckets: &MapData, count: u32) -> io::Result<Vec<u64>> {
    let slots = count as usize * WAYS as usize;
    let tags: Mapping<u64> = Mapping::new(buckets.fd().as_fd(), slots, ProtFlags::PROT_READ)?;
    // SAFETY: within the mapping. Volatile: the kernel changes it.
    let tag = |index| unsafe { tags.at(index).read_volatile() };
    Ok(cleaned((0..slots).map(tag)))
}

/// Whether a tag is the cookie of a session; otherwise its slot is free or is being written.
pub(super) const fn is_cookie(tag: u64) -> bool {
    tag != 0 && tag != CLAIMED
}

/// The cookies among the tags, without duplicates. A socket that is connected again is inserted again, possibly in
/// another slot.
pub(super) fn cleaned(tags: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut cookies: Vec<u64> = tags.filter(|tag| is_cookie(*tag)).collect();
    cookies.sort_unstable();
    cookies.dedup();
    cookies
}

/// The elements of a map, mapped into this process's memory. It must not be shared between threads.
#[derive(Debug)]
pub(super) struct Mapping<T> {
    start: NonNull<T>,
    elements: usize,
    bytes: NonZeroUsize,
}

impl<T> Mapping<T> {
    pub(super) fn new(
        map: BorrowedFd<'_>,
        elements: usize,
        protection: ProtFlags,
    ) -> io::Result<Self> {
        let bytes = elements
            .checked_mul(size_of::<T>())
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping of elements with the map's value size; it overlaps nothing.
        let start = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self {
            start: start.cast(),
            elements,
            bytes,
        })
    }

    pub(super) fn at(&self, index: usize) -> *mut T {
        assert!(index < self.elements, "an element of the mapping");
        // SAFETY: within the mapping.
        unsafe { self.start.add(index).as_ptr() }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and the pointers that `at` returned are no longer used.
        let unmapped = unsafe { munmap(self.start.cast(), self.bytes.get()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_and_claimed_slots_are_no_cookies_and_each_cookie_is_one() {
        assert_eq!(cleaned([7, 0, CLAIMED, 3, 7, 0].into_iter()), [3, 7]);
    }

    #[test]
    fn only_what_a_program_of_this_version_answers_is_an_answer() {
        for op in [
            TableOp::Read,
            TableOp::Update,
            TableOp::Remove,
            TableOp::Adopt,
            TableOp::Shut,
            TableOp::Reopen,
            TableOp::Decide,
        ] {
            assert!(is_answer(op, answer::DONE));
            assert!(!is_answer(op, 0) && !is_answer(op, 6));
        }
        for full in [answer::FULL, answer::RULE_FULL] {
            assert!(is_answer(TableOp::Adopt, full) && !is_answer(TableOp::Read, full));
        }
        assert!(!is_answer(TableOp::Adopt, answer::MISSING));
    }
}
