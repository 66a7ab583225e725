//! Finds the rule and limits of a connection in the active match table.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::{
    Ancestors, Choice, ErrorKind, Facts, Limits, MAX_MATCH_ENTRIES, Session, matches,
};

use crate::{
    capacity, count,
    maps::{ANCESTORS, MATCH_ENTRIES, MATCH_TABLES, active_table, limits_of},
    words,
};

/// The result of a match.
pub(crate) struct Decision {
    /// Rule of the first entry that applies; may be `RULE_EXEMPT`.
    pub rule: u16,
    /// Generation of the table.
    pub generation: u32,
    /// The entry depends on owner facts that are not known. The daemon has to resolve the owner and decide.
    pub needs_owner: bool,
}

/// The session's current limits. If the policy has changed since its last payload, the session is matched again first.
///
/// Returns `None`, which passes the packet, in these cases:
///
/// - no rule, or an exempting entry, matches the session: the daemon will release it;
/// - its owner is not known: the daemon will resolve it;
/// - it is still undecided: the daemon will decide and count it as opened;
/// - a map cannot be read (fail open).
#[inline(always)]
pub(crate) fn of(session: &mut Session) -> Option<&'static Limits> {
    let Some(policy) = limits_of(session.rule) else {
        count::error(ErrorKind::TableUnreadable);
        return None;
    };
    if policy.generation == session.generation {
        return Some(policy);
    }
    of_rule_anew(session)
}

#[inline(never)]
fn of_rule_anew(session: &mut Session) -> Option<&'static Limits> {
    if session.generation == 0 {
        return None;
    }
    // SAFETY: derived from a reference. Volatile: `table_ops` changes it.
    let before_ns = unsafe { ptr::read_volatile(&raw const session.open_until_ns) };
    let decision = decide(session)?;
    if decision.needs_owner {
        return None;
    }
    let policy = limits_of(decision.rule)?;
    let before = Choice::of(session);
    let after = before.by(decision.rule, decision.generation);
    // If a packet of the other direction changes the flags at the same time, the exchange fails and the next packet
    // tries again.
    if words::exchange(words::choice_word(session), before.0, after.0) {
        capacity::moved(before, after);
    }
    // Only the daemon opens a gate that it has shut.
    if before_ns != Session::SHUT {
        words::exchange(&raw mut session.open_until_ns, before_ns, 0);
    }
    // The policy may have changed between the two lookups.
    (policy.generation == decision.generation).then_some(policy)
}

/// State of the loop over the match entries.
struct Search {
    facts: Facts,
    /// Null if the ancestors are not known. Not an `Option`: the compiler may leave its payload unwritten for `None`,
    /// which the verifier refuses.
    ancestors: *const Ancestors,
    /// Index of the table's first entry.
    base: u32,
    /// Rule of the first entry that applies, and whether it needs the owner.
    found: Option<(u16, bool)>,
}

/// Matches the connection of a session against the active table. Returns `None` if no entry applies.
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
    // SAFETY: the callback has the signature that the helper expects, and the search outlives the loop.
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

/// Returns 1 to end the loop, 0 to continue.
extern "C" fn apply_entry(index: u32, search: *mut c_void) -> i64 {
    // SAFETY: the pointer that `decide` passed.
    let search = unsafe { &mut *search.cast::<Search>() };
    let Some(entry) = MATCH_ENTRIES.get(search.base + index) else {
        count::error(ErrorKind::TableUnreadable);
        return 1;
    };
    // SAFETY: the map lookup returned the pointer, which is valid while the program runs. If the LRU map reuses the
    // element for another cgroup meanwhile, the daemon's own decision corrects this one.
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
