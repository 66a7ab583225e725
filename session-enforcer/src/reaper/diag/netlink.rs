//! A `sock_diag` netlink socket and its requests.
//!
//! A netlink socket shows the sockets of the network namespace in which it was created, even after the thread
//! has left that namespace.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    os::fd::{AsRawFd as _, OwnedFd},
};

use bytes::BytesMut;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect,
            recvmsg, send, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};
use thiserror::Error;

use crate::host::clock::thread_ns;

use super::wire::{
    self, Body, Detail, Family, Message, Ports, Queued, Socket, SocketId, WireError,
};

/// The maximum number of sockets in one request to a reaper.
pub const MAX_BATCH: usize = 128;

/// The kernel answers during the send, so an answer that has not arrived by then will not arrive.
const ANSWER_TIMEOUT_S: i64 = 1;

/// The requested size of the receive buffer. The kernel doubles it.
const RECEIVE_BUFFER: usize = 1 << 20;

/// The largest datagram that the kernel fills during a dump.
const DATAGRAM: usize = 1 << 16;

/// A list hands over its sockets in chunks of this size.
pub const CHUNK: usize = 256;

/// The number of sockets that the kernel lists while it holds the lock of a hash bucket (`SKARR_SZ` of
/// `net/ipv4/inet_diag.c`). Between two such groups it resumes by position, so it can miss a socket while others close.
const AT_ONCE: usize = 16;

/// A dump is repeated up to this often if the kernel's tables changed during it.
const DUMP_ATTEMPTS: u32 = 4;

/// Errors of the exchange with the kernel's socket table.
#[derive(Debug, Error)]
pub enum SockDiagError {
    /// The netlink socket could not be opened.
    #[error("opening a sock_diag netlink socket: {0}")]
    Open(Errno),
    /// The request could not be sent.
    #[error("sending to sock_diag: {0}")]
    Send(Errno),
    /// The answer could not be received.
    #[error("receiving from sock_diag: {0}")]
    Receive(Errno),
    /// A datagram was longer than the receive buffer.
    #[error("an answer of sock_diag was cut by the receive buffer")]
    Truncated,
    /// An answer was malformed or out of sequence.
    #[error("an answer of sock_diag is not understood: {0}")]
    Wire(#[from] WireError),
    /// The kernel refused to list sockets.
    #[error("the kernel refuses to list sockets: {0}")]
    Refused(Errno),
    /// No dump was complete: the table changed during each attempt.
    #[error("the kernel's socket table changed during each of {DUMP_ATTEMPTS} attempts to list it")]
    Interrupted,
    /// So many sockets have the ports of a single target that the kernel may have missed it.
    #[error("the kernel may have missed a socket among all that have its ports")]
    Crowded,
    /// The cookie of the network namespace could not be read.
    #[error("reading the network namespace's cookie: {0}")]
    Cookie(io::Error),
}

/// The kernel's answer to a `SOCK_DESTROY` request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destroyed {
    /// 0, or an error number.
    pub code: i32,
    /// Bytes in the socket's queues just before the reset, if the kernel reported them.
    pub queued: Option<Queued>,
    /// The socket's owner. 0 if the kernel did not report the socket.
    pub owner: SocketOwner,
    /// The processor time of the request.
    pub took_ns: u64,
}

/// The code for a socket that the reaper has left out, because its owner's resets are slow.
pub const LEFT_OUT: i32 = i32::MAX;

/// The owner of a socket, as the kernel reports it now. All zero if it does not.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct SocketOwner {
    /// The id of the socket's cgroup.
    pub cgroup_id: u64,
    /// The user id.
    pub uid: u32,
}

impl From<&Socket> for SocketOwner {
    fn from(socket: &Socket) -> Self {
        Self {
            cgroup_id: socket.cgroup_id.unwrap_or(0),
            uid: socket.uid,
        }
    }
}

/// A netlink connection to the socket table of one network namespace.
#[derive(Debug)]
pub struct DiagSocket {
    fd: OwnedFd,
    sequence: u32,
    out: BytesMut,
    input: Vec<u8>,
}

impl DiagSocket {
    /// Opens the socket table of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the netlink socket.
    pub fn open() -> Result<Self, SockDiagError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(SockDiagError::Open)?;
        // An unconnected netlink socket would accept messages of any process in the namespace, which could
        // forge the kernel's answers.
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(SockDiagError::Open)?;
        let timeout = TimeVal::new(ANSWER_TIMEOUT_S, 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &timeout).map_err(SockDiagError::Open)?;
        // `SO_RCVBUFFORCE` needs `CAP_NET_ADMIN` and exceeds the system's limit; `SO_RCVBUF` is capped by
        // that limit.
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER).map_err(SockDiagError::Open)?;
        }
        Ok(Self {
            fd,
            sequence: 0,
            out: BytesMut::new(),
            input: vec![0; DATAGRAM],
        })
    }

    /// The cookie of the socket's network namespace (`SO_NETNS_COOKIE`, Linux 5.15).
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not have the option.
    pub fn netns_cookie(&self) -> Result<u64, SockDiagError> {
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, and `cookie` has that size.
        let status = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        if status != 0 || length as usize != size_of::<u64>() {
            return Err(SockDiagError::Cookie(io::Error::last_os_error()));
        }
        Ok(cookie)
    }

    /// Destroys a socket and returns the bytes that were in its queues.
    ///
    /// The kernel processes both requests within the send. It answers the destroy request only if it refuses,
    /// so an empty receive buffer afterwards means that the socket was destroyed. If the kernel has no memory
    /// for the refusal, the receive fails with ENOBUFS (`netlink_ack()`).
    ///
    /// # Errors
    ///
    /// Fails if the exchange fails. Whether the socket was destroyed is then unknown.
    pub fn destroy(&mut self, target: &SocketId) -> Result<Destroyed, SockDiagError> {
        let began_ns = thread_ns();
        let query = self.begin();
        wire::put_query(&mut self.out, query, target, Detail::Names);
        let destroy = self.next_sequence();
        wire::put_destroy(&mut self.out, destroy, target);
        self.send()?;
        let mut destroyed = Destroyed::default();
        let mut had_ended = false;
        loop {
            let length = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Err(SockDiagError::Receive(Errno::EAGAIN)) => break,
                received => received?,
            };
            let mut data = &self.input[..length];
            let message = wire::next_message(&mut data)?.ok_or(SockDiagError::Truncated)?;
            match (message.sequence, message.body) {
                (got, Body::Socket(socket)) if got == query => {
                    destroyed.queued = Some(socket.queued);
                    destroyed.owner = SocketOwner::from(&socket);
                    had_ended = socket.is_mini;
                }
                (got, Body::Answer(_)) if got == query => {}
                (got, Body::Answer(code)) if got == destroy => destroyed.code = code,
                (got, _) => return Err(WireError::Sequence { got }.into()),
            }
        }
        // A `TIME_WAIT` remainder is no session, so its destruction does not count as a reset.
        if had_ended {
            destroyed.code = libc::ENOENT;
        }
        destroyed.took_ns = thread_ns().saturating_sub(began_ns);
        Ok(destroyed)
    }

    /// Returns the kernel's data about the target, or `None` if the socket no longer exists.
    ///
    /// # Errors
    ///
    /// Fails if the exchange fails. Whether the socket exists is then unknown.
    pub fn query(
        &mut self,
        target: &SocketId,
        detail: Detail,
    ) -> Result<Option<Socket>, SockDiagError> {
        let sequence = self.begin();
        wire::put_query(&mut self.out, sequence, target, detail);
        let found = self.only_socket(sequence)?;
        Ok(found.filter(|found| found.target.cookie == target.cookie))
    }

    /// Queries several sockets by cookie, whichever interface they are bound to now. The kernel walks its
    /// whole table once. A single target is found for certain; one of several can be missed while other sockets close.
    ///
    /// # Errors
    ///
    /// Fails as [`DiagSocket::query`] does, and if the kernel may have missed a single target.
    pub fn search(&mut self, targets: &[SocketId]) -> Result<Vec<Option<Socket>>, SockDiagError> {
        // With the ports of a single target the kernel filters the dump itself. Nearly all searches have one
        // target.
        let ports = match targets {
            [target] => [target.local_port, target.remote_port],
            _ => [0, 0],
        };
        let place = |(index, target): (usize, &SocketId)| (target.cookie, index);
        let places: HashMap<u64, usize> = targets.iter().enumerate().map(place).collect();
        let mut found = vec![None; targets.len()];
        let mut listed = 0;
        self.list(wire::state::TRACKED, ports, &mut |sockets| {
            listed += sockets.len();
            for socket in sockets {
                if let Some(index) = places.get(&socket.target.cookie) {
                    found[*index] = Some(socket);
                }
            }
        })?;
        if found == [None] && listed >= AT_ONCE {
            return Err(SockDiagError::Crowded);
        }
        Ok(found)
    }

    /// Returns the kernel's data about the MPTCP socket with this token, or `None` if it no longer exists.
    ///
    /// # Errors
    ///
    /// Fails if the exchange fails, or if the kernel cannot list MPTCP sockets (`CONFIG_INET_MPTCP_DIAG`).
    pub fn query_mptcp(&mut self, token: u32) -> Result<Option<Socket>, SockDiagError> {
        let sequence = self.begin();
        wire::put_query_mptcp(&mut self.out, sequence, token);
        self.only_socket(sequence)
    }

    /// Receives the answer to a request for one socket.
    fn only_socket(&mut self, sequence: u32) -> Result<Option<Socket>, SockDiagError> {
        self.send()?;
        let length = self.receive(MsgFlags::empty())?;
        let mut data = &self.input[..length];
        let Some(message) = wire::next_message(&mut data)? else {
            return Err(WireError::Cut {
                claimed: 16,
                present: 0,
            }
            .into());
        };
        check_sequence(&message, sequence)?;
        match message.body {
            Body::Socket(found) => Ok(Some(found)),
            Body::Answer(libc::ENOENT) => Ok(None),
            Body::Answer(code) | Body::Done(code) => {
                Err(SockDiagError::Refused(Errno::from_raw(code)))
            }
        }
    }

    /// Lists the TCP sockets of the namespace that are in one of the `states` (a set of
    /// [`wire::state::bit`]s) and have these ports (0 matches any). Passes them to `take` in chunks of at
    /// most [`CHUNK`] while the dump runs. If the table changed during the dump, the dump is repeated, and
    /// sockets are handed over again.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses, the exchange fails, or the table changed during each attempt. The sockets
    /// that were handed over before are valid.
    pub fn list(
        &mut self,
        states: u32,
        ports: Ports,
        take: &mut dyn FnMut(Vec<Socket>),
    ) -> Result<(), SockDiagError> {
        let mut chunk = Vec::with_capacity(CHUNK);
        // IPv6 first: a process can turn an IPv6 socket with IPv4-mapped addresses into an IPv4 socket (IPV6_ADDRFORM), and
        // not back. It is then in the second list, if it was not in the first one.
        for family in [Family::Ipv6, Family::Ipv4] {
            self.until_whole(|diag| {
                diag.dump_once(family, states, ports, &mut |socket| {
                    chunk.push(socket);
                    if chunk.len() == CHUNK {
                        take(std::mem::replace(&mut chunk, Vec::with_capacity(CHUNK)));
                    }
                })
            })?;
        }
        if !chunk.is_empty() {
            take(chunk);
        }
        Ok(())
    }

    /// Returns the same sockets as one list.
    ///
    /// # Errors
    ///
    /// Fails as [`DiagSocket::list`] does.
    pub fn listed(&mut self, states: u32, ports: Ports) -> Result<Vec<Socket>, SockDiagError> {
        let mut sockets = Vec::new();
        self.list(states, ports, &mut |chunk| sockets.extend(chunk))?;
        Ok(sockets)
    }

    fn until_whole(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<bool, SockDiagError>,
    ) -> Result<(), SockDiagError> {
        for _ in 0..DUMP_ATTEMPTS {
            if attempt(self)? {
                return Ok(());
            }
        }
        Err(SockDiagError::Interrupted)
    }

    /// Returns whether the dump was complete.
    fn dump_once(
        &mut self,
        family: Family,
        states: u32,
        ports: Ports,
        take: &mut dyn FnMut(Socket),
    ) -> Result<bool, SockDiagError> {
        let sequence = self.begin();
        wire::put_dump(
            &mut self.out,
            sequence,
            family,
            states,
            Detail::Names,
            ports,
        );
        self.send()?;
        let mut whole = true;
        loop {
            let length = self.receive(MsgFlags::empty())?;
            let mut data = &self.input[..length];
            while let Some(message) = wire::next_message(&mut data)? {
                check_sequence(&message, sequence)?;
                whole &= !message.interrupted;
                match message.body {
                    Body::Socket(found) => take(found),
                    Body::Done(0) => return Ok(whole),
                    Body::Done(code) | Body::Answer(code) => {
                        return Err(SockDiagError::Refused(Errno::from_raw(code)));
                    }
                }
            }
        }
    }

    /// Clears the output buffer for a new request and returns the request's sequence number.
    fn begin(&mut self) -> u32 {
        self.out.clear();
        self.next_sequence()
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn send(&self) -> Result<(), SockDiagError> {
        loop {
            match send(self.fd.as_raw_fd(), &self.out, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(SockDiagError::Send(errno)),
            }
        }
    }

    fn receive(&mut self, flags: MsgFlags) -> Result<usize, SockDiagError> {
        loop {
            let mut buffer = [IoSliceMut::new(&mut self.input)];
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut buffer, None, flags) {
                Ok(message) if message.flags.contains(MsgFlags::MSG_TRUNC) => {
                    return Err(SockDiagError::Truncated);
                }
                Ok(message) => return Ok(message.bytes),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(SockDiagError::Receive(errno)),
            }
        }
    }
}

fn check_sequence(message: &Message, expected: u32) -> Result<(), WireError> {
    if message.sequence == expected {
        return Ok(());
    }
    Err(WireError::Sequence {
        got: message.sequence,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer for a socket that does not exist.
    fn gone() -> Destroyed {
        Destroyed {
            code: libc::ENOENT,
            ..Destroyed::default()
        }
    }

    #[test]
    fn only_the_kernel_can_send_to_the_socket() {
        use nix::sys::socket::{getsockname, sendto};
        let diag = DiagSocket::open().unwrap();
        let address: NetlinkAddr = getsockname(diag.fd.as_raw_fd()).unwrap();
        let stranger = DiagSocket::open().unwrap();
        let forged = [0; 16];
        let sent = sendto(
            stranger.fd.as_raw_fd(),
            &forged,
            &address,
            MsgFlags::empty(),
        );
        assert_eq!(sent, Err(Errno::ECONNREFUSED));
    }

    fn timeless(destroyed: Destroyed) -> Destroyed {
        Destroyed {
            took_ns: 0,
            ..destroyed
        }
    }

    #[test]
    fn the_own_namespace_has_a_cookie_and_no_socket_of_a_made_up_name() {
        let mut diag = DiagSocket::open().unwrap();
        assert_ne!(diag.netns_cookie().unwrap(), 0);
        let nobody = SocketId {
            local: session_enforcer_common::Address::from_ipv4(u32::from_ne_bytes([127, 0, 0, 1])),
            remote: session_enforcer_common::Address::from_ipv4(u32::from_ne_bytes([127, 0, 0, 1])),
            local_port: 1,
            remote_port: 1,
            ifindex: 0,
            cookie: 1,
        };
        assert_eq!(diag.query(&nobody, Detail::Activity).unwrap(), None);
        assert_eq!(timeless(diag.destroy(&nobody).unwrap()), gone());
        assert_eq!(diag.search(&[nobody]).unwrap(), [None]);
    }

    #[test]
    fn a_list_has_every_socket_in_bits_and_without_what_takes_a_lock() {
        let listen = |_| std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners: Vec<_> = (0..=CHUNK).map(listen).collect();
        let listening = wire::state::bit(wire::state::LISTEN);
        let mut found = HashMap::new();
        let mut take = |chunk: Vec<Socket>| {
            assert!(chunk.len() <= CHUNK);
            found.extend(chunk.into_iter().map(|s| (s.target.local_port, s)));
        };
        let mut diag = DiagSocket::open().unwrap();
        diag.list(listening, [0, 0], &mut take).unwrap();
        for listener in &listeners {
            let port = listener.local_addr().unwrap().port();
            assert!(found[&port].info.is_none());
            assert_ne!(found[&port].target.cookie, 0);
            let of_port = diag.listed(listening, [port, 0]).unwrap();
            assert!(of_port.iter().all(|s| s.target.local_port == port));
            assert!(of_port.contains(&found[&port]));
        }
    }

    #[test]
    fn a_socket_is_found_told_about_and_destroyed() {
        use std::io::Write as _;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let client_port = client.local_addr().unwrap().port();
        let mut diag = DiagSocket::open().unwrap();
        let all = diag
            .listed(wire::state::SESSIONS, [client_port, port])
            .unwrap();
        let is_it = |s: &&Socket| s.target.local_port == client_port;
        let target = all.iter().find(is_it).unwrap().target;
        let told = diag.query(&target, Detail::Activity).unwrap().unwrap();
        assert_eq!(told.target, target);
        assert!(told.info.unwrap().last_data_sent_ms < 10_000);
        assert_eq!(
            diag.query(&target, Detail::Names).unwrap().unwrap().info,
            None
        );
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"bytes").unwrap();
        let queued = Queued {
            send: 0,
            receive: 5,
        };
        let reset = Destroyed {
            queued: Some(queued),
            owner: SocketOwner::from(&told),
            ..Destroyed::default()
        };
        assert_eq!(timeless(diag.destroy(&target).unwrap()), reset);
        let error = client.take_error().unwrap().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        assert_eq!(timeless(diag.destroy(&target).unwrap()), gone());
        assert_eq!(diag.query(&target, Detail::Names).unwrap(), None);
    }
}
