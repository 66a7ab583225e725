//! Detects Ctrl-C and similar signals between two steps of the demo or of a benchmark, so that it always
//! cleans up.

use std::{
    fmt,
    sync::atomic::{AtomicI32, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use libc::c_int;
use nix::{
    errno::Errno,
    poll::{PollFd, ppoll},
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        time::TimeSpec,
    },
};

const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// The number of the last such signal, or 0.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn catch(signal: c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
}

/// The error after such a signal.
#[derive(Debug)]
pub struct Interrupted(Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// The signals that end the program early.
///
/// They are blocked except while waiting. A terminal also sends Ctrl-C to the children. They inherit the
/// block, so none dies while it creates or removes a namespace.
#[derive(Debug)]
pub struct Stop(SigSet);

impl Stop {
    /// From now on these signals do not end the process.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn listen() -> Result<Self> {
        let set: SigSet = SIGNALS.into_iter().collect();
        let action = SigAction::new(SigHandler::Handler(catch), SaFlags::SA_RESTART, set);
        for signal in SIGNALS {
            // SAFETY: the handler only stores into an atomic.
            unsafe { sigaction(signal, &action) }?;
        }
        set.thread_block()?;
        Ok(Self(set))
    }

    /// Starts a program that must receive these signals itself.
    ///
    /// # Errors
    ///
    /// The errors of the start, and [`Interrupted`].
    pub fn unblocked<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        self.0.thread_unblock()?;
        let started = start();
        self.0.thread_block()?;
        self.check()?;
        started
    }

    /// Waits for an event of these descriptors. Fails if such a signal arrives.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or an error of the kernel.
    pub fn wait(&self, fds: &mut [PollFd<'_>], timeout: Duration) -> Result<()> {
        let nothing_blocked = Some(SigSet::empty());
        match ppoll(fds, Some(TimeSpec::from_duration(timeout)), nothing_blocked) {
            Ok(_) | Err(Errno::EINTR) => self.check(),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for this time. Fails if such a signal arrives.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or an error of the kernel.
    pub fn pause(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            self.wait(&mut [], end.saturating_duration_since(Instant::now()))?;
        }
        self.check()
    }

    /// Checks whether such a signal has arrived.
    ///
    /// # Errors
    ///
    /// [`Interrupted`] if one has.
    pub fn check(&self) -> Result<()> {
        match CAUGHT.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(Interrupted(Signal::try_from(number)?).into()),
        }
    }
}
