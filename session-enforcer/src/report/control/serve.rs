//! Accepts and serves the connections of the control socket.

use std::{
    convert::Infallible, io, os::unix::net::UnixListener as StdUnixListener, sync::Arc,
    time::Duration,
};

use hyper::{Request as HttpRequest, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

use super::{Admission, routes::Client, write_timeout::WriteTimeout};
use crate::{
    datapath::TableInUse,
    report::{
        connections::{Connections, HasAsked, accept_failed, one_request},
        to_engine,
    },
};

/// The maximum number of connections. Beyond it, the oldest connection without a complete request is closed.
/// If all have sent one, the new connection is closed.
const MAX_CONNECTIONS: usize = 128;

/// The size in bytes of the header buffer and of the buffer of an answer.
const BUFFER: usize = 64 << 10;

/// The time limit for a client that reads nothing of its answer.
const READ_PATIENCE: Duration = Duration::from_secs(10);

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

/// Serves connections until the engine has ended, and then gives them the rest of their answers.
///
/// # Errors
///
/// Fails if the runtime cannot watch the socket.
pub async fn serve(server: Server, engine: mpsc::Sender<to_engine::Request>) -> io::Result<()> {
    let listener = UnixListener::from_std(server.listener)?;
    let mut connections = Connections::at_most(MAX_CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = engine.closed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                accept_failed("control.socket", &error).await;
                continue;
            }
        };
        if !connections.make_room() {
            // Dropping the new stream closes it.
            continue;
        }
        let client = Client {
            requester: Arc::new(server.admission.admit(&stream)),
            engine: engine.clone(),
            sessions: Arc::clone(&server.sessions),
        };
        let serve = |has_asked| connection(stream, client, has_asked);
        connections.serve(serve).await;
    }
    connections.finish().await;
    Ok(())
}

async fn connection(stream: UnixStream, client: Client, has_asked: HasAsked) {
    let service = service_fn(move |request: HttpRequest<Incoming>| {
        has_asked.note();
        let client = client.clone();
        async move { Ok::<_, Infallible>(client.answer(request).await) }
    });
    let stream = WriteTimeout::new(stream, READ_PATIENCE);
    let served = one_request()
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!("a connection of the control socket: {error}");
    }
}
