//! Connections that go from one socket to another without a word to the peer (`TCP_REPAIR`), and keep their age.

use aya_ebpf::bindings::BPF_ANY;
use session_enforcer_common::{Clocks, Ends, Session};

use crate::maps::RESTORED;

/// Keeps the clocks of a session whose socket closes without a FIN of its own.
#[inline(never)]
pub(crate) fn remember(session: &Session) {
    let clocks = Clocks::of(session);
    // What does not fit in is forgotten: its connection is past every limit when it is restored.
    let _ = RESTORED.insert(ends_of(session), clocks, u64::from(BPF_ANY));
}

/// Gives a session that was not dialled, and not accepted, the clocks of its connection. Nobody remembers some: then
/// all of its times are those of the boot.
#[inline(never)]
pub(crate) fn inherit(session: &mut Session) {
    let ends = ends_of(session);
    match RESTORED.get_ptr(ends) {
        // SAFETY: a pointer that the map gave, valid while the program runs.
        Some(clocks) => unsafe { (*clocks).give_to(session) },
        None => {
            session.established_ns = BOOT_NS;
            session.last_received_ns = BOOT_NS;
            session.last_sent_ns = BOOT_NS;
            session.answered_ns = BOOT_NS;
        }
    }
    let _ = RESTORED.remove(ends);
}

/// 0 means something else in some of the times.
const BOOT_NS: u64 = 1;

#[inline(always)]
fn ends_of(session: &Session) -> Ends {
    Ends {
        local: session.local,
        remote: session.remote,
        local_port: session.local_port,
        remote_port: session.remote_port,
    }
}
