//! Packets that `etherparse` writes are parsed correctly, and for any modification of them this
//! parser and `etherparse` never return different results.

use etherparse::{
    IpAuthHeader, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header,
    Ipv6RawExtHeader, LaxSlicedPacket, TcpHeader, TransportSlice,
};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

/// The fields of a segment that is sent and must be parsed.
#[derive(Clone, Debug)]
struct Sent {
    seq: u32,
    /// 32-bit words of TCP options.
    options: usize,
    fin: bool,
    rst: bool,
    payload: usize,
}

impl Sent {
    fn tcp(&self) -> Vec<u8> {
        let mut header = TcpHeader::new(5432, 51234, self.seq, 1024);
        (header.fin, header.rst, header.ack) = (self.fin, self.rst, true);
        header.acknowledgment_number = !self.seq;
        header.set_options_raw(&vec![1; self.options * 4]).unwrap();
        let mut bytes = header.to_bytes().to_vec();
        bytes.resize(bytes.len() + self.payload, 0xaa);
        bytes
    }

    fn segment(&self) -> Segment {
        Segment {
            seq: self.seq,
            ack: !self.seq,
            payload: self.payload as u32,
            ends: self.fin || self.rst,
            fin: self.fin && !self.rst,
        }
    }
}

fn sent() -> impl Strategy<Value = Sent> {
    let fields = (any::<u32>(), 0..=10usize, any::<[bool; 2]>(), 0..200usize);
    fields.prop_map(|(seq, options, [fin, rst], payload)| Sent {
        seq,
        options,
        fin,
        rst,
        payload,
    })
}

fn plain() -> Sent {
    Sent {
        seq: 7,
        options: 0,
        fin: false,
        rst: false,
        payload: 3,
    }
}

fn ipv4(option_words: usize, inner: &[u8]) -> Vec<u8> {
    let ends = ([10, 0, 0, 7], [10, 0, 0, 5]);
    let mut header =
        Ipv4Header::new(inner.len() as u16, 64, IpNumber::TCP, ends.0, ends.1).unwrap();
    header.options = Ipv4Options::try_from(&vec![1; option_words * 4][..]).unwrap();
    header.set_payload_len(inner.len()).unwrap();
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(inner);
    bytes
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const EXTENSIONS: [u8; 6] = [
    HOP_BY_HOP,
    ROUTING,
    FRAGMENT,
    AUTHENTICATION,
    DESTINATION,
    MOBILITY,
];

/// An extension header: its kind, and how many units it is longer than the shortest one.
type Extension = (u8, usize);

fn extension((kind, more): Extension, next: IpNumber) -> Vec<u8> {
    match kind {
        FRAGMENT => Ipv6FragmentHeader::new(next, 0.try_into().unwrap(), false, 1)
            .to_bytes()
            .to_vec(),
        AUTHENTICATION => IpAuthHeader::new(next, 1, 2, &vec![3; more * 4])
            .unwrap()
            .to_bytes()
            .to_vec(),
        _ => Ipv6RawExtHeader::new_raw(next, &vec![0; 6 + more * 8])
            .unwrap()
            .to_bytes()
            .to_vec(),
    }
}

fn ipv6(extensions: &[Extension], inner: &[u8]) -> Vec<u8> {
    let kinds = extensions.iter().map(|(kind, _)| IpNumber(*kind));
    let nexts: Vec<IpNumber> = kinds.chain([IpNumber::TCP]).collect();
    let mut rest = Vec::new();
    for (chosen, next) in extensions.iter().zip(&nexts[1..]) {
        rest.extend(extension(*chosen, *next));
    }
    rest.extend(inner);
    let header = Ipv6Header {
        traffic_class: 0,
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: rest.len() as u16,
        next_header: nexts[0],
        hop_limit: 64,
        source: [1; 16],
        destination: [2; 16],
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(rest);
    bytes
}

/// An encapsulated packet: after an IPv4 header, or after an IPv6 header with a routing header of `SRv6`.
fn encapsulated(inner: &[u8], in_ipv4: bool) -> Vec<u8> {
    let kind = if inner[0] >> 4 == 4 { 4 } else { 41 };
    let (mut packet, kind_at) = if in_ipv4 {
        (ipv4(0, inner), 9)
    } else {
        (ipv6(&[(ROUTING, 2)], inner), 40)
    };
    packet[kind_at] = kind;
    packet
}

fn protocol(packet: &[u8]) -> u32 {
    if packet[0] >> 4 == 4 {
        ETH_P_IP
    } else {
        ETH_P_IPV6
    }
}

/// Parses a packet that is completely linear.
fn read(packet: &[u8], protocol: u32) -> Option<Segment> {
    parse(packet, protocol, packet.len())
}

/// The result of `etherparse`, if it finds a TCP header that is not in a fragment.
fn oracle(packet: &[u8]) -> Option<Segment> {
    let sliced = LaxSlicedPacket::from_ip(packet).ok()?;
    if sliced.net.as_ref()?.ip_payload_ref()?.fragmented {
        return None;
    }
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else {
        return None;
    };
    // The payload is the rest of the packet: length fields are not used here.
    let header_at = tcp.slice().as_ptr() as usize - packet.as_ptr() as usize;
    let header_length = tcp.header_slice().len();
    Some(Segment {
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        payload: (packet.len() - header_at - header_length) as u32,
        ends: tcp.fin() || tcp.rst(),
        fin: tcp.fin() && !tcp.rst(),
    })
}

#[test]
fn a_header_that_is_too_short_to_be_one_is_refused() {
    let mut packet = ipv4(0, &plain().tcp());
    for words in 0..5 {
        packet[0] = 0x40 | words;
        assert_eq!(
            read(&packet, ETH_P_IP),
            None,
            "IPv4 header of {words} words"
        );
    }
    let mut packet = ipv4(0, &plain().tcp());
    for words in 0..5 {
        packet[20 + 12] = words << 4;
        assert_eq!(read(&packet, ETH_P_IP), None, "TCP header of {words} words");
    }
}

#[test]
fn a_tcp_header_may_end_with_the_packet_and_not_after_it() {
    let mut packet = ipv4(
        0,
        &Sent {
            payload: 4,
            ..plain()
        }
        .tcp(),
    );
    packet[20 + 12] = 6 << 4;
    assert_eq!(read(&packet, ETH_P_IP).map(|s| s.payload), Some(0));
    packet[20 + 12] = 7 << 4;
    assert_eq!(read(&packet, ETH_P_IP), None);
}

#[test]
fn a_packet_that_is_not_tcp_over_ip_is_refused() {
    let packet = ipv4(0, &plain().tcp());
    let arp = u32::from(0x0806_u16.to_be());
    assert_eq!(read(&packet, arp), None);
    assert_eq!(read(&packet, u32::from_be(ETH_P_IP)), None);
    let mut udp = packet;
    udp[9] = 17;
    assert_eq!(read(&udp, ETH_P_IP), None);
    let mut no_next_header = ipv6(&[], &plain().tcp());
    no_next_header[6] = 59;
    assert_eq!(read(&no_next_header, ETH_P_IPV6), None);
}

#[test]
fn as_many_headers_as_are_promised_are_walked_and_no_more() {
    let chain = [(DESTINATION, 0); MAX_HEADERS + 1];
    let packet = ipv6(&chain[1..], &plain().tcp());
    assert_eq!(read(&packet, ETH_P_IPV6), Some(plain().segment()));
    let packet = ipv6(&chain, &plain().tcp());
    assert_eq!(read(&packet, ETH_P_IPV6), None);
}

#[test]
fn payload_outside_of_the_linear_part_counts() {
    let packet = ipv4(0, &plain().tcp());
    // An aggregate of more than 64 KiB, with only its headers in the linear part.
    let (headers, length) = (&packet[..40], 40 + 190_000);
    let segment = parse(headers, ETH_P_IP, length);
    assert_eq!(segment.map(|s| s.payload), Some(190_000));
    assert_eq!(parse(&packet[..39], ETH_P_IP, length), None);
}

#[test]
fn sequence_numbers_wrap_around() {
    let segment = Segment {
        seq: u32::MAX - 1,
        ack: 0,
        payload: 5,
        ends: false,
        fin: false,
    };
    assert_eq!(segment.end(), 3);
}

proptest! {
    #[test]
    fn ipv4_with_any_options_is_read(sent in sent(), options in 0..=10usize) {
        let mut packet = ipv4(options, &sent.tcp());
        prop_assert_eq!(read(&packet, ETH_P_IP), Some(sent.segment()));
        // BIG TCP: the length field is 0.
        packet[2..4].fill(0);
        prop_assert_eq!(read(&packet, ETH_P_IP), Some(sent.segment()));
        prop_assert_eq!(oracle(&packet), Some(sent.segment()));
    }

    #[test]
    fn ipv6_with_any_chain_is_read(
        sent in sent(),
        chain in vec((select(&EXTENSIONS[..]), 0..4usize), 0..=MAX_HEADERS),
    ) {
        let mut packet = ipv6(&chain, &sent.tcp());
        prop_assert_eq!(read(&packet, ETH_P_IPV6), Some(sent.segment()));
        packet[4..6].fill(0);
        prop_assert_eq!(read(&packet, ETH_P_IPV6), Some(sent.segment()));
    }

    #[test]
    fn a_packet_in_a_packet_is_read(
        sent in sent(),
        is_ipv4: bool,
        around in vec(any::<bool>(), 0..=MAX_HEADERS / 2),
    ) {
        let plain = if is_ipv4 { ipv4(3, &sent.tcp()) } else { ipv6(&[], &sent.tcp()) };
        let packet = around.iter().fold(plain, |packet, in_ipv4| encapsulated(&packet, *in_ipv4));
        prop_assert_eq!(read(&packet, protocol(&packet)), Some(sent.segment()));
    }

    /// Wherever the linear part ends: the packet is parsed completely if the linear part contains the
    /// fixed part of the TCP header, and not at all otherwise.
    #[test]
    fn cut_headers_are_never_guessed(
        sent in sent(),
        chain in vec((select(&EXTENSIONS[..]), 0..4usize), 0..4),
        cut in 0..300usize,
    ) {
        let tcp = sent.tcp();
        let packet = ipv6(&chain, &tcp);
        let linear = &packet[..cut.min(packet.len())];
        let tcp_at = packet.len() - tcp.len();
        let expected = (linear.len() >= tcp_at + 20).then(|| sent.segment());
        prop_assert_eq!(parse(linear, ETH_P_IPV6, packet.len()), expected);
    }

    /// Also with modified bytes. `etherparse` is stricter about the order of
    /// extension headers, so it may find nothing where this parser finds a segment.
    #[test]
    fn a_damaged_packet_is_read_as_etherparse_reads_it(
        sent in sent(),
        options in 0..=10usize,
        chain in vec((select(&EXTENSIONS[..]), 0..4usize), 0..4),
        is_ipv4: bool,
        damage in vec((0..100usize, any::<u8>()), 1..4),
    ) {
        let (mut packet, protocol) = if is_ipv4 {
            (ipv4(options, &sent.tcp()), ETH_P_IP)
        } else {
            (ipv6(&chain, &sent.tcp()), ETH_P_IPV6)
        };
        for (at, value) in damage {
            // The version is not modified: the kernel passes it to this parser, and `etherparse` reads it.
            let at = 1 + at % (packet.len() - 1);
            packet[at] = value;
        }
        // With length fields of 0 `etherparse` also uses the length of the packet.
        let length_at = if is_ipv4 { 2 } else { 4 };
        packet[length_at..length_at + 2].fill(0);
        let (ours, theirs) = (read(&packet, protocol), oracle(&packet));
        prop_assert!(theirs.is_none() || ours == theirs, "{ours:?} {theirs:?}");
    }

    #[test]
    fn any_bytes_are_read_or_refused_but_never_harm(
        data: Vec<u8>,
        protocol in select(&[ETH_P_IP, ETH_P_IPV6, 0][..]),
        length: usize,
    ) {
        let segment = parse(&data[..], protocol, length);
        prop_assert!(segment.is_none_or(|s| s.payload as usize <= length));
    }
}
