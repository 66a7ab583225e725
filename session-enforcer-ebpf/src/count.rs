//! Counting in per-CPU maps.

use session_enforcer_common::{ErrorKind, PacketDirection, RuleCounters};

use crate::maps::{ERRORS, GATE_DROPS, RULE_COUNTERS};

/// Counts an error of the programs.
#[inline(always)]
pub(crate) fn error(kind: ErrorKind) {
    if let Some(count) = ERRORS.get_ptr_mut(kind as u32) {
        // SAFETY: a valid pointer into this CPU's element. A program of the same CPU may only
        // interrupt between the read and the write in NMI, where these programs never run.
        unsafe { *count += 1 };
    }
}

/// Counts a packet that the gate dropped.
#[inline(always)]
pub(crate) fn gate_drop(way: PacketDirection) {
    if let Some(count) = GATE_DROPS.get_ptr_mut(way as u32) {
        // SAFETY: as above.
        unsafe { *count += 1 };
    }
}

/// Changes the counters of a rule.
#[inline(always)]
pub(crate) fn rule(rule: u16, change: impl FnOnce(&mut RuleCounters)) {
    if let Some(counters) = RULE_COUNTERS.get_ptr_mut(u32::from(rule)) {
        // SAFETY: as above.
        change(unsafe { &mut *counters });
    }
}
