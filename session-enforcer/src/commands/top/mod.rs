//! `session-enforcer top`: shows the live sessions on the whole terminal.
//!
//! The state and the drawing are pure ([`board`], [`draw`]). This file has the connection to the daemon, the
//! keyboard and the signals.

mod board;
mod draw;

use std::{
    env,
    io::{self, IsTerminal as _},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use hyper::Method;
use ratatui::{DefaultTerminal, crossterm::event};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, sleep, sleep_until},
};

use super::{
    daemon_client::{DaemonClient, block_on, parse, with_query},
    follow::words,
};
use crate::{
    cli::TopArgs,
    exit::{ExitStatus, Failure},
    report::control::{KillLine, Row, Status},
};
use board::{Action, Board, Fetched};

/// The minimum interval between two fetches.
const PERIOD: Duration = Duration::from_secs(1);

/// The pause after a fetch, as a multiple of its duration: a fetch of very many sessions takes a while.
const REST: u32 = 30;

/// The maximum number of displayed sessions.
const MAX_ROWS: &str = "500";

/// The pause before the event stream is opened again after a failure.
const FOLLOW_AGAIN: Duration = Duration::from_secs(2);

/// Shows the sessions until the user quits.
///
/// # Errors
///
/// Fails if there is no terminal, or no daemon answers.
pub fn top(args: &TopArgs) -> Result<()> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "top needs a terminal; `session-enforcer list` prints the sessions";
        return Err(Failure::new(ExitStatus::Usage, message).into());
    }
    let client = DaemonClient::new(&args.daemon.socket);
    block_on(async {
        // Fail before drawing if no daemon answers.
        client.value::<Status>(Method::GET, "/v1/status").await?;
        let signals = Signals::new().context("taking over signals")?;
        let terminal = ratatui::try_init().context("preparing the terminal")?;
        let _restored = Restored;
        show(args, client, terminal, signals).await
    })
}

/// Restores the terminal when dropped.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// The signals that end the program.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Events other than those of the keyboard.
enum News {
    Fetched(Box<Result<Fetched>>),
    Ended(String),
    Killed(String),
}

async fn show(
    args: &TopArgs,
    client: DaemonClient,
    mut terminal: DefaultTerminal,
    mut signals: Signals,
) -> Result<()> {
    let filters = args.filter.pairs();
    let filters: Vec<(String, String)> = filters
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let colour = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut board = Board::new(args.sort);
    let (sender, mut news) = unbounded_channel();
    let mut keys = keyboard()?;
    tokio::spawn(follow(client.clone(), sender.clone()));
    let (mut next, mut asked) = (Instant::now(), None);
    loop {
        terminal
            .draw(|frame| draw::draw(frame, &mut board, colour))
            .context("drawing")?;
        tokio::select! {
            () = sleep_until(next), if asked.is_none() => {
                asked = Some(Instant::now());
                let path = path(&board, &filters);
                tokio::spawn(fetch(client.clone(), path, sender.clone()));
            }
            Some(came) = news.recv() => match came {
                News::Fetched(fetched) => {
                    let took = asked.take().map_or(Duration::ZERO, |at| at.elapsed());
                    next = Instant::now() + (took * REST).max(PERIOD);
                    board.take(*fetched);
                }
                News::Ended(line) => board.ended(line),
                News::Killed(line) => board.killed(line),
            },
            key = keys.recv() => {
                let Some(key) = key else {
                    return Ok(());
                };
                match board.event(&key) {
                    Action::Quit => return Ok(()),
                    Action::Refresh => next = Instant::now(),
                    Action::Kill(id) => {
                        tokio::spawn(kill(client.clone(), id, sender.clone()));
                    }
                    Action::Nothing => {}
                }
            }
            () = signals.any() => return Ok(()),
        }
    }
}

/// Key presses and changes of the terminal's size.
fn keyboard() -> Result<UnboundedReceiver<event::Event>> {
    let (sender, events) = unbounded_channel();
    let read = move || {
        while let Ok(event) = event::read() {
            if sender.send(event).is_err() {
                return;
            }
        }
    };
    // The thread ends with the process.
    let keyboard = thread::Builder::new().name("keyboard".to_owned());
    keyboard.spawn(read).context("reading the keyboard")?;
    Ok(events)
}

fn path(board: &Board, filters: &[(String, String)]) -> String {
    let mut pairs: Vec<(&str, &str)> = filters
        .iter()
        .map(|(key, value)| (&**key, &**value))
        .filter(|(key, _)| *key != "text" || board.filter().is_empty())
        .collect();
    pairs.extend([("sort", board.sort().name()), ("limit", MAX_ROWS)]);
    if !board.filter().is_empty() {
        pairs.push(("text", board.filter()));
    }
    with_query("/v1/sessions", &pairs)
}

async fn fetch(client: DaemonClient, path: String, news: UnboundedSender<News>) {
    let fetched = async {
        let status: Status = client.value(Method::GET, "/v1/status").await?;
        let mut lines = client.lines(Method::GET, &path, Bytes::new()).await?;
        let mut rows = Vec::new();
        while let Some(line) = lines.next().await? {
            let row: Row<'_> = parse(line)?;
            rows.push(row.into_owned());
        }
        Ok(Fetched {
            status,
            rows,
            at: Instant::now().into_std(),
        })
    };
    let fetched = fetched.await;
    let _ = news.send(News::Fetched(Box::new(fetched)));
}

/// Reports sessions that end at a limit or at a client's request.
async fn follow(client: DaemonClient, news: UnboundedSender<News>) {
    loop {
        if let Ok(mut lines) = client.lines(Method::GET, "/v1/events", Bytes::new()).await {
            while let Ok(Some(line)) = lines.next().await {
                let Ok(record) = parse::<Value>(line) else {
                    break;
                };
                if record.pointer("/session_enforcer/id").is_some()
                    && news.send(News::Ended(words(&record))).is_err()
                {
                    return;
                }
            }
        }
        sleep(FOLLOW_AGAIN).await;
    }
}

async fn kill(client: DaemonClient, id: u64, news: UnboundedSender<News>) {
    let killed = async {
        let body = json!({ "ids": [id] }).to_string().into();
        let path = "/v1/sessions/kill";
        let mut lines = client.lines(Method::POST, path, body).await?;
        let line = lines.next().await?.context("no answer")?;
        let line: KillLine = parse(line)?;
        let error = line.error.map(|error| format!(": {error}"));
        let result = line.result.name().replace('_', " ");
        anyhow::Ok(format!(
            "session {id}: {result}{}",
            error.unwrap_or_default()
        ))
    };
    let line = killed
        .await
        .unwrap_or_else(|error| format!("session {id}: {error:#}"));
    let _ = news.send(News::Killed(line));
}
