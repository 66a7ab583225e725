//! The gate: payload of a session past its deadline does not pass, whatever the daemon is doing.
//!
//! What carries no payload passes: the RST with which the kernel ends the session goes through the
//! egress hook before the session leaves the map, and a FIN that were dropped would be sent again
//! and again.

use core::{arch::asm, ptr};

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use session_enforcer_common::{EventKind, Limits, PacketDirection, Session, flags};

use crate::{count, lifecycle, words};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
}

/// The gate looks at a session at least this often, in nanoseconds: the shortest limit. It bounds
/// what a look can do that was for another session, whose map element this one has taken over while
/// the packet was on its way.
const LONGEST_UNSEEN_NS: u64 = 1_000_000_000;

/// Whether payload that passes now comes too late. This comes before the packet's stamp, so that what
/// is late cannot revive its session.
#[inline(always)]
pub(crate) fn is_shut(session: &mut Session, limits: &Limits, now_ns: u64) -> bool {
    now_ns >= session.open_until_ns && recheck(session, limits, now_ns)
}

/// Whether the daemon has shut the gate since the packet was let through. This comes after the packet's
/// stamp, and a [`words::order`] between the two: see [`Session::SHUT`].
#[inline(always)]
pub(crate) fn is_shut_meanwhile(session: *const Session, limits: &Limits) -> bool {
    // A barrier for the compiler, which has no selection for `compiler_fence` here. That an x86-64 processor may
    // read before its stamp can be seen all the same, the daemon allows for (`STAMP_VISIBLE`).
    // SAFETY: no instruction.
    unsafe { asm!("", options(nostack, preserves_flags)) };
    // SAFETY: the caller has it from a reference. Volatile: the daemon's program changes it.
    limits.gate == 1
        && unsafe { ptr::read_volatile(&raw const (*session).open_until_ns) } == Session::SHUT
}

/// Looks at the session: a few times a timeout, and not once a packet.
#[inline(never)]
fn recheck(session: &mut Session, limits: &Limits, now_ns: u64) -> bool {
    // SAFETY: from a reference. Volatile: the daemon's program changes it.
    let before_ns = unsafe { ptr::read_volatile(&raw const session.open_until_ns) };
    if before_ns == Session::SHUT && limits.gate == 1 {
        return true;
    }
    let until_ns = limits.open_until_ns(session, now_ns);
    if until_ns > now_ns {
        let until_ns = until_ns.min(now_ns + LONGEST_UNSEEN_NS);
        // Where the daemon has shut the gate meanwhile it stays shut.
        if before_ns != Session::SHUT {
            words::exchange(&raw mut session.open_until_ns, before_ns, until_ns);
        }
    } else if refuses(session, limits) {
        return true;
    }
    // It may have been shut under the policy before.
    session.flags &= !flags::EXPIRY_REPORTED;
    false
}

/// Decides by the time that it is then.
///
/// The session is read again: a packet of the other direction on another CPU may have been half way
/// through its stamps at the first reading, and seemed to be late.
#[inline(never)]
fn refuses(session: *const Session, limits: &Limits) -> bool {
    // SAFETY: no argument, no precondition.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: the caller has it from a reference. It becomes one after the call of the helper, which
    // the compiler knows nothing of, so it is read after the clock. In place: a copy would not leave
    // enough of the stack.
    limits.refuses(unsafe { &*session }, now_ns)
}

/// Drops a packet of a session that is past its deadline, and tells the daemon the first time.
#[inline(always)]
pub(crate) fn drop_packet(session: &mut Session, cookie: u64, way: PacketDirection) -> Verdict {
    count::gate_drop(way);
    if session.flags & flags::EXPIRY_REPORTED == 0
        && lifecycle::notify(EventKind::Expired, cookie, session)
    {
        session.flags |= flags::EXPIRY_REPORTED;
    }
    Verdict::Drop
}
