//! The connections of the control socket.

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

/// Connections at once. Of more, the oldest is closed that has sent no whole request; where all have, the newest.
const MAX_CONNECTIONS: usize = 128;

/// How long a client may take to send its request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of the headers, and of an answer that waits for the client.
const BUFFER: usize = 64 << 10;

/// How long a client may take none of its answer.
const READ_PATIENCE: Duration = Duration::from_secs(10);

/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens, and what its answers are made from.
#[derive(Debug)]
pub struct Server {
    /// The socket.
    pub listener: StdUnixListener,
    /// Who may ask.
    pub admission: Admission,
    /// The session table.
    pub sessions: Arc<TableInUse>,
}

struct Connection {
    task: AbortHandle,
    has_asked: Arc<AtomicBool>,
}

/// Serves until the process ends.
///
/// # Errors
///
/// Where the socket cannot be watched.
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
            // Dropping it closes it.
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
        // What it has sent is read before another one comes.
        tokio::task::yield_now().await;
    }
}

/// Closes the oldest connection without a whole request; whether there was one.
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
