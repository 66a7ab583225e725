//! Which rule decides about a connection, by the match table in force.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::{ErrorKind, Facts, MAX_MATCH_ENTRIES, Table, matches};

use crate::{
    counters,
    maps::{ACTIVE_TABLE, MATCH_ENTRIES, MATCH_TABLES},
};

/// What a table says about a connection.
pub(crate) struct Decision {
    /// The rule of the first entry that applies, `RULE_EXEMPT` among them.
    pub rule: u16,
    /// Generation of the table.
    pub generation: u32,
}

/// What the loop over the match entries works on.
struct Search {
    facts: Facts,
    /// Index of the table's first entry.
    base: u32,
    /// Rule of the first entry that applies.
    found: Option<u16>,
}

/// What the table in force says about the connection; nothing where no entry applies.
#[inline(always)]
pub(crate) fn decide(facts: &Facts) -> Option<Decision> {
    let active = ACTIVE_TABLE
        .get(0)
        .map_or(0, |active| active % Table::COUNT);
    let Some(table) = MATCH_TABLES.get(active) else {
        counters::error(ErrorKind::TableUnreadable);
        return None;
    };
    let (generation, entries) = (table.generation, table.entries);
    let mut search = Search {
        facts: *facts,
        base: active * MAX_MATCH_ENTRIES,
        found: None,
    };
    // SAFETY: the callback has the signature that the helper asks for, and the search outlives it.
    unsafe {
        bpf_loop(
            entries.min(MAX_MATCH_ENTRIES),
            apply_entry as *mut c_void,
            ptr::from_mut(&mut search).cast(),
            0,
        )
    };
    let rule = search.found?;
    Some(Decision { rule, generation })
}

/// Returns 1 to end the loop, 0 to go on.
extern "C" fn apply_entry(index: u32, search: *mut c_void) -> i64 {
    // SAFETY: the pointer that `decide` gave.
    let search = unsafe { &mut *search.cast::<Search>() };
    let Some(entry) = MATCH_ENTRIES.get(search.base + index) else {
        counters::error(ErrorKind::TableUnreadable);
        return 1;
    };
    if !matches(&search.facts, entry) {
        return 0;
    }
    search.found = Some(entry.rule);
    1
}
