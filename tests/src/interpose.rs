//! Injects faults into the daemon's system calls. `seccomp` asks the test about some of them, and the test
//! lets each one pass, delays it, or makes it fail.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    process::Command,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use libc::{c_int, seccomp_notif, seccomp_notif_resp, sock_filter};
use nix::errno::Errno;

use crate::{clock::eventually, pace::patience};

/// The descriptor of seccomp's notifications in the daemon. The number is high, so that it does not collide
/// with the daemon's own.
const QUESTIONS: RawFd = 900;

/// `SOCK_DESTROY` of `linux/sock_diag.h`, a netlink message type.
const SOCK_DESTROY: u16 = 21;

/// The length of a netlink message about one socket, and the offset of its type. The destroy message is the
/// last one of a send.
const MESSAGE: u64 = 72;
const KIND_AT: u64 = 4;

/// The offset of `msg_control` in `struct msghdr`.
const CONTROL_AT: u64 = 32;

/// The offsets of the system call number and of the fourth argument in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const FLAGS_AT: u32 = 40;

// `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// A system call of the daemon that the test can intercept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Sending the request to destroy sockets.
    Destroy,
    /// Receiving answers of the kernel's socket table.
    Answer,
    /// Entering a network namespace.
    EnterNamespace,
    /// Writing the audit to the disk.
    Sync,
}

/// The number of kinds.
const KINDS: usize = 4;

/// The treatment of a kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The calls proceed.
    Pass,
    /// The calls wait until the treatment changes.
    Wait,
    /// The calls fail with this error.
    Fail(Errno),
}

#[derive(Debug)]
struct State {
    fates: [Fate; KINDS],
    /// The number of calls that had to wait or failed.
    met: [u32; KINDS],
}

/// Decides about the daemon's calls. The test holds it as long as the daemon.
#[derive(Debug)]
pub struct Interposer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the error for a call, or `None`, after the call has waited as long as required.
    fn decide(&self, call: Call) -> Option<Errno> {
        let number = call as usize;
        let mut state = self.lock();
        if state.fates[number] != Fate::Pass {
            state.met[number] += 1;
        }
        loop {
            match state.fates[number] {
                Fate::Pass => return None,
                Fate::Fail(error) => return Some(error),
                Fate::Wait => {
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

const fn instruction(code: u16, k: u32, jump_true: u8, jump_false: u8) -> sock_filter {
    sock_filter {
        code,
        jt: jump_true,
        jf: jump_false,
        k,
    }
}

/// Asks about setns(2), fdatasync(2), recvmsg(2), and sendto(2) without flags. Only requests to the socket
/// table are sent without flags.
const FILTER: [sock_filter; 9] = [
    instruction(LOAD, NUMBER_AT, 0, 0),
    instruction(JUMP_IF_EQUAL, libc::SYS_setns as u32, 6, 0),
    instruction(JUMP_IF_EQUAL, libc::SYS_fdatasync as u32, 5, 0),
    instruction(JUMP_IF_EQUAL, libc::SYS_recvmsg as u32, 4, 0),
    instruction(JUMP_IF_EQUAL, libc::SYS_sendto as u32, 0, 2),
    instruction(LOAD, FLAGS_AT, 0, 0),
    instruction(JUMP_IF_EQUAL, 0, 1, 0),
    instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    instruction(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
];

/// Installs the filter in the command's process; for [`Launch::prepared`](crate::Launch::prepared). The
/// process blocks at its first intercepted call until an [`Interposer`] exists.
pub fn ask_about_calls(command: &mut Command) {
    let install = || {
        let filter = FILTER;
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads a program of that length, which lives until the call has returned.
        let questions = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        };
        if questions < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the system call takes no pointers. The copy stays open after exec.
        let copied = unsafe { libc::dup2(questions as c_int, QUESTIONS) };
        if copied < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure makes only system calls between fork and exec and allocates nothing.
    unsafe { command.pre_exec(install) };
}

impl Interposer {
    /// Decides from now on about the calls of a process that was just started with [`ask_about_calls`]. At
    /// first all calls pass.
    ///
    /// # Errors
    ///
    /// Fails if the process has no filter.
    pub fn of(pid: u32) -> Result<Self> {
        let questions = take_descriptor(pid)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                fates: [Fate::Pass; KINDS],
                met: [0; KINDS],
            }),
            changed: Condvar::new(),
        });
        let deciding = Arc::clone(&shared);
        let questions = Arc::new(questions);
        // The thread ends with the process.
        thread::spawn(move || while answer_one(&questions, &deciding).is_ok() {});
        Ok(Self { shared })
    }

    /// Sets the treatment of a kind of call, also for calls that are waiting.
    pub fn set(&self, call: Call, fate: Fate) {
        self.shared.lock().fates[call as usize] = fate;
        self.shared.changed.notify_all();
    }

    /// The number of calls of this kind that had to wait or failed.
    pub fn met(&self, call: Call) -> u32 {
        self.shared.lock().met[call as usize]
    }

    /// Waits until `count` calls of this kind in total had to wait or failed.
    ///
    /// # Errors
    ///
    /// Fails if they do not happen in time.
    pub fn wait_for(&self, call: Call, count: u32) -> Result<()> {
        eventually("a system call of the daemon", patience(), || {
            Ok((self.met(call) >= count).then_some(()))
        })
        .with_context(|| format!("{call:?}"))
    }
}

impl Drop for Interposer {
    fn drop(&mut self) {
        // Let all waiting calls pass, so that the daemon can end.
        for call in [
            Call::Destroy,
            Call::Answer,
            Call::EnterNamespace,
            Call::Sync,
        ] {
            self.set(call, Fate::Pass);
        }
    }
}

/// Takes the notification descriptor of the process as soon as it exists.
fn take_descriptor(pid: u32) -> Result<OwnedFd> {
    // SAFETY: the system call takes no pointers.
    let pidfd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just opened this descriptor for this process.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as RawFd) };
    eventually("the process asks", Duration::from_secs(20), || {
        let fd = pidfd.as_raw_fd();
        // SAFETY: the system call takes no pointers.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, fd, QUESTIONS, 0) };
        match Errno::result(taken) {
            // SAFETY: the kernel has just opened this descriptor for this process.
            Ok(taken) => Ok(Some(unsafe { OwnedFd::from_raw_fd(taken as RawFd) })),
            Err(Errno::EBADF) => Ok(None),
            Err(error) => bail!("taking the descriptor: {error}"),
        }
    })
}

/// Receives a notification and answers it on another thread, so that a waiting call delays no other.
fn answer_one(questions: &Arc<OwnedFd>, shared: &Arc<Shared>) -> Result<()> {
    // SAFETY: the structure consists of integers, for which zeroes are valid.
    let mut question: seccomp_notif = unsafe { std::mem::zeroed() };
    let fd = questions.as_raw_fd();
    // SAFETY: the kernel writes a notification into a value of that type.
    let received = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut question) };
    match Errno::result(received) {
        Ok(_) => {}
        // The thread that made the call was killed meanwhile.
        Err(Errno::EINTR | Errno::ENOENT) if is_alive(questions)? => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let (questions, shared) = (Arc::clone(questions), Arc::clone(shared));
    thread::spawn(move || answer(&questions, &question, &shared));
    Ok(())
}

fn answer(questions: &OwnedFd, question: &seccomp_notif, shared: &Shared) {
    // SAFETY: the structure consists of integers, for which zeroes are valid.
    let mut answer: seccomp_notif_resp = unsafe { std::mem::zeroed() };
    answer.id = question.id;
    match call(question).and_then(|call| shared.decide(call)) {
        Some(error) => answer.error = -(error as i32),
        None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    }
    let fd = questions.as_raw_fd();
    // SAFETY: the kernel reads an answer from a value of that type. The call fails if the asking thread was
    // killed.
    let _ = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
}

/// Whether the process still exists.
fn is_alive(questions: &OwnedFd) -> Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let mut fds = [PollFd::new(questions.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let ended = fds[0].revents().unwrap_or(PollFlags::empty());
    Ok(!ended.contains(PollFlags::POLLHUP))
}

fn call(question: &seccomp_notif) -> Option<Call> {
    match libc::c_long::from(question.data.nr) {
        libc::SYS_setns => Some(Call::EnterNamespace),
        libc::SYS_fdatasync => Some(Call::Sync),
        libc::SYS_recvmsg => {
            // The engine and its reapers receive with a buffer for a descriptor. Receives from the kernel
            // have none.
            let mut control = [0; 8];
            let memory = File::open(format!("/proc/{}/mem", question.pid)).ok()?;
            let at = question.data.args[1] + CONTROL_AT;
            memory.read_exact_at(&mut control, at).ok()?;
            (u64::from_ne_bytes(control) == 0).then_some(Call::Answer)
        }
        libc::SYS_sendto => {
            let mut kind = [0; 2];
            let memory = File::open(format!("/proc/{}/mem", question.pid)).ok()?;
            let end = question.data.args[1] + question.data.args[2];
            let at = end.checked_sub(MESSAGE)? + KIND_AT;
            memory.read_exact_at(&mut kind, at).ok()?;
            (u16::from_ne_bytes(kind) == SOCK_DESTROY).then_some(Call::Destroy)
        }
        _ => None,
    }
}
