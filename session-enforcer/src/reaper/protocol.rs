//! What engine and reaper say to each other: one request at a time to each reaper, answered by one or
//! more replies, each a message of its own (`SOCK_SEQPACKET`).
//!
//! Both are the same program, so the version only guards against a reaper of another build. Every
//! message is bounded by [`MAX_MESSAGE`]; what does not decode ends the reaper, or has the engine
//! give it up.

use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::diag::{Detail, MAX_BATCH, Socket, SocketId};

/// Changes with every change of a message.
pub const VERSION: u16 = 2;

/// Bytes of a message at most. A long [`Reply::Scope`] is cut into several.
pub const MAX_MESSAGE: usize = 128 << 10;

/// Sockets in one request or reply at most.
pub const MAX_SOCKETS: usize = MAX_BATCH;

/// Numbers in one message at most, 10 bytes each at the most.
pub const MAX_NUMBERS: usize = 8 << 10;

/// A network namespace. The engine may lend a descriptor of it with the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// Its cookie (`SO_NETNS_COOKIE`).
    pub cookie: u64,
    /// Where it was last seen, a file of `nsfs`.
    pub seen_at: Option<PathBuf>,
    /// Where to search for it where it is not there.
    pub search: Search,
}

/// Where a network namespace is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Search {
    /// Nowhere.
    Nowhere,
    /// Among those that a process is in or that are mounted: nearly all, and at little cost.
    Processes,
    /// Also in every thread and every descriptor of the host.
    Everywhere,
}

/// How much of a connection is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Extent {
    /// The subflow of an MPTCP connection; the connection too where it has no other that is open.
    Subflow,
    /// The connection with all its subflows.
    Connection,
}

/// How a session is reset through a descriptor of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disconnect {
    /// A TCP socket that `sock_diag` shows, where the kernel has no `SOCK_DESTROY`.
    Tcp,
    /// A subflow of an MPTCP connection.
    Mptcp(Extent),
    /// A TCP socket, found by its cookie alone: no socket table tells whose it is.
    ByCookie {
        /// Whether among the processes of the whole host, or only of its cgroup.
        everywhere: bool,
    },
}

/// A session to reset through a descriptor of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its socket.
    pub target: SocketId,
    /// In which way.
    pub how: Disconnect,
    /// Directory of its cgroup: its processes are looked at first.
    pub cgroup: Option<PathBuf>,
}

/// Which network namespaces a survey visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// The daemon's own.
    Own,
    /// Those that a process is in or that are mounted: nearly all, at little cost.
    Usual,
    /// Also those that are held by a single thread or by an open file.
    Every,
}

/// What the engine asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Destroy these sockets of a namespace, one after the other. Each is claimed first, and its
    /// answer is in the shared page as soon as the kernel has given it
    /// ([`SharedPage`](super::shared::SharedPage)). Ends with [`Reply::Done`].
    Destroy {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
    },
    /// Reset these sessions through descriptors, each claimed first. A [`Reply::Disconnected`] for each,
    /// then [`Reply::Done`].
    Disconnect {
        /// The namespace.
        netns: Netns,
        /// The sessions.
        sessions: Vec<Held>,
    },
    /// Say what the kernel knows of these sockets, each claimed first. [`Reply::Sockets`] with as many as
    /// were asked about, in their order, then [`Reply::Done`].
    Query {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
        /// What to tell.
        detail: Detail,
    },
    /// Search a namespace for sockets by their cookies, whatever interface they are bound to by now.
    /// [`Reply::Sockets`] with as many, then [`Reply::Done`].
    Search {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
    },
    /// Say whose these sockets of a namespace are, and find a process that holds each: among those of its cgroup, and
    /// then, where it is to be looked for everywhere, among all of the host. [`Reply::Owners`] with as many as were
    /// asked about, in their order, then [`Reply::Done`].
    Owners {
        /// The namespace.
        netns: Netns,
        /// The sockets.
        targets: Vec<SocketId>,
        /// Whether the descriptors of all processes may be looked at.
        everywhere: bool,
    },
    /// List the sockets that listen on this port of a namespace. [`Reply::Sockets`], then [`Reply::Done`].
    Listeners {
        /// The namespace.
        netns: Netns,
        /// The port, in host byte order.
        port: u16,
    },
    /// List the sockets of many namespaces: [`Reply::Scope`] first, for each namespace
    /// [`Reply::Namespace`], its [`Reply::Listeners`] and [`Reply::Sessions`], [`Reply::WholeNamespace`]
    /// where all came, and [`Reply::Done`].
    Survey {
        /// Which.
        reach: Reach,
        /// Directory of the watched cgroup; none where its attachment covers every socket.
        cgroup: Option<PathBuf>,
        /// Whether the processes that hold the sockets are to be found first: a look at every descriptor
        /// of the host.
        with_holders: bool,
    },
    /// Say where these cgroups are. [`Reply::Cgroup`] for each, then [`Reply::Done`].
    Cgroups {
        /// Their identities.
        ids: Vec<u64>,
    },
    /// Duplicate these sockets of processes. [`Reply::Duplicate`] for each, with a descriptor, then
    /// [`Reply::Done`].
    Duplicate {
        /// The holder and the cookie that its socket must have.
        sockets: Vec<(Holder, u64)>,
    },
    /// Find the numbers of these users. [`Reply::Users`], then [`Reply::Done`].
    Users {
        /// Their names.
        names: Vec<String>,
    },
    /// Wait for an RCU grace period, then [`Reply::Done`].
    GracePeriod,
    /// Destroy a connection of the reaper's own, then [`Reply::Done`], which says what the kernel
    /// did ([`Reply::Probed`]).
    Probe,
}

impl Request {
    /// Whether it takes as long as the host is large. A reaper gives way to all others with such a request, and has no
    /// other one after it.
    pub const fn is_long(&self) -> bool {
        matches!(
            self,
            Self::Survey { .. }
                | Self::Search { .. }
                | Self::Owners {
                    everywhere: true,
                    ..
                }
        )
    }
}

/// A process that holds a socket, and its descriptor of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Number of the process, in the daemon's process namespace.
    pub pid: u32,
    /// Number of the thread in whose table it is: the process's own, but where a thread has a table for itself.
    pub thread: u32,
    /// Number of the descriptor in that table.
    pub fd: i32,
    /// Its name, cut and filled with zeroes as the kernel keeps it; empty where it has ended.
    pub comm: [u8; 16],
}

/// Whose a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOwner {
    /// The user that it belongs to.
    pub uid: u32,
    /// Identity of its cgroup, where the kernel told it.
    pub cgroup_id: Option<u64>,
    /// A process that holds it, where one was found.
    pub holder: Option<Holder>,
}

/// Where a cgroup is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its identity.
    pub id: u64,
    /// Its path from the root of the hierarchy; none where it is no more.
    pub path: Option<String>,
    /// Its identity and those of the cgroups above it, from the root down, filled with zeroes; empty
    /// of one that is no more.
    pub ancestors: Vec<u64>,
}

/// What became of a session that was reset through a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disconnected {
    /// The connection was reset.
    Reset,
    /// There is no such connection any more.
    Gone,
    /// The answer was lost.
    Unknown,
    /// It was not possible, for this reason.
    Failed(String),
}

/// What a user's name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FoundUser {
    /// A user with this number.
    Uid(u32),
    /// Nobody.
    Unknown,
    /// The user database could not be asked.
    Failed(String),
}

/// What a reaper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The request is done, or was broken off.
    Done {
        /// The time after the last answer of the kernel, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
        /// How long the reaper has used a processor for the request, in nanoseconds.
        used_ns: u64,
        /// Why it was broken off.
        error: Option<Problem>,
    },
    /// Where another namespace is that was met on the way.
    Met {
        /// Its cookie.
        cookie: u64,
        /// A file that stands for it.
        path: PathBuf,
    },
    /// Where a namespace is that had to be searched for; comes with a descriptor of it.
    Found {
        /// A file that stands for it.
        path: PathBuf,
    },
    /// What became of the next session.
    Disconnected {
        /// The outcome.
        outcome: Disconnected,
        /// When the kernel had answered, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
    },
    /// What the kernel knows of the next sockets that were asked about; none is one that is gone.
    Sockets {
        /// The sockets.
        sockets: Vec<Option<Socket>>,
        /// The time after the answer to the last, in nanoseconds of `CLOCK_BOOTTIME`.
        at_ns: u64,
    },
    /// Some cgroups that the watched one covers.
    Scope {
        /// Their identities.
        ids: Vec<u64>,
    },
    /// Whose sockets are meant could not be found out.
    NoScope(String),
    /// A network namespace; comes with a descriptor of it, but for the daemon's own.
    Namespace {
        /// Its cookie.
        cookie: u64,
        /// A file that stands for it.
        path: PathBuf,
    },
    /// Some sockets that listen in it, with their processes where those were asked for.
    Listeners(Vec<(Socket, Option<Holder>)>),
    /// Some of its sessions, without what passed in them.
    Sessions(Vec<Socket>),
    /// All of its sessions were there.
    WholeNamespace,
    /// A namespace could not be listed, or not to its end: this went wrong.
    Unlisted(String),
    /// Whose the sockets are that were asked about; none is one that is gone.
    Owners {
        /// Their owners.
        owners: Vec<Option<SocketOwner>>,
        /// How long the reaper has used a processor for that, in nanoseconds.
        used_ns: u64,
    },
    /// A cgroup.
    Cgroup(Cgroup),
    /// A descriptor comes with this, or this went wrong.
    Duplicate(Option<String>),
    /// The users, in the order of their names.
    Users(Vec<FoundUser>),
    /// What the kernel answered to [`Request::Probe`].
    Probed(Probed),
}

/// What the kernel said to a request to destroy a connection of the reaper's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probed {
    /// 0 or an error number.
    Destroyed(i32),
    /// `SOCK_DESTROY` is not supported: whether it was reset through its process instead.
    NotSupported(Result<(), String>),
    /// There was no connection, or no answer.
    Failed(String),
}

/// Why a request was broken off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Problem {
    /// The namespace is not found, or cannot be entered.
    Namespace {
        /// What went wrong.
        error: String,
        /// Where it was searched for in vain.
        searched: Search,
    },
    /// The exchange with the kernel.
    Diag(String),
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Namespace { error, .. } | Self::Diag(error) => f.write_str(error),
        }
    }
}

/// A message that is not one of this protocol.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// It is too long.
    #[error("a message of {0} bytes, more than {MAX_MESSAGE}")]
    TooLong(usize),
    /// It is of another version.
    #[error("a message of version {0}, this is {VERSION}")]
    Version(u16),
    /// It is malformed.
    #[error("a message is not understood: {0}")]
    Malformed(#[from] postcard::Error),
}

/// The bytes of a message.
///
/// # Errors
///
/// Where it is longer than [`MAX_MESSAGE`].
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    let bytes = postcard::to_extend(message, VERSION.to_le_bytes().to_vec())?;
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Reads a message.
///
/// # Errors
///
/// Where it is none of this version.
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
    }

    #[test]
    fn what_is_too_long_of_another_version_or_cut_is_refused() {
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
