//! Resets a connection through a descriptor of the process that holds it: `pidfd_getfd` and
//! `connect(AF_UNSPEC)`. This serves kernels without `SOCK_DESTROY`, and MPTCP connections: there
//! `SOCK_DESTROY` resets one subflow, and neither application notices.
//!
//! The process may have closed the socket and reused its descriptor number. So the descriptor is used only if
//! its socket has the cookie that the kernel's socket table reports for the connection.

use std::{
    io,
    net::TcpStream,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::errno::Errno;
use thiserror::Error;

use super::{
    diag::{Detail, DiagSocket, SockDiagError, Socket, SocketId, state},
    protocol::{Extent, Holder, SocketKey},
};

/// The level of MPTCP's socket options (`linux/socket.h`).
const SOL_MPTCP: libc::c_int = 284;

/// `MPTCP_TCPINFO` of `linux/mptcp.h` (Linux 5.16).
const MPTCP_TCPINFO: libc::c_int = 2;

/// `PIDFD_THREAD` of `linux/pidfd.h` (Linux 6.9).
const PIDFD_THREAD: libc::c_int = libc::O_EXCL;

/// The maximum number of subflows in a query. The kernel allows 8 besides the first one.
const MAX_SUBFLOWS: usize = 32;

/// The outcome of a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection was reset.
    Reset,
    /// The connection no longer exists.
    Gone,
    /// The kernel's answer was lost.
    Unknown,
}

/// The reasons why a connection could not be reset.
#[derive(Debug, Error)]
pub enum DisconnectError {
    /// The query to the socket table failed.
    #[error(transparent)]
    Diag(#[from] SockDiagError),
    /// The kernel lists a subflow but not its MPTCP connection.
    #[error(
        "the kernel does not list the MPTCP connection of the subflow; it must be built with \
         CONFIG_INET_MPTCP_DIAG"
    )]
    NotListed,
    /// The connection is established, and no process has accepted it yet.
    #[error("no process has accepted the connection yet, and the kernel resets it for nobody else")]
    NotAccepted,
    /// The process that holds this socket must be searched for first.
    #[error("the process that holds the connection is not known yet")]
    NeedsHolder(SocketKey),
    /// None of the processes that could be scanned holds the connection.
    #[error(
        "no process is found that holds the connection: it was closed, is on its way between \
         processes, or CAP_SYS_PTRACE is missing"
    )]
    NotHeld,
    /// The kernel refused to duplicate the process's descriptor.
    #[error("taking the socket of process {pid}: {source}; pidfd_getfd needs CAP_SYS_PTRACE")]
    Refused {
        /// The process.
        pid: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The process has closed the socket and reused its descriptor number.
    #[error("process {pid} has put another socket into the place of the connection's")]
    Another {
        /// The process.
        pid: u32,
    },
    /// The kernel refused the `connect(AF_UNSPEC)`.
    #[error("connect(AF_UNSPEC) on the socket of process {pid}: {source}")]
    Disconnect {
        /// The process.
        pid: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel refused to destroy a subflow that no process holds.
    #[error("SOCK_DESTROY: {}", .0.desc())]
    Destroy(Errno),
    /// The kernel reported success, but the connection still exists.
    #[error("the connection lives after connect(AF_UNSPEC) on the socket of process {pid}")]
    Lives {
        /// The process that holds the connection.
        pid: u32,
    },
}

/// Resets a TCP connection of the namespace of `diag`.
///
/// # Errors
///
/// Fails if the reset is not possible. The connection is then unchanged.
pub fn reset_tcp(
    diag: &mut DiagSocket,
    target: &SocketId,
    holder: Option<&Holder>,
) -> Result<Answer, DisconnectError> {
    let Some(socket) = open_socket(diag, target)? else {
        return Ok(Answer::Gone);
    };
    let (pid, fd) = take_listed(&socket, holder)?;
    disconnect(diag, target, pid, &fd)
}

/// Resets a TCP connection without a query to a socket table; its cookie identifies the socket.
///
/// # Errors
///
/// Fails if the reset is not possible. The connection is then unchanged.
pub fn reset_by_cookie(
    target: &SocketId,
    holder: Option<&Holder>,
) -> Result<Answer, DisconnectError> {
    let cookie = target.cookie;
    let (pid, fd) = take(SocketKey::Cookie(cookie), cookie, holder)?;
    // The process may have connected the socket to another address since.
    if !is_session(&fd) || !is_named(&fd, target) {
        return Ok(Answer::Gone);
    }
    connect_to_nobody(&fd).map_err(|source| DisconnectError::Disconnect { pid, source })?;
    if is_session(&fd) {
        return Err(DisconnectError::Lives { pid });
    }
    Ok(Answer::Reset)
}

/// Whether a TCP socket is connected (`tcpi_state`, the first byte of `TCP_INFO`).
fn is_session(socket: &OwnedFd) -> bool {
    let mut now = 0_u8;
    let told = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut now);
    told.is_ok() && state::TRACKED & state::bit(now) != 0
}

/// Whether a connected socket has the addresses and ports of the target.
fn is_named(socket: &OwnedFd, target: &SocketId) -> bool {
    let duplicate = socket.try_clone().map(TcpStream::from);
    let found = duplicate.and_then(|stream| socket_id(&stream));
    let ifindex = target.ifindex;
    found.is_ok_and(|found| SocketId { ifindex, ..found } == *target)
}

/// Resets a subflow of an MPTCP connection in the namespace of `diag`, or the whole connection, as `extent`
/// requests.
///
/// # Errors
///
/// Fails if the reset is not possible. The connection is then unchanged.
pub fn reset_mptcp(
    diag: &mut DiagSocket,
    target: &SocketId,
    extent: Extent,
    holder: Option<&Holder>,
) -> Result<Answer, DisconnectError> {
    // The kernel reports the token only together with `tcp_info` (`inet_sk_diag_fill()`), which takes the
    // socket's lock.
    let subflow = |diag: &mut DiagSocket| -> Result<_, SockDiagError> {
        let found = diag.query(target, Detail::Activity)?;
        Ok(found.filter(|socket| !socket.is_mini))
    };
    let now = |diag: &mut DiagSocket| Ok::<_, SockDiagError>(subflow(diag)?.map(|s| s.mptcp_token));
    let Some(subflow) = subflow(diag)? else {
        return Ok(Answer::Gone);
    };
    let Some(token) = subflow.mptcp_token else {
        // The subflow was detached from its MPTCP connection. It is plain TCP, and no process holds it.
        return destroy(diag, target);
    };
    let connection = match diag.query_mptcp(token)? {
        Some(connection) if !is_orphan(&connection) => connection,
        None if is_open(subflow.state) => return Err(DisconnectError::NotListed),
        // No process on this host holds the connection, so nobody needs the reset's error.
        _ => return destroy(diag, target),
    };
    let (pid, fd) = take_listed(&connection, holder)?;
    // The kernel may reuse a token after its connection has ended, so check that the subflow still has this
    // token.
    match now(diag)? {
        Some(now) if now == Some(token) => {}
        Some(_) => return Err(DisconnectError::Another { pid }),
        None => return Ok(Answer::Gone),
    }
    if extent == Extent::Subflow && has_others(&fd, &subflow) {
        return destroy(diag, target);
    }
    disconnect(diag, target, pid, &fd)
}

fn open_socket(diag: &mut DiagSocket, target: &SocketId) -> Result<Option<Socket>, SockDiagError> {
    let found = diag.query(target, Detail::Names)?;
    Ok(found.filter(|socket| !socket.is_mini))
}

/// Whether every process has closed the socket. A connection that no process has accepted yet also has no
/// inode, but it is still open.
fn is_orphan(socket: &Socket) -> bool {
    socket.inode == 0 && !is_open(socket.state)
}

/// Whether neither a process nor the kernel has closed the socket on this host.
fn is_open(state: u8) -> bool {
    matches!(state, state::ESTABLISHED | state::CLOSE_WAIT)
}

/// Duplicates the descriptor of a listed socket from the process that holds it.
fn take_listed(
    socket: &Socket,
    holder: Option<&Holder>,
) -> Result<(u32, OwnedFd), DisconnectError> {
    match socket.inode {
        0 if is_open(socket.state) => Err(DisconnectError::NotAccepted),
        0 => Err(DisconnectError::NotHeld),
        inode => take(SocketKey::Inode(inode), socket.target.cookie, holder),
    }
}

/// Duplicates the descriptor of the socket with this cookie from the process that holds it.
fn take(
    key: SocketKey,
    wanted: u64,
    holder: Option<&Holder>,
) -> Result<(u32, OwnedFd), DisconnectError> {
    let holder = holder.ok_or(DisconnectError::NeedsHolder(key))?;
    let pid = holder.pid;
    let fd = duplicate(holder).map_err(|source| DisconnectError::Refused { pid, source })?;
    match cookie(&fd) {
        Ok(cookie) if cookie == wanted => Ok((pid, fd)),
        // `SO_COOKIE` fails if the descriptor is no socket.
        _ => Err(DisconnectError::Another { pid }),
    }
}

fn destroy(diag: &mut DiagSocket, target: &SocketId) -> Result<Answer, DisconnectError> {
    match diag.destroy(target)?.code {
        0 => Ok(Answer::Reset),
        libc::ENOENT => Ok(Answer::Gone),
        code => Err(DisconnectError::Destroy(Errno::from_raw(code))),
    }
}

/// Whether the MPTCP connection has open subflows besides this one.
fn has_others(connection: &OwnedFd, subflow: &Socket) -> bool {
    // A connection that has fallen back to TCP does not have the option and has one subflow.
    let states = subflow_states(connection).unwrap_or_default();
    let open = |state: u8| usize::from(state == state::ESTABLISHED);
    states.into_iter().map(open).sum::<usize>() > open(subflow.state)
}

/// Returns the TCP states of an MPTCP connection's subflows.
fn subflow_states(connection: &OwnedFd) -> io::Result<Vec<u8>> {
    /// `struct mptcp_subflow_data`, and the first byte of each subflow's `struct tcp_info`.
    #[repr(C)]
    struct Answer {
        size_of_header: u32,
        subflows: u32,
        size_in_kernel: u32,
        size_of_each: u32,
        states: [u8; MAX_SUBFLOWS],
    }
    let mut answer = Answer {
        size_of_header: 16,
        subflows: 0,
        size_in_kernel: 0,
        size_of_each: 1,
        states: [0; MAX_SUBFLOWS],
    };
    option(connection, SOL_MPTCP, MPTCP_TCPINFO, &mut answer)?;
    let subflows = (answer.subflows as usize).min(MAX_SUBFLOWS);
    Ok(answer.states[..subflows].to_vec())
}

/// Reads the socket's cookie, which is unique until the next boot.
///
/// # Errors
///
/// Fails if the descriptor is no socket.
pub fn cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0;
    option(socket, libc::SOL_SOCKET, libc::SO_COOKIE, &mut cookie)?;
    Ok(cookie)
}

/// Names the socket of a connection of this process. It must not be bound to an interface.
///
/// # Errors
///
/// Fails if the socket is not connected.
pub fn socket_id(stream: &TcpStream) -> io::Result<SocketId> {
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    Ok(SocketId {
        local: local.ip().into(),
        remote: remote.ip().into(),
        local_port: local.port(),
        remote_port: remote.port(),
        ifindex: 0,
        cookie: cookie(stream)?,
    })
}

/// Reads a socket option into a value that consists of integers.
fn option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &mut T,
) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let place = std::ptr::from_mut(value).cast();
    // SAFETY: the kernel writes at most `length` bytes, and `value` has that size and consists of integers
    // only.
    let status =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, place, &raw mut length) };
    if status == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Disconnects a process's socket, which sends a reset, and checks that the connection is gone.
fn disconnect(
    diag: &mut DiagSocket,
    target: &SocketId,
    pid: u32,
    socket: &OwnedFd,
) -> Result<Answer, DisconnectError> {
    connect_to_nobody(socket).map_err(|source| DisconnectError::Disconnect { pid, source })?;
    match open_socket(diag, target)? {
        None => Ok(Answer::Reset),
        Some(_) => Err(DisconnectError::Lives { pid }),
    }
}

/// `tcp_disconnect()` and `mptcp_disconnect()` send a reset if the connection is open.
fn connect_to_nobody(socket: &OwnedFd) -> io::Result<()> {
    let nobody = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads at most `length` bytes of an address of that size.
    let status = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) };
    if status == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Duplicates a process's socket for this process (`pidfd_getfd`, Linux 5.6).
///
/// # Errors
///
/// Fails if the process has ended, has closed the socket, or may not be inspected.
pub fn duplicate(holder: &Holder) -> io::Result<OwnedFd> {
    // Linux 6.9 and later reach the descriptor table of a single thread.
    let flags = if holder.thread == holder.pid {
        0
    } else {
        PIDFD_THREAD
    };
    // SAFETY: numbers only.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, holder.thread, flags) };
    let process = owned(process)?;
    // SAFETY: numbers only, and an open descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), holder.fd, 0) };
    owned(fd)
}

/// Takes ownership of a descriptor that a system call has just opened.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the callers pass the result of a system call that has just opened the descriptor.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
