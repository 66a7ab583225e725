//! Read-only access to a session table without the help of the programs. Other threads use it for this daemon's table.
//! The take-over uses it for the table of an earlier daemon, whose programs may still change it.

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

/// Maximum number of buckets read in one step: about 100 us if all are full.
const STEP: u32 = 64;

/// A reader of a session table.
pub struct SessionReader {
    buckets: Array<MapData, Bucket>,
    sessions: Array<MapData, Session>,
    key: Key,
}

/// The session table in use; growth replaces it.
#[derive(Debug)]
pub struct TableInUse(Mutex<Arc<SessionReader>>);

impl TableInUse {
    pub(super) fn new(reader: SessionReader) -> Self {
        Self(Mutex::new(Arc::new(reader)))
    }

    /// A reader that starts at the beginning of the table.
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

/// Position of a scan of the whole table.
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
    /// Uses maps that are open.
    pub(super) fn new(buckets: OwnedFd, sessions: OwnedFd, key: Key) -> Result<Self, BpfError> {
        Self::of(MapData::from_fd(buckets), MapData::from_fd(sessions), key)
    }

    /// Opens the maps pinned in a set that was checked.
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

    /// The current record of the session.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the read.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        let mut slot = self.slot(cookie)?;
        while let Some(before) = slot {
            let session = self.record(before)?;
            // Meanwhile the session may have ended and its slot may have been reused. If the socket was connected
            // again, its new session may be in another slot.
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

    /// Reads a record between the caller's reads of its tag before and after. System calls do not order these reads by
    /// themselves on every processor; x86-64 orders all reads.
    fn record(&self, slot: u32) -> Result<Session, BpfError> {
        fence(Ordering::Acquire);
        let session = self.sessions.get(&slot, 0).map_err(map_error(SESSIONS));
        fence(Ordering::Acquire);
        session
    }

    fn tags(&self, bucket: u32) -> Result<Bucket, BpfError> {
        self.buckets.get(&bucket, 0).map_err(map_error(BUCKETS))
    }

    /// The cookies of all sessions, without duplicates.
    pub(super) fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        let mut cookies = Vec::new();
        for bucket in self.buckets.iter() {
            cookies.extend(bucket.map_err(map_error(BUCKETS))?.0);
        }
        Ok(cleaned(cookies.into_iter()))
    }

    /// Reads the next sessions: at most some hundreds, possibly none. Returns `None` at the end of the table. The table
    /// is never copied as a whole. A session that exists during the whole scan is returned once, or more often if its
    /// socket is connected again meanwhile.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the read.
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

    /// Reads the records of a bucket. A record is dropped if its tag has changed since.
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
