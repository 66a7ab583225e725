//! An agent: a process that opens sockets for the test in its own cgroup and network namespace.
//!
//! A socket belongs to the cgroup and the namespace of the process that creates it, whoever holds it later.
//! An accepted socket belongs to those of its listener. The test programs run their tests as threads of one
//! process, which cannot be in several cgroups. So each place has an agent, which passes its sockets back
//! over an `AF_UNIX` socket.

use std::{
    fs::{self, File},
    io::{IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
    unistd::{Uid, seteuid, setresuid},
};

use crate::{cgroup::Cgroup, netns::Netns, pace::patience, process::die_with_parent};

/// The length of a request: the three arguments of socket(2). An answer is an error number, or 0 with a
/// socket.
const REQUEST: usize = 12;

/// The cgroup, namespaces and user of an agent. The default is those of the test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    cgroup: Option<PathBuf>,
    netns: Option<PathBuf>,
    uid: Option<u32>,
    effective_uid: Option<u32>,
    own_user_namespace: bool,
}

impl Place {
    /// The place of the test.
    pub fn here() -> Self {
        Self::default()
    }

    /// The same place, but in this cgroup.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.path().to_owned());
        self
    }

    /// The same place, but in the cgroup with this directory.
    #[must_use]
    pub fn in_directory(mut self, cgroup: &Path) -> Self {
        self.cgroup = Some(cgroup.to_owned());
        self
    }

    /// The same place, but in this network namespace.
    #[must_use]
    pub fn in_netns(self, netns: &Netns) -> Self {
        self.in_netns_at(netns.path())
    }

    /// The same place, but in the network namespace of this file.
    #[must_use]
    pub fn in_netns_at(mut self, path: PathBuf) -> Self {
        self.netns = Some(path);
        self
    }

    /// The same place, but as this user, without capabilities.
    #[must_use]
    pub fn as_user(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// The same place, but with this effective UID, as in a set-user-ID program. The real UID stays that of
    /// the user who started the process.
    #[must_use]
    pub fn with_rights_of(mut self, uid: u32) -> Self {
        self.effective_uid = Some(uid);
        self
    }

    /// The same place, but in a new user namespace without user mappings.
    #[must_use]
    pub fn in_own_user_namespace(mut self) -> Self {
        self.own_user_namespace = true;
        self
    }

    /// A command that runs `program` at this place, for real servers and clients. `agent` is the path of the
    /// agent's binary. The program dies with the thread that starts it.
    pub fn command(&self, agent: &Path, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.agent_command(agent, "exec");
        command.arg("--").arg(program);
        die_with_parent(&mut command);
        command
    }

    fn agent_command(&self, agent: &Path, what: &str) -> Command {
        let mut command = Command::new(agent);
        command.arg(what);
        for (flag, path) in [("--cgroup", &self.cgroup), ("--netns", &self.netns)] {
            if let Some(path) = path {
                command.arg(flag).arg(path);
            }
        }
        for (flag, uid) in [("--uid", self.uid), ("--rights-of", self.effective_uid)] {
            if let Some(uid) = uid {
                command.arg(flag).arg(uid.to_string());
            }
        }
        if self.own_user_namespace {
            command.arg("--own-user-namespace");
        }
        command
    }
}

/// Moves the calling process to this place.
///
/// # Errors
///
/// Fails if a part of the place does not exist, or without root's privileges.
pub fn enter(place: &Place) -> Result<()> {
    if let Some(path) = &place.netns {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {}", path.display()))?;
    }
    if let Some(path) = &place.cgroup {
        // 0 means the writing process.
        fs::write(path.join("cgroup.procs"), "0")
            .with_context(|| format!("entering the cgroup {}", path.display()))?;
    }
    if let Some(uid) = place.uid.map(Uid::from_raw) {
        setresuid(uid, uid, uid).context("becoming another user")?;
    }
    if let Some(uid) = place.effective_uid {
        seteuid(Uid::from_raw(uid)).context("taking the rights of another user")?;
    }
    if place.own_user_namespace {
        unshare(CloneFlags::CLONE_NEWUSER).context("making a user namespace")?;
    }
    // The change of the user has cleared the signal.
    set_pdeathsig(Signal::SIGKILL)?;
    Ok(())
}

/// The running agent of one place.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    control: UnixStream,
}

impl Agent {
    /// Starts the agent at a place.
    ///
    /// # Errors
    ///
    /// Fails if the agent cannot be started. The agent writes later errors to the test's standard error.
    pub fn start(binary: &Path, place: &Place) -> Result<Self> {
        Self::start_with(place.agent_command(binary, "serve"))
    }

    /// Starts the agent through a command that runs its binary with the argument `serve`.
    ///
    /// # Errors
    ///
    /// Fails if the agent cannot be started.
    pub fn start_with(mut command: Command) -> Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(patience()))?;
        let child = die_with_parent(&mut command)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let agent = Self { child, control };
        // The first answer proves that the agent has reached its place.
        agent.socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        Ok(agent)
    }

    /// The agent's PID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Creates a socket at the agent's place with the arguments of socket(2).
    ///
    /// # Errors
    ///
    /// The kernel's error at that place, or the failure of an agent that has ended.
    pub fn socket(&self, domain: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
        let mut request = [0; REQUEST];
        for (bytes, argument) in request.chunks_mut(4).zip([domain, kind, protocol]) {
            bytes.copy_from_slice(&argument.to_ne_bytes());
        }
        (&self.control)
            .write_all(&request)
            .context("asking the agent for a socket")?;
        let (code, fd) = receive(&self.control).context("waiting for the agent's socket")?;
        match (code, fd) {
            (0, Some(fd)) => Ok(fd),
            (0, None) => bail!("the agent sent no socket: it could not enter its place"),
            (code, _) => Err(Errno::from_raw(code)).context("making a socket in its place"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The agent may have been killed with its cgroup.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn receive(control: &UnixStream) -> Result<(i32, Option<OwnedFd>)> {
    let mut code = [0; 4];
    let mut space = nix::cmsg_space!(RawFd);
    let mut data = [IoSliceMut::new(&mut code)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(control.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    ensure!(message.bytes == 4, "the agent has gone");
    let mut passed = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = item {
            // SAFETY: the kernel has just opened these descriptors for this process.
            passed.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((i32::from_ne_bytes(code), passed.pop()))
}

/// The agent's side: creates the requested sockets until the test closes its end.
///
/// # Errors
///
/// Fails if the answer cannot be sent.
pub fn serve(control: &UnixStream) -> Result<()> {
    let mut request = [0; REQUEST];
    while (&mut &*control).read_exact(&mut request).is_ok() {
        let argument = |at: usize| {
            i32::from_ne_bytes([
                request[at],
                request[at + 1],
                request[at + 2],
                request[at + 3],
            ])
        };
        // SAFETY: the system call takes no pointers.
        let fd =
            unsafe { libc::socket(argument(0), argument(4) | libc::SOCK_CLOEXEC, argument(8)) };
        if fd < 0 {
            answer(control, Errno::last_raw(), None)?;
            continue;
        }
        // SAFETY: the kernel has just opened this descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        answer(control, 0, Some(&socket))?;
    }
    Ok(())
}

fn answer(control: &UnixStream, code: i32, socket: Option<&OwnedFd>) -> Result<()> {
    let code = code.to_ne_bytes();
    let fds: Vec<RawFd> = socket.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control_messages = if fds.is_empty() { &[] } else { &rights[..] };
    let data = [IoSlice::new(&code)];
    sendmsg::<()>(
        control.as_raw_fd(),
        &data,
        control_messages,
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}
