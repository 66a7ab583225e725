//! Serves `/metrics`, `/healthz`, `/readyz` and a landing page at `/` from a separate thread. The answers
//! come from the engine, so an answer proves that the engine is alive.

use std::{
    convert::Infallible,
    fs, io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixListener as StdUnixListener,
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request as HttpRequest, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, listen, socket},
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    runtime,
    sync::mpsc,
    time::timeout,
};

use super::{
    connections::{Connections, HasAsked, accept_failed, one_request},
    landing_page::{self, Readiness},
    to_engine::{Request, ask},
};
use crate::{
    config::MetricsListen,
    host::{
        privilege,
        trust::{self, Untrusted},
    },
    report::control,
};

/// The limits for clients.
#[derive(Clone, Copy)]
struct Bounds {
    /// The maximum number of connections. Beyond it, the oldest connection without a complete request is
    /// closed, otherwise the oldest one. So no client can keep others out by holding connections.
    connections: usize,
    /// The maximum lifetime of a connection: the headers, the engine's answer, and time to read the answer.
    lifetime: Duration,
}

const BOUNDS: Bounds = Bounds {
    connections: 256,
    lifetime: Duration::from_secs(15),
};

/// How often an address that another program has is tried again.
const RETRY: Duration = Duration::from_secs(3);

/// The daemon's user and group may connect to a Unix socket.
const SOCKET_MODE: u32 = 0o660;

/// The reasons why the metrics cannot be served.
#[derive(Debug, Error)]
pub enum BindError {
    /// The address is in use or not local, or the socket cannot be created.
    #[error(
        "metrics.listen: {listen}: {source}; choose another address, stop the program that has it, or \"\" for \
         none"
    )]
    Bind {
        /// The address.
        listen: MetricsListen,
        /// The error.
        source: io::Error,
    },
    /// Another user could replace the socket.
    #[error("metrics.listen: {0}")]
    Untrusted(#[source] Untrusted),
}

impl BindError {
    /// Whether another program listens at the address.
    pub fn is_in_use(&self) -> bool {
        matches!(self, Self::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

/// The address of the metrics.
#[derive(Debug)]
pub enum Address {
    /// The daemon listens at it.
    Bound(Listener),
    /// Another program listens at it. It is tried again until it is free.
    InUse(MetricsListen),
}

/// A listening socket that is not served yet.
#[derive(Debug)]
pub enum Listener {
    /// A TCP socket.
    Tcp(std::net::TcpListener),
    /// A Unix socket.
    Unix(StdUnixListener),
}

/// Starts to listen.
///
/// # Errors
///
/// Fails if the address is in use or not local, if a Unix socket cannot be created, or if other users could
/// replace it.
pub fn bind(listen: &MetricsListen) -> Result<Listener, BindError> {
    let bound = match listen {
        MetricsListen::Tcp(address) => bind_tcp(*address),
        MetricsListen::Unix(path) => {
            trust::check(directory_of(path)).map_err(BindError::Untrusted)?;
            bind_unix(path, SOCKET_MODE).map(Listener::Unix)
        }
    };
    bound.map_err(|source| BindError::Bind {
        listen: listen.clone(),
        source,
    })
}

/// The directory of a Unix socket, whose writers could replace the socket. Writers of the socket itself can
/// only connect.
pub(super) fn directory_of(socket: &Path) -> &Path {
    socket.parent().unwrap_or(socket)
}

fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
    let listener = std::net::TcpListener::bind(address)?;
    // The standard library asks for a queue of 128, which one process that only connects keeps full. A second listen(2)
    // changes the length, here to the most that `net.core.somaxconn` allows.
    listen(&listener, Backlog::MAXALLOWABLE)?;
    listener.set_nonblocking(true)?;
    Ok(Listener::Tcp(listener))
}

/// Creates a Unix socket with these permissions. An existing socket without a listener is left over from a
/// daemon that has ended and is replaced.
pub(super) fn bind_unix(path: &Path, mode: u32) -> io::Result<StdUnixListener> {
    check_place(path)?;
    if is_socket(path) && !has_listener(path) {
        fs::remove_file(path)?;
    }
    let listener = StdUnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Checks that a Unix socket can be at the path: its directory exists, and no other kind of file is there.
pub(super) fn check_place(path: &Path) -> io::Result<()> {
    fs::metadata(directory_of(path))?;
    if fs::symlink_metadata(path).is_ok() && !is_socket(path) {
        let what = "a file or directory that is no socket is there";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    }
    Ok(())
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// Whether a process listens at a Unix socket.
fn has_listener(path: &Path) -> bool {
    // EAGAIN: the listener's queue is full.
    matches!(connect_at_once(path), Ok(_) | Err(Errno::EAGAIN))
}

/// Connects, but does not wait for a process that accepts no connections.
fn connect_at_once(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(client.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(client)
}

/// The path of a Unix socket.
///
/// # Errors
///
/// Fails if the kernel does not return it.
pub fn path_of(socket: &StdUnixListener) -> io::Result<PathBuf> {
    let address = socket.local_addr()?;
    Ok(address.as_pathname().unwrap_or(Path::new("")).to_owned())
}

/// Checks whether the TCP address is local. The port is ignored, because a running daemon may use it. For a
/// Unix socket, checks whether its directory exists and is trusted.
///
/// # Errors
///
/// Fails if [`bind`] would fail for these reasons.
pub fn check(listen: &MetricsListen) -> Result<(), BindError> {
    let found = match listen {
        MetricsListen::Tcp(address) => {
            match std::net::TcpListener::bind(SocketAddr::new(address.ip(), 0)) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(error),
                _ => Ok(()),
            }
        }
        MetricsListen::Unix(path) => {
            trust::check(directory_of(path)).map_err(BindError::Untrusted)?;
            check_place(path)
        }
    };
    found.map_err(|source| BindError::Bind {
        listen: listen.clone(),
        source,
    })
}

/// Starts the thread that serves the metrics and the control socket until the engine, which has the other end of
/// `requests`, has ended. `ended` is dropped when the clients of the control socket have the rest of their answers.
/// The thread inherits the privileges of the calling thread.
///
/// # Errors
///
/// Fails if the thread cannot be started.
pub fn start(
    address: Option<Address>,
    control: Option<control::Server>,
    requests: mpsc::Sender<Request>,
    ended: impl Send + 'static,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let work = move || {
        privilege::give_way();
        runtime.block_on(async move {
            let metrics = async {
                if let Some(address) = address
                    && let Err(error) = serve_metrics(address, requests.clone()).await
                {
                    tracing::error!("metrics.listen is not served: {error}");
                }
            };
            let control = async {
                if let Some(control) = control
                    && let Err(error) = control::serve(control, requests.clone()).await
                {
                    tracing::error!("control.socket is not served: {error}");
                }
            };
            tokio::join!(metrics, control);
        });
        drop(ended);
    };
    thread::Builder::new().name("http".to_owned()).spawn(work)?;
    Ok(())
}

async fn serve_metrics(address: Address, requests: mpsc::Sender<Request>) -> io::Result<()> {
    let listener = match address {
        Address::Bound(listener) => listener,
        Address::InUse(listen) => match bind_when_free(&listen, &requests).await {
            Some(listener) => listener,
            None => return Ok(()),
        },
    };
    match &listener {
        Listener::Tcp(tcp) => tracing::info!("metrics at http://{}/metrics", tcp.local_addr()?),
        Listener::Unix(socket) => {
            let path = path_of(socket)?;
            tracing::info!("metrics at {}, a Unix socket", path.display());
        }
    }
    serve_within(BOUNDS, Accepting::of(listener)?, requests).await;
    Ok(())
}

/// Listens at an address as soon as no other program does. `None` if the engine ends before.
async fn bind_when_free(
    listen: &MetricsListen,
    requests: &mpsc::Sender<Request>,
) -> Option<Listener> {
    let mut is_logged = false;
    loop {
        match bind(listen) {
            Ok(listener) => return Some(listener),
            Err(error) if error.is_in_use() || is_logged => {}
            // A port below 1024, for example, which this thread may not bind.
            Err(error) => {
                tracing::error!("{error}; once the address is free, restart the daemon");
                is_logged = true;
            }
        }
        if timeout(RETRY, requests.closed()).await.is_ok() {
            return None;
        }
    }
}

/// A listener in the server's runtime.
enum Accepting {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client's stream.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Accepting {
    fn of(listener: Listener) -> io::Result<Self> {
        Ok(match listener {
            Listener::Tcp(listener) => Self::Tcp(TcpListener::from_std(listener)?),
            Listener::Unix(listener) => Self::Unix(UnixListener::from_std(listener)?),
        })
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

async fn serve_within(bounds: Bounds, listener: Accepting, requests: mpsc::Sender<Request>) {
    let mut connections = Connections::at_most(bounds.connections);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = requests.closed() => return,
        };
        match accepted {
            Ok(stream) => {
                if !connections.make_room() {
                    connections.close_oldest();
                }
                let requests = requests.clone();
                let serve =
                    |has_asked| timeout(bounds.lifetime, connection(stream, requests, has_asked));
                connections.serve(serve).await;
            }
            Err(error) => accept_failed("metrics.listen", &error).await,
        }
    }
}

async fn connection(stream: Box<dyn Stream>, requests: mpsc::Sender<Request>, has_asked: HasAsked) {
    let service = service_fn(move |request: HttpRequest<Incoming>| {
        has_asked.note();
        let requests = requests.clone();
        async move { Ok::<_, Infallible>(answer(&request, &requests).await) }
    });
    let served = one_request().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        // Errors of a client do not concern the operator.
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
        "/" => landing_page(requests).await,
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /, /metrics, /healthz and /readyz\n",
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

/// Answers with status 200 even if the daemon is not ready, because the page is for people.
async fn landing_page(requests: &mpsc::Sender<Request>) -> Answer {
    let readiness = match ask(requests, Request::Ready).await {
        Some(Ok(())) => Readiness::Ready,
        Some(Err(reason)) => Readiness::NotReady(reason),
        None => Readiness::Stuck,
    };
    let mut answer = text(StatusCode::OK, landing_page::html(&readiness));
    let headers = answer.headers_mut();
    let kind = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(CONTENT_TYPE, kind);
    // The page loads and runs nothing, even if foreign text gets into it.
    let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    answer
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
    use std::iter;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpStream, UnixStream},
    };

    use super::*;
    use crate::report::to_engine::ENGINE_TIMEOUT;

    /// A socket on a free port, and its address.
    fn listen() -> (Listener, SocketAddr) {
        let listener = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(tcp) = &listener else {
            panic!("{listener:?}");
        };
        let address = tcp.local_addr().unwrap();
        (listener, address)
    }

    #[test]
    fn more_connections_can_wait_than_the_standard_library_asks_for() {
        let (_listener, address) = listen();
        // The kernel drops a SYN for which the queue has no place. The next one follows after 1 s.
        let connect =
            |_| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(900));
        let waiting: io::Result<Vec<_>> = (0..200).map(connect).collect();
        waiting.unwrap();
    }

    /// Starts a server with an engine that gives these answers.
    async fn begin(ready: Result<(), String>) -> SocketAddr {
        let (listener, address) = listen();
        let (sender, requests) = mpsc::channel(1);
        start(Some(Address::Bound(listener)), None, sender, ()).unwrap();
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
                Request::Control(_) => {}
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
        let address = begin(Ok(())).await;
        let metrics = get(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
        assert!(metrics.contains("content-type: text/plain; version=0.0.4; charset=utf-8"));
        assert!(metrics.ends_with("\r\n\r\na 1\n"));
        assert!(get(address, "/healthz").await.ends_with("\r\n\r\nok\n"));
        assert!(get(address, "/readyz").await.ends_with("\r\n\r\nready\n"));
        let page = get(address, "/").await;
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(page.contains("content-type: text/html; charset=utf-8\r\n"));
        assert!(page.contains("content-security-policy: default-src 'none'"));
        assert!(page.contains("The daemon is ready: "), "{page}");
        assert!(get(address, "/other").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_ready_says_why() {
        let address = begin(Err("not adopted yet".to_owned())).await;
        let answer = get(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not adopted yet\n"));
        let page = get(address, "/").await;
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(page.contains("The daemon is not ready: not adopted yet."));
    }

    #[tokio::test]
    async fn other_methods_and_garbage_are_refused() {
        let address = begin(Ok(())).await;
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
        let address = begin(Ok(())).await;
        let head = exchange(address, "HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-length: 4\r\n"));
        assert!(head.ends_with("\r\n\r\n"), "{head}");
    }

    #[tokio::test]
    async fn a_connection_ends_with_its_answer() {
        let address = begin(Ok(())).await;
        let twice = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2);
        let answer = exchange(address, &twice).await;
        assert_eq!(answer.matches("ok\n").count(), 1, "{answer}");
        assert!(answer.contains("connection: close"));
    }

    /// Opens more connections than the limit, each of which stalls, before the last client asks.
    async fn standing_still(request: &str) {
        let (listener, address) = listen();
        let listener = Accepting::of(listener).unwrap();
        let (sender, requests) = mpsc::channel(1);
        let bounds = Bounds {
            connections: 2,
            lifetime: Duration::from_millis(300),
        };
        tokio::spawn(serve_within(bounds, listener, sender));
        // The answer exceeds the socket buffers of both ends.
        tokio::spawn(engine(requests, "a 1\n".repeat(4 << 20), Ok(())));
        let mut clients = Vec::new();
        for _ in 0..2 * bounds.connections {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(request.as_bytes()).await.unwrap();
            clients.push(client);
        }
        // This is shorter than the header time limit, so that limit cannot be the reason for success.
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
        let (listener, address) = listen();
        let (sender, requests) = mpsc::channel(1);
        start(Some(Address::Bound(listener)), None, sender, ()).unwrap();
        let answer = get(address, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        drop(requests);
    }

    #[test]
    fn the_thread_ends_when_the_engine_has_gone() {
        let (listener, _) = listen();
        let (sender, requests) = mpsc::channel(1);
        let (ended, has_ended) = std::sync::mpsc::channel::<()>();
        start(Some(Address::Bound(listener)), None, sender, ended).unwrap();
        drop(requests);
        let waited = has_ended.recv_timeout(ENGINE_TIMEOUT);
        assert_eq!(waited, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_taken_address_is_named_with_the_key() {
        let (_taken, address) = listen();
        let error = bind(&MetricsListen::Tcp(address)).unwrap_err();
        assert!(error.is_in_use());
        let error = error.to_string();
        assert!(
            error.starts_with(&format!("metrics.listen: {address}: ")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn an_address_in_use_is_served_once_it_is_free() {
        let (taken, address) = listen();
        let (sender, requests) = mpsc::channel(1);
        let listen = MetricsListen::Tcp(address);
        start(Some(Address::InUse(listen)), None, sender, ()).unwrap();
        tokio::spawn(engine(requests, String::new(), Ok(())));
        drop(taken);
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
    }

    #[test]
    fn the_thread_that_waits_for_an_address_ends_with_the_engine() {
        let (_taken, address) = listen();
        let (sender, requests) = mpsc::channel(1);
        let (ended, has_ended) = std::sync::mpsc::channel::<()>();
        let in_use = Address::InUse(MetricsListen::Tcp(address));
        start(Some(in_use), None, sender, ended).unwrap();
        drop(requests);
        let waited = has_ended.recv_timeout(RETRY / 2);
        assert_eq!(waited, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_listener_that_accepts_nothing_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        let listener = bind_unix(&path, SOCKET_MODE).unwrap();
        nix::sys::socket::listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let clients: Vec<_> = iter::from_fn(|| connect_at_once(&path).ok()).collect();
        assert!(!clients.is_empty());
        assert!(bind(&MetricsListen::Unix(path)).unwrap_err().is_in_use());
    }

    #[tokio::test]
    async fn a_unix_socket_is_served_and_taken_over_from_a_daemon_that_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        let socket = MetricsListen::Unix(path.clone());
        check(&socket).unwrap();
        drop(bind(&socket).unwrap());
        let (sender, requests) = mpsc::channel(1);
        start(
            Some(Address::Bound(bind(&socket).unwrap())),
            None,
            sender,
            (),
        )
        .unwrap();
        tokio::spawn(engine(requests, String::new(), Ok(())));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        let mut client = UnixStream::connect(&path).await.unwrap();
        let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("ok\n"), "{answer}");
        let error = bind(&socket).unwrap_err();
        assert!(error.is_in_use());
        let error = error.to_string();
        let start = format!("metrics.listen: unix:{}: ", path.display());
        assert!(error.starts_with(&start), "{error}");
    }

    #[test]
    fn nothing_but_a_socket_is_replaced_and_no_place_that_others_could_change_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a-file");
        fs::write(&path, "kept").unwrap();
        let error = bind(&MetricsListen::Unix(path.clone())).unwrap_err();
        assert!(!error.is_in_use(), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        let nowhere = MetricsListen::Unix(directory.path().join("none/metrics.sock"));
        assert!(check(&nowhere).is_err() && bind(&nowhere).is_err());
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let open = MetricsListen::Unix(directory.path().join("metrics.sock"));
        for refused in [check(&open).unwrap_err(), bind(&open).unwrap_err()] {
            assert!(matches!(refused, BindError::Untrusted(_)), "{refused}");
        }
    }
}
