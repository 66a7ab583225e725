//! Parses the header fields that are needed to detect new payload.
//!
//! The kernel programs and the tests on the host compile the same functions. Only the access to the packet's bytes
//! differs: see [`Linear`].

/// `skb->protocol` of an IPv4 packet, in network byte order as the kernel stores it.
pub const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
/// `skb->protocol` of an IPv6 packet, in network byte order.
pub const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// Maximum number of headers between the first IP header and the TCP header: IPv6 extension headers, authentication
/// headers and inner IP headers. Linux sends at most hop-by-hop (BIG TCP adds one), destination and routing headers; an
/// encapsulating route adds an IP header and a routing header.
pub const MAX_HEADERS: usize = 8;

const IPPROTO_IPIP: u8 = 4;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_IPV6: u8 = 41;
const IPV4_HEADER_MIN: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER_MIN: usize = 20;

/// The FIN bit in the byte of TCP flags.
const FIN: u8 = 0b001;
/// The RST bit in the byte of TCP flags.
const RST: u8 = 0b100;

/// The linear part of a packet, which can be read in place. It begins with the network header.
pub trait Linear {
    /// Reads the `N` bytes at `offset`, if the linear part contains all of them.
    ///
    /// The bytes are passed to a closure. If they were returned, the kernel programs would test each `Option` of a
    /// reference for null after the bounds check.
    fn read<const N: usize, T>(&self, offset: usize, read: impl FnOnce(&[u8; N]) -> T)
    -> Option<T>;
}

impl Linear for [u8] {
    fn read<const N: usize, T>(
        &self,
        offset: usize,
        read: impl FnOnce(&[u8; N]) -> T,
    ) -> Option<T> {
        self.get(offset..)?.first_chunk().map(read)
    }
}

/// The fields of a TCP segment, or of an aggregate of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number of the first payload byte.
    pub seq: u32,
    /// Number of payload bytes.
    pub payload: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Whether the segment has FIN or RST set.
    pub ends: bool,
    /// Whether the segment has FIN and not RST set.
    pub fin: bool,
}

impl Segment {
    /// Sequence number after the last payload byte.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        self.seq.wrapping_add(self.payload)
    }
}

/// Parses a packet of the `protocol` (one of the `ETH_P_` constants). Returns `None` if the headers cannot be parsed.
///
/// `length` is the length of the whole packet and at least that of `linear`, which is its first part. The length fields
/// of the headers are not used: they are 0 in an aggregate of more than 64 KiB (BIG TCP).
#[inline(always)]
pub fn parse(linear: &(impl Linear + ?Sized), protocol: u32, length: usize) -> Option<Segment> {
    let first = match protocol {
        ETH_P_IP => IPPROTO_IPIP,
        ETH_P_IPV6 => IPPROTO_IPV6,
        _ => return None,
    };
    let (mut kind, mut offset) = behind(linear, first, 0)?;
    for _ in 0..MAX_HEADERS {
        if kind == IPPROTO_TCP {
            break;
        }
        (kind, offset) = behind(linear, kind, offset)?;
    }
    if kind != IPPROTO_TCP {
        return None;
    }
    tcp(linear, offset, length)
}

/// The kind and offset of the next header after the one of this `kind` at `offset` (RFC 791 section 3.1, RFC 8200
/// sections 3 and 4, RFC 4302 section 2.2). Returns `None` for an unknown kind.
///
/// Fragments without a TCP header do not occur: both hooks see whole datagrams, since reassembly comes before ingress
/// and fragmentation after egress.
#[inline(always)]
fn behind(linear: &(impl Linear + ?Sized), kind: u8, offset: usize) -> Option<(u8, usize)> {
    // Reads as many bytes as the shortest TCP header has; a TCP header follows each of these headers, so the packet is
    // long enough.
    let (next, length) = linear.read(offset, |header: &[u8; TCP_HEADER_MIN]| {
        let units = usize::from(header[1]);
        match kind {
            IPPROTO_IPIP => (header[9], usize::from(header[0] & 0x0f) * 4),
            IPPROTO_IPV6 => (header[6], IPV6_HEADER),
            // Hop-by-hop, routing, destination options and mobility headers.
            0 | 43 | 60 | 135 => (header[0], (units + 1) * 8),
            // Fragment header, of fixed length.
            44 => (header[0], 8),
            // Authentication header.
            51 => (header[0], (units + 2) * 4),
            _ => (0, 0),
        }
    })?;
    let shortest = if kind == IPPROTO_IPIP {
        IPV4_HEADER_MIN
    } else {
        8
    };
    (length >= shortest).then_some((next, offset + length))
}

#[inline(always)]
fn tcp(linear: &(impl Linear + ?Sized), offset: usize, length: usize) -> Option<Segment> {
    let (seq, ack, length_of_header, flags) =
        linear.read(offset, |header: &[u8; TCP_HEADER_MIN]| {
            let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            let ack = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
            (seq, ack, usize::from(header[12] >> 4) * 4, header[13])
        })?;
    let headers = offset + length_of_header;
    if length_of_header < TCP_HEADER_MIN || headers > length {
        return None;
    }
    Some(Segment {
        seq,
        ack,
        payload: (length - headers) as u32,
        ends: flags & (FIN | RST) != 0,
        fin: flags & (FIN | RST) == FIN,
    })
}

#[cfg(test)]
mod tests;
