//! The environment of a run's connections: namespaces, processes inside and outside the cgroup, listeners.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{SockaddrStorage, bind};

use super::{
    book::{End, PORTS},
    plan::Opening,
};
use crate::{
    agent::Agent,
    lab::Lab,
    netns::{Netns, Veth},
    raw::{RawTcp, Sequence},
    repair::Saved,
    tcp::{Listener, Pair},
};

/// The first ports of the listeners inside and outside the cgroup. Client ports are lower.
const FIRST_PORTS: [u16; 2] = [61_000, 62_000];

/// The client ports. Each is used once, so a port identifies its connection.
const DIALLING: std::ops::Range<u16> = 1_024..60_000;

/// The port numbers of a rule's port, one for each of its listeners.
pub(super) fn port_numbers(port: usize) -> [u16; 2] {
    FIRST_PORTS.map(|first| first + port as u16)
}

/// Everything that opens connections.
pub(super) struct Field {
    /// By port: outside and inside the cgroup.
    listeners: Vec<[Listener; 2]>,
    /// In the listeners' namespace and in the other one: outside and inside the cgroup.
    dialers: [[Agent; 2]; 2],
    /// In both namespaces.
    spoofers: [RawTcp; 2],
    next_port: u16,
    /// The processes that own the listeners: outside and inside the cgroup.
    servers: [Agent; 2],
    _netns: [Netns; 2],
}

impl Field {
    pub(super) fn new(lab: &Lab) -> Result<Self> {
        let netns = [Netns::new()?, Netns::new()?];
        Veth::between(&netns[0], &netns[1])?;
        let both = |netns: &Netns| -> Result<[Agent; 2]> {
            Ok([lab.outside_in(netns)?, lab.inside_in(netns)?])
        };
        let servers = both(&netns[0])?;
        let listen = |port| -> Result<[Listener; 2]> {
            let [outside, inside] = port_numbers(port);
            let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            Ok([
                servers[0].listen(any(outside))?,
                servers[1].listen(any(inside))?,
            ])
        };
        let dialers = [both(&netns[0])?, both(&netns[1])?];
        Ok(Self {
            listeners: (0..PORTS).map(listen).collect::<Result<_>>()?,
            spoofers: [RawTcp::new(&dialers[0][0])?, RawTcp::new(&dialers[1][0])?],
            dialers,
            next_port: DIALLING.start,
            servers,
            _netns: netns,
        })
    }

    /// Opens a connection from an unused port.
    pub(super) fn open(&mut self, opening: &Opening) -> Result<Pair> {
        let inside = |end| usize::from(opening.inside[end as usize]);
        let listener = &self.listeners[opening.port][inside(End::Server)];
        let to = SocketAddr::new(server_address(opening), listener.port());
        let dialer = &self.dialers[usize::from(opening.far)][inside(End::Client)];
        let socket = dialer.tcp(to)?;
        let port = self.next_port;
        anyhow::ensure!(DIALLING.contains(&port), "no port is left to dial from");
        self.next_port += 1;
        let from = match to {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        };
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from))
            .with_context(|| format!("binding to {from}"))?;
        Pair::dial(socket, listener, to)
    }
}

impl Field {
    /// Creates another socket for the server's end of a connection. Its TCP options are not restored yet.
    pub(super) fn establish(&self, opening: &Opening, saved: &Saved) -> Result<TcpStream> {
        let inside = opening.inside[End::Server as usize];
        saved.establish(&self.servers[usize::from(inside)])
    }

    /// Sends a forged segment to the peer of an end. The segment has the end's address as its source and is sent from
    /// the end's network namespace. Does nothing for IPv6.
    pub(super) fn spoof(
        &self,
        opening: &Opening,
        end: End,
        from: &TcpStream,
        [to_send, to_receive]: [u32; 2],
    ) -> Result<()> {
        if !opening.is_ipv4 {
            return Ok(());
        }
        let is_there = opening.far && end == End::Client;
        let at = Sequence {
            to_send,
            to_receive,
        };
        self.spoofers[usize::from(is_there)].send(from, at, b"forged")
    }
}

fn server_address(opening: &Opening) -> IpAddr {
    match (opening.far, opening.is_ipv4) {
        (false, true) => Ipv4Addr::LOCALHOST.into(),
        (false, false) => Ipv6Addr::LOCALHOST.into(),
        (true, true) => Veth::LEFT,
        (true, false) => Veth::LEFT_V6,
    }
}
