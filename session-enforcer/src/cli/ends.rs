//! The connection that `explain` explains.

use std::net::SocketAddr;

use session_enforcer_common::Direction;

use crate::{
    config::User,
    exit::{ExitStatus, Failure},
};

/// The two ends of a connection: both IPv4 or both IPv6, an IPv4-mapped address being its IPv4
/// address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

impl Ends {
    /// The ends of a connection.
    ///
    /// # Errors
    ///
    /// Fails if one is IPv4 and the other IPv6.
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Result<Self, Failure> {
        let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
        let (local, remote) = (canonical(local), canonical(remote));
        if local.is_ipv4() != remote.is_ipv4() {
            let words = |end: SocketAddr| {
                let family = if end.is_ipv4() { "IPv4" } else { "IPv6" };
                format!("{} is an {family} address", end.ip())
            };
            let (local, remote) = (words(local), words(remote));
            let message = format!("{local} and {remote}; both must be of the same family");
            return Err(Failure::new(ExitStatus::Usage, message));
        }
        Ok(Self { local, remote })
    }
}

/// The known properties of a connection besides its ends. `None` means unspecified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// Who opened the connection.
    pub direction: Option<Direction>,
    /// The user who owns the socket.
    pub user: Option<User>,
    /// The socket's cgroup, as a path from the root.
    pub cgroup: Option<String>,
}
