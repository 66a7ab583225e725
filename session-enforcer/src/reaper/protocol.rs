//! The messages between the engine and a reaper. A reaper handles one request at a time and answers with one
//! or more replies, each a message of its own (`SOCK_SEQPACKET`).
//!
//! Both sides are the same program, so the version only guards against a reaper of another build. No message
//! exceeds [`MAX_MESSAGE`] bytes. A reaper ends if it cannot decode a request; the engine gives a reaper up
//! if it cannot decode a reply.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::diag::{Detail, MAX_BATCH, Socket, SocketId, SocketOwner};

/// Increase it with every change of a message.
pub const VERSION: u16 = 5;

/// The maximum length of a message in bytes. A long [`Reply::Scope`] is split into several messages.
pub const MAX_MESSAGE: usize = 128 << 10;

/// The maximum number of sockets in one request or reply.
pub const MAX_SOCKETS: usize = MAX_BATCH;

/// The maximum number of sockets in one search for holders. Each takes at most 50 bytes of the reply.
pub const MAX_SOUGHT: usize = 2 << 10;

/// The maximum number of integers in one message. Each takes at most 10 bytes.
pub const MAX_NUMBERS: usize = 8 << 10;

/// The maximum number of paths in a message. A path has at most 4 KiB.
pub const MAX_PATHS: usize = 16;

/// A network namespace. The engine may pass a descriptor of it with the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// The namespace's cookie (`SO_NETNS_COOKIE`).
    pub cookie: u64,
    /// The nsfs file at which the namespace was last seen.
    pub seen_at: Option<PathBuf>,
    /// Where to search if that file does not lead to the namespace.
    pub search: Search,
}

/// Where to search for a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Search {
    /// Do not search.
    Nowhere,
    /// Search the namespaces that a process is in or that are mounted. That finds nearly all of them at low
    /// cost.
    Processes,
    /// Also search every thread and every descriptor of the host.
    Everywhere,
}

/// How much of an MPTCP connection to reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Extent {
    /// One subflow. If the connection has no other open subflow, the whole connection.
    Subflow,
    /// The connection with all its subflows.
    Connection,
}

/// How to reset a session through a descriptor of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disconnect {
    /// A TCP socket that `sock_diag` lists, on a kernel without `SOCK_DESTROY`.
    Tcp,
    /// A subflow of an MPTCP connection.
    Mptcp(Extent),
    /// A TCP socket that is found by its cookie alone, without `sock_diag`.
    ByCookie,
}

/// A session to reset through a descriptor of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The session's socket.
    pub target: SocketId,
    /// The method.
    pub how: Disconnect,
    /// The process that holds it, if a [`Request::Holders`] has found it.
    pub holder: Option<Holder>,
}

/// The name of a socket in a search for its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SocketKey {
    /// The inode number, as `/proc` shows it. It needs no look at the socket.
    Inode(u32),
    /// The cookie.
    Cookie(u64),
}

/// The processes that a search for holders scans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SearchScope {
    /// The processes of the cgroup with this ID.
    Cgroup(u64),
    /// The processes of the host.
    Host {
        /// The lowest PID to scan: a long search is made in parts.
        from: u32,
    },
}

/// The network namespaces that a survey visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// The daemon's own namespace.
    Own,
    /// The namespaces that a process is in or that are mounted. These are nearly all, at low cost.
    Usual,
    /// Also the namespaces that only a single thread or an open file keeps alive.
    Every,
}

/// A request of the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Destroy these sockets of a namespace, one after the other. The reaper claims each socket first and
    /// writes the kernel's answer into the shared page at once ([`SharedPage`](super::shared::SharedPage)).
    /// Ends with [`Reply::Done`].
    Destroy {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
        /// Sockets of these owners are left out ([`LEFT_OUT`](super::diag::LEFT_OUT)).
        slow: Vec<SocketOwner>,
    },
    /// Reset these sessions through descriptors; claim each first. Answered by one [`Reply::Disconnected`]
    /// for each, then [`Reply::Done`].
    Disconnect {
        /// The namespace.
        netns: Netns,
        /// The sessions.
        sessions: Vec<Held>,
    },
    /// Query these sockets; claim each first. Answered by [`Reply::Sockets`] with one entry per target in
    /// their order, then [`Reply::Done`].
    Query {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
        /// The amount of data to return.
        detail: Detail,
    },
    /// Search a namespace for sockets by cookie, whichever interface they are bound to now. Answered by
    /// [`Reply::Sockets`] with one entry per target, then [`Reply::Done`].
    Search {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
    },
    /// Find a process that holds each of these sockets. Answered by [`Reply::Holders`], then [`Reply::Done`].
    Holders {
        /// The sockets, at most [`MAX_SOUGHT`].
        sought: Vec<SocketKey>,
        /// The processes to scan.
        scope: SearchScope,
        /// The processor time after which the search ends.
        budget: Duration,
    },
    /// List the sockets of a namespace that listen on this port. Answered by [`Reply::Sockets`], then
    /// [`Reply::Done`].
    Listeners {
        /// The namespace.
        netns: Netns,
        /// The port, in host byte order.
        port: u16,
    },
    /// List the sockets of many namespaces. Answered by [`Reply::Scope`]; for each namespace by
    /// [`Reply::Namespace`], [`Reply::Listeners`], [`Reply::Sessions`] and, if its list is complete,
    /// [`Reply::WholeNamespace`]; and by [`Reply::Done`].
    Survey {
        /// The namespaces to visit.
        reach: Reach,
        /// The directory of the watched cgroup. `None` if the attachment covers every socket of the host.
        cgroup: Option<PathBuf>,
        /// Whether to find the processes that hold the sockets first, which reads every descriptor of the
        /// host.
        with_holders: bool,
    },
    /// Find the paths of these cgroups. Answered by one [`Reply::Cgroup`] for each, then [`Reply::Done`].
    Cgroups {
        /// The cgroup IDs.
        ids: Vec<u64>,
    },
    /// Find the cgroups that rules name. Answered by [`Reply::Matching`] and [`Reply::WatchDirectories`], then
    /// [`Reply::Done`].
    NamedCgroups {
        /// Paths from the root, or patterns.
        names: Vec<String>,
    },
    /// Duplicate these sockets of other processes. Answered by one [`Reply::Duplicate`] for each, which
    /// carries a descriptor, then [`Reply::Done`].
    Duplicate {
        /// The holder of each socket, and the cookie that the socket must have.
        sockets: Vec<(Holder, u64)>,
    },
    /// Find the UIDs of these users. Answered by [`Reply::Users`], then [`Reply::Done`].
    Users {
        /// The user names.
        names: Vec<String>,
    },
    /// Wait for an RCU grace period. Answered by [`Reply::Done`].
    GracePeriod,
    /// Destroy a connection that the reaper makes for the test. Answered by [`Reply::Probed`], then
    /// [`Reply::Done`].
    Probe,
}

impl Request {
    /// Whether the duration grows with the number of sockets or processes of the host, or the reaper keeps sockets of
    /// other processes. The reaper lowers its priority for such a request, and gets no other request after it.
    pub const fn is_long(&self) -> bool {
        matches!(
            self,
            Self::Survey { .. } | Self::Search { .. } | Self::Duplicate { .. }
        )
    }
}

/// A process that holds a socket, and its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The PID in the daemon's PID namespace.
    pub pid: u32,
    /// The thread whose descriptor table has the socket: equal to `pid`, unless a thread has a table of its
    /// own.
    pub thread: u32,
    /// The descriptor number in that table.
    pub fd: i32,
    /// The process name, truncated and zero-padded as the kernel stores it. Empty if the process has ended.
    pub comm: [u8; 16],
}

/// The location of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// The cgroup ID.
    pub id: u64,
    /// The path from the root of the hierarchy, cut if it is long. `None` if the cgroup no longer exists.
    pub path: Option<String>,
    /// The IDs of the cgroup and of its ancestors, from the root down, zero-padded. Empty if the cgroup no
    /// longer exists.
    pub ancestors: Vec<u64>,
}

/// The outcome of a reset through a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disconnected {
    /// The connection was reset.
    Reset,
    /// The connection no longer exists.
    Gone,
    /// The kernel's answer was lost.
    Unknown,
    /// The reset was not possible, for this reason.
    Failed(String),
    /// The process that holds this socket must be searched for first.
    NeedsHolder(SocketKey),
}

/// The result of looking up a user name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FoundUser {
    /// The user has this UID.
    Uid(u32),
    /// The user does not exist.
    Unknown,
    /// The user database could not be queried.
    Failed(String),
}

/// A reply of a reaper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The reaper has started and is ready for its first request.
    Ready,
    /// The request is complete, or was aborted.
    Done {
        /// The time after the kernel's last answer, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
        /// The processor time of the request, in nanoseconds.
        used_ns: u64,
        /// Whether the reaper ends now.
        ends: bool,
        /// The reason if the request was aborted.
        error: Option<Problem>,
    },
    /// The location of another namespace that the search entered.
    Met {
        /// The namespace's cookie.
        cookie: u64,
        /// A file that refers to the namespace.
        path: PathBuf,
    },
    /// The location of a namespace that had to be searched for. The message carries a descriptor of it.
    Found {
        /// A file that refers to the namespace.
        path: PathBuf,
    },
    /// The outcome for the next session of the request.
    Disconnected {
        /// The outcome.
        outcome: Disconnected,
        /// The time after the kernel's answer, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
    },
    /// The kernel's data about the next sockets of the request. `None` for a socket that no longer exists.
    Sockets {
        /// The sockets.
        sockets: Vec<Option<Socket>>,
        /// The time after the last answer, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
    },
    /// Some of the cgroups that the watched cgroup covers.
    Scope {
        /// The cgroup IDs.
        ids: Vec<u64>,
    },
    /// The cgroups that the watched one covers could not be listed.
    NoScope(String),
    /// A network namespace. The message carries a descriptor of it, except for the daemon's own namespace.
    Namespace {
        /// The namespace's cookie.
        cookie: u64,
        /// A file that refers to the namespace.
        path: PathBuf,
    },
    /// Some listeners of the namespace, with their processes if the request asked for them.
    Listeners(Vec<(Socket, Option<Holder>)>),
    /// Some sessions of the namespace, without [`Socket::info`].
    Sessions(Vec<Socket>),
    /// All listeners and sessions of the namespace were sent.
    WholeNamespace,
    /// A namespace could not be listed, or only in part, for this reason.
    Unlisted(String),
    /// The holders of the sockets of the request that were found.
    Holders {
        /// The holders.
        found: Vec<(SocketKey, Holder)>,
        /// The PID at which a search of the host must go on. `None` if it has seen the last process.
        next: Option<u32>,
        /// The processor time of the search, in nanoseconds.
        used_ns: u64,
    },
    /// The location of a cgroup.
    Cgroup(Cgroup),
    /// Some of the cgroups that match a name of the request: their paths from the root, and their IDs.
    Matching {
        /// The name.
        name: String,
        /// The cgroups.
        cgroups: Vec<(String, u64)>,
    },
    /// Some of the directories to watch, because a cgroup that matches a name may appear there.
    WatchDirectories(Vec<PathBuf>),
    /// The message carries a descriptor (`None`), or the duplication failed for this reason.
    Duplicate(Option<String>),
    /// The results for the users, in the order of the names.
    Users(Vec<FoundUser>),
    /// The outcome of a [`Request::Probe`].
    Probed(Probed),
}

/// The outcome of destroying a connection that the reaper made for the test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probed {
    /// 0 or an error number.
    Destroyed(i32),
    /// The kernel reported success, and the connection still exists.
    NotDestroyed(String),
    /// `SOCK_DESTROY` is not supported. The value says whether the reset through a descriptor worked instead.
    NotSupported(Result<(), String>),
    /// The connection could not be made, or the kernel did not answer.
    Failed(String),
}

/// The reason why a request was aborted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Problem {
    /// The namespace was not found or could not be entered.
    Namespace {
        /// The error.
        error: String,
        /// Where the search failed to find it.
        searched: Search,
    },
    /// The exchange with `sock_diag` failed.
    Diag(String),
    /// The cgroups cannot be read.
    Cgroups(String),
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Namespace { error, .. } | Self::Diag(error) | Self::Cgroups(error) => {
                f.write_str(error)
            }
        }
    }
}

/// A message that violates the protocol.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// The message is too long.
    #[error("a message of {0} bytes, more than {MAX_MESSAGE}")]
    TooLong(usize),
    /// The message is of another version.
    #[error("a message of version {0}, this is {VERSION}")]
    Version(u16),
    /// The message cannot be decoded.
    #[error("a message is not understood: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Encodes a message.
///
/// # Errors
///
/// Fails if the message is longer than [`MAX_MESSAGE`].
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    let bytes = postcard::to_extend(message, VERSION.to_le_bytes().to_vec())?;
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Decodes a message.
///
/// # Errors
///
/// Fails if the bytes are no valid message of this version.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong(bytes.len()));
    }
    let (version, body) = bytes.split_first_chunk().unwrap_or((&[0; 2], &[]));
    let version = u16::from_le_bytes(*version);
    if version != VERSION {
        return Err(ProtocolError::Version(version));
    }
    Ok(postcard::from_bytes(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(sockets: usize) -> Request {
        let target = SocketId {
            local: session_enforcer_common::Address([u32::MAX; 4]),
            remote: session_enforcer_common::Address([u32::MAX; 4]),
            local_port: u16::MAX,
            remote_port: u16::MAX,
            ifindex: u32::MAX,
            cookie: u64::MAX,
        };
        Request::Query {
            netns: Netns {
                cookie: u64::MAX,
                seen_at: Some("/proc/4711/ns/net".into()),
                search: Search::Everywhere,
            },
            targets: vec![target; sockets],
            detail: Detail::Activity,
        }
    }

    #[test]
    fn the_largest_messages_fit_and_come_back_as_they_were() {
        let request = request(MAX_SOCKETS);
        let bytes = encode(&request).unwrap();
        assert_eq!(decode::<Request>(&bytes).unwrap(), request);
        let reply = Reply::Scope {
            ids: vec![u64::MAX; MAX_NUMBERS],
        };
        assert_eq!(decode::<Reply>(&encode(&reply).unwrap()).unwrap(), reply);
        let holder = Holder {
            pid: u32::MAX,
            thread: u32::MAX,
            fd: i32::MIN,
            comm: [u8::MAX; 16],
        };
        let reply = Reply::Holders {
            found: vec![(SocketKey::Cookie(u64::MAX), holder); MAX_SOUGHT],
            next: Some(u32::MAX),
            used_ns: u64::MAX,
        };
        assert_eq!(decode::<Reply>(&encode(&reply).unwrap()).unwrap(), reply);
    }

    #[test]
    fn a_message_that_is_too_long_or_truncated_or_of_another_version_is_refused() {
        assert!(matches!(
            encode(&request(4 * MAX_SOCKETS * MAX_SOCKETS)),
            Err(ProtocolError::TooLong(_))
        ));
        let mut bytes = encode(&Reply::WholeNamespace).unwrap();
        assert!(matches!(
            decode::<Reply>(&vec![0; MAX_MESSAGE + 1]),
            Err(ProtocolError::TooLong(_))
        ));
        bytes[0] ^= 0x80;
        assert!(matches!(
            decode::<Reply>(&bytes),
            Err(ProtocolError::Version(_))
        ));
        let bytes = encode(&request(3)).unwrap();
        for length in 0..bytes.len() {
            assert!(decode::<Request>(&bytes[..length]).is_err(), "{length}");
        }
    }
}
