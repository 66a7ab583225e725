//! The wire format of `sock_diag` and `inet_diag`: pure functions from and to bytes.
//!
//! Layouts: `linux/netlink.h`, `linux/inet_diag.h` and `struct tcp_info` of `linux/tcp.h`. They are stable
//! kernel interfaces that grow only at their ends. The length of every field from the kernel is checked; a
//! field that does not fit is an error and never a guess.

use bytes::{Buf as _, BufMut, BytesMut};
use serde::{Deserialize, Serialize};
use session_enforcer_common::{Address, Session};
use thiserror::Error;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
/// The kernel's tables changed during a dump, so sockets may be missing.
const NLM_F_DUMP_INTR: u16 = 0x10;

const HEADER: usize = 16;
const REQUEST: usize = 56;
/// The length of a request without attributes.
const PLAIN: u32 = (HEADER + REQUEST) as u32;
const MESSAGE: usize = 72;
const ATTRIBUTE_HEADER: usize = 4;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// Attributes nested in the ULP attribute: the one of MPTCP and, within it, the local token of the connection
/// (`linux/mptcp.h`).
const INET_ULP_INFO_MPTCP: u16 = 3;
const MPTCP_SUBFLOW_ATTR_TOKEN_LOC: u16 = 2;
/// Request attribute for a protocol number that does not fit into the one-byte field.
const INET_DIAG_REQ_PROTOCOL: u16 = 3;
/// Mask for an attribute's kind. The two upper bits are flags (`NLA_TYPE_MASK`).
const ATTRIBUTE_KIND: u16 = 0x3fff;
/// `idiag_timer` of a mini-socket in `TIME_WAIT` or of an orphan in `FIN_WAIT2`.
const TIMER_TIME_WAIT: u8 = 3;

/// TCP states as the kernel numbers them (`net/tcp_states.h`).
pub mod state {
    /// Open in both directions.
    pub const ESTABLISHED: u8 = 1;
    /// The handshake is not complete. A socket of TCP Fast Open is a session already.
    pub const SYN_RECV: u8 = 3;
    /// This host has sent its FIN; the peer has not acknowledged it.
    pub const FIN_WAIT1: u8 = 4;
    /// The peer has acknowledged this host's FIN and may still send.
    pub const FIN_WAIT2: u8 = 5;
    /// Closed; the kernel keeps only the tuple.
    pub const TIME_WAIT: u8 = 6;
    /// The peer has sent its FIN; this host may still send.
    pub const CLOSE_WAIT: u8 = 8;
    /// Both sides have sent a FIN; this host's is not acknowledged.
    pub const LAST_ACK: u8 = 9;
    /// The socket accepts connections.
    pub const LISTEN: u8 = 10;
    /// Both sides sent their FINs at the same time.
    pub const CLOSING: u8 = 11;

    /// The states in which a socket is a session: from establishment to close.
    pub const SESSIONS: u32 = bit(ESTABLISHED)
        | bit(FIN_WAIT1)
        | bit(FIN_WAIT2)
        | bit(CLOSE_WAIT)
        | bit(LAST_ACK)
        | bit(CLOSING);

    /// The states in which a tracked socket can be. Most sockets in `SYN_RECV` are mini-sockets and no session, so a
    /// list of connections to adopt leaves that state out.
    pub const TRACKED: u32 = SESSIONS | bit(SYN_RECV);

    /// Whether the connection is closing, so that only an answer of the peer is outstanding.
    pub const fn is_closing(state: u8) -> bool {
        matches!(state, LAST_ACK | CLOSING | FIN_WAIT1)
    }

    /// Whether this host has closed its direction: its FIN is queued or sent.
    pub const fn is_closed_here(state: u8) -> bool {
        matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
    }

    /// Whether the peer has closed its direction: its FIN has arrived.
    pub const fn is_closed_there(state: u8) -> bool {
        matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
    }

    /// The bit of the state in a request's set of states. A number beyond the width of the set gives 0, which
    /// matches nothing.
    pub const fn bit(state: u8) -> u32 {
        1_u32.unbounded_shl(state as u32)
    }
}

/// The address family of a dump. The kernel dumps one family at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 sockets.
    Ipv4,
    /// IPv6 sockets, including those with IPv4-mapped addresses.
    Ipv6,
}

impl Family {
    const fn number(self) -> u8 {
        match self {
            Self::Ipv4 => libc::AF_INET as u8,
            Self::Ipv6 => libc::AF_INET6 as u8,
        }
    }
}

/// Identifies one socket by tuple and cookie. The kernel looks the socket up by tuple and refuses the request
/// if the cookie differs, so a later connection with the same tuple is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketId {
    /// This host's address.
    #[serde(with = "Words")]
    pub local: Address,
    /// The peer's address.
    #[serde(with = "Words")]
    pub remote: Address,
    /// This host's port.
    pub local_port: u16,
    /// The peer's port.
    pub remote_port: u16,
    /// The interface that the socket is bound to, or 0.
    pub ifindex: u32,
    /// The socket's cookie.
    pub cookie: u64,
}

impl SocketId {
    /// The socket of a session.
    pub const fn of(cookie: u64, session: &Session) -> Self {
        Self {
            local: session.local,
            remote: session.remote,
            local_port: session.local_port,
            remote_port: session.remote_port,
            ifindex: session.ifindex,
            cookie,
        }
    }
}

/// A mirror of [`Address`] for serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Address")]
struct Words([u32; 4]);

/// One socket of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// The TCP state; see [`state`].
    pub state: u8,
    /// Whether this is a mini-socket, the remainder of a closed session.
    pub is_mini: bool,
    /// The socket's tuple, interface and cookie.
    pub target: SocketId,
    /// The user who owns the socket. Also 0 if no process has accepted the connection yet.
    pub uid: u32,
    /// The socket's inode number, which `/proc/pid/fd` shows. 0 if no process holds the socket.
    pub inode: u32,
    /// Bytes in the socket's queues.
    pub queued: Queued,
    /// The ID of the socket's cgroup, if the kernel reported it.
    pub cgroup_id: Option<u64>,
    /// Whether a listener accepts IPv6 only (`IPV6_V6ONLY`).
    pub is_v6_only: bool,
    /// Data of `tcp_info`, if the kernel reported it.
    pub info: Option<Info>,
    /// For an MPTCP subflow: the token that identifies its connection within the namespace.
    pub mptcp_token: Option<u32>,
}

/// Payload bytes in the queues of this host's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    /// Bytes that the process has written and the peer has not acknowledged.
    pub send: u32,
    /// Bytes that the kernel has received and the process has not read.
    pub receive: u32,
}

impl Queued {
    /// Converts the kernel's queue lengths (`tcp_diag_get_info()`) into payload bytes. They include one
    /// sequence number for a FIN until the peer acknowledges it, or until the process reads the end of the
    /// stream.
    fn of(state: u8, received: u32, unacknowledged: u32) -> Self {
        Self {
            send: unacknowledged.saturating_sub(state::is_closed_here(state).into()),
            receive: received.saturating_sub(state::is_closed_there(state).into()),
        }
    }
}

/// The fields of `tcp_info` that an adoption needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Milliseconds since data was last sent, including retransmissions.
    pub last_data_sent_ms: u32,
    /// Milliseconds since data was last received.
    pub last_data_received_ms: u32,
    /// Payload bytes received, each counted once.
    pub bytes_received: u64,
    /// Payload bytes sent, each counted once. Bytes that were dropped before they left the host count at each
    /// attempt of the stack (`__tcp_transmit_skb()` counts before `queue_xmit`, whatever that returns).
    pub bytes_tried: u64,
    /// Sequence numbers sent. They cover the payload, the FIN and, on the side that connected, the SYN.
    pub numbers_sent: u64,
    /// Sequence numbers of that kind that the peer has acknowledged.
    pub numbers_acknowledged: u64,
    /// Whether the peer has acknowledged everything that was sent.
    pub is_all_acknowledged: bool,
    /// Whether the send queue has no unsent data and no unsent FIN.
    pub is_all_sent: bool,
    /// Segments with payload that the stack tried to send, modulo 2^32.
    pub data_segments_sent: u32,
}

/// A message from the kernel that violates the protocol.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// The data ends within a message.
    #[error("a message of {claimed} bytes in {present} bytes of data")]
    Cut {
        /// The length that the message claims, or the minimum length of its kind.
        claimed: usize,
        /// The number of bytes available.
        present: usize,
    },
    /// The sequence number belongs to no pending request.
    #[error("an answer to request {got}, which was not sent or was answered before")]
    Sequence {
        /// The number in the answer.
        got: u32,
    },
    /// A message of an unexpected kind.
    #[error("a message of kind {0}, which does not belong here")]
    Kind(u16),
    /// An address family that was not requested.
    #[error("a socket of address family {0}")]
    Family(u8),
}

/// One message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The sequence number of the request.
    pub sequence: u32,
    /// Whether the kernel reports that the dump may have missed sockets.
    pub interrupted: bool,
    /// The content.
    pub body: Body,
}

/// The content of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The request succeeded (0), or was refused with this error number.
    Answer(i32),
    /// The dump is complete (0), or was aborted with this error number.
    Done(i32),
    /// One socket.
    Socket(Socket),
}

/// Appends a request to destroy the socket. The kernel answers only if it refuses (`netlink_rcv_skb()`).
pub fn put_destroy(out: &mut BytesMut, sequence: u32, target: &SocketId) {
    put_header(out, PLAIN, SOCK_DESTROY, NLM_F_REQUEST, sequence);
    put_exact(out, target, 0);
}

/// Appends a query for one socket.
pub fn put_query(out: &mut BytesMut, sequence: u32, target: &SocketId, detail: Detail) {
    put_header(out, PLAIN, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, sequence);
    put_exact(out, target, detail.extensions());
}

/// Appends a query for the MPTCP socket with this token (`mptcp_diag_dump_one()`).
pub fn put_query_mptcp(out: &mut BytesMut, sequence: u32, token: u32) {
    const ATTRIBUTE: usize = ATTRIBUTE_HEADER + 4;
    let length = (HEADER + REQUEST + ATTRIBUTE) as u32;
    put_header(out, length, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, sequence);
    // The kernel ignores the family and the protocol field of this request and reads the protocol from the
    // attribute.
    put_request_start(out, Family::Ipv4, 0, u32::MAX);
    out.put_bytes(0, REQUEST - 8 - 8);
    // The token takes the place of the cookie, which the kernel ignores here.
    out.put_u32_ne(token);
    out.put_u32_ne(0);
    out.put_u16_ne(ATTRIBUTE as u16);
    out.put_u16_ne(INET_DIAG_REQ_PROTOCOL);
    out.put_u32_ne(libc::IPPROTO_MPTCP as u32);
}

/// How much data a query or dump requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// Tuple, cookie, state and owner. The kernel takes no socket lock for them.
    Names,
    /// The same and [`Info`]. The kernel takes the socket's lock (`tcp_get_info()`), which the socket's
    /// process can hold for as long as it likes.
    Activity,
}

impl Detail {
    const fn extensions(self) -> u8 {
        match self {
            Self::Names => 0,
            Self::Activity => 1 << (INET_DIAG_INFO - 1),
        }
    }
}

/// The local and the remote port that a dump filters by; 0 matches any (`inet_diag_dump_icsk()`).
pub type Ports = [u16; 2];

/// Appends a request for the TCP sockets of the family that are in one of the `states` and have these ports.
pub fn put_dump(
    out: &mut BytesMut,
    sequence: u32,
    family: Family,
    states: u32,
    detail: Detail,
    ports: Ports,
) {
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    put_header(out, PLAIN, SOCK_DIAG_BY_FAMILY, flags, sequence);
    put_request_start(out, family, detail.extensions(), states);
    ports.iter().for_each(|port| out.put_u16(*port));
    out.put_bytes(0, REQUEST - 8 - 4);
}

fn put_header(out: &mut BytesMut, length: u32, kind: u16, flags: u16, sequence: u32) {
    out.put_u32_ne(length);
    out.put_u16_ne(kind);
    out.put_u16_ne(flags);
    out.put_u32_ne(sequence);
    out.put_u32_ne(0);
}

fn put_request_start(out: &mut impl BufMut, family: Family, extensions: u8, states: u32) {
    out.put_u8(family.number());
    out.put_u8(libc::IPPROTO_TCP as u8);
    out.put_u8(extensions);
    out.put_u8(0);
    out.put_u32_ne(states);
}

fn put_exact(out: &mut BytesMut, target: &SocketId, extensions: u8) {
    // The kernel also finds an IPv6 socket with IPv4-mapped addresses by its IPv4 addresses.
    let ipv4 = target.local.is_ipv4() && target.remote.is_ipv4();
    let family = if ipv4 { Family::Ipv4 } else { Family::Ipv6 };
    put_request_start(out, family, extensions, u32::MAX);
    out.put_u16(target.local_port);
    out.put_u16(target.remote_port);
    for address in [target.local, target.remote] {
        if ipv4 {
            out.put_u32_ne(address.0[3]);
            out.put_bytes(0, 12);
        } else {
            out.put_slice(&address.octets());
        }
    }
    out.put_u32_ne(target.ifindex);
    out.put_u32_ne(target.cookie as u32);
    out.put_u32_ne((target.cookie >> 32) as u32);
}

/// Removes the first message of a datagram and returns it, or `None` at the end.
///
/// # Errors
///
/// Fails if the data is cut or the message is not a reply to these requests.
pub fn next_message(data: &mut &[u8]) -> Result<Option<Message>, WireError> {
    if data.is_empty() {
        return Ok(None);
    }
    let whole = *data;
    need(whole, HEADER)?;
    let mut header = &whole[..HEADER];
    let length = header.get_u32_ne() as usize;
    let kind = header.get_u16_ne();
    let flags = header.get_u16_ne();
    let sequence = header.get_u32_ne();
    if length < HEADER {
        return Err(WireError::Cut {
            claimed: HEADER,
            present: length,
        });
    }
    need(whole, length)?;
    let body = parse_body(kind, &whole[HEADER..length])?;
    *data = &whole[align(length).min(whole.len())..];
    Ok(Some(Message {
        sequence,
        interrupted: flags & NLM_F_DUMP_INTR != 0,
        body,
    }))
}

fn parse_body(kind: u16, mut body: &[u8]) -> Result<Body, WireError> {
    match kind {
        NLMSG_ERROR => {
            need(body, 4)?;
            Ok(Body::Answer(body.get_i32_ne().saturating_neg()))
        }
        NLMSG_DONE => {
            need(body, 4)?;
            Ok(Body::Done(body.get_i32_ne().saturating_neg()))
        }
        SOCK_DIAG_BY_FAMILY => parse_socket(body).map(Body::Socket),
        other => Err(WireError::Kind(other)),
    }
}

fn parse_socket(body: &[u8]) -> Result<Socket, WireError> {
    need(body, MESSAGE)?;
    let (mut fixed, attributes) = body.split_at(MESSAGE);
    let family = fixed.get_u8();
    let state = fixed.get_u8();
    let timer = fixed.get_u8();
    fixed.advance(1);
    let local_port = fixed.get_u16();
    let remote_port = fixed.get_u16();
    let local = take_address(&mut fixed, family)?;
    let remote = take_address(&mut fixed, family)?;
    let ifindex = fixed.get_u32_ne();
    let cookie = u64::from(fixed.get_u32_ne()) | u64::from(fixed.get_u32_ne()) << 32;
    // `idiag_expires`.
    fixed.advance(4);
    let received = fixed.get_u32_ne();
    let unacknowledged = fixed.get_u32_ne();
    let uid = fixed.get_u32_ne();
    let inode = fixed.get_u32_ne();
    let mut socket = Socket {
        state,
        is_mini: timer == TIMER_TIME_WAIT || state == state::TIME_WAIT,
        target: SocketId {
            local,
            remote,
            local_port,
            remote_port,
            ifindex,
            cookie,
        },
        uid,
        inode,
        queued: Queued::of(state, received, unacknowledged),
        cgroup_id: None,
        is_v6_only: false,
        info: None,
        mptcp_token: None,
    };
    read_attributes(attributes, unacknowledged, &mut socket)?;
    Ok(socket)
}

fn take_address(fixed: &mut &[u8], family: u8) -> Result<Address, WireError> {
    let mut octets = [0; 16];
    fixed.copy_to_slice(&mut octets);
    match i32::from(family) {
        libc::AF_INET => {
            let first = [octets[0], octets[1], octets[2], octets[3]];
            Ok(Address::from_ipv4(u32::from_ne_bytes(first)))
        }
        libc::AF_INET6 => Ok(Address::from_octets(octets)),
        _ => Err(WireError::Family(family)),
    }
}

fn read_attributes(
    mut rest: &[u8],
    unacknowledged: u32,
    socket: &mut Socket,
) -> Result<(), WireError> {
    while let Some((kind, mut value)) = next_attribute(&mut rest)? {
        match kind {
            INET_DIAG_SKV6ONLY => {
                need(value, 1)?;
                socket.is_v6_only = value.get_u8() != 0;
            }
            INET_DIAG_INFO => socket.info = Some(parse_info(value, unacknowledged)?),
            INET_DIAG_ULP_INFO => socket.mptcp_token = parse_mptcp_token(value)?,
            INET_DIAG_CGROUP_ID => {
                need(value, 8)?;
                socket.cgroup_id = Some(value.get_u64_ne());
            }
            _ => {}
        }
    }
    Ok(())
}

/// An MPTCP listener has the ULP attribute but no token.
fn parse_mptcp_token(ulp: &[u8]) -> Result<Option<u32>, WireError> {
    let Some(subflow) = find_attribute(ulp, INET_ULP_INFO_MPTCP)? else {
        return Ok(None);
    };
    let Some(mut token) = find_attribute(subflow, MPTCP_SUBFLOW_ATTR_TOKEN_LOC)? else {
        return Ok(None);
    };
    need(token, 4)?;
    Ok(Some(token.get_u32_ne()))
}

fn find_attribute(mut rest: &[u8], wanted: u16) -> Result<Option<&[u8]>, WireError> {
    while let Some((kind, value)) = next_attribute(&mut rest)? {
        if kind == wanted {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Removes the first attribute and returns its kind and value.
fn next_attribute<'a>(rest: &mut &'a [u8]) -> Result<Option<(u16, &'a [u8])>, WireError> {
    if rest.is_empty() {
        return Ok(None);
    }
    need(rest, ATTRIBUTE_HEADER)?;
    let mut header = &rest[..ATTRIBUTE_HEADER];
    let length = usize::from(header.get_u16_ne());
    let kind = header.get_u16_ne() & ATTRIBUTE_KIND;
    if length < ATTRIBUTE_HEADER {
        return Err(WireError::Cut {
            claimed: ATTRIBUTE_HEADER,
            present: length,
        });
    }
    need(rest, length)?;
    let value = &rest[ATTRIBUTE_HEADER..length];
    *rest = &rest[align(length).min(rest.len())..];
    Ok(Some((kind, value)))
}

/// The offsets are those of `struct tcp_info` in Linux 4.19, which all supported kernels share.
/// `unacknowledged` counts the bytes that were sent and not acknowledged and those that were not sent yet
/// (`tcp_diag_get_info()`).
fn parse_info(info: &[u8], unacknowledged: u32) -> Result<Info, WireError> {
    const UNACKNOWLEDGED: usize = 24;
    const LAST_DATA_SENT: usize = 44;
    const LAST_DATA_RECEIVED: usize = 52;
    const BYTES_ACKNOWLEDGED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    const NOT_SENT: usize = 144;
    const DATA_SEGMENTS_SENT: usize = 156;
    const BYTES_SENT: usize = 200;
    const BYTES_RETRANSMITTED: usize = 208;
    need(info, BYTES_RETRANSMITTED + 8)?;
    let four = |at: usize| (&info[at..at + 4]).get_u32_ne();
    let eight = |at: usize| (&info[at..at + 8]).get_u64_ne();
    Ok(Info {
        last_data_sent_ms: four(LAST_DATA_SENT),
        last_data_received_ms: four(LAST_DATA_RECEIVED),
        bytes_received: eight(BYTES_RECEIVED),
        bytes_tried: eight(BYTES_SENT).saturating_sub(eight(BYTES_RETRANSMITTED)),
        // The kernel reads `unacknowledged` before `tcp_info` and without the socket's lock. Bytes that the
        // process writes in between are missing, and bytes that are acknowledged in between count twice.
        numbers_sent: (eight(BYTES_ACKNOWLEDGED).saturating_add(unacknowledged.into()))
            .saturating_sub(four(NOT_SENT).into()),
        numbers_acknowledged: eight(BYTES_ACKNOWLEDGED),
        is_all_acknowledged: four(UNACKNOWLEDGED) == 0,
        is_all_sent: four(NOT_SENT) == 0,
        data_segments_sent: four(DATA_SEGMENTS_SENT),
    })
}

fn need(data: &[u8], bytes: usize) -> Result<(), WireError> {
    if data.len() < bytes {
        return Err(WireError::Cut {
            claimed: bytes,
            present: data.len(),
        });
    }
    Ok(())
}

/// Messages and attributes are aligned to four bytes.
const fn align(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests;
