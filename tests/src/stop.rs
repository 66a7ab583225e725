//! Ctrl-C and its like: noticed between two steps of the demo or of a benchmark, so that it always
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

/// The number of the last such signal; 0 is none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn catch(signal: c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
}

/// Somebody wants it to end.
#[derive(Debug)]
pub struct Interrupted(Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// The signals that end it early.
///
/// They are blocked but for the moments of waiting. A terminal sends Ctrl-C to the children, too:
/// those inherit the block, and none dies halfway through making or removing a namespace.
#[derive(Debug)]
pub struct Stop(SigSet);

impl Stop {
    /// From here on those signals no longer end the process by themselves.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn listen() -> Result<Self> {
        let set: SigSet = SIGNALS.into_iter().collect();
        let action = SigAction::new(SigHandler::Handler(catch), SaFlags::SA_RESTART, set);
        for signal in SIGNALS {
            // SAFETY: all that the handler does is to store into an atomic.
            unsafe { sigaction(signal, &action) }?;
        }
        set.thread_block()?;
        Ok(Self(set))
    }

    /// Starts a program that has to receive those signals itself.
    ///
    /// # Errors
    ///
    /// Those of the start, and [`Interrupted`].
    pub fn unblocked<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        self.0.thread_unblock()?;
        let started = start();
        self.0.thread_block()?;
        self.check()?;
        started
    }

    /// Waits for something to happen to one of these; fails where such a signal comes.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or where the kernel refuses.
    pub fn wait(&self, fds: &mut [PollFd<'_>], timeout: Duration) -> Result<()> {
        let nothing_blocked = Some(SigSet::empty());
        match ppoll(fds, Some(TimeSpec::from_duration(timeout)), nothing_blocked) {
            Ok(_) | Err(Errno::EINTR) => self.check(),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets this much time pass; fails where such a signal comes.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or where the kernel refuses.
    pub fn pause(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            self.wait(&mut [], end.saturating_duration_since(Instant::now()))?;
        }
        self.check()
    }

    /// Fails with [`Interrupted`] where such a signal has come.
    ///
    /// # Errors
    ///
    /// [`Interrupted`].
    pub fn check(&self) -> Result<()> {
        match CAUGHT.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(Interrupted(Signal::try_from(number)?).into()),
        }
    }
}
