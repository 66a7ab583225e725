//! The session table: lookup, insertion and removal. `session_enforcer_common::table` describes its layout.
//!
//! After its creation only these programs write to the table, also for the daemon (`table_ops`). A program always runs
//! to its end, so a killed daemon leaves no partial change.
//!
//! A slot is claimed only by compare-and-exchange of its tag, so two programs never get the same slot. As with the
//! kernel's hash maps, a slot can be reused between a program's lookup and its write: see `activity::track`.
//!
//! A record is written before its tag; the exchange of the tag orders the two. A reader orders the read of the tag and
//! the reads of the record by [`words::order`], and so does a reader that checks the tag again after reading the
//! record.

use core::{
    intrinsics::{AtomicOrdering::SeqCst, atomic_xchg},
    mem::{MaybeUninit, offset_of},
    ptr,
};

use session_enforcer_common::{
    Choice, Session, flags,
    table::{Bucket, CLAIMED, IN_A_ROW, WAYS, is_free, prefers_second},
};

use crate::{
    capacity::{self, Refusal},
    maps::{BUCKET_COUNT, BUCKETS, SESSIONS, TABLE_KEY},
    words::{self, exchange},
};

/// Attempts to insert a session; an attempt fails if another program takes the free slot first.
const ATTEMPTS: u32 = 3;

/// Maximum number of copies that `read_whole` makes to get a consistent one.
const MAX_COPIES: usize = 8;

/// Looks up the record of a session; it is valid while the program runs. For the packet path, where it is inlined.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<*mut Session> {
    let slot = slot_of(cookie)?;
    // Orders the read of the tag before the reads of the record.
    words::order();
    SESSIONS.get_ptr_mut(slot)
}

/// Finds the slot of a session. For the rare operations of a session's life.
#[inline(always)]
pub(crate) fn search(cookie: u64) -> Option<u32> {
    let slot = slot_or_none(cookie);
    (slot != NO_SLOT).then_some(slot)
}

/// The record in a slot; valid while the program runs.
#[inline(always)]
pub(crate) fn record(slot: u32) -> Option<*mut Session> {
    SESSIONS.get_ptr_mut(slot)
}

/// Returned by [`slot_or_none`] if the cookie has no session. A table has fewer slots.
const NO_SLOT: u32 = u32::MAX;

/// Finds the slot of a session.
///
/// The exported name makes this a global function, which the verifier checks once. Inlined it would follow each
/// comparison with a tag to the end of the program.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn slot_or_none(cookie: u64) -> u32 {
    let slot = slot_of(cookie);
    // Orders the read of the tag before the reads of the record.
    words::order();
    slot.unwrap_or(NO_SLOT)
}

/// Inserts a session whose cookie is not in the table.
#[inline(never)]
pub(crate) fn insert(cookie: u64, session: &Session) -> Result<(), Refusal> {
    // Reserved values: 0 marks a free slot, `CLAIMED` a slot that is being written, and the kernel treats `u64::MAX` as
    // no cookie.
    if matches!(cookie, 0 | CLAIMED | u64::MAX) {
        return Err(Refusal::Full);
    }
    if search(cookie).is_some() {
        return Err(Refusal::Present);
    }
    let choice = Choice::of(session);
    capacity::take(choice)?;
    if put(cookie, session) {
        return Ok(());
    }
    capacity::give_back(choice);
    Err(Refusal::Full)
}

/// Number of 64-bit words in a record.
const WORDS: usize = size_of::<Session>() / size_of::<u64>();

/// Index of the word that holds the choice.
const CHOICE: usize = offset_of!(Session, generation) / size_of::<u64>();

/// Updates an existing session in place, word by word. A word that a packet changes at the same time keeps the packet's
/// value, and activity since the daemon read the record is merged. Returns whether the session still exists.
#[inline(never)]
pub(crate) fn update(cookie: u64, session: &mut Session) -> bool {
    let Some(slot) = search(cookie) else {
        return false;
    };
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return false;
    };
    let mut before = MaybeUninit::<Session>::uninit();
    // SAFETY: the map lookup returned one pointer, the other points to a local variable; the record has only integers.
    let before = unsafe {
        words::copy::<u64, _>(record, before.as_mut_ptr());
        before.assume_init_ref()
    };
    session.merge_activity(&before.traffic());
    if !is_session(slot, cookie, before.established_ns) {
        return false;
    }
    change(record, before, session);
    let choice = Choice::of(session);
    if choose(slot, cookie, choice, flags::OF_PACKETS) {
        return true;
    }
    // The session has ended since. Another session may have reused the record, so the old words are restored.
    change(record, session, before);
    false
}

/// Replaces each word of `before`, except the choice, with that of `after` by compare-and-exchange. Stamps come last: a
/// time is written after the values that it dates.
///
/// Unrolled, because Linux before 6.6 refuses a loop whose end falls through to its beginning, which the compiler would
/// emit.
#[inline(never)]
fn change(record: *mut Session, before: &Session, after: &Session) {
    const { assert!(WORDS == 21 && CHOICE == 8) };
    let (before, after) = (
        ptr::from_ref(before).cast::<u64>(),
        ptr::from_ref(after).cast::<u64>(),
    );
    macro_rules! exchange_words {
        ($($word:literal)*) => {
            // SAFETY: the index is within both records.
            $(unsafe {
                let (before, after) = (before.add($word).read(), after.add($word).read());
                exchange(record.cast::<u64>().add($word), before, after);
            })*
        };
    }
    exchange_words!(9 10 11 12 13 14 15 16 17 18 19 20 0 1 2 3 4 5 6 7);
}

/// Gives a session the rule and generation of a choice, and keeps the flags in `kept`. Returns whether the session
/// still exists. Up to three attempts, since a packet may change the flags at the same time. Unrolled: see [`change`].
#[inline(always)]
fn choose(slot: u32, cookie: u64, choice: Choice, kept: u8) -> bool {
    let mut outcome = choose_once(slot, cookie, choice.0, kept);
    if outcome == CHANGED_MEANWHILE {
        outcome = choose_once(slot, cookie, choice.0, kept);
    }
    if outcome == CHANGED_MEANWHILE {
        outcome = choose_once(slot, cookie, choice.0, kept);
    }
    outcome == CHOSEN
}

/// Return values of [`choose_once`].
const CHOSEN: u32 = 0;
const HAS_ENDED: u32 = 1;
const CHANGED_MEANWHILE: u32 = 2;

/// Changes the choice of a session once. Another session may reuse the slot between the check and the change; its
/// choice is then restored. If the restoration fails, the session has ended since, and its end was counted by the new
/// choice.
///
/// The exported name makes this a global function, which the verifier checks once.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn choose_once(slot: u32, cookie: u64, choice: u64, kept: u8) -> u32 {
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return HAS_ENDED;
    };
    let before = choice_of(record);
    if before == Choice::ENDED || !is_at(slot, cookie) {
        return HAS_ENDED;
    }
    let after = Choice(choice).keeping(before, kept);
    let word = words::choice_word(record);
    if !exchange(word, before.0, after.0) {
        return CHANGED_MEANWHILE;
    }
    if !is_at(slot, cookie) && exchange(word, after.0, before.0) {
        return HAS_ENDED;
    }
    capacity::moved(before, after);
    CHOSEN
}

/// Gives the session established at `established_ns` a rule, and resets its gate, which has not checked it under that
/// rule.
#[inline(never)]
pub(crate) fn decide(cookie: u64, established_ns: u64, rule: u16, generation: u32) -> bool {
    let Some(slot) = search(cookie) else {
        return false;
    };
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return false;
    };
    if !is_session(slot, cookie, established_ns) {
        return false;
    }
    // SAFETY: the map lookup returned the pointer. Volatile: packets change it.
    let open_until_ns = unsafe { ptr::read_volatile(&raw const (*record).open_until_ns) };
    let chosen = choose(slot, cookie, Choice(0).by(rule, generation), u8::MAX);
    if chosen && open_until_ns != Session::SHUT {
        // SAFETY: the map lookup returned the pointer.
        exchange(
            unsafe { &raw mut (*record).open_until_ns },
            open_until_ns,
            0,
        );
    }
    chosen
}

#[inline(always)]
pub(crate) fn choice_of(record: *mut Session) -> Choice {
    // SAFETY: the map lookup returned the pointer. Volatile: others change it.
    Choice(unsafe { ptr::read_volatile(words::choice_word(record)) })
}

/// Whether the slot holds the session of this cookie and time of establishment.
#[inline(always)]
fn is_session(slot: u32, cookie: u64, established_ns: u64) -> bool {
    let Some(record) = SESSIONS.get_ptr(slot) else {
        return false;
    };
    // SAFETY: the map lookup returned the pointer. Volatile: others change it.
    let found_ns = unsafe { ptr::read_volatile(&raw const (*record).established_ns) };
    // Orders the earlier reads of the record before the read of the tag.
    words::order();
    found_ns == established_ns && is_at(slot, cookie)
}

#[inline(always)]
fn is_at(slot: u32, cookie: u64) -> bool {
    // SAFETY: the map lookup returned the pointer. Volatile: others change it.
    tag_of(slot).is_some_and(|tag| unsafe { ptr::read_volatile(tag) } == cookie)
}

/// Copies a consistent record of a session. Returns whether the session exists.
///
/// Packets change the record during the copy. A packet with an answer, for example, could yield a copy with old stamps
/// in which the answer is no longer owed. The copy is therefore repeated until it equals the record. If no attempt
/// succeeds, the session is busy, and each copy shows that it is not idle.
#[inline(never)]
pub(crate) fn read_whole(cookie: u64, into: *mut Session) -> bool {
    let Some(slot) = search(cookie) else {
        return false;
    };
    let (Some(tag), Some(record)) = (tag_of(slot), SESSIONS.get_ptr(slot)) else {
        return false;
    };
    for _ in 0..MAX_COPIES {
        // SAFETY: the map lookups returned the pointers, which are valid while the program runs.
        unsafe { words::copy::<u64, _>(record, into) };
        // Orders the whole copy before the second read.
        words::order();
        if agrees(record, into) {
            break;
        }
    }
    words::order();
    // Another session may have reused the record during the copy.
    //
    // SAFETY: see the copy above.
    unsafe { ptr::read_volatile(tag) == cookie }
}

#[inline(always)]
fn agrees(record: *const Session, copy: *const Session) -> bool {
    let (words, copied) = (record.cast::<u64>(), copy.cast::<u64>());
    for word in 0..WORDS {
        // SAFETY: within both records. Volatile: the record must be read a second time.
        let differs =
            unsafe { words.add(word).read_volatile() != copied.add(word).read_volatile() };
        if differs {
            return false;
        }
    }
    true
}

/// Shuts or reopens the gate of the session established at `established_ns`. Returns whether that session exists.
#[inline(never)]
pub(crate) fn set_gate(cookie: u64, established_ns: u64, is_open: bool) -> bool {
    let Some(slot) = search(cookie) else {
        return false;
    };
    let Some(session) = record(slot) else {
        return false;
    };
    // SAFETY: the map lookups returned the pointers, which are valid while the program runs. Volatile: others change
    // them.
    unsafe {
        let word = &raw mut (*session).open_until_ns;
        let is_meant =
            || ptr::read_volatile(&raw const (*session).established_ns) == established_ns;
        if !is_meant() {
            return false;
        }
        if is_open {
            return exchange(word, Session::SHUT, 0);
        }
        atomic_xchg::<u64, { SeqCst }>(word, Session::SHUT);
        // Another session, whose gate is open, may have reused the record. Its tag is set to `CLAIMED` before its words
        // are written. A later session of the same cookie has another time of establishment, which was written before
        // its tag.
        let is_there = is_at(slot, cookie);
        words::order();
        is_there && is_meant() || !exchange(word, Session::SHUT, 0)
    }
}

/// Removes the session established at `established_ns`, but not a later session of the same cookie. Returns whether
/// that session existed.
#[inline(never)]
pub(crate) fn remove(cookie: u64, established_ns: u64) -> bool {
    let Some(slot) = search(cookie) else {
        return false;
    };
    is_session(slot, cookie, established_ns) && clear(slot, cookie) != NONE_CLEARED
}

/// Returned by [`clear_all`] if no slot still belonged to the socket.
pub(crate) const NONE_CLEARED: u64 = u64::MAX;

/// Frees the slots of a socket that closes. There are two if the daemon adopted the socket at the moment in which it
/// was connected again. The socket is locked, so it cannot get another session meanwhile.
///
/// Returns the generation and, in the lower 16 bits, the rule of the session at its end; of two sessions those of the
/// older generation.
#[inline(never)]
pub(crate) fn clear_all(cookie: u64) -> u64 {
    let mut oldest = NONE_CLEARED;
    for _ in 0..2 {
        if let Some(slot) = search(cookie) {
            oldest = oldest.min(clear(slot, cookie));
        }
    }
    oldest
}

/// Frees one slot if it still belongs to the session; see [`clear_all`]. `Choice::ENDED` tells a concurrent change of
/// the choice that the session has ended.
#[inline(always)]
fn clear(slot: u32, cookie: u64) -> u64 {
    // Not as a pair: the compiler may read the tag's place on the stack before it knows whether it was written, which
    // Linux 6.1 refuses.
    let Some(tag) = tag_of(slot) else {
        return NONE_CLEARED;
    };
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return NONE_CLEARED;
    };
    if !exchange(tag, cookie, CLAIMED) {
        return NONE_CLEARED;
    }
    // SAFETY: the map lookups returned the pointers.
    let choice = unsafe {
        let choice = atomic_xchg::<u64, { SeqCst }>(words::choice_word(record), Choice::ENDED.0);
        atomic_xchg::<u64, { SeqCst }>(tag, 0);
        Choice(choice)
    };
    capacity::give_back(choice);
    u64::from(choice.generation()) << 16 | u64::from(choice.rule())
}

/// Inserts a session into a free slot. Returns whether there was one.
#[inline(never)]
fn put(cookie: u64, session: &Session) -> bool {
    for attempt in 0..ATTEMPTS {
        if put_once(cookie, session, attempt) {
            return true;
        }
    }
    false
}

/// Inserts a session into a free slot of the preferred bucket. Fails if both buckets are full or another program takes
/// the slot first; the next attempt starts at another slot.
#[inline(always)]
fn put_once(cookie: u64, session: &Session, attempt: u32) -> bool {
    let [first, second] = buckets_of(cookie);
    let (mut bucket, mut free) = (first, free_in(first));
    // The second bucket is read only if it could be preferred at all.
    if prefers_second(free.count_ones(), WAYS) {
        let others = free_in(second);
        if prefers_second(free.count_ones(), others.count_ones()) {
            (bucket, free) = (second, others);
        }
    }
    if free == 0 {
        return false;
    }
    // Sockets created one after another may be established at the same moment on several processors, and share a
    // bucket. Each starts its search at a different slot. The first attempt keeps the slots adjacent, because a packet
    // scans from the first slot.
    let start = if attempt == 0 {
        cookie as u32 % IN_A_ROW
    } else {
        cookie as u32 % IN_A_ROW * (WAYS / IN_A_ROW)
    };
    let rotated = (free | free << WAYS) >> start;
    let slot = bucket * WAYS + (lowest(rotated) + start) % WAYS;
    let (Some(tag), Some(record)) = (tag_of(slot), SESSIONS.get_ptr_mut(slot)) else {
        return false;
    };
    if !exchange(tag, 0, CLAIMED) {
        return false;
    }
    // SAFETY: the map lookups returned the pointers, and this program owns the claimed slot. The exchange is a barrier,
    // so the record is written before the tag makes it visible.
    unsafe {
        words::copy::<u64, _>(session, record);
        atomic_xchg::<u64, { SeqCst }>(tag, cookie);
    }
    true
}

#[inline(always)]
fn buckets_of(cookie: u64) -> [u32; 2] {
    TABLE_KEY.load().buckets(cookie, BUCKET_COUNT.load())
}

/// The slot of a session, which is also the index of its record.
#[inline(always)]
fn slot_of(cookie: u64) -> Option<u32> {
    // 0 is no cookie; it is also the tag of a free slot.
    if cookie == 0 {
        return None;
    }
    let [first, second] = buckets_of(cookie);
    slot_in(first, cookie).or_else(|| slot_in(second, cookie))
}

#[inline(always)]
fn slot_in(bucket: u32, cookie: u64) -> Option<u32> {
    let tags = tags_of(bucket)?;
    (0..WAYS)
        .find(|way| read(tags, *way) == cookie)
        .map(|way| bucket * WAYS + way)
}

/// The free slots of a bucket, one bit for each. Without branches, because the verifier would follow all their
/// combinations.
///
/// The exported name makes this a global function, which the verifier checks once instead of at each call.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn free_in(bucket: u32) -> u32 {
    let Some(tags) = tags_of(bucket) else {
        return 0;
    };
    (0..WAYS).fold(0, |free, way| free | is_free(read(tags, way)) << way)
}

/// Index of the lowest bit that is set; `ways` must not be 0.
#[inline(always)]
fn lowest(ways: u32) -> u32 {
    (ways & ways.wrapping_neg()).wrapping_sub(1).count_ones()
}

#[inline(always)]
fn tags_of(bucket: u32) -> Option<*mut u64> {
    BUCKETS.get_ptr_mut(bucket).map(<*mut Bucket>::cast)
}

#[inline(always)]
fn tag_of(slot: u32) -> Option<*mut u64> {
    let tags = tags_of(slot / WAYS)?;
    // The volatile read keeps the bounds check below: the compiler would drop it as redundant, but the verifier needs
    // it.
    //
    // SAFETY: reads a local variable.
    let slot = unsafe { ptr::read_volatile(&raw const slot) };
    // SAFETY: within the element that the map lookup returned.
    Some(unsafe { tags.add((slot % WAYS) as usize) })
}

#[inline(always)]
fn read(tags: *mut u64, way: u32) -> u64 {
    // SAFETY: within the element that the map lookup returned. Volatile: others change it.
    unsafe { ptr::read_volatile(tags.add(way as usize)) }
}
