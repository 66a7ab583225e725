//! Which rule decides about a connection, by the match table in force, and its limits.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::{
    Ancestors, Choice, ErrorKind, Facts, Limits, MAX_MATCH_ENTRIES, MAX_RULES, Session, Table,
    matches,
};

use crate::{
    capacity, count,
    maps::{ACTIVE_TABLE, ANCESTORS, MATCH_ENTRIES, MATCH_TABLES, POLICIES},
    slots, words,
};

/// What a table says about a connection.
pub(crate) struct Decision {
    /// The rule of the first entry that applies, `RULE_EXEMPT` among them.
    pub rule: u16,
    /// Generation of the table.
    pub generation: u32,
    /// Whether the entry asks for what is not known of the owner. Then it is for the daemon to find
    /// out, and to decide.
    pub needs_owner: bool,
}

/// Index of the table in force.
#[inline(always)]
pub(crate) fn active_table() -> u32 {
    ACTIVE_TABLE
        .get(0)
        .map_or(0, |active| active % Table::COUNT)
}

/// The limits in force of a session, after it was matched again where another policy came into
/// force since its last payload. `None` where nothing is known to limit it: no rule matches it any
/// more, or an exempting one does, and it is the daemon's to release; or its owner is not known, and is
/// the daemon's to find; or it was never decided about, and is counted as opened when the daemon decides;
/// or a map cannot be read, and errors are on the side of life.
#[inline(always)]
pub(crate) fn of(session: &mut Session) -> Option<&'static Limits> {
    let Some(policy) = limits(session.rule) else {
        count::error(ErrorKind::TableUnreadable);
        return None;
    };
    if policy.generation == session.generation {
        return Some(policy);
    }
    of_rule_anew(session)
}

/// The limits of a rule; none for an exempting one.
#[inline(always)]
pub(crate) fn limits(rule: u16) -> Option<&'static Limits> {
    let rule = u32::from(rule);
    if rule >= MAX_RULES {
        return None;
    }
    POLICIES.get(active_table() * MAX_RULES + rule)
}

#[inline(never)]
fn of_rule_anew(session: &mut Session) -> Option<&'static Limits> {
    if session.generation == 0 {
        return None;
    }
    // SAFETY: from a reference. Volatile: the daemon's program changes it.
    let before_ns = unsafe { ptr::read_volatile(&raw const session.open_until_ns) };
    let decision = decide(session)?;
    if decision.needs_owner {
        return None;
    }
    let policy = limits(decision.rule)?;
    let before = Choice::of(session);
    let after = before.by(decision.rule, decision.generation);
    // Where a packet of the other direction changes its flags meanwhile, the next one decides.
    if words::exchange(slots::choice_word(session), before.0, after.0) {
        capacity::moved(before, after);
    }
    // A gate that the daemon has shut is the daemon's to open.
    if before_ns != Session::SHUT {
        words::exchange(&raw mut session.open_until_ns, before_ns, 0);
    }
    // The policy may have changed again between the two look-ups.
    (policy.generation == decision.generation).then_some(policy)
}

/// What the loop over the match entries works on.
struct Search {
    facts: Facts,
    /// Null where they are not known. Not an `Option`, whose other half the compiler may leave
    /// unwritten, which the verifier refuses.
    ancestors: *const Ancestors,
    /// Index of the table's first entry.
    base: u32,
    /// Rule of the first entry that applies, and whether that is open.
    found: Option<(u16, bool)>,
}

/// What the table in force says about the connection of an owner in this cgroup, 0 where that is not
/// known; nothing where no entry applies.
#[inline(always)]
pub(crate) fn decide(session: &Session) -> Option<Decision> {
    let active = active_table();
    let Some(table) = MATCH_TABLES.get(active) else {
        count::error(ErrorKind::TableUnreadable);
        return None;
    };
    let (generation, entries) = (table.generation, table.entries);
    let mut search = Search {
        facts: Facts::of(session),
        ancestors: ptr::null(),
        base: active * MAX_MATCH_ENTRIES,
        found: None,
    };
    let cgroup_id = session.owner.cgroup_id;
    if cgroup_id != 0
        && let Some(ancestors) = ANCESTORS.get_ptr(cgroup_id)
    {
        search.ancestors = ancestors;
        search.facts.known |= Facts::CGROUP;
    }
    // SAFETY: the callback has the signature that the helper asks for, and the search outlives it.
    unsafe {
        bpf_loop(
            entries.min(MAX_MATCH_ENTRIES),
            apply_entry as *mut c_void,
            ptr::from_mut(&mut search).cast(),
            0,
        )
    };
    let (rule, needs_owner) = search.found?;
    Some(Decision {
        rule,
        generation,
        needs_owner,
    })
}

/// Returns 1 to end the loop, 0 to go on.
extern "C" fn apply_entry(index: u32, search: *mut c_void) -> i64 {
    // SAFETY: the pointer that `decide` gave.
    let search = unsafe { &mut *search.cast::<Search>() };
    let Some(entry) = MATCH_ENTRIES.get(search.base + index) else {
        count::error(ErrorKind::TableUnreadable);
        return 1;
    };
    // SAFETY: a pointer that the map gave, valid while the program runs. Should the element be freed
    // and be another cgroup's meanwhile, the daemon's own decision corrects this one.
    let ancestors = unsafe { search.ancestors.as_ref() };
    if !matches(
        &search.facts,
        ancestors.unwrap_or(&Ancestors::UNKNOWN),
        entry,
    ) {
        return 0;
    }
    search.found = Some((entry.rule, entry.needs_owner(&search.facts)));
    1
}
