//! A `timerfd` on `CLOCK_BOOTTIME`, the clock of the sessions' deadlines. The async runtime's own timer has a
//! resolution of only one millisecond.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    time::Duration,
};

use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::io::unix::AsyncFd;

/// Gives tokio the raw descriptor of the timer.
struct Descriptor(TimerFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A timer that is armed for one moment, or disarmed.
pub struct Timer {
    fd: AsyncFd<Descriptor>,
    set_to_ns: Option<u64>,
}

impl Timer {
    /// Creates a disarmed timer.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the timer.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?;
        // SAFETY: the timer owns its descriptor, which stays the same until it is dropped.
        let fd = unsafe { AsyncFd::register(Descriptor(timer)) }?;
        Ok(Self {
            fd,
            set_to_ns: None,
        })
    }

    /// Arms the timer for a moment, or disarms it (`None`). A moment in the past expires at once.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn set(&mut self, at_ns: Option<u64>) -> io::Result<()> {
        if self.set_to_ns == at_ns {
            return Ok(());
        }
        match at_ns {
            // A timerfd that is set to zero is disarmed, so use 1 ns at least.
            Some(ns) => self.fd.get_ref().0.set(
                Expiration::OneShot(TimeSpec::from(Duration::from_nanos(ns.max(1)))),
                TimerSetTimeFlags::TFD_TIMER_ABSTIME,
            )?,
            None => self.fd.get_ref().0.unset()?,
        }
        self.set_to_ns = at_ns;
        Ok(())
    }

    /// Waits until the timer expires. The timer is disarmed afterwards.
    ///
    /// # Errors
    ///
    /// Fails if the runtime can no longer watch the timer.
    pub async fn expired(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.fd.readable().await?;
            let mut count = [0; 8];
            let read =
                guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref().0.as_fd(), &mut count)?));
            match read {
                Ok(result) => {
                    result?;
                    self.set_to_ns = None;
                    return Ok(());
                }
                Err(_not_ready) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::clock::monotonic_ns;

    #[tokio::test(flavor = "current_thread")]
    async fn it_expires_at_the_moment_and_not_before() {
        let mut timer = Timer::new().unwrap();
        for delay_ns in [20_000_000, 0] {
            let at = monotonic_ns() + delay_ns;
            timer.set(Some(at)).unwrap();
            timer.expired().await.unwrap();
            assert!(monotonic_ns() >= at);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_disarmed_timer_does_not_expire() {
        let mut timer = Timer::new().unwrap();
        timer.set(Some(monotonic_ns() + 5_000_000)).unwrap();
        timer.set(None).unwrap();
        let wait = tokio::time::timeout(Duration::from_millis(30), timer.expired());
        assert!(wait.await.is_err());
    }
}
