//! Connections of which the test holds both ends.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Backlog, SockaddrStorage, bind, connect, listen},
};

use crate::{
    agent::Agent,
    clock::{Moment, Time},
    options::{last_error, set_option},
    pace::{late_ticks, patience},
};

impl Agent {
    /// Creates an unbound, unconnected TCP socket of this address family at the agent's place.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn tcp(&self, like: SocketAddr) -> Result<OwnedFd> {
        let family = if like.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        self.socket(family, libc::SOCK_STREAM, 0)
    }

    /// Listens at the agent's place.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn listen(&self, address: impl Into<SocketAddr>) -> Result<Listener> {
        let address = address.into();
        Listener::on(self.tcp(address)?, address)
    }
}

/// Disconnects with connect(2) and `AF_UNSPEC`: resets the connection and keeps the socket, which can connect
/// again.
///
/// # Errors
///
/// The kernel's error.
pub fn disconnect(stream: TcpStream) -> Result<OwnedFd> {
    // SAFETY: the struct contains only integers, for which zero is valid.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes, the size of the value.
    let status = unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, length) };
    Errno::result(status).context("connect(AF_UNSPEC)")?;
    Ok(stream.into())
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    /// The socket's address.
    pub address: SocketAddr,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Listener {
    /// Makes a socket listen. With port 0 the kernel chooses a port.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn on(socket: OwnedFd, address: SocketAddr) -> Result<Self> {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))
            .with_context(|| format!("binding to {address}"))?;
        listen(&socket, Backlog::MAXALLOWABLE)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The socket's port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    ///
    /// Fails if no connection arrives in time.
    pub fn accept(&self) -> Result<TcpStream> {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience())?;
        ensure!(
            poll(&mut fds, timeout)? == 1,
            "no connection came to {}",
            self.address
        );
        let (stream, _) = self.listener.accept()?;
        bounded(stream)
    }

    /// Accepts all pending connections.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn accept_waiting(&self) -> Result<Vec<TcpStream>> {
        let mut waiting = Vec::new();
        loop {
            let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO)? == 0 {
                return Ok(waiting);
            }
            waiting.push(self.accept()?);
        }
    }
}

/// Connects a socket, which may have been bound and configured before.
///
/// # Errors
///
/// The kernel's error.
pub fn dial(socket: OwnedFd, to: SocketAddr) -> Result<TcpStream> {
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))
        .with_context(|| format!("connecting to {to}"))?;
    bounded(TcpStream::from(socket))
}

/// Sets time limits, so that a read or a write that would block forever fails.
pub(crate) fn bounded(stream: TcpStream) -> Result<TcpStream> {
    stream.set_read_timeout(Some(patience()))?;
    stream.set_write_timeout(Some(patience()))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Both ends of one connection.
#[derive(Debug)]
pub struct Pair {
    /// The end that connected.
    pub client: TcpStream,
    /// The end that accepted.
    pub server: TcpStream,
    /// The address of the end that connected. The kernel forgets it when the connection ends.
    pub client_address: SocketAddr,
    /// The address of the end that accepted.
    pub server_address: SocketAddr,
    /// The time of the establishment at both ends.
    pub opened: Moment,
}

impl Pair {
    /// Opens a connection from the agent's place to the listener.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn open(client: &Agent, listener: &Listener) -> Result<Self> {
        Self::dial(client.tcp(listener.address)?, listener, listener.address)
    }

    /// Connects a prepared socket to the listener at this address.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn dial(socket: OwnedFd, listener: &Listener, to: SocketAddr) -> Result<Self> {
        let ends = || Ok((dial(socket, to)?, listener.accept()?));
        let (opened, (client, server)) = Moment::of(ends)?;
        Self::of(client, server, opened)
    }

    /// Combines the two ends of an existing connection.
    ///
    /// # Errors
    ///
    /// Fails if they belong to different connections.
    pub fn of(client: TcpStream, server: TcpStream, opened: Moment) -> Result<Self> {
        let (client_address, server_address) = (client.local_addr()?, server.local_addr()?);
        let accepted = server.peer_addr()?;
        ensure!(
            accepted.port() == client_address.port(),
            "{accepted} was accepted for {client_address}"
        );
        Ok(Self {
            client,
            server,
            client_address,
            server_address,
            opened,
        })
    }

    /// Sends payload to the server and reads it there. Returns the time.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended.
    pub fn to_server(&self, payload: &[u8]) -> Result<Moment> {
        pass(&self.client, &self.server, payload)
    }

    /// Sends payload to the client and reads it there. Returns the time.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended.
    pub fn to_client(&self, payload: &[u8]) -> Result<Moment> {
        pass(&self.server, &self.client, payload)
    }

    /// Makes a round trip and returns its time.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended.
    pub fn round_trip(&self) -> Result<Moment> {
        Ok(self.to_server(b"ping")?.until(self.to_client(b"pong")?))
    }

    /// Makes round trips for this time, at intervals far below the shortest limit.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended.
    pub fn keep_busy(&self, duration: Duration) -> Result<Moment> {
        let start = Instant::now();
        loop {
            let last = self.round_trip()?;
            if start.elapsed() >= duration {
                return Ok(last);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Makes round trips until the connection ends. Returns the end as the first socket sees it.
    ///
    /// # Errors
    ///
    /// Fails if the connection still exists after [`patience()`].
    pub fn keep_busy_until_end(&self) -> Result<End> {
        let start = Instant::now();
        while start.elapsed() < patience() {
            if let Err(error) = self.round_trip() {
                let seen = Time::now();
                let io = error
                    .downcast_ref::<io::Error>()
                    .and_then(io::Error::raw_os_error);
                return Ok(End {
                    error: io.map(Errno::from_raw),
                    seen,
                });
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("the busy connection lives after {:?}", patience())
    }

    /// Waits for the end of both sockets: the client's, then the server's.
    ///
    /// # Errors
    ///
    /// Fails if one of them still exists after [`patience()`].
    pub fn ends(&self) -> Result<[End; 2]> {
        let ends = ends_of(&[&self.client, &self.server])?;
        <[End; 2]>::try_from(ends)
            .ok()
            .context("two sockets have two ends")
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, payload: &[u8]) -> Result<Moment> {
    let mut received = vec![0; payload.len()];
    let (moment, ()) = Moment::of(|| {
        from.write_all(payload).context("sending payload")?;
        to.read_exact(&mut received).context("receiving payload")
    })?;
    ensure!(received == payload, "the payload arrived damaged");
    Ok(moment)
}

/// The end of a connection as one socket sees it.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The socket's error. `None` if it was closed normally.
    pub error: Option<Errno>,
    /// The time when the test saw it.
    pub seen: Time,
}

impl End {
    /// Asserts that this is a reset with this error and not earlier than the limit after the moment of the
    /// last activity or of the establishment.
    #[track_caller]
    pub fn assert_reset(&self, error: Errno, since: &Moment, limit: Duration) {
        assert_eq!(self.error, Some(error));
        self.assert_not_early(since, limit);
    }

    /// Asserts that the end was not earlier than the limit after the moment.
    #[track_caller]
    pub fn assert_not_early(&self, since: &Moment, limit: Duration) {
        let after = self.seen.at - since.earliest.at;
        assert!(
            after + late_ticks() >= limit,
            "ended after {after:?}, {:?} early",
            limit - after
        );
    }
}

/// Waits until each connection has ended at its client. Asserts that it was reset there, not earlier than
/// `limit` after it was opened.
///
/// # Errors
///
/// Fails if one of them still exists after [`patience()`].
///
/// # Panics
///
/// Panics if one of them ended in another way or too early.
pub fn assert_all_reset(pairs: &[Pair], limit: Duration) -> Result<()> {
    let clients: Vec<_> = pairs.iter().map(|pair| &pair.client).collect();
    for (end, pair) in ends_of(&clients)?.iter().zip(pairs) {
        end.assert_reset(Errno::ECONNRESET, &pair.opened, limit);
    }
    Ok(())
}

/// Waits until each socket has ended.
///
/// # Errors
///
/// Fails if one of them still exists after [`patience()`].
pub fn ends_of(sockets: &[&TcpStream]) -> Result<Vec<End>> {
    let deadline = Instant::now() + patience();
    let mut ends = vec![None; sockets.len()];
    while ends.iter().any(Option::is_none) {
        let open: Vec<usize> = (0..ends.len()).filter(|n| ends[*n].is_none()).collect();
        // Without requested events poll(2) reports only errors and the end of both directions.
        let poll_fd = |n: &usize| PollFd::new(sockets[*n].as_fd(), PollFlags::empty());
        let mut fds: Vec<PollFd<'_>> = open.iter().map(poll_fd).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            bail!(
                "{} of {} connections live after {:?}",
                open.len(),
                ends.len(),
                patience()
            );
        }
        let seen = Time::now();
        let ended = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        for (n, _) in open.iter().zip(&fds).filter(|(_, fd)| ended(fd)) {
            ends[*n] = Some(End {
                error: last_error(sockets[*n])?,
                seen,
            });
        }
    }
    Ok(ends.into_iter().flatten().collect())
}
