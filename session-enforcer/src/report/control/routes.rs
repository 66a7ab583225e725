//! The HTTP routes of the control socket.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    Method, Request as HttpRequest, Response, StatusCode,
    body::{Body, Frame, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
};
use serde::Serialize;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, unbounded_channel},
    time::timeout,
};

use super::{
    Selection,
    kill_request::KillSelection,
    listing::{self, Broken, Gone, Lines, Scan, ask},
    messages::{
        KillLine, KillOutcome, KillRequest, KillResult, Killed, Refusal, ReloadRequest, Request,
    },
    session_row::Listed,
};
use crate::{
    datapath::TableInUse,
    host::clock::{WallClock, monotonic_ns},
    report::{
        audit::{Requester, Subscription},
        to_engine,
    },
};

/// The answer to a filter by owner if no rule in force names owners.
const NO_OWNERS: &str =
    "user, cgroup: the owners of sessions are not known, because no rule names users or cgroups";

/// The maximum length of a request body in bytes.
const MAX_BODY: usize = 1 << 20;

/// The time limit for a request body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum number of chunks of an answer that wait for the client.
const WAITING_CHUNKS: usize = 4;

/// The number of sessions in one reset request to the engine.
const KILL_BATCH: usize = 128;

/// The maximum number of sessions whose reset is unanswered.
const MAX_UNANSWERED_KILLS: usize = 1_024;

/// After this time without an answer the remaining sessions are reported as pending. A session is reported as
/// failed earlier if its reset hangs on a socket lock, or if too many resets hang already.
const KILL_PATIENCE: Duration = Duration::from_secs(30);

/// The time limit for a reload. With a million connections a reload takes about 10 s.
const RELOAD_PATIENCE: Duration = Duration::from_secs(300);

/// The last line of the event stream if the client fell behind.
const CUT_OFF: &[u8] =
    b"{\"error\":\"records were left out: they were not read fast enough; ask again\"}\n";

/// A client and the sources of its answers.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) requester: Arc<Result<Requester, String>>,
    pub(super) engine: mpsc::Sender<to_engine::Request>,
    pub(super) sessions: Arc<TableInUse>,
}

/// An answer: one body, or a stream of chunks.
pub(super) type Answer = Response<Either<Full<Bytes>, Pieces>>;

/// A stream of chunks.
pub(super) struct Pieces(mpsc::Receiver<io::Result<Bytes>>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let piece = self.0.poll_recv(context);
        piece.map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

impl Client {
    pub(super) async fn answer(&self, request: HttpRequest<Incoming>) -> Answer {
        let requester = match &*self.requester {
            Ok(requester) => requester.clone(),
            Err(why) => return refusal(StatusCode::FORBIDDEN, why),
        };
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let allowed = match &*path {
            "/v1/sessions/kill" | "/v1/reload" => Method::POST,
            "/v1/status" | "/v1/sessions" | "/v1/events" => Method::GET,
            path if path.starts_with("/v1/sessions/") => Method::GET,
            _ => {
                return refusal(
                    StatusCode::NOT_FOUND,
                    &format!("there is no {path}; {PATHS}"),
                );
            }
        };
        if head.method != allowed {
            return not_allowed(&allowed);
        }
        match &*path {
            "/v1/status" => self.status().await,
            "/v1/sessions" => self.list(&query).await,
            "/v1/events" => self.events().await,
            "/v1/reload" => self.reload(requester).await,
            "/v1/sessions/kill" => match read(body).await {
                Ok(body) => self.kill(&query, &body, requester).await,
                Err(refused) => *refused,
            },
            path => self.one(path.trim_start_matches("/v1/sessions/")).await,
        }
    }

    async fn status(&self) -> Answer {
        match ask(&self.engine, Request::Status).await {
            Some(status) => json(StatusCode::OK, &status),
            None => stuck(),
        }
    }

    async fn scan(&self) -> Result<Scan, Box<Answer>> {
        let begun = Scan::begin(self.engine.clone(), self.sessions.reader()).await;
        begun.map_err(|Broken(why)| Box::new(refusal(StatusCode::SERVICE_UNAVAILABLE, &why)))
    }

    /// Starts a scan of the table for this selection.
    async fn scan_for(&self, selection: &Selection) -> Result<Scan, Box<Answer>> {
        let scan = self.scan().await?;
        if selection.filter.names_owner() && !scan.knows_owners() {
            return Err(Box::new(refusal(StatusCode::BAD_REQUEST, NO_OWNERS)));
        }
        match selection.filter.rule() {
            Some(rule) if !scan.has_rule(rule) => {
                let why = format!(
                    "rule: there is no rule \"{rule}\"; `session-enforcer status` shows the names of the rules"
                );
                Err(Box::new(refusal(StatusCode::NOT_FOUND, &why)))
            }
            _ => Ok(scan),
        }
    }

    async fn list(&self, query: &str) -> Answer {
        let selection = match Selection::parse(query) {
            Ok(selection) => selection,
            Err(why) => return refusal(StatusCode::BAD_REQUEST, &why),
        };
        match self.scan_for(&selection).await {
            Ok(scan) => streamed(|lines| listing::list(scan, selection, lines)),
            Err(refused) => *refused,
        }
    }

    async fn one(&self, id: &str) -> Answer {
        let Ok(id) = id.parse::<u64>() else {
            return refusal(StatusCode::NOT_FOUND, "a session has a number");
        };
        let mut scan = match self.scan().await {
            Ok(scan) => scan,
            Err(refused) => return *refused,
        };
        let sessions = match scan.of(&[id]).await {
            Ok(sessions) => sessions,
            Err(Broken(why)) => return refusal(StatusCode::INTERNAL_SERVER_ERROR, &why),
        };
        let found = sessions
            .first()
            .and_then(|(id, session)| scan.found(*id, session));
        match found {
            Some(found) => {
                let row = found.row(&WallClock::now(), monotonic_ns());
                json(StatusCode::OK, &row)
            }
            None => {
                let why = format!("there is no session {id}: it has ended, or no rule matches it");
                refusal(StatusCode::NOT_FOUND, &why)
            }
        }
    }

    async fn kill(&self, query: &str, body: &[u8], requester: Requester) -> Answer {
        let request = match KillSelection::parse(query, body) {
            Ok(request) => request,
            Err(why) => return refusal(StatusCode::BAD_REQUEST, &why),
        };
        let scan = match self.scan_for(&request.selection).await {
            Ok(scan) => scan,
            Err(refused) => return *refused,
        };
        if !request.selection.dry_run {
            tracing::info!(
                "user {}, process {} ({:?}) asks for a reset of {request}",
                requester.uid,
                requester.pid,
                requester.command,
            );
        }
        let engine = self.engine.clone();
        streamed(|lines| Kill::new(engine, scan, request, requester, lines).run())
    }

    async fn reload(&self, by: Requester) -> Answer {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let request = to_engine::Request::Control(Request::Reload(ReloadRequest { by, reply }));
        if self.engine.send(request).await.is_err() {
            return stuck();
        }
        match timeout(RELOAD_PATIENCE, answer).await {
            Ok(Ok(Ok(change))) => json(StatusCode::OK, &change),
            Ok(Ok(Err(refused))) => json(StatusCode::UNPROCESSABLE_ENTITY, &refused),
            _ => stuck(),
        }
    }

    async fn events(&self) -> Answer {
        match ask(&self.engine, Request::Events).await {
            Some(Some(subscription)) => streamed(|lines| follow(subscription, lines)),
            Some(None) => refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many follow the events already; end one of them",
            ),
            None => stuck(),
        }
    }
}

const PATHS: &str = "there are GET /v1/status, /v1/sessions, /v1/sessions/ID, /v1/events and POST /v1/sessions/kill, \
                     /v1/reload";

/// Reads the body of a request.
async fn read(body: Incoming) -> Result<Bytes, Box<Answer>> {
    let refused = |status, why: &str| Err(Box::new(refusal(status, why)));
    let too_large =
        format!("the request is larger than {MAX_BODY} bytes; name fewer sessions at once");
    if body.size_hint().lower() > MAX_BODY as u64 {
        return refused(StatusCode::PAYLOAD_TOO_LARGE, &too_large);
    }
    match timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            refused(StatusCode::PAYLOAD_TOO_LARGE, &too_large)
        }
        Ok(Err(error)) => refused(StatusCode::BAD_REQUEST, &error.to_string()),
        Err(_) => refused(
            StatusCode::REQUEST_TIMEOUT,
            "the request was not sent in time",
        ),
    }
}

/// Answers with lines that a separate task produces.
fn streamed<F: Future<Output = ()> + Send + 'static>(make: impl FnOnce(Lines) -> F) -> Answer {
    let (sender, pieces) = mpsc::channel(WAITING_CHUNKS);
    tokio::spawn(make(Lines::to(sender)));
    let mut answer = Response::new(Either::Right(Pieces(pieces)));
    let kind = HeaderValue::from_static("application/x-ndjson");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    let mut answer = Response::new(Either::Left(Full::new(text.into())));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

pub(super) fn refusal(status: StatusCode, why: &str) -> Answer {
    let error = why.to_owned();
    json(status, &Refusal { error })
}

fn stuck() -> Answer {
    refusal(
        StatusCode::SERVICE_UNAVAILABLE,
        "the engine does not answer",
    )
}

fn not_allowed(allowed: &Method) -> Answer {
    let mut answer = refusal(StatusCode::METHOD_NOT_ALLOWED, &format!("only {allowed}"));
    if let Ok(allowed) = HeaderValue::from_str(allowed.as_str()) {
        answer.headers_mut().insert(ALLOW, allowed);
    }
    answer
}

/// Forwards the audit records to the client.
async fn follow(mut subscription: Subscription, mut lines: Lines) {
    loop {
        let records = tokio::select! {
            records = subscription.next() => records,
            () = lines.gone() => return,
        };
        let Some(records) = records else {
            break;
        };
        if lines.send(records).await.is_err() {
            return;
        }
    }
    if subscription.is_cut_off() {
        let _ = lines.send(Bytes::from_static(CUT_OFF)).await;
    }
}

/// A kill request: the resets and their answers.
struct Kill {
    engine: mpsc::Sender<to_engine::Request>,
    scan: Scan,
    request: KillSelection,
    by: Arc<Requester>,
    lines: Lines,
    results: UnboundedReceiver<Killed>,
    sender: mpsc::UnboundedSender<Killed>,
    unanswered: HashMap<u64, KillLine>,
}

/// The reasons why the remaining sessions are not reset.
enum Ended {
    Broken(Broken),
    Gone,
}

impl From<Broken> for Ended {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<Gone> for Ended {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl Kill {
    fn new(
        engine: mpsc::Sender<to_engine::Request>,
        scan: Scan,
        request: KillSelection,
        by: Requester,
        lines: Lines,
    ) -> Self {
        let (sender, results) = unbounded_channel();
        Self {
            engine,
            scan,
            request,
            by: Arc::new(by),
            lines,
            results,
            sender,
            unanswered: HashMap::new(),
        }
    }

    async fn run(mut self) {
        match self.reset_all().await {
            Ok(()) | Err(Ended::Gone) => {}
            Err(Ended::Broken(broken)) => self.lines.break_off(broken).await,
        }
    }

    async fn reset_all(&mut self) -> Result<(), Ended> {
        match self.request.ids.take() {
            Some(ids) => {
                let ids: Vec<u64> = ids.into_iter().collect();
                for some in ids.chunks(KILL_BATCH) {
                    let sessions = self.scan.of(some).await?;
                    let mut missing: BTreeSet<u64> = some.iter().copied().collect();
                    for id in self.reset(&sessions).await? {
                        missing.remove(&id);
                    }
                    for id in missing {
                        self.lines.add(&not_found(id));
                    }
                }
            }
            None => {
                while let Some(sessions) = self.scan.next().await? {
                    for some in sessions.chunks(KILL_BATCH) {
                        self.reset(some).await?;
                    }
                }
            }
        }
        while !self.unanswered.is_empty() {
            self.wait().await?;
        }
        Ok(self.lines.flush().await?)
    }

    /// Requests the reset of the matching sessions. Returns their IDs.
    async fn reset(
        &mut self,
        sessions: &[(u64, session_enforcer_common::Session)],
    ) -> Result<Vec<u64>, Ended> {
        let now_ns = monotonic_ns();
        let mut meant = Vec::new();
        for (id, session) in sessions {
            let found = self.scan.found(*id, session);
            let found = found.filter(|found| self.request.selection.filter.matches(found, now_ns));
            if let Some(found) = found {
                meant.push((line(&found), session.established_ns));
            }
        }
        let ids = meant.iter().map(|(line, _)| line.id).collect();
        if self.request.selection.dry_run {
            meant.iter().for_each(|(line, _)| self.lines.add(line));
        } else if !meant.is_empty() {
            self.ask(meant).await?;
        }
        while let Ok(killed) = self.results.try_recv() {
            self.answered(killed);
        }
        self.lines.pass_on().await?;
        while self.unanswered.len() > MAX_UNANSWERED_KILLS - KILL_BATCH {
            self.wait().await?;
        }
        Ok(ids)
    }

    async fn ask(&mut self, meant: Vec<(KillLine, u64)>) -> Result<(), Ended> {
        let request = KillRequest {
            sessions: meant.iter().map(|(line, ns)| (line.id, *ns)).collect(),
            by: Arc::clone(&self.by),
            results: self.sender.clone(),
        };
        for (line, _) in meant {
            self.unanswered.insert(line.id, line);
        }
        let request = to_engine::Request::Control(Request::Kill(request));
        let sent = self.engine.send(request).await;
        sent.map_err(|_| Broken("the daemon has stopped".to_owned()).into())
    }

    /// Waits for an answer.
    async fn wait(&mut self) -> Result<(), Ended> {
        self.lines.flush().await?;
        match timeout(KILL_PATIENCE, self.results.recv()).await {
            Ok(Some(killed)) => self.answered(killed),
            _ => {
                for (_, line) in self.unanswered.drain() {
                    self.lines.add(&KillLine {
                        result: KillOutcome::Pending,
                        ..line
                    });
                }
            }
        }
        Ok(())
    }

    fn answered(&mut self, killed: Killed) {
        let Some(line) = self.unanswered.remove(&killed.id) else {
            return;
        };
        let (result, error) = match killed.result {
            KillResult::Reset => (KillOutcome::Reset, None),
            KillResult::Gone => (KillOutcome::Gone, None),
            KillResult::Failed(why) => (KillOutcome::Failed, Some(why)),
        };
        self.lines.add(&KillLine {
            result,
            error,
            ..line
        });
    }
}

/// The answer line for a session that matches the request.
fn line(found: &Listed<'_>) -> KillLine {
    let row = found.row(&WallClock::now(), monotonic_ns());
    KillLine {
        id: found.id,
        rule: Some(row.rule.into_owned()),
        local: Some(row.local),
        remote: Some(row.remote),
        result: KillOutcome::WouldReset,
        error: None,
    }
}

fn not_found(id: u64) -> KillLine {
    KillLine {
        id,
        rule: None,
        local: None,
        remote: None,
        result: KillOutcome::NotFound,
        error: None,
    }
}
