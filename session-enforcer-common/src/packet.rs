//! Reads the few header fields that tell new payload from everything else.
//!
//! The kernel programs and the tests on the host compile the same functions. What differs is how
//! bytes of the packet are come by: see [`Linear`].

/// `skb->protocol` of an IPv4 packet, as it lies there: in network byte order.
pub const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
/// `skb->protocol` of an IPv6 packet, in network byte order.
pub const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// IPv6 extension headers that are walked before the TCP header. Linux sends at most hop-by-hop
/// (BIG TCP adds one), destination and routing headers.
pub const MAX_EXTENSIONS: usize = 8;

const IPPROTO_TCP: u8 = 6;
const IPV4_HEADER_MIN: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER_MIN: usize = 20;

/// FIN, as it lies in the byte of TCP flags.
const FIN: u8 = 0b001;
/// RST, likewise.
const RST: u8 = 0b100;

/// The part of a packet that can be read in place. It begins with the network header.
pub trait Linear {
    /// Reads the `N` bytes at `offset`, if all of them lie in this part.
    ///
    /// They are lent and not returned: an `Option` of a reference is a pointer that may be null, and
    /// the kernel programs would check it for that at each header, after the check of the bounds.
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

/// What a TCP segment, or an aggregate of segments, carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number of the first payload byte.
    pub seq: u32,
    /// Payload bytes.
    pub payload: u32,
    /// Whether the segment ends its direction (FIN) or the connection (RST).
    pub ends: bool,
    /// Whether it ends its direction, and that alone.
    pub fin: bool,
}

impl Segment {
    /// Sequence number after the last payload byte.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        self.seq.wrapping_add(self.payload)
    }
}

/// Reads a packet of the `protocol` (one of the `ETH_P_` numbers). `None` where the headers are not
/// as expected.
///
/// `length` is that of the whole packet, of which `linear` is the first part or all: it is no less.
/// The length fields of the headers are of no use, since they are 0 in an aggregate of more than
/// 64 KiB (BIG TCP).
#[inline(always)]
pub fn parse(linear: &(impl Linear + ?Sized), protocol: u32, length: usize) -> Option<Segment> {
    let tcp_at = match protocol {
        ETH_P_IP => ipv4_payload(linear)?,
        ETH_P_IPV6 => ipv6_payload(linear)?,
        _ => return None,
    };
    tcp(linear, tcp_at, length)
}

/// Offset of the TCP header behind an IPv4 header. A later fragment has no TCP header, but both
/// hooks see whole datagrams: reassembly is before ingress, fragmentation after egress.
#[inline(always)]
fn ipv4_payload(linear: &(impl Linear + ?Sized)) -> Option<usize> {
    let (words, protocol) = linear.read(0, |header: &[u8; IPV4_HEADER_MIN]| {
        (header[0] & 0x0f, header[9])
    })?;
    let length = usize::from(words) * 4;
    if protocol != IPPROTO_TCP || length < IPV4_HEADER_MIN {
        return None;
    }
    Some(length)
}

/// Offset of the TCP header behind an IPv6 header and its extension headers.
#[inline(always)]
fn ipv6_payload(linear: &(impl Linear + ?Sized)) -> Option<usize> {
    let mut next = linear.read(0, |header: &[u8; IPV6_HEADER]| header[6])?;
    let mut offset = IPV6_HEADER;
    for _ in 0..MAX_EXTENSIONS {
        if next == IPPROTO_TCP {
            return Some(offset);
        }
        let (following, units) =
            linear.read(offset, |extension: &[u8; 2]| (extension[0], extension[1]))?;
        offset += extension_length(next, units)?;
        next = following;
    }
    (next == IPPROTO_TCP).then_some(offset)
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

#[inline(always)]
fn tcp(linear: &(impl Linear + ?Sized), offset: usize, length: usize) -> Option<Segment> {
    let (seq, length_of_header, flags) = linear.read(offset, |header: &[u8; TCP_HEADER_MIN]| {
        let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        (seq, usize::from(header[12] >> 4) * 4, header[13])
    })?;
    let headers = offset + length_of_header;
    if length_of_header < TCP_HEADER_MIN || headers > length {
        return None;
    }
    Some(Segment {
        seq,
        payload: (length - headers) as u32,
        ends: flags & (FIN | RST) != 0,
        fin: flags & (FIN | RST) == FIN,
    })
}

#[cfg(test)]
mod tests;
