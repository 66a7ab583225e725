//! The session table for who only reads it, on another thread than the engine's and without its help. Some sessions at a
//! time: nobody copies the whole table.

use std::{fmt, os::fd::OwnedFd};

use aya::maps::{Array, Map, MapData};
use session_enforcer_common::{
    Session,
    table::{Bucket, CLAIMED, Key, WAYS},
};

use super::{
    BpfError, map_error,
    session_table::{BUCKETS, SESSIONS},
};

/// Buckets that one step reads at most: some 100 us where all are full.
const STEP: u32 = 64;

/// Reads the sessions of this daemon.
pub struct SessionReader {
    buckets: Array<MapData, Bucket>,
    sessions: Array<MapData, Session>,
    key: Key,
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
    pub(super) fn new(buckets: OwnedFd, sessions: OwnedFd, key: Key) -> Result<Self, BpfError> {
        let map = |fd| MapData::from_fd(fd).and_then(Map::from_map_data);
        Ok(Self {
            buckets: map(buckets)
                .and_then(Array::try_from)
                .map_err(map_error(BUCKETS))?,
            sessions: map(sessions)
                .and_then(Array::try_from)
                .map_err(map_error(SESSIONS))?,
            key,
        })
    }

    /// The next sessions, some hundreds at most and perhaps none; nothing at the end of the table. A session that is there from the
    /// beginning to the end is read, once but where it moves meanwhile.
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
            let tags = self.buckets.get(&bucket, 0).map_err(map_error(BUCKETS))?;
            for (way, cookie) in (0..WAYS).zip(tags.0) {
                if let Some(session) = self.at(bucket, way, cookie)? {
                    found.push((cookie, session));
                }
            }
        }
        cursor.next = end;
        cursor.is_at_end = end == self.buckets.len();
        Ok(Some(found))
    }

    /// The session of a cookie.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn session(&self, cookie: u64) -> Result<Option<Session>, BpfError> {
        for bucket in self.key.buckets(cookie, self.buckets.len()) {
            let tags = self.buckets.get(&bucket, 0).map_err(map_error(BUCKETS))?;
            for (way, tag) in (0..WAYS).zip(tags.0) {
                if tag == cookie
                    && let Some(session) = self.at(bucket, way, cookie)?
                {
                    return Ok(Some(session));
                }
            }
        }
        Ok(None)
    }

    /// The record in a place, if it is that of the cookie after it was read too.
    fn at(&self, bucket: u32, way: u32, cookie: u64) -> Result<Option<Session>, BpfError> {
        if cookie == 0 || cookie == CLAIMED {
            return Ok(None);
        }
        let place = bucket * WAYS + way;
        let session = self.sessions.get(&place, 0).map_err(map_error(SESSIONS))?;
        let tags = self.buckets.get(&bucket, 0).map_err(map_error(BUCKETS))?;
        let is_same = tags.0.get(way as usize) == Some(&cookie);
        Ok(is_same.then_some(session))
    }
}
