//! Resets a connection through a descriptor of a process that holds it: `pidfd_getfd` and
//! `connect(AF_UNSPEC)`. For what `SOCK_DESTROY` does not serve: MPTCP connections, of which it
//! resets one subflow and tells neither application, and kernels without it.
//!
//! The descriptor is only used where its socket has the very cookie that the kernel's socket table
//! gives for the connection: a process may have closed it since, and its number stand for another.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use thiserror::Error;

use super::{
    diag::{Detail, DiagSocket, SockDiagError, Socket, SocketId, state},
    processes::Descriptors,
    protocol::{Disconnect, Extent, Held, Holder},
};

/// The level of MPTCP's socket options (`linux/socket.h`).
const SOL_MPTCP: libc::c_int = 284;

/// `MPTCP_TCPINFO` of `linux/mptcp.h` (Linux 5.16).
const MPTCP_TCPINFO: libc::c_int = 2;

/// `PIDFD_THREAD` of `linux/pidfd.h` (Linux 6.9).
const PIDFD_THREAD: libc::c_int = libc::O_EXCL;

/// Subflows that are asked about. The kernel lets a connection have 8 beside its first.
const MAX_SUBFLOWS: usize = 32;

/// What the kernel said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection was reset.
    Reset,
    /// There is no such connection any more.
    Gone,
    /// The answer was lost.
    Unknown,
}

/// The processes that may hold a connection: those of its cgroup first, and only where none of them does
/// all of the host. Each is looked at once, when it is asked for.
#[derive(Debug, Default)]
pub struct Holders {
    of_cgroups: HashMap<PathBuf, Descriptors>,
    of_all: Option<Descriptors>,
    /// By cgroup, and of all, the sockets by their cookies, where they were asked for.
    cookies: HashMap<Option<PathBuf>, HashMap<u64, Holder>>,
}

impl Holders {
    /// A process that holds the socket with this inode number.
    fn holder(&mut self, inode: u32, cgroup: Option<&Path>) -> Option<Holder> {
        let found = cgroup.and_then(|directory| self.of_cgroup(directory).holder(inode));
        found.or_else(|| self.of_all().holder(inode))
    }

    /// The same, of the whole host only where that is wanted.
    pub fn found(
        &mut self,
        inode: u32,
        cgroup: Option<PathBuf>,
        everywhere: bool,
    ) -> Option<Holder> {
        if everywhere {
            return self.holder(inode, cgroup.as_deref());
        }
        self.of_cgroup(&cgroup?).holder(inode)
    }

    /// A process's socket with this cookie, for this process.
    fn socket(
        &mut self,
        wanted: u64,
        cgroup: Option<&Path>,
        everywhere: bool,
    ) -> Option<(u32, OwnedFd)> {
        let among = |cookies: &HashMap<u64, Holder>| {
            let holder = cookies.get(&wanted)?;
            let fd = duplicate(holder).ok()?;
            // It may stand for another socket by now.
            (cookie(&fd).ok()? == wanted).then_some((holder.pid, fd))
        };
        if cgroup.is_some()
            && let Some(found) = among(self.cookies(cgroup))
        {
            return Some(found);
        }
        everywhere.then(|| among(self.cookies(None))).flatten()
    }

    /// The sockets of a cgroup's processes, or of all, by their cookies.
    fn cookies(&mut self, directory: Option<&Path>) -> &HashMap<u64, Holder> {
        let place = directory.map(Path::to_owned);
        if !self.cookies.contains_key(&place) {
            let descriptors = match directory {
                Some(directory) => self.of_cgroup(directory),
                None => self.of_all(),
            };
            let cookie = |holder: Holder| Some((cookie(&duplicate(&holder).ok()?).ok()?, holder));
            let cookies = descriptors.holders().filter_map(cookie).collect();
            self.cookies.insert(place.clone(), cookies);
        }
        &self.cookies[&place]
    }

    fn of_cgroup(&mut self, directory: &Path) -> &Descriptors {
        self.of_cgroups
            .entry(directory.to_owned())
            .or_insert_with(|| Descriptors::of_cgroup(directory))
    }

    /// Looks at the processes of the whole host, if nobody has asked for that yet.
    pub fn scan_all(&mut self) {
        self.of_all();
    }

    fn of_all(&mut self) -> &Descriptors {
        self.of_all
            .get_or_insert_with(Descriptors::of_all_processes)
    }
}

/// Why a connection could not be reset.
#[derive(Debug, Error)]
pub enum DisconnectError {
    /// The socket table could not be asked.
    #[error(transparent)]
    Diag(#[from] SockDiagError),
    /// The kernel shows a subflow and not its connection.
    #[error(
        "the kernel does not list the MPTCP connection of the subflow; it must be built with \
         CONFIG_INET_MPTCP_DIAG"
    )]
    NotListed,
    /// It is established and waits for a process to accept it.
    #[error("no process has accepted the connection yet, and the kernel resets it for nobody else")]
    NotAccepted,
    /// It belongs to none of the processes that could be looked into.
    #[error(
        "no process is found that holds the connection: it was closed, is on its way between \
         processes, or CAP_SYS_PTRACE is missing"
    )]
    NotHeld,
    /// The process does not give its descriptor.
    #[error("taking the socket of process {pid}: {source}; pidfd_getfd needs CAP_SYS_PTRACE")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process has closed it meanwhile.
    #[error("process {pid} has put another socket into the place of the connection's")]
    Another {
        /// The process.
        pid: u32,
    },
    /// The kernel refused.
    #[error("connect(AF_UNSPEC) on the socket of process {pid}: {source}")]
    Disconnect {
        /// The process.
        pid: u32,
        /// What it said.
        source: io::Error,
    },
    /// The kernel refused to destroy what no process has to give.
    #[error("SOCK_DESTROY: {}", .0.desc())]
    Destroy(Errno),
    /// The kernel claimed success.
    #[error("the connection lives after connect(AF_UNSPEC) on the socket of process {pid}")]
    Lives {
        /// The process that holds it.
        pid: u32,
    },
}

/// Resets a TCP connection of the namespace of `diag`.
///
/// # Errors
///
/// Where that is not possible; the connection is then as it was.
pub fn reset_tcp(
    diag: &mut DiagSocket,
    target: &SocketId,
    cgroup: Option<&Path>,
    holders: &mut Holders,
) -> Result<Answer, DisconnectError> {
    let Some(socket) = open_socket(diag, target)? else {
        return Ok(Answer::Gone);
    };
    let (pid, fd) = take(&socket, cgroup, holders)?;
    disconnect(diag, target, pid, &fd)
}

/// Resets a TCP connection without asking a socket table anything: the socket is found by its cookie.
///
/// # Errors
///
/// Where no process is found that holds it, which may be because it has ended.
pub fn reset_by_cookie(held: &Held, holders: &mut Holders) -> Result<Answer, DisconnectError> {
    let everywhere = held.how == Disconnect::ByCookie { everywhere: true };
    let found = holders.socket(held.target.cookie, held.cgroup.as_deref(), everywhere);
    let (pid, fd) = found.ok_or(DisconnectError::NotHeld)?;
    if !is_session(&fd) {
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
    told.is_ok() && state::SESSIONS & state::bit(now) != 0
}

/// Resets a subflow of an MPTCP connection of the namespace of `diag`, and as much of the connection as
/// `extent` says.
///
/// # Errors
///
/// Where that is not possible; the connection is then as it was.
pub fn reset_mptcp(
    diag: &mut DiagSocket,
    target: &SocketId,
    extent: Extent,
    cgroup: Option<&Path>,
    holders: &mut Holders,
) -> Result<Answer, DisconnectError> {
    // The token comes with what passed (`inet_sk_diag_fill()`), for which the kernel takes the lock.
    let subflow = |diag: &mut DiagSocket| -> Result<_, SockDiagError> {
        let found = diag.query(target, Detail::Activity)?;
        Ok(found.filter(|socket| !socket.is_mini))
    };
    let now = |diag: &mut DiagSocket| Ok::<_, SockDiagError>(subflow(diag)?.map(|s| s.mptcp_token));
    let Some(subflow) = subflow(diag)? else {
        return Ok(Answer::Gone);
    };
    let Some(token) = subflow.mptcp_token else {
        // Its connection has let go of it: plain TCP that no process holds.
        return destroy(diag, target);
    };
    let connection = match diag.query_mptcp(token)? {
        Some(connection) if !is_orphan(&connection) => connection,
        None if is_open(subflow.state) => return Err(DisconnectError::NotListed),
        // No application is left on this host that would have to know.
        _ => return destroy(diag, target),
    };
    let (pid, fd) = take(&connection, cgroup, holders)?;
    // A token may go to another connection when its own has ended, but this one has it still.
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

/// Whether every process has closed it. One that nobody has accepted yet has no inode either, and
/// is still open.
fn is_orphan(socket: &Socket) -> bool {
    socket.inode == 0 && !is_open(socket.state)
}

/// Whether neither process nor kernel has closed it here.
fn is_open(state: u8) -> bool {
    matches!(state, state::ESTABLISHED | state::CLOSE_WAIT)
}

/// The socket's descriptor, from a process that has it.
fn take(
    held: &Socket,
    cgroup: Option<&Path>,
    holders: &mut Holders,
) -> Result<(u32, OwnedFd), DisconnectError> {
    if held.inode == 0 && is_open(held.state) {
        return Err(DisconnectError::NotAccepted);
    }
    let holder = holders.holder(held.inode, cgroup);
    let holder = holder.ok_or(DisconnectError::NotHeld)?;
    let pid = holder.pid;
    let refused = |source| DisconnectError::Refused { pid, source };
    let fd = duplicate(&holder).map_err(refused)?;
    match cookie(&fd) {
        Ok(cookie) if cookie == held.target.cookie => Ok((pid, fd)),
        // What is no socket has no cookie.
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

/// Whether an MPTCP connection has open subflows beside this one.
fn has_others(connection: &OwnedFd, subflow: &Socket) -> bool {
    // A connection that has fallen back to TCP has no such option, and one subflow.
    let states = subflow_states(connection).unwrap_or_default();
    let open = |state: u8| usize::from(state == state::ESTABLISHED);
    states.into_iter().map(open).sum::<usize>() > open(subflow.state)
}

/// The TCP states of the subflows of an MPTCP connection.
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

/// The kernel's name of a socket, which no other has until the next boot.
///
/// # Errors
///
/// Where the descriptor stands for no socket.
pub fn cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0;
    option(socket, libc::SOL_SOCKET, libc::SO_COOKIE, &mut cookie)?;
    Ok(cookie)
}

/// Reads a socket option into a place of integers.
fn option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &mut T,
) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let place = std::ptr::from_mut(value).cast();
    // SAFETY: the kernel writes at most `length` bytes to a place of that size, which is made of
    // integers only.
    let status =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, place, &raw mut length) };
    if status == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Ends the connection of a process's socket with a reset, and looks whether that is so.
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

/// `tcp_disconnect()` and `mptcp_disconnect()` send a reset where the connection is open.
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

/// A descriptor of a process's socket for this process (`pidfd_getfd`, Linux 5.6).
///
/// # Errors
///
/// Where the process has ended or closed it, or may not be looked into.
pub fn duplicate(holder: &Holder) -> io::Result<OwnedFd> {
    // A single thread's table is reached from Linux 6.9 on.
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

/// The descriptor that a system call has opened for this process.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: as the caller says.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
