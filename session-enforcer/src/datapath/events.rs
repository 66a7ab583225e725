//! What the programs tell the daemon: events of sessions, and their log.

use std::{
    io,
    task::{Context, Poll},
};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use session_enforcer_common::{Event, EventError, EventKind};
use tokio::io::unix::AsyncFd;

/// Events of the kernel, in the order in which they happened.
pub struct Events {
    pub(super) ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    /// Is ready when the kernel has added to a channel that was read to its end.
    ///
    /// # Errors
    ///
    /// Where the channel cannot be watched any more.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ready = self.ring.poll_read_ready_mut(context);
        ready.map_ok(|mut guard| guard.clear_ready())
    }

    /// The next event, or `None` at the end. A record that is none is an error; the next call goes
    /// on behind it.
    pub fn read(&mut self) -> Option<Result<(EventKind, Event), EventError>> {
        let item = self.ring.get_mut().next()?;
        Some(Event::parse(&item))
    }
}

/// The programs' log, which goes to `tracing`.
pub struct KernelLog {
    pub(super) logger: AsyncFd<EbpfLogger<&'static dyn log::Log>>,
}

impl KernelLog {
    /// Waits for log records and writes them out.
    ///
    /// # Errors
    ///
    /// Where the channel cannot be watched any more.
    pub async fn forward(&mut self) -> io::Result<()> {
        let mut guard = self.logger.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
        Ok(())
    }
}
