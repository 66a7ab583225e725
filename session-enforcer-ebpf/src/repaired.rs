//! Connections that move to another socket without a FIN or RST (`TCP_REPAIR`) keep their age.

use aya_ebpf::bindings::BPF_ANY;
use session_enforcer_common::{Clocks, Ends, Session};

use crate::maps::RESTORED;

/// Keeps the clocks of a session whose socket closes without a FIN.
#[inline(never)]
pub(crate) fn remember(session: &Session) {
    let clocks = Clocks::of(session);
    // If the insertion fails, the connection counts as past every limit when it is restored.
    let _ = RESTORED.insert(ends_of(session), clocks, u64::from(BPF_ANY));
}

/// Gives the session of a restored connection the clocks of that connection. If none are stored, all its times are set
/// to the boot, so that it is past every limit.
///
/// The clocks stay stored: a socket with the same ends in another network namespace could take them away otherwise. The
/// next socket that closes without a FIN replaces them.
#[inline(never)]
pub(crate) fn inherit(session: &mut Session) {
    match RESTORED.get_ptr(ends_of(session)) {
        // SAFETY: the map lookup returned the pointer, which is valid while the program runs.
        Some(clocks) => unsafe { (*clocks).give_to(session) },
        None => {
            session.established_ns = BOOT_NS;
            session.last_received_ns = BOOT_NS;
            session.last_sent_ns = BOOT_NS;
            session.answered_ns = BOOT_NS;
        }
    }
}

/// Not 0, because 0 has a special meaning in some time fields.
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
