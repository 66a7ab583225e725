//! The packet parser, against another one that is written for being simple.
//!
//! The input is a byte that chooses the protocol, two bytes with the length of the packet's part
//! that is not linear, and the linear part.

use session_enforcer_common::packet::{ETH_P_IP, ETH_P_IPV6, MAX_HEADERS, Segment, parse};

use super::bytes::Bytes;

/// Reads the input as a packet.
///
/// # Panics
///
/// Where the two parsers do not read the same.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let protocol = bytes.choice([ETH_P_IP, ETH_P_IPV6, 0]);
    let length_beyond = usize::from(bytes.value::<u16>());
    let linear = bytes.0;
    let length = linear.len() + length_beyond;
    let segment = parse(linear, protocol, length);
    assert_eq!(segment, simple(linear, protocol, length));
    if let Some(segment) = segment {
        assert_eq!(segment.end().wrapping_sub(segment.seq), segment.payload);
    }
}

fn simple(linear: &[u8], protocol: u32, length: usize) -> Option<Segment> {
    let first = match protocol {
        ETH_P_IP => 4,
        ETH_P_IPV6 => 41,
        _ => return None,
    };
    let tcp_at = behind_headers(linear, first, 0, MAX_HEADERS + 1)?;
    let tcp = linear.get(tcp_at..)?.get(..20)?;
    let header_length = usize::from(tcp[12] / 16) * 4;
    if header_length < 20 {
        return None;
    }
    let payload = length.checked_sub(tcp_at)?.checked_sub(header_length)?;
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |number, byte| number << 8 | u32::from(*byte))
    };
    Some(Segment {
        seq: number(&tcp[4..8]),
        ack: number(&tcp[8..12]),
        payload: payload.try_into().ok()?,
        ends: tcp[13] & 1 == 1 || tcp[13] & 4 == 4,
        fin: tcp[13] & 5 == 1,
    })
}

fn behind_headers(linear: &[u8], kind: u8, at: usize, most: usize) -> Option<usize> {
    if kind == 6 {
        return Some(at);
    }
    let most = most.checked_sub(1)?;
    let header = linear.get(at..)?;
    let [next, units] = *header.first_chunk()?;
    let (next, length) = match kind {
        4 => {
            let words = usize::from(next % 16);
            // Whether the options themselves are linear does not matter.
            (*header.get(9)?, (words >= 5).then_some(words * 4)?)
        }
        41 => (*header.get(6)?, 40),
        44 => (next, 8),
        51 => (next, 8 + usize::from(units) * 4),
        0 | 43 | 60 | 135 => (next, 8 + usize::from(units) * 8),
        _ => return None,
    };
    behind_headers(linear, next, at + length, most)
}
