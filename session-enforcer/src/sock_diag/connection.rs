//! A netlink socket and the exchanges on it.
//!
//! The network namespace in which the socket is created decides whose sockets it sees, also when
//! the thread has left that namespace since.

use std::{
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
    self, Answering, Body, Detail, Family, Message, Ports, Socket, Target, WireError,
};

/// Requests in one send. Each may be answered with a message of its own into the receive buffer; 200
/// answers fit into the default one, 300 were lost in it (Linux 6.18).
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

    /// Destroys the targets, at most [`MAX_BATCH`], and returns the kernel's answer to each in
    /// their order: 0 or an error number. `None` is a target without an answer, whose fate is
    /// unknown: look at it again.
    ///
    /// The kernel takes the requests one after the other, answers each that it refuses (whatever the
    /// error but EINTR, which none of these gives), and always answers the last. So that answer is
    /// one to all before it that have none of their own. With an answer to each, a session took 13 us
    /// of processor time instead of 11.
    ///
    /// # Errors
    ///
    /// The second value is set where the exchange broke off. The answers before that count.
    pub fn destroy(&mut self, targets: &[Target]) -> (Vec<Option<i32>>, Result<(), SockDiagError>) {
        let targets = &targets[..targets.len().min(MAX_BATCH)];
        let first = self.begin(targets.len());
        for (index, target) in targets.iter().enumerate() {
            let answering = if index + 1 == targets.len() {
                Answering::Always
            } else {
                Answering::Refusals
            };
            let sequence = first.wrapping_add(index as u32);
            wire::put_destroy(&mut self.out, sequence, target, answering);
        }
        let mut answers = Answers::new(first, targets.len());
        let result = self.send().and_then(|()| self.collect(&mut answers));
        (answers.into_codes(), result)
    }

    fn collect(&mut self, answers: &mut Answers) -> Result<(), SockDiagError> {
        while !answers.are_complete() {
            let length = self.receive()?;
            let mut data = &self.input[..length];
            while let Some(message) = wire::next_message(&mut data)? {
                answers.take(&message)?;
            }
        }
        Ok(())
    }

    /// What the kernel knows of the target, or `None` where it is gone.
    ///
    /// # Errors
    ///
    /// Where the exchange fails; whether the socket is there is then unknown.
    pub fn look(&mut self, target: &Target) -> Result<Option<Socket>, SockDiagError> {
        let sequence = self.begin(1);
        wire::put_look(&mut self.out, sequence, target);
        let found = self.only_socket(sequence)?;
        Ok(found.filter(|found| found.target.cookie == target.cookie))
    }

    /// The same, whatever interface the socket is bound to by now. The kernel walks its whole table.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn search(&mut self, target: &Target) -> Result<Option<Socket>, SockDiagError> {
        let ports = [target.local_port, target.remote_port];
        let mut found = None;
        for family in [Family::Ipv4, Family::Ipv6] {
            self.until_whole(|diag| {
                let states = wire::state::SESSIONS;
                diag.dump_once(family, states, Detail::Names, ports, &mut |socket| {
                    if socket.target.cookie == target.cookie {
                        found = Some(socket);
                    }
                })
            })?;
        }
        Ok(found)
    }

    /// What the kernel knows of the MPTCP socket with this token, or `None` where it is gone.
    ///
    /// # Errors
    ///
    /// Where the exchange fails, or the kernel cannot list MPTCP sockets
    /// (`CONFIG_INET_MPTCP_DIAG`).
    pub fn look_mptcp(&mut self, token: u32) -> Result<Option<Socket>, SockDiagError> {
        let sequence = self.begin(1);
        wire::put_look_mptcp(&mut self.out, sequence, token);
        self.only_socket(sequence)
    }

    /// The answer to a request for one socket.
    fn only_socket(&mut self, sequence: u32) -> Result<Option<Socket>, SockDiagError> {
        self.send()?;
        let length = self.receive()?;
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

    /// Every TCP socket of the namespace in one of the `states` (a set of [`wire::state::bit`]s).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses, the exchange fails, or the table changed at each attempt.
    pub fn dump(&mut self, states: u32) -> Result<Vec<Socket>, SockDiagError> {
        let mut sockets = Vec::new();
        for family in [Family::Ipv4, Family::Ipv6] {
            let start = sockets.len();
            let attempt = |diag: &mut Self| {
                sockets.truncate(start);
                diag.dump_once(family, states, Detail::Activity, [0, 0], &mut |socket| {
                    sockets.push(socket);
                })
            };
            self.until_whole(attempt)?;
        }
        Ok(sockets)
    }

    /// Hands over the same sockets in bits of at most [`BIT`], while the list goes on. Where the table
    /// changed meanwhile they are listed again, and come again.
    ///
    /// # Errors
    ///
    /// As above; what has come before is right.
    pub fn in_bits(
        &mut self,
        states: u32,
        detail: Detail,
        take: &mut dyn FnMut(Vec<Socket>),
    ) -> Result<(), SockDiagError> {
        let mut bit = Vec::with_capacity(BIT);
        for family in [Family::Ipv4, Family::Ipv6] {
            self.until_whole(|diag| {
                diag.dump_once(family, states, detail, [0, 0], &mut |socket| {
                    bit.push(socket);
                    if bit.len() == BIT {
                        take(std::mem::replace(&mut bit, Vec::with_capacity(BIT)));
                    }
                })
            })?;
        }
        take(bit);
        Ok(())
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
        detail: Detail,
        ports: Ports,
        take: &mut dyn FnMut(Socket),
    ) -> Result<bool, SockDiagError> {
        let sequence = self.begin(1);
        wire::put_dump(&mut self.out, sequence, family, states, detail, ports);
        self.send()?;
        let mut whole = true;
        loop {
            let length = self.receive()?;
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

    /// Clears the way for an exchange of `requests`, and returns the number of the first.
    fn begin(&mut self, requests: usize) -> u32 {
        self.discard_late_answers();
        self.out.clear();
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(requests as u32);
        first
    }

    /// An exchange that broke off may have left answers behind, which would be taken for answers
    /// out of order. There are no more of them than one exchange has.
    fn discard_late_answers(&mut self) {
        for _ in 0..=MAX_BATCH {
            // SAFETY: the buffer is valid for its length.
            let n = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    self.input.as_mut_ptr().cast(),
                    self.input.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            if n < 0 && !matches!(Errno::last(), Errno::ENOBUFS | Errno::EINTR) {
                return;
            }
        }
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

    fn receive(&mut self) -> Result<usize, SockDiagError> {
        loop {
            let mut buffer = [IoSliceMut::new(&mut self.input)];
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut buffer, None, MsgFlags::empty()) {
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

/// The answers to a run of numbered requests, of which the last is always answered.
struct Answers {
    first: u32,
    codes: Vec<Option<i32>>,
}

impl Answers {
    fn new(first: u32, count: usize) -> Self {
        Self {
            first,
            codes: vec![None; count],
        }
    }

    /// Whether the last request has its answer.
    fn are_complete(&self) -> bool {
        self.codes.last().is_none_or(Option::is_some)
    }

    fn take(&mut self, message: &Message) -> Result<(), WireError> {
        let wrong = WireError::Sequence {
            got: message.sequence,
        };
        let index = message.sequence.wrapping_sub(self.first) as usize;
        let slot = self.codes.get_mut(index).ok_or_else(|| wrong.clone())?;
        let Body::Answer(code) = message.body else {
            return Err(wrong);
        };
        if slot.replace(code).is_some() {
            return Err(wrong);
        }
        if self.are_complete() {
            // What the kernel had refused before it took the last, it has said.
            for code in &mut self.codes {
                code.get_or_insert(0);
            }
        }
        Ok(())
    }

    fn into_codes(self) -> Vec<Option<i32>> {
        self.codes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(sequence: u32, code: i32) -> Message {
        Message {
            sequence,
            interrupted: false,
            body: Body::Answer(code),
        }
    }

    #[test]
    fn the_answer_to_the_last_request_is_one_to_all_before_it_that_were_not_refused() {
        let mut answers = Answers::new(10, 5);
        for (sequence, code) in [(13, 1), (11, 2)] {
            answers.take(&answer(sequence, code)).unwrap();
            assert!(!answers.are_complete());
        }
        answers.take(&answer(14, 3)).unwrap();
        assert!(answers.are_complete());
        let codes = [Some(0), Some(2), Some(0), Some(1), Some(3)];
        assert_eq!(answers.into_codes(), codes);
    }

    #[test]
    fn without_the_last_answer_nothing_is_known_but_the_refusals() {
        let mut answers = Answers::new(10, 3);
        answers.take(&answer(11, 2)).unwrap();
        assert_eq!(answers.into_codes(), [None, Some(2), None]);
        assert!(Answers::new(10, 0).are_complete());
    }

    #[test]
    fn numbers_wrap_around() {
        let mut answers = Answers::new(u32::MAX, 2);
        answers.take(&answer(u32::MAX, 1)).unwrap();
        answers.take(&answer(0, 0)).unwrap();
        assert_eq!(answers.into_codes(), [Some(1), Some(0)]);
    }

    #[test]
    fn a_strange_or_repeated_answer_is_an_error_and_changes_nothing_else() {
        let mut answers = Answers::new(10, 2);
        answers.take(&answer(10, 0)).unwrap();
        for got in [9, 12, 10] {
            assert_eq!(
                answers.take(&answer(got, 0)),
                Err(WireError::Sequence { got })
            );
        }
        assert_eq!(answers.into_codes(), [Some(0), None]);
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
        let nobody = Target {
            local: session_enforcer_common::Address::from_ipv4(u32::from_ne_bytes([127, 0, 0, 1])),
            remote: session_enforcer_common::Address::from_ipv4(u32::from_ne_bytes([127, 0, 0, 1])),
            local_port: 1,
            remote_port: 1,
            ifindex: 0,
            cookie: 1,
        };
        assert_eq!(diag.look(&nobody).unwrap(), None);
        assert_eq!(diag.search(&nobody).unwrap(), None);
    }

    #[test]
    fn a_list_in_bits_has_every_socket_and_says_what_passed_only_where_asked() {
        let listen = |_| std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners: Vec<_> = (0..=BIT).map(listen).collect();
        let listening = wire::state::bit(wire::state::LISTEN);
        for (detail, is_told) in [(Detail::Names, false), (Detail::Activity, true)] {
            let mut found = std::collections::HashMap::new();
            let mut take = |bit: Vec<Socket>| {
                assert!(bit.len() <= BIT);
                found.extend(bit.into_iter().map(|s| (s.target.local_port, s)));
            };
            let mut diag = DiagSocket::open().unwrap();
            diag.in_bits(listening, detail, &mut take).unwrap();
            for listener in &listeners {
                let own = found[&listener.local_addr().unwrap().port()];
                assert_eq!(own.info.is_some(), is_told);
                assert_ne!(own.target.cookie, 0);
            }
        }
    }

    #[test]
    fn a_dump_finds_a_socket_of_its_own() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let client_port = client.local_addr().unwrap().port();
        let mut diag = DiagSocket::open().unwrap();
        let all = diag
            .dump(wire::state::SESSIONS | wire::state::bit(wire::state::LISTEN))
            .unwrap();
        let found = |local, remote| {
            all.iter()
                .find(|s| s.target.local_port == local && s.target.remote_port == remote)
        };
        assert_eq!(found(port, 0).unwrap().state, wire::state::LISTEN);
        let established = found(client_port, port).unwrap();
        assert!(established.info.unwrap().last_data_sent_ms < 10_000);
        assert_eq!(
            diag.look(&established.target).unwrap().unwrap().target,
            established.target
        );
    }
}
