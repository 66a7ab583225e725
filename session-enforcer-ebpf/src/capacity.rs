//! Who has how many slots of the session table: each rule has a share that the sessions of others leave it, and may
//! have a limit of its own.

use core::intrinsics::{AtomicOrdering::SeqCst, atomic_xadd};

use session_enforcer_common::Choice;

use crate::{
    maps::{FIRST_GENERATION, HELD, MATCH_TABLES, MAX_SESSIONS, TABLE},
    policy_tables,
    slots::Refusal,
};

const ONE_LESS: u64 = u64::MAX;

/// Takes a slot for a session.
#[inline(always)]
pub(crate) fn take(choice: Choice) -> Result<(), Refusal> {
    match take_slot(choice.0) {
        TAKEN => Ok(()),
        RULE_FULL => Err(Refusal::RuleFull),
        _ => Err(Refusal::Full),
    }
}

/// What [`take_slot`] answers.
const TAKEN: u32 = 0;
const RULE_FULL: u32 = 1;
const FULL: u32 = 2;

/// Counts before the session is there, so that no two get the last slot.
///
/// With names of their own for the linker this one and the next are global functions, which the verifier follows once
/// and not at each call.
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

/// A rule whose sessions have its share leaves the reserve to the others. What is not decided about is no rule's.
#[inline(always)]
fn answer(choice: Choice, all: i64, held: u64) -> u32 {
    // Signed: should what is pinned count too few, the table is not shut for ever.
    let slots = i64::from(MAX_SESSIONS.load());
    if all >= slots {
        return FULL;
    }
    if !is_counted(choice) && choice.generation() != 0 {
        // Of another daemon, which had room for it.
        return TAKEN;
    }
    let Some(table) = MATCH_TABLES.get(policy_tables::active_table()) else {
        return TAKEN;
    };
    if all >= slots - i64::from(table.reserve)
        && (choice.generation() == 0 || held >= u64::from(table.share))
    {
        return FULL;
    }
    match policy_tables::limits(choice.rule()) {
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

/// The slot of a session is free, or was not used.
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

/// A session goes to another rule.
#[inline(always)]
pub(crate) fn moved(before: Choice, after: Choice) {
    count_of(before, ONE_LESS);
    count_of(after, 1);
}

/// Whether the number of the rule is this daemon's.
#[inline(always)]
fn is_counted(choice: Choice) -> bool {
    choice.generation() >= FIRST_GENERATION.load()
        && choice.generation() != Choice::ENDED.generation()
}

/// Adds to the sessions of a rule, modulo 2^64, and returns what it was.
#[inline(always)]
fn count_of(choice: Choice, more: u64) -> u64 {
    if !is_counted(choice) {
        return 0;
    }
    let Some(held) = HELD.get_ptr_mut(u32::from(choice.rule())) else {
        return 0;
    };
    // SAFETY: a pointer that the map gave.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(held, more) }
}

/// Adds to the number of all sessions, modulo 2^64, and returns what it was.
#[inline(always)]
fn count(more: u64) -> u64 {
    let Some(head) = TABLE.get_ptr_mut(0) else {
        // Not reached: the array has this element.
        return 0;
    };
    // SAFETY: a pointer that the map gave.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(&raw mut (*head).sessions, more) }
}
