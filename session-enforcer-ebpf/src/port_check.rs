//! Whether any rule can be about a connection, by its ports: what is asked first, and without a call
//! into the kernel. The context has the ports, and the programs the address of the filters.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff,
    programs::{SkBuffContext, SockOpsContext},
};
use session_enforcer_common::PortFilter;

use crate::{maps::PORTS, policy_tables::active_table};

/// Whether the connection of the packet can have a session. A packet for a listening socket has the
/// remote port 0; it has none.
#[inline(always)]
pub(crate) fn may_have_session(ctx: &SkBuffContext) -> bool {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid, and these fields may be read on these hooks: the packet has a
    // socket there, a full one. Each is read alone and volatile: the verifier refuses a wider access.
    let (local, remote) = unsafe {
        (
            ptr::read_volatile(&raw const (*skb).local_port) as u16,
            remote_port(ptr::read_volatile(&raw const (*skb).remote_port)),
        )
    };
    // SAFETY: the filters are always there.
    unsafe { PortFilter::ask(&raw const (*PORTS.as_ptr()).of_packets, local, remote) }
}

/// Whether the table in force can match the connection.
#[inline(always)]
pub(crate) fn may_be_matched(ctx: &SockOpsContext) -> bool {
    let (local, remote) = (ctx.local_port() as u16, remote_port(ctx.remote_port()));
    let table = active_table() as usize;
    // SAFETY: the filters are always there, one for each table.
    unsafe { PortFilter::ask(&raw const (*PORTS.as_ptr()).of_tables[table], local, remote) }
}

/// The remote port of a context: in network byte order, in the upper half of the word on a
/// little-endian machine.
#[inline(always)]
pub(crate) fn remote_port(word: u32) -> u16 {
    u32::from_be(word) as u16
}
