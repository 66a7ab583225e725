//! A session table for who only reads it, without the help of the programs: this daemon's on another thread than the
//! engine's, and that which an earlier daemon left, which its programs may still change.

use std::{
    fmt,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{Ordering, fence},
    },
};

use aya::maps::{Array, Map, MapData, MapError};
use session_enforcer_common::{
    Session,
    table::{Bucket, Key, WAYS},
};

use super::{
    BpfError, map_error,
    session_table::{BUCKETS, SESSIONS, cleaned, is_cookie},
};

/// Buckets that one step reads at most: some 100 us where all are full.
const STEP: u32 = 64;

/// Reads sessions.
pub struct SessionReader {
    buckets: Array<MapData, Bucket>,
    sessions: Array<MapData, Session>,
    key: Key,
}

/// The table that is in use, which another one may take the place of.
#[derive(Debug)]
pub struct TableInUse(Mutex<Arc<SessionReader>>);

impl TableInUse {
    pub(super) fn new(reader: SessionReader) -> Self {
        Self(Mutex::new(Arc::new(reader)))
    }

    /// For who reads it from its beginning.
    pub fn reader(&self) -> Arc<SessionReader> {
        Arc::clone(&self.lock())
    }

    pub(super) fn set(&self, reader: SessionReader) {
        *self.lock() = Arc::new(reader);
    }

    fn lock(&self) -> MutexGuard<'_, Arc<SessionReader>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a reading of the whole table has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    next: u32,
    is_at_end: bool,
}

impl fmt::Debug for SessionReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionReader").finish_non_exhaustive()
    }
}

impl SessionReader {
    /// Of maps that are open.
    pub(super) fn new(buckets: OwnedFd, sessions: OwnedFd, key: Key) -> Result<Self, BpfError> {
        Self::of(MapData::from_fd(buckets), MapData::from_fd(sessions), key)
    }

    /// Opens the pins of a set that was looked at.
    pub(super) fn open(set: &Path, key: Key) -> Result<Self, BpfError> {
        let map = |name| MapData::from_pin(set.join(name));
        Self::of(map(BUCKETS), map(SESSIONS), key)
    }

    fn of(
        buckets: Result<MapData, MapError>,
        sessions: Result<MapData, MapError>,
        key: Key,
    ) -> Result<Self, BpfError> {
        Ok(Self {
            buckets: buckets
                .and_then(Map::from_map_data)
                .and_then(Array::try_from)
                .map_err(map_error(BUCKETS))?,
            sessions: sessions
                .and_then(Map::from_map_data)
                .and_then(Array::try_from)
                .map_err(map_error(SESSIONS))?,
            key,
        })
    }

    /// The session as the kernel has it now.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let mut slot = self.slot(cookie)?;
        while let Some(before) = slot {
            let session = self.record(before)?;
            // It may have ended meanwhile, and the record be another's; or lie elsewhere, where the
            // socket was connected again.
            slot = self.slot(cookie)?;
            if slot == Some(before) {
                return Ok(Some(session));
            }
        }
        Ok(None)
    }

    fn slot(&self, cookie: u64) -> Result<Option<u32>, BpfError> {
        if !is_cookie(cookie) {
            return Ok(None);
        }
        for bucket in self.key.buckets(cookie, self.buckets.len()) {
            let tags = self.tags(bucket)?;
            if let Some(way) = (0..WAYS).find(|way| tags.0[*way as usize] == cookie) {
                return Ok(Some(bucket * WAYS + way));
            }
        }
        Ok(None)
    }

    /// A record, after the tag that was read before and before one that is read then. The system calls have no such
    /// order of themselves; on x86-64 every read has it.
    fn record(&self, slot: u32) -> Result<Session, BpfError> {
        fence(Ordering::Acquire);
        let session = self.sessions.get(&slot, 0).map_err(map_error(SESSIONS));
        fence(Ordering::Acquire);
        session
    }

    fn tags(&self, bucket: u32) -> Result<Bucket, BpfError> {
        self.buckets.get(&bucket, 0).map_err(map_error(BUCKETS))
    }

    /// The cookie of every session, once.
    pub(super) fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        let mut cookies = Vec::new();
        for bucket in self.buckets.iter() {
            cookies.extend(bucket.map_err(map_error(BUCKETS))?.0);
        }
        Ok(cleaned(cookies.into_iter()))
    }

    /// The next sessions, some hundreds at most and perhaps none; nothing at the end of the table. Nobody copies the
    /// whole table. A session that is there from the beginning to the end is read, once but where its socket is
    /// connected again meanwhile.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn next(&self, cursor: &mut Cursor) -> Result<Option<Vec<(u64, Session)>>, BpfError> {
        if cursor.is_at_end {
            return Ok(None);
        }
        let end = cursor.next.saturating_add(STEP).min(self.buckets.len());
        let mut found = Vec::new();
        for bucket in cursor.next..end {
            self.read_bucket(bucket, &mut found)?;
        }
        cursor.next = end;
        cursor.is_at_end = end == self.buckets.len();
        Ok(Some(found))
    }

    /// The records of a bucket, each of which is that of the same cookie after it was read too.
    fn read_bucket(&self, bucket: u32, found: &mut Vec<(u64, Session)>) -> Result<(), BpfError> {
        let mut read = Vec::new();
        for (way, cookie) in self.tags(bucket)?.0.into_iter().enumerate() {
            if is_cookie(cookie) {
                let session = self.record(bucket * WAYS + way as u32)?;
                read.push((way, cookie, session));
            }
        }
        if !read.is_empty() {
            let tags = self.tags(bucket)?.0;
            read.retain(|(way, cookie, _)| tags.get(*way) == Some(cookie));
        }
        found.extend(
            read.into_iter()
                .map(|(_, cookie, session)| (cookie, session)),
        );
        Ok(())
    }
}
