//! The end of what programs in the kernel have begun.

use std::{thread, time::Duration};

/// How long programs that have begun are waited for where the kernel does not tell when they have ended: a
/// thousand times what a packet takes, and no promise.
const LONG_ENOUGH: Duration = Duration::from_millis(10);

/// Waits until every program that runs now has ended, and a look at its packet's socket tells of the packet.
/// Some 10 ms.
///
/// What arrives is given to the socket, or to the backlog of one that a process holds, within the RCU
/// read-side critical section in which the program ran (`ip_local_deliver_finish`, `ip6_input_finish`). The
/// look takes the socket's lock (`tcp_get_info`), with which the backlog is emptied, and under which
/// whatever leaves passes the hook and is counted. On a single processor the kernel waits for nothing: what
/// ran there when this was called has ended, unless the kernel is a real-time one.
pub fn wait_for_programs() {
    if !grace_period() {
        thread::sleep(LONG_ENOUGH);
    }
}

/// Waits for the end of an RCU grace period; false where the kernel does not do it for a process: one with
/// processors that have no tick (`nohz_full`), or without membarrier(2).
fn grace_period() -> bool {
    // SAFETY: a call without pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}
