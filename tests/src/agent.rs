//! A process that makes sockets for the test in the cgroup and the network namespace that it is in.
//!
//! A socket belongs to the cgroup and the namespace of the process that makes it, whoever holds it
//! later, and an accepted one to those of its listener. The test programs run their tests as
//! threads of one process, which cannot be in several cgroups: so each place has its agent, which
//! passes the sockets back over a socket of the family `AF_UNIX`.

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

/// A request is the three arguments of socket(2); an answer is an error number or 0 with a socket.
const REQUEST: usize = 12;

/// Where sockets are made. The default is where the test itself is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    cgroup: Option<PathBuf>,
    netns: Option<PathBuf>,
    uid: Option<u32>,
    effective_uid: Option<u32>,
    own_user_namespace: bool,
}

impl Place {
    /// Where the test itself is.
    pub fn here() -> Self {
        Self::default()
    }

    /// The same place in this cgroup.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.path().to_owned());
        self
    }

    /// The same place in the cgroup of this directory.
    #[must_use]
    pub fn in_directory(mut self, cgroup: &Path) -> Self {
        self.cgroup = Some(cgroup.to_owned());
        self
    }

    /// The same place in this network namespace.
    #[must_use]
    pub fn in_netns(self, netns: &Netns) -> Self {
        self.in_netns_at(netns.path())
    }

    /// The same place in the network namespace of this file.
    #[must_use]
    pub fn in_netns_at(mut self, path: PathBuf) -> Self {
        self.netns = Some(path);
        self
    }

    /// The same place as this user, who has no capabilities then.
    #[must_use]
    pub fn as_user(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// The same place with the rights of this user, as a program has them that is set to the user's
    /// id: the process stays the user's who started it.
    #[must_use]
    pub fn with_rights_of(mut self, uid: u32) -> Self {
        self.effective_uid = Some(uid);
        self
    }

    /// The same place in a user namespace of its own, in which no user has a number.
    #[must_use]
    pub fn in_own_user_namespace(mut self) -> Self {
        self.own_user_namespace = true;
        self
    }

    /// A command that runs `program` there, for real servers and clients. `agent` is the path of
    /// the agent's binary. The program dies with the thread that starts it.
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
/// Where a part of it is not there, or root's rights are missing.
pub fn enter(place: &Place) -> Result<()> {
    if let Some(path) = &place.netns {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {}", path.display()))?;
    }
    if let Some(path) = &place.cgroup {
        // 0 is the process that writes.
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
    // The change of the user has cleared this.
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
    /// Starts the agent's binary at a place.
    ///
    /// # Errors
    ///
    /// Where it cannot be started. What it says later is on the test's standard error.
    pub fn start(binary: &Path, place: &Place) -> Result<Self> {
        Self::start_with(place.agent_command(binary, "serve"))
    }

    /// Starts the agent by a command that leads to its binary, with the argument `table_ops`.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn start_with(mut command: Command) -> Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(patience()))?;
        let child = die_with_parent(&mut command)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let agent = Self { child, control };
        // Its first answer shows that it is where it should be.
        agent.socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        Ok(agent)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A socket that belongs to the agent's place, made with the arguments of socket(2).
    ///
    /// # Errors
    ///
    /// What the kernel says in that place, or where the agent has gone.
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
        // It may have been killed with its cgroup.
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
            // SAFETY: the kernel has just made these descriptors for this process.
            passed.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((i32::from_ne_bytes(code), passed.pop()))
}

/// The agent's side: makes the sockets that are asked for, until the test closes its end.
///
/// # Errors
///
/// Where the test cannot be answered.
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
        // SAFETY: a system call without pointers.
        let fd =
            unsafe { libc::socket(argument(0), argument(4) | libc::SOCK_CLOEXEC, argument(8)) };
        if fd < 0 {
            answer(control, Errno::last_raw(), None)?;
            continue;
        }
        // SAFETY: the kernel has just made this descriptor.
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
