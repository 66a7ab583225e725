//! The session table: find, put in, take out. `session_enforcer_common::table` says how it is made.
//!
//! Once it is made only these programs write to it, for the daemon too (`table_ops`): a program runs to its
//! end, so whatever becomes of the daemon, no change is ever left half done.
//!
//! A tag is changed by compare-and-exchange alone, so that no two programs get one slot. As with a
//! hash map of the kernel's, a record may be another session's by the time that a program writes to it
//! which found it before: see `activity::track`.
//!
//! A record is written before its tag, since an exchange orders the two. Who reads a tag and then the record orders
//! them by [`words::order`], and so does who reads the tag once more to know whose the record was.

use core::{
    intrinsics::{AtomicOrdering::SeqCst, atomic_xchg},
    mem::{MaybeUninit, offset_of},
    ptr,
};

use session_enforcer_common::{
    Choice, Session, flags,
    table::{Bucket, CLAIMED, IN_A_ROW, WAYS, is_same, prefers_second},
};

use crate::{
    capacity,
    maps::{BUCKET_COUNT, BUCKETS, SESSIONS, TABLE_KEY},
    words::{self, exchange},
};

/// How often a session is put in at most where other programs take the slot that was free.
const ATTEMPTS: u32 = 3;

/// Copies of a record that are made in search of one that is whole.
const MAX_COPIES: usize = 8;

/// Why a session was not put in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is there.
    Present,
    /// There is no room.
    Full,
    /// Its rule allows no more.
    RuleFull,
}

/// The record of a session; valid while the program runs. For the packet path, which it becomes a part
/// of.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<*mut Session> {
    let slot = slot_of(cookie)?;
    // The tag was read before the record is.
    words::order();
    SESSIONS.get_ptr_mut(slot)
}

/// Where the session of a cookie lies, for what is done a few times in its life: without a branch for each
/// tag, whose combinations the verifier would follow.
#[inline(always)]
pub(crate) fn scan(cookie: u64) -> Option<Scanned> {
    if cookie == 0 {
        return None;
    }
    let scanned = Scanned::into(buckets_of(cookie), cookie);
    scanned.slot().is_some().then_some(scanned)
}

/// Puts in a session that is not there.
#[inline(never)]
pub(crate) fn insert(cookie: u64, session: &Session) -> Result<(), Refusal> {
    // These would be taken for something else: the kernel, too, takes the last one for none.
    if matches!(cookie, 0 | CLAIMED | u64::MAX) {
        return Err(Refusal::Full);
    }
    let scanned = Scanned::into(buckets_of(cookie), cookie);
    if scanned.slot().is_some() {
        return Err(Refusal::Present);
    }
    let choice = Choice::of(session);
    capacity::take(choice)?;
    if put(scanned, cookie, session) {
        return Ok(());
    }
    capacity::give_back(choice);
    Err(Refusal::Full)
}

/// Words of a record.
const WORDS: usize = size_of::<Session>() / size_of::<u64>();

/// Which of them the choice is.
const CHOICE: usize = offset_of!(Session, generation) / size_of::<u64>();

/// Changes a session that is there, word by word and in place: what a packet changes in the same moment is the
/// packet's. What passed since the daemon read the record is kept. Whether the session is there then.
#[inline(never)]
pub(crate) fn update(cookie: u64, session: &mut Session) -> bool {
    let Some(slot) = scan(cookie).and_then(Scanned::slot) else {
        return false;
    };
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return false;
    };
    let mut before = MaybeUninit::<Session>::uninit();
    // SAFETY: pointers that the map gave and to a variable, of integers only.
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
    if choose(slot, cookie, choice, flags::PEER_HAS_ENDED) {
        return true;
    }
    // It has ended meanwhile. The record may be another session's by now, which gets back what it had.
    change(record, session, before);
    false
}

/// Puts the words of `after`, but for the choice, where those of `before` are. The stamps come last: a time is written
/// after what it is the time of.
///
/// No loop: Linux before 6.6 refuses one whose end falls through to its beginning, as the compiler would make it.
#[inline(never)]
fn change(record: *mut Session, before: &Session, after: &Session) {
    const { assert!(WORDS == 21 && CHOICE == 8) };
    let (before, after) = (
        ptr::from_ref(before).cast::<u64>(),
        ptr::from_ref(after).cast::<u64>(),
    );
    macro_rules! exchange_words {
        ($($word:literal)*) => {
            // SAFETY: within the records.
            $(unsafe {
                let (before, after) = (before.add($word).read(), after.add($word).read());
                exchange(record.cast::<u64>().add($word), before, after);
            })*
        };
    }
    exchange_words!(9 10 11 12 13 14 15 16 17 18 19 20 0 1 2 3 4 5 6 7);
}

/// Gives a session the rule and the generation of a choice, and its flags besides those to be kept; whether it is there
/// then. Where a packet changes the flags meanwhile, the next attempt meets it no more. No loop: see [`change`].
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

/// What [`choose_once`] answers.
const CHOSEN: u32 = 0;
const HAS_ENDED: u32 = 1;
const CHANGED_MEANWHILE: u32 = 2;

/// Between the look at the slot and the change it may have become another session's, which gets its choice back.
/// Where that is not there any more, the session has ended since, by the choice that it was given.
///
/// With a name of its own for the linker it is a global function, which the verifier follows once.
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
    let word = choice_word(record);
    if !exchange(word, before.0, after.0) {
        return CHANGED_MEANWHILE;
    }
    if !is_at(slot, cookie) && exchange(word, after.0, before.0) {
        return HAS_ENDED;
    }
    capacity::moved(before, after);
    CHOSEN
}

/// Gives the session that was established then a rule. The gate has not checked it under that yet.
#[inline(never)]
pub(crate) fn decide(cookie: u64, established_ns: u64, rule: u16, generation: u32) -> bool {
    let Some(slot) = scan(cookie).and_then(Scanned::slot) else {
        return false;
    };
    let Some(record) = SESSIONS.get_ptr_mut(slot) else {
        return false;
    };
    if !is_session(slot, cookie, established_ns) {
        return false;
    }
    // SAFETY: a pointer that the map gave. Volatile: packets change it.
    let open_until_ns = unsafe { ptr::read_volatile(&raw const (*record).open_until_ns) };
    let chosen = choose(slot, cookie, Choice(0).by(rule, generation), u8::MAX);
    if chosen && open_until_ns != Session::SHUT {
        // SAFETY: a pointer that the map gave.
        exchange(
            unsafe { &raw mut (*record).open_until_ns },
            open_until_ns,
            0,
        );
    }
    chosen
}

/// The word of a record by which its session is judged.
#[inline(always)]
pub(crate) fn choice_word(record: *mut Session) -> *mut u64 {
    // SAFETY: within the record, whose fields from here on are one word.
    unsafe { (&raw mut (*record).generation).cast() }
}

/// What it says.
#[inline(always)]
pub(crate) fn choice_of(record: *mut Session) -> Choice {
    // SAFETY: a pointer that the map gave. Volatile: others change it.
    Choice(unsafe { ptr::read_volatile(choice_word(record)) })
}

/// Whether the session of a cookie lies there, and was established then.
#[inline(always)]
fn is_session(slot: u32, cookie: u64, established_ns: u64) -> bool {
    let Some(record) = SESSIONS.get_ptr(slot) else {
        return false;
    };
    // SAFETY: a pointer that the map gave. Volatile: others change it.
    let found_ns = unsafe { ptr::read_volatile(&raw const (*record).established_ns) };
    // What was read of the record until now was read before the tag is.
    words::order();
    found_ns == established_ns && is_at(slot, cookie)
}

#[inline(always)]
fn is_at(slot: u32, cookie: u64) -> bool {
    // SAFETY: a pointer that the map gave. Volatile: others change it.
    tag_of(slot).is_some_and(|tag| unsafe { ptr::read_volatile(tag) } == cookie)
}

/// A copy of the record of a session, as it was at one moment; whether it is there.
///
/// Packets change a record meanwhile: an answer that passes could show the stamps from before and the
/// debt as paid. A copy that the record still agrees with was made when nothing passed. One that changes
/// so often that none agrees is not that of an idle session, and no copy of it says so.
#[inline(never)]
pub(crate) fn read_whole(cookie: u64, into: *mut Session) -> bool {
    let Some(slot) = scan(cookie).and_then(Scanned::slot) else {
        return false;
    };
    let (Some(tag), Some(record)) = (tag_of(slot), SESSIONS.get_ptr(slot)) else {
        return false;
    };
    for _ in 0..MAX_COPIES {
        // SAFETY: pointers that the maps gave, valid while the program runs.
        unsafe { words::copy::<u64, _>(record, into) };
        // All of it was read before any of it is read again.
        words::order();
        if agrees(record, into) {
            break;
        }
    }
    words::order();
    // By now it may be another's.
    // SAFETY: as above.
    unsafe { ptr::read_volatile(tag) == cookie }
}

#[inline(always)]
fn agrees(record: *const Session, copy: *const Session) -> bool {
    let (words, copied) = (record.cast::<u64>(), copy.cast::<u64>());
    for word in 0..size_of::<Session>() / size_of::<u64>() {
        // SAFETY: within both records. Volatile: the record is to be read a second time.
        let differs =
            unsafe { words.add(word).read_volatile() != copied.add(word).read_volatile() };
        if differs {
            return false;
        }
    }
    true
}

/// Shuts the gate of the session that was established then, or opens it again; whether it is there.
#[inline(never)]
pub(crate) fn set_gate(cookie: u64, established_ns: u64, is_open: bool) -> bool {
    let Some(scanned) = scan(cookie) else {
        return false;
    };
    let (Some(slot), Some(session)) = (scanned.slot(), scanned.record()) else {
        return false;
    };
    // SAFETY: pointers that the maps gave, valid while the program runs. Volatile: others change them.
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
        // The record may have become another session's, whose gate is open. Its tag tells so before any of its words
        // is written; one of the same cookie was established at another time, which was written before the tag.
        let is_there = is_at(slot, cookie);
        words::order();
        is_there && is_meant() || !exchange(word, Session::SHUT, 0)
    }
}

/// What [`clear_all`] returns where every slot was another's by then.
pub(crate) const NONE_CLEARED: u64 = u64::MAX;

/// Frees the slots in which a session was found. There are two where the daemon adopted a socket in the moment in
/// which it was connected again.
///
/// Returns the generation and, in the lower 16 bits, the rule by which the session was judged at its end; of two the
/// older.
#[inline(never)]
pub(crate) fn clear_all(scanned: Scanned, cookie: u64) -> u64 {
    let mut oldest = NONE_CLEARED;
    for index in 0..2 {
        let mut ways = of_cookie(scanned.ways[index]);
        for _ in 0..2 {
            if ways != 0 {
                let slot = scanned.buckets[index] * WAYS + lowest(ways);
                oldest = oldest.min(clear(slot, cookie));
                ways &= ways - 1;
            }
        }
    }
    oldest
}

/// Frees the slot of a session, if that is still there; see [`clear_all`]. Whoever is about to change its choice
/// finds that it has ended.
#[inline(always)]
fn clear(slot: u32, cookie: u64) -> u64 {
    let (Some(tag), Some(record)) = (tag_of(slot), SESSIONS.get_ptr_mut(slot)) else {
        return NONE_CLEARED;
    };
    if !exchange(tag, cookie, CLAIMED) {
        return NONE_CLEARED;
    }
    // SAFETY: pointers that the maps gave.
    let choice = unsafe {
        let choice = atomic_xchg::<u64, { SeqCst }>(choice_word(record), Choice::ENDED.0);
        atomic_xchg::<u64, { SeqCst }>(tag, 0);
        Choice(choice)
    };
    capacity::give_back(choice);
    u64::from(choice.generation()) << 16 | u64::from(choice.rule())
}

/// Puts a session into a free slot, if there is one.
#[inline(never)]
fn put(mut scanned: Scanned, cookie: u64, session: &Session) -> bool {
    for attempt in 0..ATTEMPTS {
        if attempt != 0 {
            scanned = Scanned::into(scanned.buckets, cookie);
        }
        if put_once(scanned, cookie, session, attempt) {
            return true;
        }
    }
    false
}

/// Puts a session into a free slot of the bucket that is to have it. Fails where both are full, and where
/// another program takes that slot first: the next attempt begins elsewhere.
#[inline(always)]
fn put_once(scanned: Scanned, cookie: u64, session: &Session, attempt: u32) -> bool {
    let [first, second] = scanned.buckets;
    let [free, others] = scanned.ways.map(free_of);
    let (bucket, free) = if prefers_second(free.count_ones(), others.count_ones()) {
        (second, others)
    } else {
        (first, free)
    };
    if free == 0 {
        return false;
    }
    // Sockets that are made one after the other may be established at the same moment on several
    // processors: those that have a bucket in common begin at slots of their own. At first close to each
    // other, since a packet looks from the first slot on.
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
    // SAFETY: pointers that the maps gave; the slot is this program's. The record is written before
    // others can find it: an exchange is a barrier.
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

/// The slot of a session: the index of its record.
#[inline(always)]
fn slot_of(cookie: u64) -> Option<u32> {
    // A socket without a cookie; the tag of a free record is no cookie either.
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

/// What was found in the two buckets of a cookie.
#[derive(Clone, Copy)]
pub(crate) struct Scanned {
    buckets: [u32; 2],
    ways: [u32; 2],
}

impl Scanned {
    #[inline(always)]
    fn into(buckets: [u32; 2], cookie: u64) -> Self {
        let [first, second] = buckets;
        Self {
            buckets,
            ways: [scan_bucket(first, cookie), scan_bucket(second, cookie)],
        }
    }

    /// The record of the session; valid while the program runs.
    #[inline(always)]
    pub(crate) fn record(self) -> Option<*mut Session> {
        SESSIONS.get_ptr_mut(self.slot()?)
    }

    /// The slot of the session.
    #[inline(always)]
    fn slot(self) -> Option<u32> {
        let ([first, second], [here, there]) = (self.buckets, self.ways.map(of_cookie));
        if here != 0 {
            Some(first * WAYS + lowest(here))
        } else if there != 0 {
            Some(second * WAYS + lowest(there))
        } else {
            None
        }
    }
}

/// The slots of a bucket, a bit for each: in the lower half of the word those that are free, in the
/// upper those of the cookie. No branch for each: see `scan`.
///
/// With a name of its own for the linker it is a global function, which the verifier follows once and not
/// at each call.
#[inline(never)]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn scan_bucket(bucket: u32, cookie: u64) -> u32 {
    let Some(tags) = tags_of(bucket) else {
        return 0;
    };
    let mut ways = 0;
    for way in 0..WAYS {
        // Read twice: to keep sixteen tags would take a good part of the stack.
        ways |= is_same(read(tags, way), 0) << way;
        ways |= is_same(read(tags, way), cookie) << (WAYS + way);
    }
    // The tags were read before a record is.
    words::order();
    ways
}

#[inline(always)]
fn free_of(ways: u32) -> u32 {
    ways & ((1 << WAYS) - 1)
}

#[inline(always)]
fn of_cookie(ways: u32) -> u32 {
    ways >> WAYS
}

/// The lowest of the ways, of which there is one.
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
    // What the compiler knows of the way it does not check, and the verifier does not know it.
    // SAFETY: a variable.
    let slot = unsafe { ptr::read_volatile(&raw const slot) };
    // SAFETY: within the element that the map gave.
    Some(unsafe { tags.add((slot % WAYS) as usize) })
}

#[inline(always)]
fn read(tags: *mut u64, way: u32) -> u64 {
    // SAFETY: within the element that the map gave. Volatile: others change it.
    unsafe { ptr::read_volatile(tags.add(way as usize)) }
}
