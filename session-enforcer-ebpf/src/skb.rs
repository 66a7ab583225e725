//! Direct access to a packet's bytes; what they say is read in `session_enforcer_common::packet`.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use session_enforcer_common::packet::{self, Linear};

pub(crate) use session_enforcer_common::packet::Segment;

/// Reads the packet, whose data begins with the network header on both hooks. `None` where the
/// headers are not as expected.
#[inline(always)]
pub(crate) fn parse(ctx: &SkBuffContext) -> Option<Segment> {
    let skb: *const __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid, and these fields may be read on these hooks.
    let (data, length, protocol) = unsafe {
        let data = Data {
            start: (*skb).data as usize,
            end: (*skb).data_end as usize,
        };
        (data, (*skb).len as usize, (*skb).protocol)
    };
    // The socket's family does not tell: an IPv6 socket that talks to an IPv4-mapped address
    // sends and receives IPv4 packets.
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
        // The form in which the verifier knows a check of packet bounds.
        if from + N > self.end {
            return None;
        }
        // SAFETY: the bytes lie before the end of the data, which outlives the program's run, and
        // bytes may lie at any address.
        Some(read(unsafe { &*(from as *const [u8; N]) }))
    }
}
