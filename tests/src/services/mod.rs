//! Real servers and clients from the system's packages, for tests of the daemon with them.
//!
//! Each server keeps all its files in a temporary directory and runs in the test's cgroup. Its children are
//! killed with the cgroup, even after a panic of the test.

mod hanging_exec;
mod haproxy;
mod hosts;
mod journal;
mod mariadb;
mod nft;
mod nginx;
mod node;
mod openssh;
mod postgresql;
mod program;
mod prometheus;
mod redis;
mod scripted;
mod tls;
mod web;

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{SockaddrStorage, bind, getsockname};

use crate::{agent::Agent, options::set_option, process::output_of};

pub use hanging_exec::HangingExec;
pub use haproxy::haproxy;
pub use hosts::{Host, Hosts};
pub use journal::{Journal, enter_mounts};
pub use mariadb::MariaDb;
pub use nft::{filter_packets, track_connections};
pub use nginx::nginx;
pub use node::node_client;
pub use openssh::{Login, OpenSsh};
pub use postgresql::Postgres;
pub use program::Program;
pub use prometheus::{Prometheus, promtool_check, promtool_of_shipped};
pub use redis::{Redis, redis_at};
pub use scripted::Scripted;
pub use tls::TlsServer;
pub use web::WebServer;

/// A port of 127.0.0.1 that the kernel assigns to no other program.
///
/// The server sets `SO_REUSEADDR`, so it can bind the port although it is bound here, because this socket
/// does not listen. For programs that request any free port, or connect, the port is in use.
#[derive(Debug)]
struct ReservedPort {
    number: u16,
    _socket: OwnedFd,
}

impl ReservedPort {
    /// Reserves a port.
    fn take(agent: &Agent) -> Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let socket = agent.tcp(any)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(any)).context("binding to a free port")?;
        let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
        let address = address.as_sockaddr_in().context("an IPv4 address")?;
        Ok(Self {
            number: address.port(),
            _socket: socket,
        })
    }
}

/// The payload bytes that the local socket with these ports has sent and received, as reported by `ss`. They
/// verify the daemon's counts.
///
/// # Errors
///
/// Fails if the connection does not exist.
pub fn payload_bytes(port: u16, peer_port: u16) -> Result<[u64; 2]> {
    let (port, peer_port) = (format!(":{port}"), format!(":{peer_port}"));
    let filter = ["sport", "=", &port, "and", "dport", "=", &peer_port];
    let line = output_of("ss", "iproute2", &[&["-tinHO"][..], &filter].concat())?;
    let field = |name: &str| {
        let value = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name));
        // `ss` omits zero values.
        value.map_or(Ok(0), str::parse::<u64>).context(line.clone())
    };
    ensure!(
        !line.is_empty(),
        "no connection between the ports {port} and {peer_port}"
    );
    let sent = field("bytes_sent:")? - field("bytes_retrans:")?;
    Ok([sent, field("bytes_received:")?])
}
