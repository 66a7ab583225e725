//! Lists the sessions of the table with their rules and the names of their owners.

use std::{
    collections::{BTreeSet, BinaryHeap, HashMap},
    io,
    sync::Arc,
};

use bytes::Bytes;
use serde::Serialize;
use session_enforcer_common::{Ancestors, Owner, Session};
use tokio::sync::mpsc;

use super::{
    filter::{Selection, SortKey},
    messages::{OwnerNames, Request, Rules},
    session_row::Listed,
};
use crate::{
    datapath::{Cursor, SessionReader},
    host::clock::{WallClock, monotonic_ns},
    report::to_engine,
};

/// The number of bytes that are sent to a client at a time.
const CHUNK: usize = 32 << 10;

/// A scan of the session table, in batches.
pub(super) struct Scan {
    engine: mpsc::Sender<to_engine::Request>,
    sessions: Arc<SessionReader>,
    rules: Box<dyn Rules>,
    cgroups: HashMap<u64, (Option<String>, Option<Ancestors>)>,
    users: HashMap<u32, Option<String>>,
    cursor: Cursor,
}

/// The engine does not answer, or the table cannot be read.
pub(super) struct Broken(pub(super) String);

impl Broken {
    fn engine() -> Self {
        Self("the engine does not answer".to_owned())
    }
}

impl Scan {
    /// Starts a scan with the rules in force.
    pub(super) async fn begin(
        engine: mpsc::Sender<to_engine::Request>,
        sessions: Arc<SessionReader>,
    ) -> Result<Self, Broken> {
        let rules = ask(&engine, Request::Rules).await;
        Ok(Self {
            rules: rules.ok_or_else(Broken::engine)?,
            engine,
            sessions,
            cgroups: HashMap::new(),
            users: HashMap::new(),
            cursor: Cursor::default(),
        })
    }

    /// Whether a rule has this name.
    pub(super) fn has_rule(&self, name: &str) -> bool {
        self.rules.has(name)
    }

    /// Whether the owners of sessions are known.
    pub(super) fn knows_owners(&self) -> bool {
        self.rules.name_owners()
    }

    /// Returns the next batch of sessions, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<(u64, Session)>>, Broken> {
        let read = self.sessions.next(&mut self.cursor);
        let Some(sessions) = read.map_err(|error| Broken(error.to_string()))? else {
            return Ok(None);
        };
        self.learn(&sessions).await?;
        // Let other clients proceed.
        tokio::task::yield_now().await;
        Ok(Some(sessions))
    }

    /// Returns the existing sessions with these IDs.
    pub(super) async fn of(&mut self, ids: &[u64]) -> Result<Vec<(u64, Session)>, Broken> {
        let mut sessions = Vec::new();
        for id in ids {
            let read = self.sessions.session(*id);
            let session = read.map_err(|error| Broken(error.to_string()))?;
            sessions.extend(session.map(|session| (*id, session)));
        }
        self.learn(&sessions).await?;
        tokio::task::yield_now().await;
        Ok(sessions)
    }

    /// Asks the engine for owner names that are not known yet.
    async fn learn(&mut self, sessions: &[(u64, Session)]) -> Result<(), Broken> {
        let owners = sessions.iter().map(|(_, session)| session.owner);
        let known: Vec<_> = owners.filter(Owner::is_known).collect();
        let cgroups = known.iter().map(|owner| owner.cgroup_id);
        let cgroups: BTreeSet<u64> = cgroups
            .filter(|id| *id != 0 && !self.cgroups.contains_key(id))
            .collect();
        let users = known.iter().map(|owner| owner.uid);
        let users: BTreeSet<u32> = users.filter(|uid| !self.users.contains_key(uid)).collect();
        if cgroups.is_empty() && users.is_empty() {
            return Ok(());
        }
        let names = ask(&self.engine, |reply| Request::Owners {
            cgroups: cgroups.into_iter().collect(),
            users: users.into_iter().collect(),
            reply,
        });
        let OwnerNames { cgroups, users } = names.await.ok_or_else(Broken::engine)?;
        for (id, path, ancestors) in cgroups {
            self.cgroups.insert(id, (path, ancestors));
        }
        self.users.extend(users);
        Ok(())
    }

    /// Adds the rule and the names to a session. `None` if no rule matches the session any longer.
    pub(super) fn found<'a>(&'a self, id: u64, session: &'a Session) -> Option<Listed<'a>> {
        let cgroup = self.cgroups.get(&session.owner.cgroup_id);
        let above = cgroup.and_then(|(_, above)| *above);
        let rule = self.rules.rule_of(session, &|_| above)?;
        let user = self.users.get(&session.owner.uid);
        Some(Listed {
            id,
            session,
            rule,
            user: user.and_then(|name| name.as_deref()),
            cgroup: cgroup.and_then(|(path, _)| path.as_deref()),
        })
    }
}

/// Sends a request to the engine. `None` if it does not answer.
pub(super) async fn ask<T>(
    engine: &mpsc::Sender<to_engine::Request>,
    request: impl FnOnce(tokio::sync::oneshot::Sender<T>) -> Request,
) -> Option<T> {
    to_engine::ask(engine, |reply| to_engine::Request::Control(request(reply))).await
}

/// The lines of an answer to a client.
pub(super) struct Lines {
    client: mpsc::Sender<io::Result<Bytes>>,
    waiting: Vec<u8>,
}

/// The client has disconnected.
pub(super) struct Gone;

impl Lines {
    pub(super) fn to(client: mpsc::Sender<io::Result<Bytes>>) -> Self {
        Self {
            client,
            waiting: Vec::new(),
        }
    }

    /// Adds a line.
    pub(super) fn add(&mut self, line: &impl Serialize) {
        // Serialization of these types cannot fail, and a write to a `Vec` cannot fail.
        let _ = serde_json::to_writer(&mut self.waiting, line);
        self.waiting.push(b'\n');
    }

    /// Sends the pending lines if they fill a chunk, and waits until the client accepts it.
    pub(super) async fn pass_on(&mut self) -> Result<(), Gone> {
        if self.waiting.len() < CHUNK {
            return Ok(());
        }
        self.flush().await
    }

    /// Sends all pending lines.
    pub(super) async fn flush(&mut self) -> Result<(), Gone> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let lines = std::mem::take(&mut self.waiting);
        self.client.send(Ok(lines.into())).await.map_err(|_| Gone)
    }

    /// Sends complete lines.
    pub(super) async fn send(&mut self, lines: Bytes) -> Result<(), Gone> {
        self.client.send(Ok(lines)).await.map_err(|_| Gone)
    }

    /// Waits until the client disconnects.
    pub(super) async fn gone(&self) {
        self.client.closed().await;
    }

    /// Aborts the answer, so that the client notices that it is incomplete.
    pub(super) async fn break_off(&mut self, why: Broken) {
        tracing::warn!("an answer on the control socket is broken off: {}", why.0);
        let _ = self.client.send(Err(io::Error::other(why.0))).await;
    }
}

/// Lists the sessions that the selection matches.
pub(super) async fn list(mut scan: Scan, selection: Selection, mut lines: Lines) {
    let listed = match selection.first {
        Some((sort, count)) => list_first(&mut scan, &selection, sort, count, &mut lines).await,
        None => list_all(&mut scan, &selection, &mut lines).await,
    };
    match listed {
        // A client that has disconnected needs no further lines.
        Ok(Ok(()) | Err(Gone)) => {}
        Err(broken) => lines.break_off(broken).await,
    }
}

async fn list_all(
    scan: &mut Scan,
    selection: &Selection,
    lines: &mut Lines,
) -> Result<Result<(), Gone>, Broken> {
    while let Some(sessions) = scan.next().await? {
        let (clock, now_ns) = (WallClock::now(), monotonic_ns());
        for (id, session) in &sessions {
            let found = scan.found(*id, session);
            let found = found.filter(|found| selection.filter.matches(found, now_ns));
            if let Some(found) = found {
                lines.add(&found.row(&clock, now_ns));
            }
        }
        if lines.pass_on().await.is_err() {
            return Ok(Err(Gone));
        }
    }
    Ok(lines.flush().await)
}

/// A session with its sort rank. The heap drops the greatest one first, which is the last in the order.
struct Ranked {
    rank: (u64, u64),
    id: u64,
    session: Session,
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.rank, self.id).cmp(&(other.rank, other.id))
    }
}

async fn list_first(
    scan: &mut Scan,
    selection: &Selection,
    sort: SortKey,
    count: usize,
    lines: &mut Lines,
) -> Result<Result<(), Gone>, Broken> {
    let mut first: BinaryHeap<Ranked> = BinaryHeap::new();
    while let Some(sessions) = scan.next().await? {
        let now_ns = monotonic_ns();
        for (id, session) in sessions {
            let Some(found) = scan.found(id, &session) else {
                continue;
            };
            let rank = sort.rank(&found);
            let is_among = first.len() < count
                || first
                    .peek()
                    .is_some_and(|last| (rank, id) < (last.rank, last.id));
            if is_among && selection.filter.matches(&found, now_ns) {
                first.push(Ranked { rank, id, session });
                if first.len() > count {
                    first.pop();
                }
            }
        }
    }
    let (clock, now_ns) = (WallClock::now(), monotonic_ns());
    for one in &first.into_sorted_vec() {
        if let Some(found) = scan.found(one.id, &one.session) {
            lines.add(&found.row(&clock, now_ns));
        }
        if lines.pass_on().await.is_err() {
            return Ok(Err(Gone));
        }
    }
    Ok(lines.flush().await)
}
