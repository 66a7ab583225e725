//! The connections that a server of this process serves at the same time.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use tokio::task::JoinHandle;

/// The time limit for the request headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after a failed accept, for example without free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Served connections, oldest first.
pub(super) struct Connections {
    max: usize,
    served: VecDeque<Connection>,
}

struct Connection {
    task: JoinHandle<()>,
    has_asked: HasAsked,
}

/// Whether a complete request has arrived on a connection.
#[derive(Clone, Default)]
pub(super) struct HasAsked(Arc<AtomicBool>);

impl HasAsked {
    /// A complete request has arrived.
    pub(super) fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Connections {
    pub(super) fn at_most(max: usize) -> Self {
        Self {
            max,
            served: VecDeque::new(),
        }
    }

    /// Makes room for another connection: closes the oldest one without a complete request. Returns whether there is
    /// room.
    pub(super) fn make_room(&mut self) -> bool {
        self.served.retain(|served| !served.task.is_finished());
        if self.served.len() < self.max {
            return true;
        }
        let has_asked = |served: &Connection| served.has_asked.0.load(Ordering::Relaxed);
        let idle = self.served.iter().position(|served| !has_asked(served));
        idle.is_some_and(|index| self.close(index))
    }

    /// Closes the oldest connection.
    pub(super) fn close_oldest(&mut self) {
        self.close(0);
    }

    /// Aborting the task drops the connection, which closes it.
    fn close(&mut self, index: usize) -> bool {
        let closed = self.served.remove(index);
        closed.inspect(|served| served.task.abort()).is_some()
    }

    /// Serves another connection. Lets it read its request before the next one is accepted.
    pub(super) async fn serve<T>(&mut self, serve: impl FnOnce(HasAsked) -> T)
    where
        T: Future + Send + 'static,
    {
        let has_asked = HasAsked::default();
        let serving = serve(has_asked.clone());
        let task = tokio::spawn(async move { drop(serving.await) });
        self.served.push_back(Connection { task, has_asked });
        tokio::task::yield_now().await;
    }

    /// Waits for the ends of all answers.
    pub(super) async fn finish(self) {
        let has_asked = |served: &Connection| served.has_asked.0.load(Ordering::Relaxed);
        for served in self.served.into_iter().filter(has_asked) {
            // Only the end counts, also that of an aborted task.
            let _ = served.task.await;
        }
    }
}

/// Reports a failed accept, and pauses.
pub(super) async fn accept_failed(key: &str, error: &io::Error) {
    tracing::warn!("{key}: accepting a connection: {error}");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// HTTP/1.1 with one request per connection: clients gain nothing from keep-alive, and no time limit of a connection
/// cuts a second request short.
pub(super) fn one_request() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(HEADER_TIMEOUT);
    builder
}
