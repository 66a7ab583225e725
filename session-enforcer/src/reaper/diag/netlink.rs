//! A netlink socket and the exchanges on it.
//!
//! The network namespace in which the socket is created decides whose sockets it sees, also when
//! the thread has left that namespace since.

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

use super::wire::{
    self, Body, Detail, Family, Message, Ports, Queued, Socket, SocketId, WireError,
};

/// Sockets in one request to a reaper at most.
pub const MAX_BATCH: usize = 128;

/// The kernel answers within the send, so an answer that is not there yet will not come.
const ANSWER_TIMEOUT_S: i64 = 1;

/// Asked-for size of the receive buffer; the kernel doubles it.
const RECEIVE_BUFFER: usize = 1 << 20;

/// The largest datagram that a dump fills.
const DATAGRAM: usize = 1 << 16;

/// Sockets that are handed over at a time where a list comes in bits.
pub const BIT: usize = 256;

/// Times that a dump is repeated because the kernel's tables changed under it.
const DUMP_ATTEMPTS: u32 = 4;

/// What can go wrong with the kernel's socket table.
#[derive(Debug, Error)]
pub enum SockDiagError {
    /// The netlink socket could not be made.
    #[error("opening a sock_diag netlink socket: {0}")]
    Open(Errno),
    /// A request could not be sent.
    #[error("sending to sock_diag: {0}")]
    Send(Errno),
    /// An answer could not be received.
    #[error("receiving from sock_diag: {0}")]
    Receive(Errno),
    /// A datagram was longer than the buffer for it.
    #[error("an answer of sock_diag was cut by the receive buffer")]
    Truncated,
    /// An answer was malformed or out of order.
    #[error("an answer of sock_diag is not understood: {0}")]
    Wire(#[from] WireError),
    /// The kernel refused to list sockets.
    #[error("the kernel refuses to list sockets: {0}")]
    Refused(Errno),
    /// A list of sockets was never whole.
    #[error("the kernel's socket table changed during each of {DUMP_ATTEMPTS} attempts to list it")]
    Interrupted,
    /// The namespace's cookie could not be read.
    #[error("reading the network namespace's cookie: {0}")]
    Cookie(io::Error),
}

/// What the kernel says about a socket that it was asked to destroy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destroyed {
    /// 0, or an error number.
    pub code: i32,
    /// What waited in the socket right before, where the kernel told it.
    pub queued: Option<Queued>,
}

/// A connection to the socket table of one network namespace.
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
    /// Where the kernel gives no netlink socket.
    pub fn open() -> Result<Self, SockDiagError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(SockDiagError::Open)?;
        // Connected to the kernel: anybody in the namespace could send to this socket otherwise, and
        // forge its answers.
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(SockDiagError::Open)?;
        let timeout = TimeVal::new(ANSWER_TIMEOUT_S, 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &timeout).map_err(SockDiagError::Open)?;
        // Past the system's limit where the capability allows it, up to the limit elsewhere.
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
    /// Where the kernel does not have the option.
    pub fn netns_cookie(&self) -> Result<u64, SockDiagError> {
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to a place of that size.
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

    /// Destroys a socket, and says what waited in it.
    ///
    /// The kernel takes both requests within the send. It answers that for the reset only where it refuses: no
    /// message in the receive buffer afterwards is its word that it has destroyed the socket. It reports an
    /// answer for which it had no memory (`netlink_ack()`, ENOBUFS).
    ///
    /// # Errors
    ///
    /// Where the exchange fails; what became of the socket is then unknown.
    pub fn destroy(&mut self, target: &SocketId) -> Result<Destroyed, SockDiagError> {
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
                    had_ended = socket.is_mini;
                }
                (got, Body::Answer(_)) if got == query => {}
                (got, Body::Answer(code)) if got == destroy => destroyed.code = code,
                (got, _) => return Err(WireError::Sequence { got }.into()),
            }
        }
        // What was left of it, in `TIME_WAIT`, is none of a session, although the kernel has destroyed it.
        if had_ended {
            destroyed.code = libc::ENOENT;
        }
        Ok(destroyed)
    }

    /// What the kernel knows of the target, or `None` where it is gone.
    ///
    /// # Errors
    ///
    /// Where the exchange fails; whether the socket is there is then unknown.
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

    /// The same of several, whatever interface they are bound to by now. The kernel walks its whole table, once.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn search(&mut self, targets: &[SocketId]) -> Result<Vec<Option<Socket>>, SockDiagError> {
        // What the kernel leaves out where one is searched for, which is nearly always.
        let ports = match targets {
            [target] => [target.local_port, target.remote_port],
            _ => [0, 0],
        };
        let place = |(index, target): (usize, &SocketId)| (target.cookie, index);
        let places: HashMap<u64, usize> = targets.iter().enumerate().map(place).collect();
        let mut found = vec![None; targets.len()];
        self.list(wire::state::SESSIONS, ports, &mut |sockets| {
            for socket in sockets {
                if let Some(index) = places.get(&socket.target.cookie) {
                    found[*index] = Some(socket);
                }
            }
        })?;
        Ok(found)
    }

    /// What the kernel knows of the MPTCP socket with this token, or `None` where it is gone.
    ///
    /// # Errors
    ///
    /// Where the exchange fails, or the kernel cannot list MPTCP sockets
    /// (`CONFIG_INET_MPTCP_DIAG`).
    pub fn query_mptcp(&mut self, token: u32) -> Result<Option<Socket>, SockDiagError> {
        let sequence = self.begin();
        wire::put_query_mptcp(&mut self.out, sequence, token);
        self.only_socket(sequence)
    }

    /// The answer to a request for one socket.
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

    /// Hands over every TCP socket of the namespace in one of the `states` (a set of
    /// [`wire::state::bit`]s) and with these ports (0 is any), in bits of at most [`BIT`], while the list
    /// goes on. Where the table changed meanwhile they are listed again, and come again.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses, the exchange fails, or the table changed at each attempt; what has come
    /// before is right.
    pub fn list(
        &mut self,
        states: u32,
        ports: Ports,
        take: &mut dyn FnMut(Vec<Socket>),
    ) -> Result<(), SockDiagError> {
        let mut bit = Vec::with_capacity(BIT);
        for family in [Family::Ipv4, Family::Ipv6] {
            self.until_whole(|diag| {
                diag.dump_once(family, states, ports, &mut |socket| {
                    bit.push(socket);
                    if bit.len() == BIT {
                        take(std::mem::replace(&mut bit, Vec::with_capacity(BIT)));
                    }
                })
            })?;
        }
        if !bit.is_empty() {
            take(bit);
        }
        Ok(())
    }

    /// The same sockets at once.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn listed(&mut self, states: u32, ports: Ports) -> Result<Vec<Socket>, SockDiagError> {
        let mut sockets = Vec::new();
        self.list(states, ports, &mut |bit| sockets.extend(bit))?;
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

    /// Returns whether the dump was whole.
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

    /// Clears the way for a request, and returns its number.
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

    /// The answer about a socket that is not there.
    fn gone() -> Destroyed {
        Destroyed {
            code: libc::ENOENT,
            queued: None,
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
        assert_eq!(diag.destroy(&nobody).unwrap(), gone());
        assert_eq!(diag.search(&[nobody]).unwrap(), [None]);
    }

    #[test]
    fn a_list_has_every_socket_in_bits_and_without_what_takes_a_lock() {
        let listen = |_| std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners: Vec<_> = (0..=BIT).map(listen).collect();
        let listening = wire::state::bit(wire::state::LISTEN);
        let mut found = HashMap::new();
        let mut take = |bit: Vec<Socket>| {
            assert!(bit.len() <= BIT);
            found.extend(bit.into_iter().map(|s| (s.target.local_port, s)));
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
            code: 0,
            queued: Some(queued),
        };
        assert_eq!(diag.destroy(&target).unwrap(), reset);
        let error = client.take_error().unwrap().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        assert_eq!(diag.destroy(&target).unwrap(), gone());
        assert_eq!(diag.query(&target, Detail::Names).unwrap(), None);
    }
}
