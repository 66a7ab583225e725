//! Slot accounting of the session table. Each rule has a reserved share that sessions of other rules cannot use, and
//! may have a maximum of its own.

use core::intrinsics::{AtomicOrdering::SeqCst, atomic_xadd};

use session_enforcer_common::Choice;

use crate::maps::{
    FIRST_GENERATION, HELD, MATCH_TABLES, MAX_SESSIONS, TABLE, active_table, limits_of,
};

const ONE_LESS: u64 = u64::MAX;

/// Why a session was not inserted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The cookie already has a session.
    Present,
    /// The table, or the part of it that the rule may use, is full.
    Full,
    /// The rule has reached its own maximum.
    RuleFull,
}

/// Reserves a slot for a session.
#[inline(always)]
pub(crate) fn take(choice: Choice) -> Result<(), Refusal> {
    match take_slot(choice.0) {
        TAKEN => Ok(()),
        RULE_FULL => Err(Refusal::RuleFull),
        _ => Err(Refusal::Full),
    }
}

/// Return values of [`take_slot`].
const TAKEN: u32 = 0;
const RULE_FULL: u32 = 1;
const FULL: u32 = 2;

/// Counts the session before it is inserted, so two insertions cannot both take the last slot.
///
/// The exported names make this function and the next one global functions, which the verifier checks once instead of
/// at each call.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn take_slot(choice: u64) -> u32 {
    let all = count(1) as i64;
    let held = count_of(Choice(choice), 1);
    let answer = answer(Choice(choice), all, held);
    if answer != TAKEN {
        count_less(Choice(choice));
    }
    answer
}

/// A rule that holds its share may not use the reserve. An undecided session (generation 0) belongs to no rule and may
/// not use the reserve either.
#[inline(always)]
fn answer(choice: Choice, all: i64, held: u64) -> u32 {
    // Signed: if the pinned count is too low it can become negative, and the table must not count as full then.
    let slots = i64::from(MAX_SESSIONS.load());
    if all >= slots {
        return FULL;
    }
    if !is_counted(choice) && choice.generation() != 0 {
        // A session of another daemon, which already had room for it.
        return TAKEN;
    }
    let Some(table) = MATCH_TABLES.get(active_table()) else {
        return TAKEN;
    };
    if all >= slots - i64::from(table.reserve)
        && (choice.generation() == 0 || held >= u64::from(table.share))
    {
        return FULL;
    }
    match limits_of(choice.rule()) {
        Some(limits) if choice.generation() != 0 => {
            let most = u64::from(limits.max_sessions);
            if most != 0 && held >= most {
                RULE_FULL
            } else {
                TAKEN
            }
        }
        _ => TAKEN,
    }
}

/// Releases the slot of a session that was removed or not inserted.
#[inline(always)]
pub(crate) fn give_back(choice: Choice) {
    give_slot_back(choice.0);
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn give_slot_back(choice: u64) -> u32 {
    count_less(Choice(choice));
    0
}

#[inline(always)]
fn count_less(choice: Choice) {
    count(ONE_LESS);
    count_of(choice, ONE_LESS);
}

/// Moves the count of a session from one rule to another.
#[inline(always)]
pub(crate) fn moved(before: Choice, after: Choice) {
    count_of(before, ONE_LESS);
    count_of(after, 1);
}

/// Whether the rule id belongs to this daemon.
#[inline(always)]
fn is_counted(choice: Choice) -> bool {
    choice.generation() >= FIRST_GENERATION.load()
        && choice.generation() != Choice::ENDED.generation()
}

/// Adds `more` (modulo 2^64) to the number of the rule's sessions; returns the previous number.
#[inline(always)]
fn count_of(choice: Choice, more: u64) -> u64 {
    if !is_counted(choice) {
        return 0;
    }
    let Some(held) = HELD.get_ptr_mut(u32::from(choice.rule())) else {
        return 0;
    };
    // SAFETY: the map lookup returned the pointer.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(held, more) }
}

/// Adds `more` (modulo 2^64) to the number of all sessions; returns the previous number.
#[inline(always)]
fn count(more: u64) -> u64 {
    let Some(head) = TABLE.get_ptr_mut(0) else {
        // Unreachable: the array has one element.
        return 0;
    };
    // SAFETY: the map lookup returned the pointer.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(&raw mut (*head).sessions, more) }
}
