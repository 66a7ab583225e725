//! Counters in per-CPU maps.

use session_enforcer_common::{ErrorKind, PacketDirection, RuleCounters};

use crate::maps::{ERRORS, GATE_DROPS, RULE_COUNTERS};

/// Counts an error of a program.
#[inline(always)]
pub(crate) fn error(kind: ErrorKind) {
    if let Some(count) = ERRORS.get_ptr_mut(kind as u32) {
        // SAFETY: a valid pointer into this CPU's element. Only an NMI could run a program on the same CPU between the
        // read and the write, and these programs do not run in NMI context.
        unsafe { *count += 1 };
    }
}

/// Counts a packet that the gate dropped.
#[inline(always)]
pub(crate) fn gate_drop(way: PacketDirection) {
    if let Some(count) = GATE_DROPS.get_ptr_mut(way as u32) {
        // SAFETY: as in `error`.
        unsafe { *count += 1 };
    }
}

/// Updates the counters of a rule.
#[inline(always)]
pub(crate) fn rule(rule: u16, change: impl FnOnce(&mut RuleCounters)) {
    if let Some(counters) = RULE_COUNTERS.get_ptr_mut(u32::from(rule)) {
        // SAFETY: as in `error`.
        change(unsafe { &mut *counters });
    }
}
