//! Whether any rule can match a connection with these ports. This is the first check and needs no helper call: the
//! ports are in the context, and the programs know the address of the filters.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff,
    programs::{SkBuffContext, SockOpsContext},
};
use session_enforcer_common::PortFilter;

use crate::maps::{PORTS, active_table};

/// Whether the packet's connection can have a session. A packet for a listening socket has remote port 0 and no
/// session.
#[inline(always)]
pub(crate) fn may_have_session(ctx: &SkBuffContext) -> bool {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid, and these fields are readable on these hooks, where every packet has a full socket.
    // Each field is read separately and volatile: the verifier refuses a wider access.
    let (local, remote) = unsafe {
        (
            ptr::read_volatile(&raw const (*skb).local_port) as u16,
            remote_port(ptr::read_volatile(&raw const (*skb).remote_port)),
        )
    };
    // SAFETY: the filters are a static and always readable.
    unsafe { PortFilter::ask(&raw const (*PORTS.as_ptr()).of_packets, local, remote) }
}

/// Whether an entry of the active table can match the connection.
#[inline(always)]
pub(crate) fn may_be_matched(ctx: &SockOpsContext) -> bool {
    let (local, remote) = (ctx.local_port() as u16, remote_port(ctx.remote_port()));
    let table = active_table() as usize;
    // SAFETY: the filters are a static with one filter for each table.
    unsafe { PortFilter::ask(&raw const (*PORTS.as_ptr()).of_tables[table], local, remote) }
}

/// Converts the remote port of a context, which holds it in network byte order (on a little-endian machine in the upper
/// half of the word).
#[inline(always)]
pub(crate) fn remote_port(word: u32) -> u16 {
    u32::from_be(word) as u16
}
