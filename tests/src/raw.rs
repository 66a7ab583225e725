//! Sends packets that no TCP socket would send, and captures packets.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrIn, sendto},
};

use crate::{
    agent::Agent,
    options::{option, set_option},
};

/// The sequence numbers of one end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The sequence number of the next byte that this end sends.
    pub to_send: u32,
    /// The sequence number of the next byte that this end expects.
    pub to_receive: u32,
}

impl Sequence {
    // linux/tcp.h
    const RECEIVE_QUEUE: i32 = 1;
    const SEND_QUEUE: i32 = 2;

    /// Reads them from the kernel through `TCP_REPAIR`.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`.
    pub fn of(stream: &TcpStream) -> Result<Self> {
        // linux/tcp.h. This value ends the repair mode without a window probe, so that nothing is sent.
        const OFF_NO_PROBE: i32 = -1;
        let set = |name, value| set_option(stream, libc::IPPROTO_TCP, name, value);
        set(libc::TCP_REPAIR, 1)?;
        let of_queue = |queue| {
            set(libc::TCP_REPAIR_QUEUE, queue)?;
            option(stream, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)
        };
        let numbers = (of_queue(Self::SEND_QUEUE), of_queue(Self::RECEIVE_QUEUE));
        set(libc::TCP_REPAIR, OFF_NO_PROBE)?;
        Ok(Self {
            to_send: numbers.0?.cast_unsigned(),
            to_receive: numbers.1?.cast_unsigned(),
        })
    }
}

/// Sends handmade TCP segments over IPv4.
#[derive(Debug)]
pub struct RawTcp {
    socket: OwnedFd,
}

impl RawTcp {
    /// Sends from the agent's place.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_RAW`.
    pub fn new(agent: &Agent) -> Result<Self> {
        let socket = agent.socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP)?;
        Ok(Self { socket })
    }

    /// Sends a segment with the ACK flag that claims to come from `from`, to its peer.
    ///
    /// # Errors
    ///
    /// The kernel's error, or that the connection is not IPv4.
    pub fn send(&self, from: &TcpStream, at: Sequence, payload: &[u8]) -> Result<()> {
        self.send_with(0, from, at, payload)
    }

    /// Sends such a segment with the FIN flag.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub fn send_fin(&self, from: &TcpStream, at: Sequence) -> Result<()> {
        const FIN: u8 = 1;
        self.send_with(FIN, from, at, &[])
    }

    fn send_with(&self, flags: u8, from: &TcpStream, at: Sequence, payload: &[u8]) -> Result<()> {
        let (source, target) = (ipv4(from.local_addr()?)?, ipv4(from.peer_addr()?)?);
        let mut segment = Vec::new();
        segment.extend(source.port().to_be_bytes());
        segment.extend(target.port().to_be_bytes());
        segment.extend(at.to_send.to_be_bytes());
        segment.extend(at.to_receive.to_be_bytes());
        // Five words of header, the flags, a window, no checksum yet, no urgent data.
        segment.extend([0x50, 0x10 | flags, 0x20, 0x00, 0, 0, 0, 0]);
        segment.extend(payload);
        let sum = checksum(*source.ip(), *target.ip(), &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        let to = SockaddrIn::from(SocketAddrV4::new(*target.ip(), 0));
        sendto(self.socket.as_raw_fd(), &segment, &to, MsgFlags::empty())?;
        Ok(())
    }
}

fn ipv4(address: SocketAddr) -> Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(v4) => Ok(v4),
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => Ok(SocketAddrV4::new(v4, v6.port())),
            None => bail!("{address} is not IPv4"),
        },
    }
}

/// RFC 9293 section 3.1.
fn checksum(source: Ipv4Addr, target: Ipv4Addr, segment: &[u8]) -> u16 {
    let mut bytes = [source.octets(), target.octets()].concat();
    bytes.extend([0, 6]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Captures all packets of a network namespace, which should be one of the test.
#[derive(Debug)]
pub struct Sniffer {
    socket: OwnedFd,
}

/// The start of a packet, and its length.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The network header and some of the following bytes.
    pub start: Vec<u8>,
    /// The length including the network header.
    pub length: usize,
}

impl Sniffer {
    /// Captures the packets of the agent's namespace from now on.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_RAW`.
    pub fn new(agent: &Agent) -> Result<Self> {
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = agent.socket(libc::AF_PACKET, libc::SOCK_DGRAM, all)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 32 << 20)?;
        Ok(Self { socket })
    }

    /// The packets since the last call, as far as the socket buffer held them.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn packets(&self) -> Result<Vec<Packet>> {
        let mut packets = Vec::new();
        let mut buffer = [0; 96];
        loop {
            // With MSG_TRUNC the kernel returns the whole length, even if the buffer is shorter.
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            let fd = self.socket.as_raw_fd();
            // SAFETY: the kernel writes at most as many bytes as the buffer has.
            let length = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) };
            if length < 0 {
                match Errno::last() {
                    Errno::EAGAIN => return Ok(packets),
                    error => return Err(error).context("reading packets"),
                }
            }
            let length = length.cast_unsigned();
            packets.push(Packet {
                start: buffer[..length.min(buffer.len())].to_vec(),
                length,
            });
        }
    }
}
