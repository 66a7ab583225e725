//! The session table, as the daemon works with it: this one's through the program `table_ops`, an earlier
//! daemon's by reading its maps. `session_enforcer_common::table` says how it is made.

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

/// The maps that a table consists of, as they are named in the object and as pins.
pub(super) const BUCKETS: &str = "BUCKETS";
/// The records.
pub(super) const SESSIONS: &str = "SESSIONS";
/// What a table knows of itself.
pub(super) const TABLE: &str = "TABLE";

/// Between the shutting of a gate and the reading of its record. A packet looks whether the gate was shut
/// without a barrier after its stamp: its processor may look before others can see the stamp, and makes the
/// stamp visible within this. `docs/design/exact-deadlines.md` has the measurement.
const STAMP_VISIBLE: Duration = Duration::from_micros(20);

/// This daemon's session table. All that is done to it is done by a program in the kernel, which runs to
/// its end: nothing is left half done, whatever becomes of the daemon.
pub(super) struct SessionTable {
    program: OwnedFd,
    exchanges: Mapping<TableRequest>,
    buckets: MapData,
    bucket_count: u32,
}

impl SessionTable {
    /// Of the maps as they were loaded, with the program that works on them.
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

    /// For who only reads them.
    pub(super) fn buckets_fd(&self) -> io::Result<OwnedFd> {
        self.buckets.fd().as_fd().try_clone_to_owned()
    }

    /// The session as the kernel has it now.
    pub(super) fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let request = self.ask(cookie, TableOp::Read, None)?;
        Ok((request.answer == answer::DONE).then_some(request.session))
    }

    /// The sessions of these cookies as the kernel has them now, in their order.
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

    /// Puts in sessions that are not there; what became of each, in their order.
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

    /// Writes a session that is there; whether it was.
    pub(super) fn update(&self, cookie: u64, session: &Session) -> Result<bool, BpfError> {
        let request = self.ask(cookie, TableOp::Update, Some(session))?;
        Ok(request.answer == answer::DONE)
    }

    /// Gives sessions, each named by cookie and time of establishment, rule and generation.
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

    /// Takes out the session that was established then; whether it was there.
    pub(super) fn remove(&self, cookie: u64, established_ns: u64) -> Result<bool, BpfError> {
        // SAFETY: as in `put`.
        unsafe { (*self.exchanges.at(0)).session.established_ns = established_ns };
        let request = self.ask(cookie, TableOp::Remove, None)?;
        Ok(request.answer == answer::DONE)
    }

    /// Shuts the gate of sessions, each named by cookie and time of establishment, and reads them after
    /// that: a packet whose stamp is not in its record does not pass. None where one is not there.
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

    /// Opens the gate of a session that was shut, if it is there.
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

    /// The cookie of every session, once.
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
        // SAFETY: within the mapping, which nothing reads or writes meanwhile: the program only runs
        // in `table_ops`, and the mapping keeps this value to one thread.
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
        // SAFETY: as above; any bit pattern is valid.
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

/// Whether a program of this version would answer so.
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

/// The head of a table.
pub(super) fn head(map: OwnedFd) -> Result<TableHead, MapError> {
    let map = MapData::from_fd(map).and_then(Map::from_map_data)?;
    Array::try_from(map)?.get(&0, 0)
}

/// The tags are read where the kernel has them, in a mapping that is gone again afterwards: it would
/// count as the daemon's memory.
fn cookies(buckets: &MapData, count: u32) -> io::Result<Vec<u64>> {
    let slots = count as usize * WAYS as usize;
    let tags: Mapping<u64> = Mapping::new(buckets.fd().as_fd(), slots, ProtFlags::PROT_READ)?;
    // SAFETY: within the mapping. Volatile: the kernel changes it.
    let tag = |index| unsafe { tags.at(index).read_volatile() };
    Ok(cleaned((0..slots).map(tag)))
}

/// Whether a tag is that of a session; the others are of slots that are free, or being written.
pub(super) const fn is_cookie(tag: u64) -> bool {
    tag != 0 && tag != CLAIMED
}

/// The cookies among these tags, each once: a socket that is connected again is put in again, perhaps at
/// another slot.
pub(super) fn cleaned(tags: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut cookies: Vec<u64> = tags.filter(|tag| is_cookie(*tag)).collect();
    cookies.sort_unstable();
    cookies.dedup();
    cookies
}

/// The elements of a map in this process's memory. Not to be shared between threads.
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
        // SAFETY: a new mapping, of elements whose size is the map's: nothing else lies there.
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
        // SAFETY: the mapping is this value's, and what `at` gave is not used any more.
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
