//! The one event loop: ring buffer, timer, signals, requests.
//!
//! [`Enforcer`] decides and acts, one call at a time; this module waits, and calls it.

mod adoption;
mod enforcer;
mod terminate;

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, sleep_until},
};

pub use enforcer::{Enforcer, Parts};

use crate::{
    bpf::{Events, KernelLog},
    http::Request,
    timer::Timer,
};

/// How long the daemon leaves events in the ring buffer after it has read some. It bounds the
/// wake-ups of a host with many short connections to ten a second, most of which have ended by
/// then. The shortest limit is ten times as long, so no deadline is missed by it.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// The loop and what it waits for.
pub struct Engine {
    enforcer: Enforcer,
    events: EventReader,
    log: KernelLog,
    timer: Timer,
    requests: mpsc::Receiver<Request>,
    signals: Signals,
}

impl Engine {
    /// Prepares the loop.
    ///
    /// # Errors
    ///
    /// Where a timer or a signal handler cannot be had.
    pub fn new(
        enforcer: Enforcer,
        events: Events,
        log: KernelLog,
        requests: mpsc::Receiver<Request>,
        signals: Signals,
    ) -> Result<Self> {
        Ok(Self {
            enforcer,
            events: EventReader {
                events,
                paused_until: None,
            },
            log,
            timer: Timer::new().context("making a timer")?,
            requests,
            signals,
        })
    }

    /// Runs until SIGTERM or SIGINT, then detaches and flushes.
    ///
    /// # Errors
    ///
    /// Where the kernel's channels cannot be watched any more, or the programs' maps cannot be
    /// read: without them nothing can be enforced.
    pub async fn run(mut self) -> Result<()> {
        let result = self.serve().await;
        self.enforcer.stop();
        result
    }

    async fn serve(&mut self) -> Result<()> {
        loop {
            self.timer
                .set(self.enforcer.next_due_ns())
                .context("setting the timer")?;
            tokio::select! {
                biased;
                received = self.signals.next() => match received {
                    Received::Stop(name) => {
                        tracing::info!("{name}: stopping");
                        return Ok(());
                    }
                    Received::Hangup => self.enforcer.reopen_audit(),
                },
                expired = self.timer.expired() => {
                    expired.context("waiting for the timer")?;
                    self.enforcer.enforce_due()?;
                    // Each reset has put an event into the ring buffer: keep it from filling.
                    self.events.read_all(&mut self.enforcer)?;
                }
                ready = self.events.wait() => {
                    ready.context("waiting for the kernel's events")?;
                    self.events.read_all(&mut self.enforcer)?;
                }
                Some(request) = self.requests.recv() => self.enforcer.answer(request),
                forwarded = self.log.forward() => {
                    forwarded.context("waiting for the kernel programs' log")?;
                }
            }
        }
    }
}

/// Reads the kernel's events, with a pause after each reading that found some.
struct EventReader {
    events: Events,
    paused_until: Option<Instant>,
}

impl EventReader {
    async fn wait(&mut self) -> io::Result<()> {
        match self.paused_until {
            Some(end) => {
                sleep_until(end).await;
                Ok(())
            }
            None => self.events.wait().await,
        }
    }

    fn read_all(&mut self, enforcer: &mut Enforcer) -> Result<()> {
        let mut any = false;
        while let Some(event) = self.events.read() {
            any = true;
            match event {
                Ok((kind, event)) => enforcer.handle(kind, &event),
                Err(error) => tracing::error!("an event of the kernel is not understood: {error}"),
            }
        }
        self.paused_until = any.then(|| Instant::now() + READ_PAUSE);
        enforcer.repair_lost_events()
    }
}

/// The signals that the daemon obeys.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over from their default actions.
    ///
    /// # Errors
    ///
    /// Where the system refuses.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Received::Stop("SIGINT"),
            _ = self.hangup.recv() => Received::Hangup,
        }
    }
}

/// What a signal asks for.
enum Received {
    Stop(&'static str),
    Hangup,
}
