//! The programs' channels to the daemon: session events and the log.

use std::{
    io,
    task::{Context, Poll},
};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use session_enforcer_common::{Event, EventError, EventKind};
use tokio::io::unix::AsyncFd;

/// The ring buffer of session events, in the order in which they happened.
pub struct Events {
    pub(super) ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    /// Becomes ready when the kernel adds an event after the ring buffer was read to its end.
    ///
    /// # Errors
    ///
    /// Fails if the ring buffer can no longer be watched.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ready = self.ring.poll_read_ready_mut(context);
        ready.map_ok(|mut guard| guard.clear_ready())
    }

    /// Returns the next event, or `None` at the end. An invalid record is an error; the next call continues after it.
    pub fn read(&mut self) -> Option<Result<(EventKind, Event), EventError>> {
        let item = self.ring.get_mut().next()?;
        Some(Event::parse(&item))
    }
}

/// The programs' log, which is forwarded to `tracing`.
pub struct KernelLog {
    pub(super) logger: AsyncFd<EbpfLogger<&'static dyn log::Log>>,
}

impl KernelLog {
    /// Waits for log records and forwards them.
    ///
    /// # Errors
    ///
    /// Fails if the log channel can no longer be watched.
    pub async fn forward(&mut self) -> io::Result<()> {
        let mut guard = self.logger.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
        Ok(())
    }
}
