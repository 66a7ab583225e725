use proptest::prelude::*;

use super::*;

fn v4(octets: [u8; 4]) -> Address {
    Address::from_ipv4(u32::from_ne_bytes(octets))
}

fn target() -> SocketId {
    SocketId {
        local: v4([10, 0, 0, 5]),
        remote: v4([10, 0, 0, 7]),
        local_port: 5432,
        remote_port: 51234,
        ifindex: 3,
        cookie: 0x1122_3344_5566_7788,
    }
}

/// Builds a socket message with the kernel's layout.
fn socket_message(sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let mut body = vec![libc::AF_INET as u8, state::ESTABLISHED, 0, 0];
    body.extend(5432u16.to_be_bytes());
    body.extend(51234u16.to_be_bytes());
    for octets in [[10, 0, 0, 5], [10, 0, 0, 7]] {
        body.extend(octets);
        body.extend([0; 12]);
    }
    body.extend(3u32.to_ne_bytes());
    body.extend(0x5566_7788u32.to_ne_bytes());
    body.extend(0x1122_3344u32.to_ne_bytes());
    // A timer precedes the queue lengths; user and inode number follow them.
    body.extend([0; 4]);
    body.extend(60u32.to_ne_bytes());
    body.extend(70u32.to_ne_bytes());
    body.extend([0; 8]);
    body.extend(attributes);
    message(SOCK_DIAG_BY_FAMILY, sequence, &body)
}

fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_u32_ne((HEADER + body.len()) as u32);
    out.put_u16_ne(kind);
    out.put_u16_ne(0);
    out.put_u32_ne(sequence);
    out.put_u32_ne(0);
    out.put_slice(body);
    out.to_vec()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_u16_ne((ATTRIBUTE_HEADER + value.len()) as u16);
    out.put_u16_ne(kind);
    out.put_slice(value);
    out.resize(align(out.len()), 0);
    out.to_vec()
}

fn parse_all(mut data: &[u8]) -> Result<Vec<Message>, WireError> {
    let mut messages = Vec::new();
    while let Some(message) = next_message(&mut data)? {
        messages.push(message);
    }
    Ok(messages)
}

#[test]
fn a_destroy_request_is_these_bytes() {
    let mut out = BytesMut::new();
    put_destroy(&mut out, 9, &target());
    let mut expected = Vec::new();
    expected.extend(72u32.to_ne_bytes());
    expected.extend(21u16.to_ne_bytes());
    // Without NLM_F_ACK the kernel answers only if it refuses.
    expected.extend(1u16.to_ne_bytes());
    expected.extend(9u32.to_ne_bytes());
    expected.extend(0u32.to_ne_bytes());
    expected.extend([2, 6, 0, 0, 255, 255, 255, 255]);
    expected.extend([0x15, 0x38, 0xc8, 0x22]);
    expected.extend([10, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend(3u32.to_ne_bytes());
    expected.extend(0x5566_7788u32.to_ne_bytes());
    expected.extend(0x1122_3344u32.to_ne_bytes());
    assert_eq!(out.to_vec(), expected);
}

#[test]
fn an_ipv6_request_carries_whole_addresses() {
    let mut out = BytesMut::new();
    let local = Address::from_octets([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let target = SocketId { local, ..target() };
    put_query(&mut out, 1, &target, Detail::Activity);
    assert_eq!(out[HEADER], libc::AF_INET6 as u8);
    assert_eq!(out[HEADER + 12..HEADER + 28], local.octets());
    // The peer's address is IPv4-mapped.
    assert_eq!(out[HEADER + 28..HEADER + 44], v4([10, 0, 0, 7]).octets());
}

#[test]
fn a_socket_is_read_with_its_attributes() {
    let mut info = vec![0; 240];
    info[24..28].copy_from_slice(&1u32.to_ne_bytes());
    info[44..48].copy_from_slice(&1500u32.to_ne_bytes());
    info[52..56].copy_from_slice(&700u32.to_ne_bytes());
    info[120..128].copy_from_slice(&4001u64.to_ne_bytes());
    info[128..136].copy_from_slice(&120u64.to_ne_bytes());
    info[144..148].copy_from_slice(&30u32.to_ne_bytes());
    info[156..160].copy_from_slice(&12u32.to_ne_bytes());
    info[200..208].copy_from_slice(&5000u64.to_ne_bytes());
    info[208..216].copy_from_slice(&904u64.to_ne_bytes());
    let mut attributes = attribute(INET_DIAG_INFO, &info);
    attributes.extend(attribute(99, &[1, 2, 3]));
    attributes.extend(attribute(INET_DIAG_CGROUP_ID, &77u64.to_ne_bytes()));
    let messages = parse_all(&socket_message(4, &attributes)).unwrap();
    let Body::Socket(socket) = messages[0].body else {
        panic!("must be a socket")
    };
    assert_eq!(socket.target, target());
    assert_eq!(
        (socket.state, socket.is_mini, socket.cgroup_id),
        (1, false, Some(77))
    );
    assert_eq!((socket.queued.receive, socket.queued.send), (60, 70));
    let info = socket.info.unwrap();
    assert_eq!(
        (info.last_data_sent_ms, info.last_data_received_ms),
        (1500, 700)
    );
    assert_eq!((info.bytes_received, info.bytes_tried), (120, 4096));
    assert_eq!((info.numbers_sent, info.is_all_sent), (4041, false));
    assert_eq!(info.data_segments_sent, 12);
    assert_eq!(
        (info.numbers_acknowledged, info.is_all_acknowledged),
        (4001, false)
    );
}

#[test]
fn a_fin_that_waits_is_no_byte() {
    let queued = |state| {
        let of = |received, unacknowledged| {
            let Queued { send, receive } = Queued::of(state, received, unacknowledged);
            [receive, send]
        };
        assert_eq!(of(0, 0), [0, 0]);
        of(8, 8)
    };
    for (state, waits) in [
        (state::ESTABLISHED, [8, 8]),
        (state::CLOSE_WAIT, [7, 8]),
        (state::FIN_WAIT1, [8, 7]),
        (state::LAST_ACK, [7, 7]),
        (state::CLOSING, [7, 7]),
    ] {
        assert_eq!(queued(state), waits, "{state}");
    }
}

#[test]
fn answers_are_told_from_refusals() {
    let mut data = message(NLMSG_ERROR, 1, &0i32.to_ne_bytes());
    data.extend(message(NLMSG_ERROR, 2, &(-libc::ENOENT).to_ne_bytes()));
    data.extend(message(NLMSG_DONE, 3, &0i32.to_ne_bytes()));
    let bodies: Vec<Body> = parse_all(&data).unwrap().iter().map(|m| m.body).collect();
    assert_eq!(
        bodies,
        [Body::Answer(0), Body::Answer(libc::ENOENT), Body::Done(0)]
    );
}

#[test]
fn a_state_that_no_request_can_name_has_no_bit() {
    assert_eq!(state::bit(31), 1 << 31);
    for state in [32, 33, u8::MAX] {
        assert_eq!(state::bit(state), 0);
    }
}

#[test]
fn a_message_of_another_kind_is_refused() {
    assert_eq!(parse_all(&message(1, 1, &[])), Err(WireError::Kind(1)));
}

#[test]
fn every_cut_of_an_answer_is_an_error() {
    let mut data = socket_message(4, &attribute(INET_DIAG_CGROUP_ID, &77u64.to_ne_bytes()));
    let whole = data.len();
    for cut in 1..whole {
        assert!(
            matches!(parse_all(&data[..cut]), Err(WireError::Cut { .. })),
            "cut to {cut} of {whole} bytes"
        );
    }
    // A length shorter than the header would never advance the parser.
    data[..4].copy_from_slice(&3u32.to_ne_bytes());
    assert_eq!(
        parse_all(&data),
        Err(WireError::Cut {
            claimed: 16,
            present: 3
        })
    );
}

#[test]
fn an_attribute_that_ends_outside_of_its_message_is_an_error() {
    let mut long = attribute(INET_DIAG_CGROUP_ID, &77u64.to_ne_bytes());
    long[..2].copy_from_slice(&200u16.to_ne_bytes());
    assert!(parse_all(&socket_message(4, &long)).is_err());
    let short = attribute(INET_DIAG_INFO, &[0; 100]);
    assert_eq!(
        parse_all(&socket_message(4, &short)),
        Err(WireError::Cut {
            claimed: 216,
            present: 100
        })
    );
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused_but_never_harm(data: Vec<u8>) {
        let _ = parse_all(&data);
    }

    #[test]
    fn a_changed_byte_is_read_or_refused_but_never_harms(at in 0usize..100, value: u8) {
        let mut data = socket_message(4, &attribute(INET_DIAG_CGROUP_ID, &[0; 8]));
        let at = at % data.len();
        data[at] = value;
        let _ = parse_all(&data);
    }
}

#[test]
fn an_mptcp_socket_is_asked_for_by_its_token() {
    let mut out = BytesMut::new();
    put_query_mptcp(&mut out, 7, 0x1122_3344);
    assert_eq!(out.len(), 80);
    assert_eq!(out[..4], 80u32.to_ne_bytes());
    assert_eq!(out[HEADER + 48..HEADER + 52], 0x1122_3344u32.to_ne_bytes());
    let protocol = attribute(INET_DIAG_REQ_PROTOCOL, &262u32.to_ne_bytes());
    assert_eq!(out[HEADER + REQUEST..], protocol);
}

#[test]
fn a_subflow_is_read_with_the_token_of_its_connection() {
    let token_of = |ulp: &[u8]| {
        let message = socket_message(4, &attribute(INET_DIAG_ULP_INFO, ulp));
        match parse_all(&message)?[0].body {
            Body::Socket(socket) => Ok(socket.mptcp_token),
            other => panic!("must be a socket, not {other:?}"),
        }
    };
    let name = attribute(1, b"mptcp\0");
    let remote = attribute(1, &0u32.to_ne_bytes());
    let local = attribute(MPTCP_SUBFLOW_ATTR_TOKEN_LOC, &4711u32.to_ne_bytes());
    // The kind may carry the flag of a nested attribute.
    for kind in [INET_ULP_INFO_MPTCP, INET_ULP_INFO_MPTCP | 0x8000] {
        let subflow = [
            name.clone(),
            attribute(kind, &[remote.clone(), local.clone()].concat()),
        ];
        assert_eq!(token_of(&subflow.concat()), Ok(Some(4711)));
    }
    // A listener has no token. A socket of another upper layer has an attribute of another kind.
    assert_eq!(token_of(&name), Ok(None));
    assert_eq!(token_of(&attribute(2, &local)), Ok(None));
    let cut = attribute(
        INET_ULP_INFO_MPTCP,
        &attribute(MPTCP_SUBFLOW_ATTR_TOKEN_LOC, &[1]),
    );
    assert!(matches!(token_of(&cut), Err(WireError::Cut { .. })));
}
