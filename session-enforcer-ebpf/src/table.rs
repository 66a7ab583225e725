//! The session table: find, put in, take out. `session_enforcer_common::table` says how it is made.
//!
//! Only these programs write to it, for the daemon too (`serve`): a program runs to its end, so
//! whatever becomes of the daemon, no change is ever left half done.
//!
//! A tag is changed by compare-and-exchange alone, so that no two programs get one place. As with a
//! hash map of the kernel's, a record may be another session's by the time that a program writes to it
//! which found it before: see `activity::track`.

use core::{
    intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg, atomic_xadd, atomic_xchg},
    ptr,
};

use session_enforcer_common::{
    Session,
    table::{CLAIMED, WAYS, is_taken},
};

use crate::maps::{BUCKET_COUNT, BUCKETS, MAX_SESSIONS, SESSIONS, TABLE, TABLE_KEY};

/// Why a session was not put in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is there.
    Present,
    /// There is no room.
    Full,
}

/// The record of a session; valid while the program runs. For the packet path, which it becomes a part
/// of.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<*mut Session> {
    SESSIONS.get_ptr_mut(place_of(cookie)?)
}

/// As above, where it is done once in the life of a session: the verifier follows each way through a
/// look-up at each place where it is part of a program.
#[inline(never)]
pub(crate) fn find_apart(cookie: u64) -> Option<*mut Session> {
    find(cookie)
}

/// Puts in a session that is not there.
#[inline(never)]
pub(crate) fn insert(cookie: u64, session: &Session) -> Result<(), Refusal> {
    if find_apart(cookie).is_some() {
        return Err(Refusal::Present);
    }
    if count(1) >= u64::from(MAX_SESSIONS.load()) {
        count(u64::MAX);
        return Err(Refusal::Full);
    }
    let [first, second] = buckets_of(cookie);
    let (emptier, fuller) = if has_more_room(second, first) {
        (second, first)
    } else {
        (first, second)
    };
    // The first once more: another program may have taken its last place and given it back.
    if put(emptier, cookie, session)
        || put(fuller, cookie, session)
        || put(emptier, cookie, session)
    {
        return Ok(());
    }
    count(u64::MAX);
    Err(Refusal::Full)
}

/// Takes a session out; whether this program did.
#[inline(never)]
pub(crate) fn remove(cookie: u64) -> bool {
    let Some(tag) = place_of(cookie).and_then(tag_of) else {
        return false;
    };
    let removed = exchange(tag, cookie, 0);
    if removed {
        count(u64::MAX);
    }
    removed
}

/// Copies a record word by word: what the compiler would make of an assignment does so byte by byte.
///
/// # Safety
///
/// Both must point to records, of which others may change the first at any time.
#[inline(always)]
pub(crate) unsafe fn copy(from: *const Session, to: *mut Session) {
    let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
    for word in 0..size_of::<Session>() / size_of::<u64>() {
        // SAFETY: within both records.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
    }
}

#[inline(always)]
fn buckets_of(cookie: u64) -> [u32; 2] {
    TABLE_KEY.load().buckets(cookie, BUCKET_COUNT.load())
}

/// The place of a session: the index of its record.
#[inline(always)]
fn place_of(cookie: u64) -> Option<u32> {
    // A socket without a cookie; the tag of a free record is no cookie either.
    if cookie == 0 {
        return None;
    }
    let [first, second] = buckets_of(cookie);
    place_in(first, cookie).or_else(|| place_in(second, cookie))
}

#[inline(always)]
fn place_in(bucket: u32, cookie: u64) -> Option<u32> {
    let tags = tags_of(bucket)?;
    (0..WAYS)
        .find(|way| read(tags, *way) == cookie)
        .map(|way| bucket * WAYS + way)
}

#[inline(always)]
fn tags_of(bucket: u32) -> Option<*mut u64> {
    BUCKETS.get_ptr_mut(bucket).map(|bucket| bucket.cast())
}

#[inline(always)]
fn tag_of(place: u32) -> Option<*mut u64> {
    let tags = tags_of(place / WAYS)?;
    // SAFETY: within the element that the map gave.
    Some(unsafe { tags.add((place % WAYS) as usize) })
}

#[inline(always)]
fn read(tags: *mut u64, way: u32) -> u64 {
    // SAFETY: within the element that the map gave. Volatile: others change it.
    unsafe { ptr::read_volatile(tags.add(way as usize)) }
}

#[inline(always)]
fn has_more_room(bucket: u32, other: u32) -> bool {
    taken_in(bucket) < taken_in(other)
}

/// Places of a bucket that are taken, without a branch: the verifier would follow all combinations.
#[inline(never)]
fn taken_in(bucket: u32) -> u64 {
    let Some(tags) = tags_of(bucket) else {
        return u64::from(WAYS);
    };
    (0..WAYS).map(|way| is_taken(read(tags, way))).sum()
}

/// Puts a session into a free place of the bucket, if there is one.
#[inline(never)]
fn put(bucket: u32, cookie: u64, session: &Session) -> bool {
    let Some(tags) = tags_of(bucket) else {
        return false;
    };
    let Some(way) = (0..WAYS).find(|way| read(tags, *way) == 0) else {
        return false;
    };
    let place = bucket * WAYS + way;
    let (Some(tag), Some(record)) = (tag_of(place), SESSIONS.get_ptr_mut(place)) else {
        return false;
    };
    // Where another program takes it first, this bucket counts as full.
    if !exchange(tag, 0, CLAIMED) {
        return false;
    }
    // SAFETY: pointers that the maps gave; the place is this program's. The record is written before
    // others can find it: an exchange is a barrier.
    unsafe {
        copy(session, record);
        atomic_xchg::<u64, { SeqCst }>(tag, cookie);
    }
    true
}

/// Adds to the number of sessions, modulo 2^64, and returns what it was.
#[inline(always)]
fn count(more: u64) -> u64 {
    let Some(head) = TABLE.get_ptr_mut(0) else {
        // Not reached: the array has this element.
        return 0;
    };
    // SAFETY: a pointer that the map gave.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(&raw mut (*head).sessions, more) }
}

/// Whether the tag was `before`, and is `after` now.
#[inline(always)]
fn exchange(tag: *mut u64, before: u64, after: u64) -> bool {
    // SAFETY: the callers have it from an element that a map gave.
    unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(tag, before, after).1 }
}
