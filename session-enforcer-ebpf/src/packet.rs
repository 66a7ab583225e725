//! Reads the few header fields that tell new payload from everything else.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};

const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
const IPV4_HEADER_MIN: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER_MIN: usize = 20;

/// IPv6 extension headers that are walked before the TCP header. Linux sends at most hop-by-hop
/// (BIG TCP adds one), destination and routing headers.
const MAX_EXTENSIONS: usize = 8;

/// FIN and RST, as they lie in the byte of TCP flags.
const FIN_OR_RST: u8 = 0b101;

/// What a TCP segment, or an aggregate of segments, carries.
pub(crate) struct Segment {
    /// Sequence number of the first payload byte.
    pub seq: u32,
    /// Payload bytes.
    pub payload: u32,
    /// Whether the segment ends its direction (FIN) or the connection (RST).
    pub ends: bool,
}

impl Segment {
    /// Sequence number after the last payload byte.
    #[inline(always)]
    pub(crate) fn end(&self) -> u32 {
        self.seq.wrapping_add(self.payload)
    }
}

/// Reads the packet, whose data begins with the network header on both hooks. `None` where the
/// headers are not as expected.
#[inline(always)]
pub(crate) fn parse(ctx: &SkBuffContext) -> Option<Segment> {
    let packet = Packet::new(ctx);
    // The socket's family does not tell: an IPv6 socket that talks to an IPv4-mapped address
    // sends and receives IPv4 packets.
    // SAFETY: the context is valid, and `protocol` may be read on these hooks.
    let protocol = u32::from_be(unsafe { (*ctx.skb.skb).protocol } << 16);
    let tcp_at = match protocol {
        ETH_P_IP => packet.ipv4_payload()?,
        ETH_P_IPV6 => packet.ipv6_payload()?,
        _ => return None,
    };
    packet.tcp(tcp_at)
}

/// The linear part of a packet, for direct access.
struct Packet {
    start: usize,
    end: usize,
    /// Length of the whole packet. The length fields of the headers are of no use: for an
    /// aggregate of more than 64 KiB (BIG TCP) they are 0.
    len: usize,
}

impl Packet {
    #[inline(always)]
    fn new(ctx: &SkBuffContext) -> Self {
        let skb: *const __sk_buff = ctx.skb.skb;
        // SAFETY: the context is valid, and these fields may be read on these hooks.
        unsafe {
            Self {
                start: (*skb).data as usize,
                end: (*skb).data_end as usize,
                len: (*skb).len as usize,
            }
        }
    }

    /// Pointer to `size` bytes at `offset`, if they lie in the linear part.
    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> Option<*const u8> {
        let from = self.start + offset;
        if from + size > self.end {
            return None;
        }
        Some(from as *const u8)
    }

    /// Offset of the TCP header behind an IPv4 header. A later fragment has no TCP header, but
    /// both hooks see whole datagrams: reassembly is before ingress, fragmentation after egress.
    #[inline(always)]
    fn ipv4_payload(&self) -> Option<usize> {
        let header = self.at(0, IPV4_HEADER_MIN)?;
        // SAFETY: `at` checked twenty bytes.
        let (length_words, protocol) = unsafe { (*header & 0x0f, *header.add(9)) };
        let length = usize::from(length_words) * 4;
        (protocol == IPPROTO_TCP && length >= IPV4_HEADER_MIN).then_some(length)
    }

    /// Offset of the TCP header behind an IPv6 header and its extension headers.
    #[inline(always)]
    fn ipv6_payload(&self) -> Option<usize> {
        let header = self.at(0, IPV6_HEADER)?;
        // SAFETY: `at` checked forty bytes.
        let mut next = unsafe { *header.add(6) };
        let mut offset = IPV6_HEADER;
        for _ in 0..MAX_EXTENSIONS {
            if next == IPPROTO_TCP {
                return Some(offset);
            }
            let extension = self.at(offset, 2)?;
            // SAFETY: `at` checked two bytes.
            let (following, units) = unsafe { (*extension, *extension.add(1)) };
            offset += extension_length(next, units)?;
            next = following;
        }
        None
    }

    #[inline(always)]
    fn tcp(&self, offset: usize) -> Option<Segment> {
        let header = self.at(offset, TCP_HEADER_MIN)?;
        // SAFETY: `at` checked twenty bytes; nothing is assumed of their alignment.
        let (seq, data_offset, flags) = unsafe {
            (
                u32::from_be_bytes([
                    *header.add(4),
                    *header.add(5),
                    *header.add(6),
                    *header.add(7),
                ]),
                *header.add(12) >> 4,
                *header.add(13),
            )
        };
        let headers = offset + usize::from(data_offset) * 4;
        if headers > self.len {
            return None;
        }
        Some(Segment {
            seq,
            payload: (self.len - headers) as u32,
            ends: flags & FIN_OR_RST != 0,
        })
    }
}

/// Length of an IPv6 extension header from its second byte (RFC 8200 section 4, RFC 4302 section
/// 2.2 for the authentication header), or `None` for a header that is none of them.
#[inline(always)]
fn extension_length(kind: u8, units: u8) -> Option<usize> {
    match kind {
        // Hop-by-hop, routing, destination options, mobility.
        0 | 43 | 60 | 135 => Some((usize::from(units) + 1) * 8),
        // Fragment, of fixed length.
        44 => Some(8),
        // Authentication.
        51 => Some((usize::from(units) + 2) * 4),
        _ => None,
    }
}
