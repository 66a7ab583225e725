//! Waits for running eBPF programs to end.

use std::{thread, time::Duration};

/// The wait if the kernel offers no grace period: a thousand times the duration of a packet's processing, but
/// without a guarantee.
const LONG_ENOUGH: Duration = Duration::from_millis(10);

/// Waits about 10 ms, until every program that runs now has ended and a query of a socket counts that
/// program's packet.
///
/// For an incoming packet, the program and the delivery to the socket or its backlog lie in one RCU read-side
/// critical section (`ip_local_deliver_finish`, `ip6_input_finish`). A query takes the socket's lock
/// (`tcp_get_info`), and releasing a lock empties the backlog. Outgoing packets pass the hook and are counted
/// under the same lock. On a single processor the grace period ends at once: everything that ran before the
/// call has ended, except on a real-time kernel.
pub fn wait_for_programs() {
    if !grace_period() {
        thread::sleep(LONG_ENOUGH);
    }
}

/// Waits for an RCU grace period. Returns false if the kernel refuses it: with `nohz_full` processors, or
/// without membarrier(2).
fn grace_period() -> bool {
    // SAFETY: the system call takes no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}
