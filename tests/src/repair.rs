//! Moves connections from one socket to another without notice to the peer (`TCP_REPAIR`), as CRIU does.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::socket::{SockaddrStorage, bind, connect},
};

use crate::{
    agent::Agent,
    clock::eventually,
    options::{option, set_bytes_option, set_option, tcp_info},
    pace::patience,
    tcp::bounded,
};

const TCP: i32 = libc::IPPROTO_TCP;

// Of linux/tcp.h.
const QUEUES: [i32; 2] = [1, 2];
const MSS: u32 = 2;
const WINDOW_SCALE: u32 = 3;
const SACK: u32 = 4;
const TIMESTAMPS: u32 = 8;

/// The state that another socket needs to continue a connection.
#[derive(Debug)]
pub struct Saved {
    local: SocketAddr,
    peer: SocketAddr,
    sequences: [i32; 2],
    timestamp: i32,
    mss: i32,
    scales: u32,
}

impl Saved {
    /// Saves a connection and closes its socket without notice to the peer.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`.
    pub fn of(socket: TcpStream) -> Result<Self> {
        let saved = Self::of_open(&socket)?;
        drop(socket);
        Ok(saved)
    }

    /// Saves a connection and leaves its socket open in repair mode. A later close sends nothing to the peer.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`, or if the connection has ended.
    pub fn of_open(socket: &TcpStream) -> Result<Self> {
        set_option(socket, TCP, libc::TCP_REPAIR, 1)?;
        let sequence = |queue| {
            set_option(socket, TCP, libc::TCP_REPAIR_QUEUE, queue)?;
            option(socket, TCP, libc::TCP_QUEUE_SEQ)
        };
        // `tcpi_snd_wscale` and `tcpi_rcv_wscale`, four bits each.
        let scales = tcp_info(socket)?.tcpi_snd_rcv_wscale;
        Ok(Self {
            local: socket.local_addr()?,
            peer: socket.peer_addr()?,
            sequences: [sequence(QUEUES[0])?, sequence(QUEUES[1])?],
            timestamp: option(socket, TCP, libc::TCP_TIMESTAMP)?,
            mss: option(socket, TCP, libc::TCP_MAXSEG)?,
            scales: u32::from(scales & 15) | u32::from(scales >> 4) << 16,
        })
    }

    /// Restores the connection in a socket of this agent.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`.
    pub fn restore(&self, agent: &Agent) -> Result<TcpStream> {
        let socket = self.establish(agent)?;
        self.complete(&socket)?;
        Ok(socket)
    }

    /// Creates a socket of this agent that has the connection. Its TCP options are not restored yet. The daemon may
    /// reset it from now on.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`.
    pub fn establish(&self, agent: &Agent) -> Result<TcpStream> {
        let socket: OwnedFd = agent.tcp(self.local)?;
        set_option(&socket, TCP, libc::TCP_REPAIR, 1)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(self.local))?;
        for (queue, sequence) in QUEUES.into_iter().zip(self.sequences) {
            set_option(&socket, TCP, libc::TCP_REPAIR_QUEUE, queue)?;
            set_option(&socket, TCP, libc::TCP_QUEUE_SEQ, sequence)?;
        }
        // A process that another thread starts has a copy of the saved socket, which is open until it executes its
        // program.
        eventually("the saved socket is closed", patience(), || {
            match connect(socket.as_raw_fd(), &SockaddrStorage::from(self.peer)) {
                Err(Errno::EADDRNOTAVAIL) => Ok(None),
                outcome => Ok(Some(outcome?)),
            }
        })?;
        bounded(TcpStream::from(socket))
    }

    /// Restores the TCP options of an established socket and ends its repair mode.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended.
    pub fn complete(&self, socket: &TcpStream) -> Result<()> {
        let options = [
            (MSS, self.mss.cast_unsigned()),
            (WINDOW_SCALE, self.scales),
            (SACK, 0),
            (TIMESTAMPS, 0),
        ];
        let bytes = options.map(|(name, value)| [name.to_ne_bytes(), value.to_ne_bytes()].concat());
        set_bytes_option(socket, TCP, libc::TCP_REPAIR_OPTIONS, &bytes.concat())?;
        set_option(socket, TCP, libc::TCP_TIMESTAMP, self.timestamp)?;
        set_option(socket, TCP, libc::TCP_REPAIR_QUEUE, 0)?;
        // The kernel then sends a window probe. The socket learns the peer's window from the answer.
        set_option(socket, TCP, libc::TCP_REPAIR, 0)
    }
}
