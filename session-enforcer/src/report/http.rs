//! `/metrics`, `/healthz` and `/readyz`. What they answer comes from the engine, so that an answer
//! means that the engine is alive.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request as HttpRequest, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

/// How long a client may take to send its request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What clients may take up, so that one that misbehaves keeps no health check out for long.
#[derive(Clone, Copy)]
struct Bounds {
    /// Connections at once. A scraper needs one; who comes when they are used up waits.
    connections: usize,
    /// How long one may last: the headers, the engine's answer, and some time to take it.
    lifetime: Duration,
}

const BOUNDS: Bounds = Bounds {
    connections: 64,
    lifetime: Duration::from_secs(15),
};

/// How long the engine may take to answer before it counts as stuck.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a connection could not be accepted, for want of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server asks the engine.
#[derive(Debug)]
pub enum Request {
    /// The metrics in Prometheus' text format.
    Metrics(oneshot::Sender<Result<String, String>>),
    /// Whether everything is attached and adopted, or why not.
    Ready(oneshot::Sender<Result<(), String>>),
    /// Whether the engine is alive.
    Live(oneshot::Sender<()>),
}

/// Why the address could not be listened on.
#[derive(Debug, Error)]
#[error(
    "metrics.listen: {address}: {source}; choose another address, stop the program that has it, or \"\" for none"
)]
pub struct BindError {
    address: SocketAddr,
    source: io::Error,
}

/// Listens on the address.
///
/// # Errors
///
/// Where it is taken or is no address of this host.
pub fn bind(address: SocketAddr) -> Result<std::net::TcpListener, BindError> {
    let listen = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|source| BindError { address, source })
}

/// Serves until the runtime ends.
pub async fn serve(listener: TcpListener, requests: mpsc::Sender<Request>) {
    serve_within(BOUNDS, listener, requests).await;
}

async fn serve_within(bounds: Bounds, listener: TcpListener, requests: mpsc::Sender<Request>) {
    let slots = Arc::new(Semaphore::new(bounds.connections));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let requests = requests.clone();
                tokio::spawn(async move {
                    // Dropping the connection closes it.
                    let _ = timeout(bounds.lifetime, connection(stream, requests)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("metrics.listen: accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, requests: mpsc::Sender<Request>) {
    let service = service_fn(move |request: HttpRequest<Incoming>| {
        let requests = requests.clone();
        async move { Ok::<_, Infallible>(answer(&request, &requests).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        // One request a connection: a scrape every few seconds gains nothing from more, and the
        // longest time of a connection never cuts a second request short.
        .keep_alive(false)
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        // Whatever a client does wrong is its own affair.
        tracing::debug!("an HTTP connection: {error}");
    }
}

type Answer = Response<Full<Bytes>>;

async fn answer(request: &HttpRequest<Incoming>, requests: &mpsc::Sender<Request>) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        answer
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match request.uri().path() {
        "/metrics" => metrics(requests).await,
        "/readyz" => match ask(requests, Request::Ready).await {
            Some(Ok(())) => text(StatusCode::OK, "ready\n"),
            Some(Err(reason)) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            None => stuck(),
        },
        "/healthz" => match ask(requests, Request::Live).await {
            Some(()) => text(StatusCode::OK, "ok\n"),
            None => stuck(),
        },
        "/" => text(
            StatusCode::OK,
            "session-enforcer: /metrics /healthz /readyz\n",
        ),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n",
        ),
    }
}

async fn metrics(requests: &mpsc::Sender<Request>) -> Answer {
    match ask(requests, Request::Metrics).await {
        Some(Ok(metrics)) => {
            let mut answer = text(StatusCode::OK, metrics);
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            answer.headers_mut().insert(CONTENT_TYPE, kind);
            answer
        }
        Some(Err(reason)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n")),
        None => stuck(),
    }
}

/// The engine's answer; `None` where it does not answer.
async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let exchange = async {
        let (reply, answer) = oneshot::channel();
        requests.send(request(reply)).await.ok()?;
        answer.await.ok()
    };
    timeout(ENGINE_TIMEOUT, exchange).await.ok().flatten()
}

fn stuck() -> Answer {
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        "the engine does not answer\n",
    )
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Starts a server whose engine answers these.
    async fn start(ready: Result<(), String>) -> SocketAddr {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::channel(1);
        tokio::spawn(serve(TcpListener::from_std(listener).unwrap(), sender));
        tokio::spawn(engine(requests, "a 1\n".to_owned(), ready));
        address
    }

    async fn engine(
        mut requests: mpsc::Receiver<Request>,
        metrics: String,
        ready: Result<(), String>,
    ) {
        while let Some(request) = requests.recv().await {
            match request {
                Request::Metrics(reply) => drop(reply.send(Ok(metrics.clone()))),
                Request::Ready(reply) => drop(reply.send(ready.clone())),
                Request::Live(reply) => drop(reply.send(())),
            }
        }
    }

    async fn exchange(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        exchange(
            address,
            &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
        )
        .await
    }

    #[tokio::test]
    async fn each_path_has_its_answer() {
        let address = start(Ok(())).await;
        let metrics = get(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
        assert!(metrics.contains("content-type: text/plain; version=0.0.4; charset=utf-8"));
        assert!(metrics.ends_with("\r\n\r\na 1\n"));
        assert!(get(address, "/healthz").await.ends_with("\r\n\r\nok\n"));
        assert!(get(address, "/readyz").await.ends_with("\r\n\r\nready\n"));
        assert!(get(address, "/").await.contains("/metrics"));
        assert!(get(address, "/other").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_ready_says_why() {
        let address = start(Err("not adopted yet".to_owned())).await;
        let answer = get(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not adopted yet\n"));
    }

    #[tokio::test]
    async fn other_methods_and_garbage_are_refused() {
        let address = start(Ok(())).await;
        let post = "POST /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let answer = exchange(address, post).await;
        assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"));
        assert!(
            exchange(address, "\0\0\0\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 400")
        );
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
    }

    #[tokio::test]
    async fn head_has_the_headers_only() {
        let address = start(Ok(())).await;
        let head = exchange(address, "HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-length: 4\r\n"));
        assert!(head.ends_with("\r\n\r\n"), "{head}");
    }

    #[tokio::test]
    async fn a_connection_ends_with_its_answer() {
        let address = start(Ok(())).await;
        let twice = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2);
        let answer = exchange(address, &twice).await;
        assert_eq!(answer.matches("ok\n").count(), 1, "{answer}");
        assert!(answer.contains("connection: close"));
    }

    /// Each client holds a connection, and more of them than there are wait before the last one.
    async fn standing_still(request: &str) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let (sender, requests) = mpsc::channel(1);
        let bounds = Bounds {
            connections: 2,
            lifetime: Duration::from_millis(300),
        };
        tokio::spawn(serve_within(bounds, listener, sender));
        // More than the socket buffers of both ends hold.
        tokio::spawn(engine(requests, "a 1\n".repeat(4 << 20), Ok(())));
        let mut clients = Vec::new();
        for _ in 0..2 * bounds.connections {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(request.as_bytes()).await.unwrap();
            clients.push(client);
        }
        // Sooner than the time for the headers would help.
        let other = timeout(Duration::from_secs(3), get(address, "/healthz"));
        assert!(other.await.unwrap().ends_with("ok\n"));
    }

    #[tokio::test]
    async fn clients_that_do_not_take_their_answer_do_not_keep_others_out() {
        standing_still("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
    }

    #[tokio::test]
    async fn clients_that_do_not_finish_their_request_do_not_keep_others_out() {
        standing_still("GET /metr").await;
    }

    #[tokio::test]
    async fn an_engine_that_is_stuck_is_told() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::channel(1);
        tokio::spawn(serve(TcpListener::from_std(listener).unwrap(), sender));
        let answer = get(address, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        drop(requests);
    }

    #[tokio::test]
    async fn an_engine_that_has_gone_is_told() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::channel(1);
        drop(requests);
        tokio::spawn(serve(TcpListener::from_std(listener).unwrap(), sender));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 503"));
    }

    #[test]
    fn a_taken_address_is_named_with_the_key() {
        let taken = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind(address).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("metrics.listen: {address}: ")),
            "{error}"
        );
    }
}
