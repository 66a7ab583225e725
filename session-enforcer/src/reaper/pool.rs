//! The engine's side: the pool of reapers. A reaper is idle, busy, or left behind because it hangs.
//!
//! At least [`SPARES`] reapers are idle, so that a reset never waits for one to start. Requests other than
//! resets leave [`RESERVED`] of the idle ones alone.

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

/// The minimum number of idle reapers, including those that are being started.
const SPARES: usize = 2;

/// The number of idle reapers that only resets may use.
const RESERVED: usize = 1;

/// The maximum number of idle reapers. Reapers beyond it end when they become idle.
const MAX_IDLE: usize = 4;

/// The hidden subcommand that runs a reaper.
pub const SUBCOMMAND: &str = "reaper";

/// The maximum number of reapers that are idle, starting or working. More would only compete for processors.
/// Reapers that were left behind do not count.
const MAX_WORKING: usize = 6;

/// The maximum number of reapers, including those that were left behind.
const MAX_REAPERS: usize = 320;

/// After this silence the rest of a reaper's request goes to another reaper. A false alarm is harmless: the
/// sockets that the first reaper has claimed stay with it.
pub const STALL: Duration = Duration::from_millis(1);

/// A reaper counts as stuck after this time in uninterruptible sleep.
const STUCK_AFTER: Duration = Duration::from_millis(250);

/// A reaper that makes no progress in any other state is killed after this time.
const KILLED_AFTER: Duration = Duration::from_secs(5);

/// The process state in which no signal ends a process (uninterruptible sleep).
const UNINTERRUPTIBLE: u8 = b'D';

/// The process state of a process that is running or runnable.
const RUNNING: u8 = b'R';

/// The process state of a process that a signal has stopped.
const STOPPED: u8 = b'T';

/// The pause after a reaper could not be started.
const START_PAUSE: Duration = Duration::from_millis(200);

thread_local! {
    /// The receive buffer that all reapers share.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_MESSAGE]);
}

/// The purpose of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Resets of sessions that are due.
    Resets,
    /// All other requests.
    Others,
}

/// The number of reapers by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reapers that wait for a request.
    pub idle: usize,
    /// Reapers that work.
    pub busy: usize,
    /// Reapers that hang in the kernel.
    pub stuck: usize,
    /// Reapers that were started after the first ones: one had ended or hung, or requests waited.
    pub restarts: u64,
}

/// The reapers of a daemon. A clone is cheap.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

struct Inner {
    start: threads::Sender<()>,
    idle: RefCell<VecDeque<Reaper>>,
    /// Reapers that are being started.
    starting: Cell<usize>,
    /// Whether the last one could not be started.
    has_failed: Cell<bool>,
    /// Reapers that work, including those that hang.
    busy: Cell<usize>,
    /// Busy reapers that were left behind: the engine no longer waits for their requests.
    left_behind: Cell<usize>,
    stuck: Cell<usize>,
    /// Requests that wait for a reaper.
    waiting: Cell<usize>,
    started: Cell<u64>,
    /// Reapers that ended after a long request.
    spent: Cell<u64>,
    arrived: Notify,
}

/// The engine's handle to a reaper. Dropping it kills the reaper.
struct Reaper {
    channel: AsyncFd<OwnedFd>,
    page: SharedPage,
    process: OwnedFd,
    pid: u32,
}

/// A new reaper, as the starting thread hands it over.
struct Started {
    channel: OwnedFd,
    page: SharedPage,
    process: OwnedFd,
    pid: u32,
}

impl Pool {
    /// Starts the thread that starts reapers, and the first reapers. Call it before the daemon drops its
    /// privileges, in a runtime that keeps its tasks on one thread.
    ///
    /// # Errors
    ///
    /// Fails if the thread cannot be started, or cannot keep the capabilities that reapers need.
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
            has_failed: Cell::new(false),
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

    /// Returns the number of reapers by state.
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

    /// Whether no reaper is idle, and there are as many as there may be or the last one could not be started.
    pub fn is_short(&self) -> bool {
        let inner = &self.0;
        let cannot_start = inner.has_failed.get() || inner.busy.get() >= MAX_REAPERS;
        cannot_start && inner.idle.borrow().is_empty()
    }

    async fn take_arrivals(self, mut arrivals: mpsc::UnboundedReceiver<io::Result<Started>>) {
        while let Some(started) = arrivals.recv().await {
            match started.and_then(Reaper::new) {
                Ok(reaper) => drop(tokio::task::spawn_local(self.clone().take_in(reaper))),
                Err(error) => {
                    self.0.has_failed.set(true);
                    tracing::error!("a reaper cannot be started: {error}; it is tried again");
                    tokio::time::sleep(START_PAUSE).await;
                    self.0.starting.set(self.0.starting.get() - 1);
                    self.start_spares();
                }
            }
        }
    }

    /// Takes in a new reaper when it is ready, so that no request waits for its start. A reaper that has ended is taken
    /// in, too: [`Pool::ask`] limits the attempts. One that can run may take long on a busy host and is waited for; one
    /// that cannot is killed.
    async fn take_in(self, reaper: Reaper) {
        let can_run = || matches!(reaper.state(), Some(RUNNING | UNINTERRUPTIBLE));
        let is_kept = loop {
            match timeout(KILLED_AFTER, reaper.receive()).await {
                Ok(_ready_or_ended) => break true,
                Err(_elapsed) if !can_run() => break false,
                Err(_elapsed) => {}
            }
        };
        self.0.starting.set(self.0.starting.get() - 1);
        if is_kept {
            self.0.has_failed.set(false);
            self.0.started.set(self.0.started.get() + 1);
            self.give_back(reaper);
        }
        self.start_spares();
    }

    fn give_back(&self, reaper: Reaper) {
        let mut idle = self.0.idle.borrow_mut();
        if idle.len() < MAX_IDLE || self.0.waiting.get() > 0 {
            idle.push_back(reaper);
        }
        drop(idle);
        self.0.arrived.notify_waiters();
    }

    /// Drops the idle reapers that a signal has stopped: the sender may have stopped all reapers. Each
    /// stopped reaper would delay a request until it is killed.
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
            // The send cannot fail: the starting thread lives as long as the process.
            let _ = inner.start.send(());
            inner.starting.set(inner.starting.get() + 1);
        }
    }

    /// Returns an idle reaper; waits until one is free.
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
                // The most recently used reaper has warm caches.
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

    /// Sends a request to an idle reaper; waits until one is free. `fd` is passed with the request.
    ///
    /// # Errors
    ///
    /// Fails if the request is too long, or if reapers repeatedly end before they accept it.
    pub async fn ask(
        &self,
        purpose: Purpose,
        request: &Request,
        fd: Option<&OwnedFd>,
    ) -> Result<Exchange> {
        let bytes = encode(request)?;
        // The send fails with EPIPE if the reaper was killed while it was idle; then try another one.
        for _ in 0..MAX_REAPERS {
            let reaper = self.take(purpose).await;
            reaper.page.begin();
            let sent = channel::send(reaper.channel.get_ref(), &bytes, fd);
            let exchange = Exchange {
                pool: self.clone(),
                reaper: Some(reaper),
                progress: Progress::UnderWay,
                is_spent: request.is_long(),
                is_left_behind: false,
                is_stuck: false,
                claimed_before: 0,
                used_before: None,
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

/// Counts a waiting request while the value lives.
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

/// The next event of an exchange.
#[derive(Debug)]
pub enum Next {
    /// The reaper has sent a reply and possibly a descriptor.
    Reply(Reply, Option<OwnedFd>),
    /// The reaper has sent nothing within the patience.
    Silent,
    /// The reaper has ended before its last reply (it was killed), or has violated the protocol.
    Ended,
}

/// The condition of a silent reaper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The reaper may continue at any moment.
    Slow,
    /// The reaper is in uninterruptible sleep, where no signal reaches it.
    Stuck,
}

/// The progress of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    UnderWay,
    /// The reaper is ready for another request.
    Done,
    /// The reaper has ended.
    Ended,
}

/// A request that a reaper works on. If the exchange is dropped before its end, the reaper is killed.
pub struct Exchange {
    pool: Pool,
    /// `Some` until the exchange is dropped.
    reaper: Option<Reaper>,
    progress: Progress,
    /// Whether the reaper is not used again: it ends by itself, or the request is long and it has lowered its priority,
    /// which it cannot raise again.
    is_spent: bool,
    is_left_behind: bool,
    is_stuck: bool,
    /// The number of claimed sockets at the last check.
    claimed_before: usize,
    /// The processor time that the reaper had used at the last check, in clock ticks.
    used_before: Option<u64>,
    /// The time of the last message, or of the last check that found a new claim or processor time that was used.
    silent_since: Instant,
    /// The first check that found the reaper in its current uninterruptible sleep.
    asleep_since: Option<Instant>,
}

impl Exchange {
    /// Waits at most `patience` for a reply. After [`Reply::Done`] or [`Next::Ended`] every call returns
    /// [`Next::Ended`].
    pub async fn next(&mut self, patience: Duration) -> Next {
        let (Progress::UnderWay, Some(reaper)) = (self.progress, &self.reaper) else {
            return Next::Ended;
        };
        match timeout(patience, reaper.receive()).await {
            Err(_elapsed) => Next::Silent,
            Ok(Ok(Some((reply, fd)))) => {
                self.awake();
                if let Reply::Done { ends, .. } = reply {
                    self.progress = Progress::Done;
                    self.is_spent |= ends;
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

    /// Checks the condition of a silent reaper. A reaper that is stopped, or makes no progress for
    /// `KILLED_AFTER` outside uninterruptible sleep, is killed; the next event is then [`Next::Ended`].
    pub fn condition(&mut self) -> Condition {
        let claimed = self.claimed();
        if claimed != std::mem::replace(&mut self.claimed_before, claimed) {
            self.awake();
        }
        let Some(reaper) = &self.reaper else {
            return Condition::Slow;
        };
        let now = Instant::now();
        let (state, used) = reaper.state_and_use().unzip();
        // Its main thread may sleep while others inspect processes.
        if used != std::mem::replace(&mut self.used_before, used) {
            self.silent_since = now;
        }
        if state != Some(UNINTERRUPTIBLE) {
            self.asleep_since = None;
            // A running reaper is not killed: it makes progress.
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

    /// Kills the reaper, because nobody needs its answers any more. The exchange ends when the kernel lets go of it.
    pub fn kill(&self) {
        if let Some(reaper) = &self.reaper {
            reaper.kill();
        }
    }

    /// Whether the reaper is running or runnable.
    pub fn can_run(&self) -> bool {
        let reaper = self.reaper.as_ref();
        reaper.is_some_and(|reaper| reaper.state() == Some(RUNNING))
    }

    /// The processor time that the reaper has used, in nanoseconds.
    pub fn ran_ns(&self) -> u64 {
        self.reaper.as_ref().map_or(0, Reaper::ran_ns)
    }

    /// Marks the reaper as left behind: it no longer counts as working, so another one may be started.
    pub fn leave_behind(&mut self) {
        if !std::mem::replace(&mut self.is_left_behind, true) {
            let left = &self.pool.0.left_behind;
            left.set(left.get() + 1);
            self.pool.start_spares();
        }
    }

    /// The number of claimed sockets of the request.
    pub fn claimed(&self) -> usize {
        let reaper = self.reaper.as_ref();
        reaper.map_or(0, |reaper| reaper.page.claimed())
    }

    /// Takes back the unclaimed sockets. Returns the number of claimed ones.
    pub fn stop(&self) -> usize {
        let reaper = self.reaper.as_ref();
        reaper.map_or(0, |reaper| reaper.page.stop())
    }

    /// The kernel's answer for a socket of a [`Request::Destroy`], if it has arrived.
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
        if let (Some(reaper), false) = (reaper, self.is_spent) {
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
        // SAFETY: the channel owns its descriptor, which stays the same until it is dropped.
        let channel = unsafe { AsyncFd::register(channel) }.map_err(io::Error::from)?;
        Ok(Self {
            channel,
            page,
            process,
            pid,
        })
    }

    /// Receives the next message, or `None` if the reaper has ended.
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

    /// The process state.
    fn state(&self) -> Option<u8> {
        self.state_and_use().map(|(state, _)| state)
    }

    /// Reads the process state, and the processor time that all threads have used, in clock ticks (proc(5),
    /// `/proc/pid/stat`). The read takes no lock that the reaper can hold.
    fn state_and_use(&self) -> Option<(u8, u64)> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        // The state follows the process name, which may contain any character.
        let (_, rest) = stat.rsplit_once(") ")?;
        // `utime` and `stime` are the fields 14 and 15, the state is field 3.
        let times = rest.split(' ').skip(11).take(2);
        let used = times.filter_map(|time| time.parse::<u64>().ok()).sum();
        Some((rest.bytes().next()?, used))
    }

    /// The processor time that it has used (`/proc/pid/schedstat`, Documentation/scheduler/sched-stats.rst); 0 if the
    /// kernel does not report it.
    fn ran_ns(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/schedstat", self.pid));
        let first = |stat: String| stat.split(' ').next()?.parse().ok();
        stat.ok().and_then(first).unwrap_or(0)
    }

    fn kill(&self) {
        let (process, signal) = (self.process.as_raw_fd(), Signal::SIGKILL as libc::c_int);
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the arguments are an open descriptor, numbers and a null pointer. The result is ignored
        // because a reaper that has ended needs no signal.
        let _ = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process, signal, info, 0) };
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The reasons why a message of a reaper could not be received.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error(transparent)]
    Channel(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// The loop of the thread that starts one reaper per request.
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
    // SAFETY: the arguments are numbers.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let process = RawFd::try_from(process).ok().filter(|fd| *fd >= 0);
    let process = process.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened this descriptor for this process.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    Ok(Started {
        channel,
        page,
        process,
        pid,
    })
}
