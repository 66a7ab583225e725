//! The engine's side: reapers that are idle, busy, or left behind where they hang.
//!
//! At least [`SPARES`] are idle, so that a reset never waits for one to start, and requests other than
//! resets leave [`RESERVED`] of them alone.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Command, Stdio},
    rc::Rc,
    sync::mpsc as threads,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, mpsc},
    time::{Instant, timeout},
};

use super::{
    channel,
    diag::Destroyed,
    protocol::{MAX_MESSAGE, ProtocolError, Reply, Request, decode, encode},
    shared::SharedPage,
};
use crate::host::privilege;

/// Reapers that are idle at least, or on their way to be.
const SPARES: usize = 2;

/// Idle reapers that are left to resets.
const RESERVED: usize = 1;

/// Idle reapers at most. What a time of trouble has made more of ends after it.
const MAX_IDLE: usize = 4;

/// The subcommand that a reaper is.
pub const SUBCOMMAND: &str = "reaper";

/// Reapers that are idle, start, or work and say so. More would only take each other's processors.
const MAX_WORKING: usize = 6;

/// Reapers at most, those that were left behind included.
const MAX_REAPERS: usize = 320;

/// How long a reaper may be silent before the rest of its request goes to another. A guess that costs
/// nothing where it is wrong: what is claimed stays with the first.
pub const STALL: Duration = Duration::from_millis(1);

/// How long a reaper must have waited in the kernel, in a sleep that nothing interrupts, to count as stuck.
const STUCK_AFTER: Duration = Duration::from_millis(250);

/// How long one that stands still otherwise may do so before it is killed.
const KILLED_AFTER: Duration = Duration::from_secs(5);

/// The state in which no signal ends a process.
const UNINTERRUPTIBLE: u8 = b'D';

/// The state of a process that runs, or could.
const RUNNING: u8 = b'R';

/// The state of a process that a signal has stopped, which does nothing more.
const STOPPED: u8 = b'T';

/// Pause after a reaper could not be started.
const START_PAUSE: Duration = Duration::from_millis(200);

thread_local! {
    /// What is received goes through one buffer.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_MESSAGE]);
}

/// What a reaper is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Sessions that are due.
    Resets,
    /// Everything else.
    Others,
}

/// Reapers by what they do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Waiting for a request.
    pub idle: usize,
    /// At work.
    pub busy: usize,
    /// Hanging in the kernel.
    pub stuck: usize,
    /// Started in place of one that has ended or hangs, since the start.
    pub restarts: u64,
}

/// The reapers of a daemon. Cheap to clone.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

struct Inner {
    start: threads::Sender<()>,
    idle: RefCell<VecDeque<Reaper>>,
    /// Being started.
    starting: Cell<usize>,
    /// At work, those that hang included.
    busy: Cell<usize>,
    /// Of those, whose request nobody waits for any more before he goes on.
    left_behind: Cell<usize>,
    stuck: Cell<usize>,
    /// Requests that wait for a reaper.
    waiting: Cell<usize>,
    started: Cell<u64>,
    /// Ended after a long request.
    spent: Cell<u64>,
    arrived: Notify,
}

/// A reaper, as the engine has it. It is killed with this.
struct Reaper {
    channel: AsyncFd<OwnedFd>,
    page: SharedPage,
    process: OwnedFd,
    pid: u32,
}

/// What the thread that starts reapers hands over.
struct Started {
    channel: OwnedFd,
    page: SharedPage,
    process: OwnedFd,
    pid: u32,
}

impl Pool {
    /// Starts the first reapers, and the thread that starts them. To be called before the daemon gives
    /// up its privileges, in a runtime whose tasks stay on one thread.
    ///
    /// # Errors
    ///
    /// Where there can be no thread, or it cannot keep what reapers need.
    pub fn start() -> Result<Self> {
        let (start, asked) = threads::channel();
        let (started, arrivals) = mpsc::unbounded_channel();
        let (ready, is_ready) = threads::channel();
        let work = move || {
            let prepared = privilege::prepare_to_start_reapers();
            let is_prepared = prepared.is_ok();
            let _ = ready.send(prepared);
            if is_prepared {
                start_reapers(&asked, &started);
            }
        };
        let builder = thread::Builder::new().name("start-reapers".to_owned());
        builder.spawn(work).context("starting a thread")?;
        is_ready
            .recv()
            .context("the thread that starts reapers")?
            .context("preparing to start reapers")?;
        let pool = Self(Rc::new(Inner {
            start,
            idle: RefCell::default(),
            starting: Cell::new(0),
            busy: Cell::new(0),
            left_behind: Cell::new(0),
            stuck: Cell::new(0),
            waiting: Cell::new(0),
            started: Cell::new(0),
            spent: Cell::new(0),
            arrived: Notify::new(),
        }));
        pool.start_spares();
        tokio::task::spawn_local(pool.clone().take_arrivals(arrivals));
        Ok(pool)
    }

    /// Reapers by what they do.
    pub fn counts(&self) -> Counts {
        let inner = &self.0;
        Counts {
            idle: inner.idle.borrow().len(),
            busy: inner.busy.get() - inner.stuck.get(),
            stuck: inner.stuck.get(),
            restarts: inner
                .started
                .get()
                .saturating_sub(SPARES as u64 + inner.spent.get()),
        }
    }

    async fn take_arrivals(self, mut arrivals: mpsc::UnboundedReceiver<io::Result<Started>>) {
        while let Some(started) = arrivals.recv().await {
            let reaper = started.and_then(Reaper::new);
            if let Err(error) = &reaper {
                tracing::error!("a reaper cannot be started: {error}; it is tried again");
                tokio::time::sleep(START_PAUSE).await;
            }
            self.0.starting.set(self.0.starting.get() - 1);
            if let Ok(reaper) = reaper {
                self.0.started.set(self.0.started.get() + 1);
                self.give_back(reaper);
            }
            self.start_spares();
        }
    }

    fn give_back(&self, reaper: Reaper) {
        let mut idle = self.0.idle.borrow_mut();
        if idle.len() < MAX_IDLE || self.0.waiting.get() > 0 {
            idle.push_back(reaper);
        }
        drop(idle);
        self.0.arrived.notify_waiters();
    }

    /// Gives up the idle reapers that a signal has stopped: whatever has stopped another one may have stopped
    /// them, and each would hold up a request for as long.
    fn give_up_stopped(&self) {
        let mut idle = self.0.idle.borrow_mut();
        idle.retain(|reaper| reaper.state() != Some(STOPPED));
        drop(idle);
        self.start_spares();
    }

    fn start_spares(&self) {
        let inner = &self.0;
        let has = inner.idle.borrow().len() + inner.starting.get();
        let wanted = SPARES + inner.waiting.get();
        let working = has + inner.busy.get() - inner.left_behind.get();
        let room = MAX_WORKING.saturating_sub(working);
        let room = room.min(MAX_REAPERS.saturating_sub(has + inner.busy.get()));
        for _ in 0..wanted.saturating_sub(has).min(room) {
            // The thread lives as long as the process.
            let _ = inner.start.send(());
            inner.starting.set(inner.starting.get() + 1);
        }
    }

    /// An idle reaper, as soon as there is one.
    async fn take(&self, purpose: Purpose) -> Reaper {
        let left = match purpose {
            Purpose::Resets => 0,
            Purpose::Others => RESERVED,
        };
        let mut waits = None;
        loop {
            let arrived = self.0.arrived.notified();
            let mut arrived = std::pin::pin!(arrived);
            arrived.as_mut().enable();
            let found = {
                let mut idle = self.0.idle.borrow_mut();
                // The one that came back last has what it needs in the caches.
                (idle.len() > left).then(|| idle.pop_back()).flatten()
            };
            if let Some(reaper) = found {
                drop(waits);
                self.0.busy.set(self.0.busy.get() + 1);
                self.start_spares();
                return reaper;
            }
            waits.get_or_insert_with(|| Waiting::new(&self.0.waiting));
            self.start_spares();
            arrived.await;
        }
    }

    /// Asks a reaper, as soon as there is one. `fd` goes with the request.
    ///
    /// # Errors
    ///
    /// Where the request is too long, or there is no reaper after several attempts.
    pub async fn ask(
        &self,
        purpose: Purpose,
        request: &Request,
        fd: Option<&OwnedFd>,
    ) -> Result<Exchange> {
        let bytes = encode(request)?;
        // One that was killed while it was idle is met here.
        for _ in 0..MAX_REAPERS {
            let reaper = self.take(purpose).await;
            reaper.page.begin();
            let sent = channel::send(reaper.channel.get_ref(), &bytes, fd);
            let exchange = Exchange {
                pool: self.clone(),
                reaper: Some(reaper),
                progress: Progress::UnderWay,
                is_long: request.is_long(),
                is_left_behind: false,
                is_stuck: false,
                claimed_before: 0,
                silent_since: Instant::now(),
                asleep_since: None,
            };
            match sent {
                Ok(()) => return Ok(exchange),
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => drop(exchange),
                Err(error) => return Err(error).context("asking a reaper"),
            }
        }
        anyhow::bail!("reapers end as soon as they have begun")
    }
}

/// Counts a request that waits for a reaper.
struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// What comes next of an exchange.
#[derive(Debug)]
pub enum Next {
    /// The reaper has said something, and may have sent a descriptor.
    Reply(Reply, Option<OwnedFd>),
    /// It has said nothing for as long as that.
    Silent,
    /// It has ended without an answer: it was killed, or is none of ours.
    Ended,
}

/// How a silent reaper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It may go on at any moment.
    Slow,
    /// It hangs in the kernel, where not even a signal reaches it.
    Stuck,
}

/// How far an exchange has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    UnderWay,
    /// The reaper can have another request.
    Done,
    /// It is no more.
    Ended,
}

/// A request that a reaper works on. Dropped before its end, it takes the reaper along.
pub struct Exchange {
    pool: Pool,
    /// There until this is dropped.
    reaper: Option<Reaper>,
    progress: Progress,
    /// Whether the reaper has given way to others, which it cannot take back.
    is_long: bool,
    is_left_behind: bool,
    is_stuck: bool,
    /// Sockets that were claimed when it was last looked.
    claimed_before: usize,
    /// When it last said something or claimed a socket, as far as was looked.
    silent_since: Instant,
    /// Since when it was found in a sleep that nothing interrupts.
    asleep_since: Option<Instant>,
}

impl Exchange {
    /// Waits for what the reaper says, `patience` at most. Nothing comes after [`Reply::Done`] and
    /// [`Next::Ended`].
    pub async fn next(&mut self, patience: Duration) -> Next {
        let (Progress::UnderWay, Some(reaper)) = (self.progress, &self.reaper) else {
            return Next::Ended;
        };
        match timeout(patience, reaper.receive()).await {
            Err(_elapsed) => Next::Silent,
            Ok(Ok(Some((reply, fd)))) => {
                self.awake();
                if matches!(reply, Reply::Done { .. }) {
                    self.progress = Progress::Done;
                }
                Next::Reply(reply, fd)
            }
            Ok(end) => {
                if let Err(error) = end {
                    tracing::error!("a reaper is given up: {error}");
                }
                self.awake();
                self.progress = Progress::Ended;
                Next::Ended
            }
        }
    }

    fn awake(&mut self) {
        (self.silent_since, self.asleep_since) = (Instant::now(), None);
        if std::mem::take(&mut self.is_stuck) {
            self.pool.0.stuck.set(self.pool.0.stuck.get() - 1);
        }
    }

    /// How the reaper is, which has been silent. One that stands still for long, and not in the kernel, is
    /// killed, and has ended next.
    pub fn condition(&mut self) -> Condition {
        let claimed = self.claimed();
        if claimed != std::mem::replace(&mut self.claimed_before, claimed) {
            self.awake();
        }
        let Some(reaper) = &self.reaper else {
            return Condition::Slow;
        };
        let now = Instant::now();
        let state = reaper.state();
        if state != Some(UNINTERRUPTIBLE) {
            self.asleep_since = None;
            // One that computes is at work.
            let is_idle = state != Some(RUNNING) && now - self.silent_since > KILLED_AFTER;
            if is_idle || state == Some(STOPPED) {
                reaper.kill();
                self.pool.give_up_stopped();
            }
            return Condition::Slow;
        }
        let since = *self.asleep_since.get_or_insert(now);
        if now - since < STUCK_AFTER {
            return Condition::Slow;
        }
        if !std::mem::replace(&mut self.is_stuck, true) {
            self.pool.0.stuck.set(self.pool.0.stuck.get() + 1);
        }
        Condition::Stuck
    }

    /// Whether the reaper runs, or would if it had a processor.
    pub fn can_run(&self) -> bool {
        let reaper = self.reaper.as_ref();
        reaper.is_some_and(|reaper| reaper.state() == Some(RUNNING))
    }

    /// Nobody waits for it before he goes on: another reaper may be started in its place.
    pub fn leave_behind(&mut self) {
        if !std::mem::replace(&mut self.is_left_behind, true) {
            let left = &self.pool.0.left_behind;
            left.set(left.get() + 1);
            self.pool.start_spares();
        }
    }

    /// How many sockets of the request are claimed.
    pub fn claimed(&self) -> usize {
        let reaper = self.reaper.as_ref();
        reaper.map_or(0, |reaper| reaper.page.claimed())
    }

    /// Takes back the sockets that are not claimed; how many are.
    pub fn stop(&self) -> usize {
        let reaper = self.reaper.as_ref();
        reaper.map_or(0, |reaper| reaper.page.stop())
    }

    /// The kernel's answer about a socket of a [`Request::Destroy`], where it has come.
    pub fn answered(&self, index: usize) -> Option<Destroyed> {
        self.reaper.as_ref()?.page.answered(index)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.awake();
        self.pool.0.busy.set(self.pool.0.busy.get() - 1);
        if self.is_left_behind {
            let left = &self.pool.0.left_behind;
            left.set(left.get() - 1);
        }
        let reaper = self.reaper.take();
        let reaper = reaper.filter(|_| self.progress == Progress::Done);
        if let (Some(reaper), false) = (reaper, self.is_long) {
            self.pool.give_back(reaper);
        } else if self.progress == Progress::Done {
            self.pool.0.spent.set(self.pool.0.spent.get() + 1);
        }
        self.pool.start_spares();
    }
}

impl Reaper {
    fn new(started: Started) -> io::Result<Self> {
        let Started {
            channel,
            page,
            process,
            pid,
        } = started;
        // SAFETY: the descriptor owns itself and is the same until it is dropped.
        let channel = unsafe { AsyncFd::register(channel) }.map_err(io::Error::from)?;
        Ok(Self {
            channel,
            page,
            process,
            pid,
        })
    }

    /// What it says next; none where it has ended.
    async fn receive(&self) -> Result<Option<(Reply, Option<OwnedFd>)>, ReceiveError> {
        loop {
            let mut ready = self.channel.readable().await?;
            let received = BUFFER.with_borrow_mut(|buffer| {
                ready.try_io(|fd| {
                    let (length, fd) = channel::receive(fd.get_ref(), buffer)?;
                    Ok((length > 0).then(|| (decode(&buffer[..length]), fd)))
                })
            });
            match received {
                Err(_would_block) => {}
                Ok(received) => {
                    let Some((reply, fd)) = received? else {
                        return Ok(None);
                    };
                    return Ok(Some((reply?, fd)));
                }
            }
        }
    }

    /// Its state (proc(5), `/proc/pid/stat`). Reading that takes no lock that the process holds meanwhile.
    fn state(&self) -> Option<u8> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        // Behind the name, which may have any character.
        let (_, rest) = stat.rsplit_once(") ")?;
        rest.bytes().next()
    }

    fn kill(&self) {
        let (process, signal) = (self.process.as_raw_fd(), Signal::SIGKILL as libc::c_int);
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: an open descriptor, numbers, and no structure. One that has ended needs no signal.
        let _ = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process, signal, info, 0) };
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Why what a reaper says cannot be taken in.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error(transparent)]
    Channel(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// The thread that starts reapers, each when it is asked for.
fn start_reapers(
    asked: &threads::Receiver<()>,
    started: &mpsc::UnboundedSender<io::Result<Started>>,
) {
    while asked.recv().is_ok() {
        if started.send(start_reaper()).is_err() {
            return;
        }
    }
}

fn start_reaper() -> io::Result<Started> {
    let (channel, other_end) = channel::pair()?;
    let (page, file) = SharedPage::create()?;
    let child = Command::new("/proc/self/exe")
        .arg0("session-enforcer")
        .arg(SUBCOMMAND)
        .stdin(Stdio::from(other_end))
        .stdout(Stdio::from(file))
        .spawn()?;
    let pid = child.id();
    // SAFETY: numbers only.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let process = RawFd::try_from(process).ok().filter(|fd| *fd >= 0);
    let process = process.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for this process.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    Ok(Started {
        channel,
        page,
        process,
        pid,
    })
}
