//! The client of a running daemon's control socket.

use std::{
    fmt,
    future::Future,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, body::Incoming, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, runtime, time::timeout};

use crate::{
    exit::{ExitStatus, Failure},
    report::control::Refusal,
};

/// The maximum length of a line in bytes.
const MAX_LINE: usize = 16 << 20;

/// How long the first answer to a question may take.
const READ_PATIENCE: Duration = Duration::from_secs(20);

/// How long the first answer to a kill or a reload may take. A reload of very many sessions takes some seconds.
const CHANGE_PATIENCE: Duration = Duration::from_secs(60);

/// A client of one daemon.
#[derive(Clone, Debug)]
pub(crate) struct DaemonClient {
    socket: PathBuf,
}

/// Runs a request to the daemon to its end.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    runtime.block_on(work)
}

/// Appends these pairs to the path as a query.
pub(crate) fn with_query(path: &str, pairs: &[(&str, &str)]) -> String {
    if pairs.is_empty() {
        return path.to_owned();
    }
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(pairs);
    format!("{path}?{}", query.finish())
}

impl DaemonClient {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Requests a value.
    pub(crate) async fn value<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T> {
        let answer = self.ask(method, path, Bytes::new()).await?;
        let text = answer.collect().await.context(BROKEN_OFF)?.to_bytes();
        serde_json::from_slice(&text).context(ANOTHER_VERSION)
    }

    /// Requests lines.
    pub(crate) async fn lines(&self, method: Method, path: &str, body: Bytes) -> Result<Lines> {
        Ok(Lines {
            body: self.ask(method, path, body).await?,
            waiting: Vec::new(),
            next: 0,
        })
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|error| self.unreachable(&error))?;
        let patience = if method == Method::GET {
            READ_PATIENCE
        } else {
            CHANGE_PATIENCE
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // Errors of the connection also appear in the answer.
            let _ = connection.await;
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "session-enforcer")
            .body(Full::new(body))
            .context("building the request")?;
        let silent = |why: &dyn fmt::Display| {
            let socket = self.socket.display();
            let message = format!("{socket}: the daemon does not answer: {why}");
            Failure::new(ExitStatus::Unavailable, message)
        };
        let answer = timeout(patience, sender.send_request(request)).await;
        let answer = answer.map_err(|_elapsed| {
            silent(&format_args!(
                "nothing came in {patience:?}; is it stopped? It may still do what was asked"
            ))
        })?;
        let answer = answer.map_err(|error| silent(&error))?;
        let status = answer.status();
        let body = answer.into_body();
        if status == StatusCode::OK {
            return Ok(body);
        }
        let text = body.collect().await.context(BROKEN_OFF)?.to_bytes();
        let refusal: Option<Refusal> = serde_json::from_slice(&text).ok();
        let error = refusal.map_or_else(|| status.to_string(), |refusal| refusal.error);
        Err(Failure::new(exit_status(status), error).into())
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                let message = format!(
                    "{socket}: {error}; run this as root, or as a member of the group in control.group"
                );
                Failure::new(ExitStatus::NoPermission, message)
            }
            _ => {
                let message = format!(
                    "{socket}: no daemon answers: {error}; start the daemon, or name its socket with --socket"
                );
                Failure::new(ExitStatus::Unavailable, message)
            }
        }
    }
}

const BROKEN_OFF: &str = "the connection to the daemon broke during its answer";
const ANOTHER_VERSION: &str =
    "the daemon's answer cannot be parsed: the daemon and this command are of different versions";

fn exit_status(status: StatusCode) -> ExitStatus {
    match status {
        StatusCode::BAD_REQUEST => ExitStatus::Usage,
        StatusCode::FORBIDDEN => ExitStatus::NoPermission,
        StatusCode::UNPROCESSABLE_ENTITY => ExitStatus::Configuration,
        StatusCode::SERVICE_UNAVAILABLE => ExitStatus::Unavailable,
        _ => ExitStatus::Other,
    }
}

/// The lines of an answer, as they arrive.
pub(crate) struct Lines {
    body: Incoming,
    waiting: Vec<u8>,
    /// The start of the next line.
    next: usize,
}

impl Lines {
    /// Returns the next line without its newline, or `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<&[u8]>> {
        let mut looked_at = self.next;
        loop {
            let rest = self.waiting.get(looked_at..).unwrap_or_default();
            if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                let (start, end) = (self.next, looked_at + length);
                self.next = end + 1;
                return Ok(self.waiting.get(start..end));
            }
            self.waiting.drain(..self.next);
            self.next = 0;
            looked_at = self.waiting.len();
            anyhow::ensure!(self.waiting.len() <= MAX_LINE, ANOTHER_VERSION);
            match self.body.frame().await {
                Some(frame) => {
                    let frame = frame.context(BROKEN_OFF)?;
                    if let Ok(data) = frame.into_data() {
                        self.waiting.extend_from_slice(&data);
                    }
                }
                None => {
                    anyhow::ensure!(self.waiting.is_empty(), BROKEN_OFF);
                    return Ok(None);
                }
            }
        }
    }
}

/// Parses a line.
pub(crate) fn parse<'a, T: serde::Deserialize<'a>>(line: &'a [u8]) -> Result<T> {
    serde_json::from_slice(line).context(ANOTHER_VERSION)
}
