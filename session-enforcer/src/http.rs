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

/// Connections at once. A scraper needs one; a client that keeps more open waits.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to send its request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may last. Prometheus opens a new one when it ends.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);

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
#[error("metrics.listen: {address}: {source}; choose another address, or \"\" for none")]
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
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let requests = requests.clone();
                tokio::spawn(async move {
                    connection(stream, requests).await;
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
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, served).await {
        Ok(Ok(())) | Err(_) => {}
        // Whatever a client does wrong is its own affair.
        Ok(Err(error)) => tracing::debug!("an HTTP connection: {error}"),
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
        let (sender, mut requests) = mpsc::channel(1);
        tokio::spawn(serve(TcpListener::from_std(listener).unwrap(), sender));
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                match request {
                    Request::Metrics(reply) => drop(reply.send(Ok("a 1\n".to_owned()))),
                    Request::Ready(reply) => drop(reply.send(ready.clone())),
                    Request::Live(reply) => drop(reply.send(())),
                }
            }
        });
        address
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
