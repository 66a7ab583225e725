//! The gate drops payload of a session that is past its deadline, independently of the daemon.
//!
//! Packets without payload pass. The RST of `SOCK_DESTROY` goes through the egress hook while the session is still in
//! the table, and a dropped FIN would be retransmitted.

use core::{arch::asm, ptr};

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use session_enforcer_common::{
    EventKind, Limits, PacketDirection, SHORTEST_LIMIT_NS, Session, flags,
};

use crate::{count, event_ring, words};

/// The decision about a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
}

/// Whether payload that passes now is too late. The check comes before the packet's stamp, so late payload cannot
/// revive its session.
#[inline(always)]
pub(crate) fn is_shut(session: &mut Session, limits: &Limits, now_ns: u64) -> bool {
    now_ns >= session.open_until_ns && recheck(session, limits, now_ns)
}

/// Whether the daemon has shut the gate since [`is_shut`]. The check comes after the packet's stamp, with a
/// [`words::order`] between the two: see [`Session::SHUT`].
#[inline(always)]
pub(crate) fn is_shut_meanwhile(session: *const Session, limits: &Limits) -> bool {
    // A compiler barrier; the BPF backend cannot select `compiler_fence` here. An x86-64 processor may still read the
    // gate before its stamp is visible to other processors; the daemon waits `STAMP_VISIBLE` for that.
    // SAFETY: emits no instruction.
    unsafe { asm!("", options(nostack, preserves_flags)) };
    // SAFETY: the caller derived the pointer from a reference. Volatile: `table_ops` changes it.
    limits.gate == 1
        && unsafe { ptr::read_volatile(&raw const (*session).open_until_ns) } == Session::SHUT
}

/// Evaluates the limits; this runs a few times per timeout and not for each packet.
#[inline(never)]
fn recheck(session: &mut Session, limits: &Limits, now_ns: u64) -> bool {
    // SAFETY: derived from a reference. Volatile: `table_ops` changes it.
    let before_ns = unsafe { ptr::read_volatile(&raw const session.open_until_ns) };
    if before_ns == Session::SHUT && limits.gate == 1 {
        return true;
    }
    let until_ns = limits.open_until_ns(session, now_ns);
    if until_ns > now_ns {
        // If a slot is reused while a packet is in the hook, the packet may write its result into the record of another
        // session. This bound on the interval between two checks limits the effect.
        let until_ns = until_ns.min(now_ns + SHORTEST_LIMIT_NS);
        // The exchange fails if the daemon has shut the gate since; the gate then stays shut.
        if before_ns != Session::SHUT {
            words::exchange(&raw mut session.open_until_ns, before_ns, until_ns);
        }
    } else if refuses(session, limits) {
        return true;
    }
    // The report may date from a deadline of the previous policy.
    session.flags &= !flags::EXPIRY_REPORTED;
    false
}

/// Decides a second time, with the current time and the current record.
///
/// At the first read a packet of the other direction on another CPU may have written only part of its stamps, so that
/// the session seemed to be late.
#[inline(never)]
fn refuses(session: *const Session, limits: &Limits) -> bool {
    // SAFETY: no argument, no precondition.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: the caller derived the pointer from a reference. It is dereferenced after the helper call, which is
    // opaque to the compiler, so the record is read after the clock. A copy would exceed the stack limit.
    limits.refuses(unsafe { &*session }, now_ns)
}

/// Drops a packet of a session that is past its deadline. The first drop is reported to the daemon.
#[inline(always)]
pub(crate) fn drop_packet(session: &mut Session, cookie: u64, way: PacketDirection) -> Verdict {
    count::gate_drop(way);
    if session.flags & flags::EXPIRY_REPORTED == 0
        && event_ring::notify(EventKind::Expired, cookie, session)
    {
        session.flags |= flags::EXPIRY_REPORTED;
    }
    Verdict::Drop
}
