//! Accepts and serves the connections of the control socket.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    os::unix::net::UnixListener as StdUnixListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::{Request as HttpRequest, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::AbortHandle,
};

use super::{Admission, patient::Patient, routes::Client};
use crate::{datapath::TableInUse, report::http};

/// The maximum number of connections. Beyond it, the oldest connection without a complete request is closed.
/// If all have sent one, the new connection is closed.
const MAX_CONNECTIONS: usize = 128;

/// The time limit for the request headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The size in bytes of the header buffer and of the buffer of an answer.
const BUFFER: usize = 64 << 10;

/// The time limit for a client that reads nothing of its answer.
const READ_PATIENCE: Duration = Duration::from_secs(10);

/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket and the sources of its answers.
#[derive(Debug)]
pub struct Server {
    /// The socket.
    pub listener: StdUnixListener,
    /// The clients that may send requests.
    pub admission: Admission,
    /// The session table.
    pub sessions: Arc<TableInUse>,
}

struct Connection {
    task: AbortHandle,
    has_asked: Arc<AtomicBool>,
}

/// Serves connections until the process ends.
///
/// # Errors
///
/// Fails if the runtime cannot watch the socket.
pub async fn serve(server: Server, engine: mpsc::Sender<http::Request>) -> io::Result<()> {
    let listener = UnixListener::from_std(server.listener)?;
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("control.socket: accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        connections.retain(|connection| !connection.task.is_finished());
        if connections.len() >= MAX_CONNECTIONS && !close_one(&mut connections) {
            // Dropping the new stream closes it.
            continue;
        }
        let client = Client {
            requester: Arc::new(server.admission.admit(&stream)),
            engine: engine.clone(),
            sessions: Arc::clone(&server.sessions),
        };
        let has_asked = Arc::new(AtomicBool::new(false));
        let served = connection(stream, client, Arc::clone(&has_asked));
        let task = tokio::spawn(served).abort_handle();
        connections.push_back(Connection { task, has_asked });
        // Let the new connection read its request before the next one is accepted.
        tokio::task::yield_now().await;
    }
}

/// Closes the oldest connection without a complete request. Returns whether there was one.
fn close_one(connections: &mut VecDeque<Connection>) -> bool {
    let is_idle = |connection: &Connection| !connection.has_asked.load(Ordering::Relaxed);
    let idle = connections.iter().position(is_idle);
    let closed = idle.and_then(|index| connections.remove(index));
    closed
        .inspect(|connection| connection.task.abort())
        .is_some()
}

async fn connection(stream: UnixStream, client: Client, has_asked: Arc<AtomicBool>) {
    let service = service_fn(move |request: HttpRequest<Incoming>| {
        has_asked.store(true, Ordering::Relaxed);
        let client = client.clone();
        async move { Ok::<_, Infallible>(client.answer(request).await) }
    });
    let stream = Patient::new(stream, READ_PATIENCE);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!("a connection of the control socket: {error}");
    }
}
