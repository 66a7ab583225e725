//! Direct access to packet bytes. `session_enforcer_common::packet` parses them.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use session_enforcer_common::packet::{self, Linear};

pub(crate) use session_enforcer_common::packet::Segment;

/// Parses the packet, whose data begins with the network header on both hooks. Returns `None` if the headers cannot be
/// parsed.
#[inline(always)]
pub(crate) fn parse(ctx: &SkBuffContext) -> Option<Segment> {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid, and these fields are readable on both hooks.
    let (data, length, protocol) = unsafe {
        let data = Data {
            start: (*skb).data as usize,
            end: (*skb).data_end as usize,
        };
        (data, (*skb).len as usize, (*skb).protocol)
    };
    // `protocol` and not the socket's family: an IPv6 socket with an IPv4-mapped address sends and receives IPv4
    // packets.
    packet::parse(&data, protocol, length)
}

/// The linear part of a packet.
struct Data {
    start: usize,
    end: usize,
}

impl Linear for Data {
    #[inline(always)]
    fn read<const N: usize, T>(
        &self,
        offset: usize,
        read: impl FnOnce(&[u8; N]) -> T,
    ) -> Option<T> {
        let from = self.start + offset;
        // The verifier recognises a packet bounds check only in this form.
        if from + N > self.end {
            return None;
        }
        // SAFETY: the bytes end before `data_end`, the packet outlives the program run, and a byte array has no
        // alignment.
        Some(read(unsafe { &*(from as *const [u8; N]) }))
    }
}
