//! Makes session table, schedule and sockets agree. It runs at a start, after a policy change, when a cgroup of the
//! rules appears, after lost events, and at an interval. Untracked connections are adopted, ended sessions are removed,
//! and records that were not stamped are updated; each is counted. See `docs/design/sync.md`.
//!
//! A reaper lists the sockets without taking their locks, and is asked for details only of sockets to adopt and of
//! sessions that were not listed. The engine handles the list in parts and enforces meanwhile.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Result;
use session_enforcer_common::{Ancestors, Direction, Expiry, Limits, MatchEntry, Session, expiry};

use super::{
    ask::{self, ATTEMPTS, Answer, POLL_INTERVAL, wait_out},
    backoff::Need,
    context::Context,
    holder_searches::ahead_of,
    owner_search,
    phase::Phase,
    state::{RECHECK_NS, State},
    terminate,
    tracker::{by_namespace, group_of},
};
use crate::{
    datapath::Adoption,
    engine::adopt::{self, Adopter, Listeners},
    host::{cgroup::Scope, clock::monotonic_ns},
    reaper::{
        diag::{MAX_BATCH, Socket, SocketId, state},
        pool::{Condition, Exchange, Next, Purpose},
        protocol::{Holder, Reach, Reply, Request},
    },
    report::metrics::{Repair, Untracked},
};

/// Maximum time for which an adopted session waits for others, to be confirmed together: a confirmation takes about
/// 10 ms of waiting. Later namespaces can take long to list, and belong to somebody else.
const CONFIRMED_AFTER: Duration = Duration::from_millis(50);

/// Number of sessions that are collected before other work gets its turn.
const YIELD_EVERY: usize = 4_096;

/// How long a reaper may list without an answer; it may first search every descriptor of the host.
const PATIENCE: Duration = Duration::from_secs(10);

/// The reason if that time has passed, and what to do.
const NO_LIST: &str = "the kernel does not list its sockets, as while a process keeps a socket locked; this is tried \
                       again; if it stays, end the process (the audit may name it), or use Linux 6.9 or newer";

/// What a sync does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Aim {
    /// Adopt connections that are not tracked.
    pub(super) adopts: bool,
    /// Update records from their sockets, because no program has stamped them.
    pub(super) catches_up: bool,
    /// Count adopted sessions as missed: the programs should have tracked them.
    pub(super) repairs: bool,
    /// Search every descriptor of the host for processes and namespaces.
    pub(super) is_thorough: bool,
    /// Count adopted sessions that are past a limit as late by the policy change.
    pub(super) by_change: bool,
    /// Release sessions of sockets outside the attached cgroup.
    pub(super) releases_others: bool,
}

impl Aim {
    /// The aim of a sync that takes the place of another one.
    const fn in_place_of(self, other: Self) -> Self {
        Self {
            adopts: self.adopts || other.adopts,
            catches_up: self.catches_up || other.catches_up,
            // An adopted session may be one that only the other sync should find.
            repairs: self.repairs && other.repairs,
            is_thorough: self.is_thorough || other.is_thorough,
            by_change: self.by_change || other.by_change,
            releases_others: self.releases_others || other.releases_others,
        }
    }
}

/// The socket, if it is open.
fn open_socket(answer: &Answer) -> Option<&Socket> {
    match answer {
        Answer::Known(Some(socket), _) if !socket.is_mini => Some(socket),
        _ => None,
    }
}

/// A listening socket and a process that holds it.
type Listening = (Socket, Option<Holder>);

/// A sync in progress.
struct Sync<'a> {
    context: &'a Rc<Context>,
    aim: Aim,
    /// Number of this sync; a newer sync has begun if it is not the last one.
    number: u64,
    scope: Scope,
    entries: Vec<MatchEntry>,
    limits_of_rules: Vec<Limits>,
    generation: u32,
    lag_ns: u64,
    /// Ancestors by cgroup id.
    ancestors: HashMap<u64, Ancestors>,
    /// By namespace, the sessions that were scheduled at the beginning and whose sockets were not listed yet.
    unseen: HashMap<u64, HashSet<u64>>,
    /// The namespace that is being listed.
    netns_cookie: u64,
    listeners: Listeners,
    wanted: Vec<Socket>,
    /// Sessions that were inserted and are not confirmed yet.
    unconfirmed: Vec<(u64, Session)>,
    /// Cookies of those whose sockets were locked.
    locked: HashSet<u64>,
    /// When they are confirmed, if the list does not end before.
    confirmed_at: Instant,
    visited: HashSet<u64>,
    /// Number of connections adopted.
    adopted: usize,
}

/// The aim of a routine sync. It only searches every descriptor of the host if something is known to be wrong.
pub(super) fn routine(state: &State) -> Aim {
    let need = state.backlog.need(state.has_room());
    Aim {
        adopts: true,
        repairs: true,
        is_thorough: need != Need::Routine,
        ..Aim::default()
    }
}

/// Makes session table, schedule and sockets agree. A sync in progress is stopped, and its aims are added. Returns the
/// number of adopted connections.
///
/// # Errors
///
/// Fails if the session table cannot be read or written. Sockets that cannot be listed are counted and logged instead.
pub(super) async fn sync(context: &Rc<Context>, aim: Aim) -> Result<usize> {
    let number = context.syncs.get() + 1;
    context.syncs.set(number);
    let stopped = context.sync_under_way.get();
    let aim = stopped.map_or(aim, |stopped| aim.in_place_of(stopped));
    context.sync_under_way.set(Some(aim));
    context.read_events()?;
    let scheduled: Vec<(u64, u64)> = {
        let mut state = context.state();
        state.backlog.begin();
        state.note_backlog();
        let sessions = state.tracker.sessions();
        sessions
            .map(|(cookie, group)| (group.netns_cookie, cookie))
            .collect()
    };
    let mut unseen: HashMap<u64, HashSet<u64>> = HashMap::new();
    for some in scheduled.chunks(YIELD_EVERY) {
        for (netns_cookie, cookie) in some {
            unseen.entry(*netns_cookie).or_default().insert(*cookie);
        }
        tokio::task::yield_now().await;
    }
    drop(scheduled);
    let mut sync = {
        let state = context.state();
        Sync {
            context,
            aim,
            number,
            scope: if context.cgroup.is_root() {
                Scope::All
            } else {
                Scope::Only(HashSet::new())
            },
            entries: state.rule_set.entries.clone(),
            limits_of_rules: state.rule_set.limits_of_rules(),
            generation: state.rule_set.generation,
            lag_ns: state.lag_ns,
            ancestors: HashMap::new(),
            unseen,
            netns_cookie: 0,
            listeners: Listeners::default(),
            wanted: Vec::new(),
            unconfirmed: Vec::new(),
            locked: HashSet::new(),
            confirmed_at: Instant::now(),
            visited: HashSet::new(),
            adopted: 0,
        }
    };
    let listed = sync.list().await;
    // Sessions that were inserted must be confirmed and counted even after an error.
    let confirmed = sync.confirm().await;
    let used = listed.and_then(|used| confirmed.map(|()| used))?;
    let adopted = sync.adopted;
    if sync.is_last() {
        context.sync_under_way.set(None);
        let mut state = context.state();
        state.backlog.end(monotonic_ns(), used);
        state.note_backlog();
        for netns_cookie in &sync.visited {
            state.give_up_if_unused(*netns_cookie);
        }
    }
    context.wake.notify_one();
    Ok(adopted)
}

impl Sync<'_> {
    fn is_last(&self) -> bool {
        self.context.syncs.get() == self.number
    }

    fn adopter(&self) -> Adopter<'_> {
        Adopter {
            entries: &self.entries,
            limits_of_rules: &self.limits_of_rules,
            generation: self.generation,
            lag_ns: self.lag_ns,
            scope: &self.scope,
            ancestors: &self.ancestors,
        }
    }

    /// Handles the list of a reaper; returns its processor time. If the reaper ends early, another one starts the list
    /// again, because the caller treats the end of the sync as the end of the adoption.
    async fn list(&mut self) -> Result<Duration> {
        let reach = match (self.context.all_namespaces, self.aim.is_thorough) {
            (false, _) => Reach::Own,
            (true, false) => Reach::Usual,
            (true, true) => Reach::Every,
        };
        let is_gone = self.context.cgroup.is_gone();
        if is_gone {
            // Its path may belong to another cgroup by now.
            let path = self.context.cgroup.path().display();
            tracing::warn!(
                "connections are not adopted: cgroup {path} was removed; restart the daemon"
            );
        }
        let is_root = self.context.cgroup.is_root();
        let request = Request::Survey {
            reach,
            cgroup: (!is_root).then(|| self.context.cgroup.path().to_owned()),
            with_holders: self.aim.adopts && self.aim.is_thorough,
        };
        for _ in 0..ATTEMPTS {
            let asked = self.context.pool.ask(Purpose::Others, &request, None).await;
            let exchange = match asked {
                Ok(exchange) => exchange,
                Err(error) => {
                    self.unlisted(&format!("{error:#}"));
                    return Ok(Duration::ZERO);
                }
            };
            if let Some(used) = self.take_list(exchange, is_gone).await? {
                return Ok(used);
            }
            // The list starts again.
            self.wanted.clear();
        }
        self.unlisted("their list broke off");
        Ok(Duration::ZERO)
    }

    /// Handles the list of one reaper; returns `None` if the reaper has ended early.
    async fn take_list(
        &mut self,
        mut exchange: Exchange,
        is_gone: bool,
    ) -> Result<Option<Duration>> {
        let mut listening: Vec<Listening> = Vec::new();
        let mut silent_polls = 0;
        while self.is_last() {
            if self.confirmed_at <= Instant::now() {
                self.confirm().await?;
            }
            match exchange.next(POLL_INTERVAL).await {
                Next::Reply(reply, handle) => {
                    silent_polls = 0;
                    let reply = (reply, handle);
                    let used = self.take_reply(reply, &mut listening, is_gone).await?;
                    if used.is_some() {
                        return Ok(used);
                    }
                }
                Next::Ended => return Ok(None),
                Next::Silent => {
                    silent_polls += 1;
                    if self.is_list_stuck(&mut exchange, silent_polls).await {
                        wait_out(self.context, exchange, None);
                        let netns = self.context.state().handles.name(self.netns_cookie);
                        self.unlisted(&format!("{netns}: {NO_LIST}"));
                        return Ok(Some(Duration::ZERO));
                    }
                }
            }
        }
        Ok(Some(Duration::ZERO))
    }

    /// Whether a list must be given up: its reaper is silent for too long, or hangs because all of `sock_diag` does.
    async fn is_list_stuck(&self, exchange: &mut Exchange, silent_polls: u32) -> bool {
        let is_stuck = exchange.condition() == Condition::Stuck;
        let is_blocked = is_stuck && ask::is_diag_blocked(self.context).await;
        POLL_INTERVAL * silent_polls >= PATIENCE || is_blocked
    }

    /// Handles a part of the list. Returns the reaper's processor time if it was the last part.
    async fn take_reply(
        &mut self,
        (reply, handle): (Reply, Option<OwnedFd>),
        listening: &mut Vec<Listening>,
        is_gone: bool,
    ) -> Result<Option<Duration>> {
        match reply {
            Reply::Scope { ids } if !is_gone => self.widen_scope(ids),
            // The sync then only finds sessions that have ended.
            Reply::NoScope(error) => tracing::warn!("connections are not adopted: {error}"),
            Reply::Namespace { cookie, path } => {
                self.context.state().handles.keep(cookie, path, handle);
                self.netns_cookie = cookie;
                self.visited.insert(cookie);
                self.listeners = Listeners::default();
                listening.clear();
            }
            Reply::Listeners(sockets) => listening.extend(sockets),
            Reply::Sessions(sockets) => {
                self.take_listeners(listening).await?;
                self.take_sessions(sockets).await?;
            }
            Reply::WholeNamespace => {
                self.take_listeners(listening).await?;
                self.adopt_wanted().await?;
                self.find_unseen().await?;
                if self.unconfirmed.is_empty() {
                    self.context.state().give_up_if_unused(self.netns_cookie);
                }
            }
            Reply::Unlisted(error) => {
                self.adopt_wanted().await?;
                self.unlisted(&error);
            }
            Reply::Done { used_ns, error, .. } => {
                if let Some(problem) = error {
                    self.unlisted(&problem.to_string());
                }
                return Ok(Some(Duration::from_nanos(used_ns)));
            }
            _ => {}
        }
        Ok(None)
    }

    fn widen_scope(&mut self, ids: Vec<u64>) {
        if let Scope::Only(all) = &mut self.scope {
            all.extend(ids);
        }
    }

    /// Counts a namespace, or sockets of one, that cannot be queried.
    fn unlisted(&mut self, error: &str) {
        let mut state = self.context.state();
        state.backlog.unreached += 1;
        state.records.metrics.untracked(Untracked::Namespace);
        tracing::warn!("sockets cannot be compared with the sessions: {error}");
    }

    async fn note_cgroups(&mut self, ids: HashSet<u64>) -> Result<()> {
        let is_new = |id: &u64| !self.ancestors.contains_key(id) && self.scope.contains(Some(*id));
        let ids: HashSet<u64> = ids.into_iter().filter(is_new).collect();
        if ids.is_empty() {
            return Ok(());
        }
        owner_search::note_cgroups(self.context, ids.clone()).await?;
        let state = self.context.state();
        let known = |id| Some((id, state.ancestors_of(id)?));
        self.ancestors.extend(ids.into_iter().filter_map(known));
        Ok(())
    }

    /// Handles the listeners of the namespace, which determine owner and direction of its sessions.
    async fn take_listeners(&mut self, listening: &mut Vec<Listening>) -> Result<()> {
        if listening.is_empty() {
            return Ok(());
        }
        let listening = std::mem::take(listening);
        let ids = listening.iter().filter_map(|(socket, _)| socket.cgroup_id);
        self.note_cgroups(ids.collect()).await?;
        let sockets: Vec<Socket> = listening.iter().map(|(socket, _)| *socket).collect();
        self.listeners = Listeners::among(&sockets);
        if self.aim.adopts && self.aim.is_thorough {
            self.note_owners(&listening).await?;
        }
        Ok(())
    }

    /// Stores the owners of listeners, so that accepted sockets inherit them.
    async fn note_owners(&mut self, listening: &[Listening]) -> Result<()> {
        let alone = Listeners::default();
        let mut held = Vec::new();
        for (socket, holder) in listening {
            let Some(holder) = holder.filter(|_| self.scope.contains(socket.cgroup_id)) else {
                continue;
            };
            let owner = adopt::owner(socket, Direction::Inbound, &alone);
            if owner.is_known() {
                held.push(((holder, socket.target.cookie), owner));
            }
        }
        for some in held.chunks(MAX_BATCH) {
            let request = Request::Duplicate {
                sockets: some.iter().map(|(held, _)| *held).collect(),
            };
            // Each duplicate is closed here before the request ends: the reaper has it open until then. If this close were
            // the last one, the owner could have it wait for unsent data (`SO_LINGER`).
            let noted = ask::each(self.context, &request, None, |index, reply, fd| {
                let mut state = self.context.state();
                // If this fails, the owner of each accepted socket is resolved separately.
                let noted = some.get(index).zip(fd);
                let noted = noted.map(|((_, owner), fd)| state.datapath.note_owner(&fd, owner));
                tracing::debug!("owner of a listener: {noted:?} {reply:?}");
            });
            if let Err(error) = noted.await {
                tracing::warn!("owners of sockets that listen are not noted: {error}");
            }
        }
        Ok(())
    }

    /// Handles a part of the namespace's list.
    async fn take_sessions(&mut self, sockets: Vec<Socket>) -> Result<()> {
        let mut known = Vec::new();
        let mut unknown = Vec::new();
        {
            self.context.read_events()?;
            let state = self.context.state();
            let mut unseen = self.unseen.get_mut(&self.netns_cookie);
            for socket in sockets {
                let cookie = socket.target.cookie;
                if !state.tracker.contains(cookie) {
                    unknown.push(socket);
                } else if !socket.is_mini {
                    if let Some(unseen) = &mut unseen {
                        unseen.remove(&cookie);
                    }
                    known.push(socket);
                }
            }
        }
        self.take_known(&known).await?;
        if !self.aim.adopts || unknown.is_empty() {
            return Ok(());
        }
        let ids = unknown.iter().filter_map(|socket| socket.cgroup_id);
        self.note_cgroups(ids.collect()).await?;
        let adopter = self.adopter();
        unknown.retain(|socket| adopter.wants(socket, &self.listeners));
        self.wanted.extend(unknown);
        if self.wanted.len() >= MAX_BATCH {
            self.adopt_wanted().await?;
        }
        Ok(())
    }

    /// Handles listed sockets that have a session.
    async fn take_known(&mut self, sockets: &[Socket]) -> Result<()> {
        if self.aim.releases_others {
            let elsewhere = |socket: &&Socket| !self.scope.contains(socket.cgroup_id);
            let others: Vec<Socket> = sockets.iter().filter(elsewhere).copied().collect();
            let cgroups = others.iter().filter_map(|socket| socket.cgroup_id);
            owner_search::note_cgroups(self.context, cgroups.collect()).await?;
            let mut state = self.context.state();
            let own = self.context.cgroup.id();
            for socket in others {
                // Its cgroup may have come since the scope was read.
                let above = socket.cgroup_id.and_then(|id| state.ancestors_of(id));
                let is_below = |(above, own): (Ancestors, u64)| above.contains(own);
                if above.zip(own).is_some_and(is_below) {
                    continue;
                }
                let cookie = socket.target.cookie;
                if let Some(session) = state.datapath.session(cookie)? {
                    state.release(cookie, &session)?;
                }
            }
        }
        if !self.aim.catches_up {
            return Ok(());
        }
        for some in sockets.chunks(MAX_BATCH) {
            let answers = self.query_activity(some).await;
            let mut state = self.context.state();
            for (socket, answer) in some.iter().zip(answers) {
                let cookie = socket.target.cookie;
                let Some(session) = state.datapath.session(cookie)? else {
                    continue;
                };
                if state.catch_up(cookie, &session, answer)? {
                    state.records.metrics.repaired(Repair::Behind);
                }
            }
        }
        Ok(())
    }

    /// Queries the activity of listed sockets. Those that cannot be queried count as locked, that is, as in use.
    async fn query_activity(&mut self, sockets: &[Socket]) -> Vec<Answer> {
        let targets: Vec<SocketId> = sockets.iter().map(|socket| socket.target).collect();
        let cgroups: Vec<u64> = sockets.iter().map(|s| s.cgroup_id.unwrap_or(0)).collect();
        let asked = ask::query_activity(self.context, self.netns_cookie, &targets, &cgroups).await;
        self.known_or_locked(asked, targets.len())
    }

    fn known_or_locked(&mut self, asked: Result<Vec<Answer>, String>, count: usize) -> Vec<Answer> {
        asked.unwrap_or_else(|error| {
            self.unlisted(&error);
            vec![Answer::Locked; count]
        })
    }

    /// Inserts the wanted connections into the session table with their current state.
    async fn adopt_wanted(&mut self) -> Result<()> {
        let wanted = std::mem::take(&mut self.wanted);
        for some in wanted.chunks(MAX_BATCH) {
            let answers = self.query_activity(some).await;
            let mut sessions = Vec::with_capacity(some.len());
            for (socket, answer) in some.iter().zip(answers) {
                if answer == Answer::Locked {
                    self.locked.insert(socket.target.cookie);
                }
                sessions.extend(self.session_of(socket, answer));
            }
            self.insert(sessions)?;
        }
        Ok(())
    }

    /// The session of a socket; `None` if it has closed.
    fn session_of(&self, listed: &Socket, answer: Answer) -> Option<(u64, Session)> {
        let (socket, at_ns) = match answer {
            Answer::Known(socket, at_ns) => (socket?, at_ns),
            Answer::Locked => (adopt::in_use(listed), monotonic_ns()),
        };
        let adopter = self.adopter();
        let session = adopter.session(&socket, &self.listeners, self.netns_cookie, at_ns);
        Some((socket.target.cookie, session?))
    }

    fn insert(&mut self, mut sessions: Vec<(u64, Session)>) -> Result<()> {
        let mut state = self.context.state();
        // Skips a connection that has opened since the list (its event has been read), and one that a reaper has.
        let is_known = |state: &State, cookie: u64| {
            let phase = state.tracker.phase_of_cookie(cookie);
            state.tracker.contains(cookie) || phase.is_some_and(Phase::is_in_other_hands)
        };
        sessions.retain(|(cookie, _)| !is_known(&state, *cookie));
        let answers = state.datapath.adopt_all(&sessions)?;
        let mut refused = 0;
        let mut untracked = Vec::new();
        for ((cookie, session), answer) in sessions.into_iter().zip(answers) {
            match answer {
                Adoption::Inserted => {
                    let adopting = Phase::Adopting {
                        may_have_ended: false,
                    };
                    state.tracker.set_phase(cookie, &session, adopting);
                    if self.unconfirmed.is_empty() {
                        self.confirmed_at = Instant::now() + CONFIRMED_AFTER;
                    }
                    self.unconfirmed.push((cookie, session));
                }
                // Its event will follow, unless it was lost.
                Adoption::Known => state.tracker.add(cookie, group_of(&session), 0),
                Adoption::Full | Adoption::RuleFull => {
                    let is_growing = answer == Adoption::Full && state.datapath.can_grow();
                    if state.resets_untracked(session.rule) && !is_growing {
                        untracked.push((cookie, session));
                        continue;
                    }
                    let cause = if answer == Adoption::RuleFull {
                        state.backlog.left_out_by_rule(session.rule);
                        Untracked::RuleFull
                    } else {
                        refused += 1;
                        Untracked::MapFull
                    };
                    if !self.aim.repairs {
                        state.records.metrics.untracked(cause);
                    }
                }
            }
        }
        terminate::reset_untracked(self.context, &mut state, untracked)?;
        let is_first = state.backlog.left_out == 0 && !self.aim.repairs;
        if refused > 0 && is_first && !state.datapath.can_grow() {
            tracing::error!(
                "the session table is full, so connections are not tracked: raise daemon.max_sessions"
            );
        }
        state.backlog.left_out += refused;
        Ok(())
    }

    /// Queries the inserted sessions once more and then schedules them. A packet that passed before its session was
    /// inserted was not stamped.
    async fn confirm(&mut self) -> Result<()> {
        let unconfirmed = std::mem::take(&mut self.unconfirmed);
        if unconfirmed.is_empty() {
            return Ok(());
        }
        // A socket that was locked at the first query is not asked again: each query may occupy a reaper.
        let is_locked = |(cookie, _): &(u64, Session)| self.locked.contains(cookie);
        let (locked, unconfirmed): (Vec<_>, Vec<_>) = unconfirmed.into_iter().partition(is_locked);
        for (cookie, session) in locked {
            self.locked.remove(&cookie);
            self.confirm_one(cookie, session, Answer::Locked)?;
        }
        // The socket may not have counted such a packet yet.
        ask::wait_for_programs(self.context).await;
        let current = self.netns_cookie;
        for (netns_cookie, sessions) in by_namespace(unconfirmed, |(_, session)| session) {
            self.netns_cookie = netns_cookie;
            for some in sessions.chunks(MAX_BATCH) {
                let target = |(cookie, session): &(u64, Session)| SocketId::of(*cookie, session);
                let targets: Vec<SocketId> = some.iter().map(target).collect();
                let cgroups: Vec<u64> = some.iter().map(|(_, s)| s.owner.cgroup_id).collect();
                let asked = ask::query_activity(self.context, netns_cookie, &targets, &cgroups);
                let answers = asked.await;
                let answers = self.known_or_locked(answers, targets.len());
                for ((cookie, session), answer) in some.iter().zip(answers) {
                    self.confirm_one(*cookie, *session, answer)?;
                }
            }
        }
        self.netns_cookie = current;
        self.context.wake.notify_one();
        Ok(())
    }

    /// Updates an adopted session by the answer about its socket, and schedules it. Forgets it if its socket is gone.
    fn confirm_one(&mut self, cookie: u64, session: Session, answer: Answer) -> Result<()> {
        let mut state = self.context.state();
        let phase = state.tracker.phase(cookie, &session);
        let may_have_ended = matches!(
            phase,
            Some(Phase::Adopting {
                may_have_ended: true
            })
        );
        state.tracker.clear_phase(cookie);
        let Some(session) = self.updated_from(answer, &mut state, cookie, &session)? else {
            return state.forget_unless_another(cookie, &session);
        };
        self.adopted += 1;
        if self.aim.repairs {
            state.records.metrics.repaired(Repair::Missed);
        }
        // A FIN may have passed before the session was inserted, so no event reported it.
        let is_closing = open_socket(&answer).is_some_and(|socket| state::is_closing(socket.state));
        self.schedule_adopted(&mut state, cookie, &session, may_have_ended || is_closing);
        Ok(())
    }

    /// Updates the record of an adopted session by the answer about its socket. Returns the session if it exists.
    fn updated_from(
        &self,
        answer: Answer,
        state: &mut State,
        cookie: u64,
        session: &Session,
    ) -> Result<Option<Session>> {
        let Answer::Known(_, at_ns) = answer else {
            return state.count_as_active(cookie, session);
        };
        let Some(socket) = open_socket(&answer) else {
            // If the socket was connected again under the same cookie, the kernel programs track the new connection.
            state.datapath.remove(cookie, session.established_ns)?;
            return Ok(None);
        };
        let limits = self.limits_of_rules.get(usize::from(session.rule));
        let told = adopt::caught_up(session, socket, limits, at_ns, self.lag_ns);
        // An update keeps stamps since the first query.
        let is_there = told == *session || state.datapath.update(cookie, &told)?;
        Ok(is_there.then_some(told))
    }

    /// Schedules an adopted session. `may_have_ended` has its socket queried soon.
    fn schedule_adopted(
        &self,
        state: &mut State,
        cookie: u64,
        session: &Session,
        may_have_ended: bool,
    ) {
        let rule = &state.rule_set.rules[usize::from(session.rule)];
        let limits = rule.limits;
        state.records.metrics.adopted(&rule.name);
        let is_asked_for = state.kills.of(cookie, session).is_some();
        let due_ns = if session.generation == state.rule_set.generation && !is_asked_for {
            ahead_of(limits.first_deadline_ns(session.established_ns), &limits)
        } else {
            // The policy has changed meanwhile, or a client has asked for the reset.
            0
        };
        state.tracker.add(cookie, group_of(session), due_ns);
        if may_have_ended {
            state.tracker.hasten(cookie, monotonic_ns() + RECHECK_NS);
        }
        let changed_ns = monotonic_ns();
        if self.aim.by_change
            && let Expiry::Expired { deadline_ns, .. } = expiry(session, &limits, changed_ns)
        {
            let late = Phase::LateByPolicy {
                changed_ns,
                reached_ns: deadline_ns,
            };
            state.tracker.set_phase(cookie, session, late);
        }
    }

    /// Queries the sockets of sessions that the complete list of their namespace did not contain. The kernel's list may
    /// omit a socket while others open and close.
    async fn find_unseen(&mut self) -> Result<()> {
        let unseen = self.unseen.remove(&self.netns_cookie).unwrap_or_default();
        let unseen: Vec<u64> = unseen.into_iter().collect();
        for some in unseen.chunks(MAX_BATCH) {
            // Sessions whose end was reported meanwhile do not count as unreported.
            self.context.read_events()?;
            let sessions = {
                let mut state = self.context.state();
                let mut sessions = Vec::new();
                for (cookie, session) in some.iter().zip(state.datapath.sessions(some)?) {
                    match session {
                        Some(session) => sessions.push((*cookie, session)),
                        None if state.tracker.contains(*cookie) => {
                            state.records.metrics.repaired(Repair::Unreported);
                            state.forget(*cookie);
                        }
                        None => {}
                    }
                }
                sessions
            };
            let targets: Vec<SocketId> =
                sessions.iter().map(|(c, s)| SocketId::of(*c, s)).collect();
            // A dump of many sockets can miss one again.
            let asked = ask::query_each(self.context, self.netns_cookie, &targets).await;
            let answers = self.known_or_locked(asked, targets.len());
            for ((cookie, session), answer) in sessions.iter().zip(answers) {
                let Answer::Known(socket, _) = answer else {
                    continue;
                };
                if socket.is_none_or(|socket| socket.is_mini) {
                    let mut state = self.context.state();
                    // The kernel's report may have come first.
                    if state.still_there(*cookie, session)?.is_some() {
                        state.drop_stale(*cookie, session)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_in_place_of_another_does_what_both_were_to_do() {
        let reload = Aim {
            adopts: true,
            is_thorough: true,
            by_change: true,
            ..Aim::default()
        };
        let follow = Aim {
            adopts: true,
            ..Aim::default()
        };
        assert_eq!(follow.in_place_of(reload), reload);
        assert_eq!(reload.in_place_of(follow), reload);
        let routine = Aim {
            adopts: true,
            repairs: true,
            ..Aim::default()
        };
        assert_eq!(routine.in_place_of(routine), routine);
        // A session found by the routine sync may be new because of the policy change.
        assert_eq!(routine.in_place_of(reload), reload);
    }
}
