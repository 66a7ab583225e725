//! Makes session map, schedule and sockets agree: at a start, after a change of the policy, when a cgroup of
//! the rules comes, after events were lost, and at a slow interval. What is missing is adopted, what has ended
//! is dropped, what an earlier daemon did not stamp is brought up to date; each is counted.
//!
//! A reaper lists the sockets, without what takes their locks. It is asked for more about single sockets: those
//! that are to be adopted and those that were not listed. The engine takes all in bit by bit, and enforces
//! meanwhile.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_common::{Ancestors, Expiry, Limits, MatchEntry, Session, expiry};

use super::{
    ask::{self, ATTEMPTS, Answer, LOOK, wait_out},
    backoff::Need,
    context::Context,
    ending,
    owner_search::{self, CaughtUp},
    state::{RECHECK_NS, State},
    terminate,
    tracker::{Phase, group_of},
};
use crate::{
    datapath::Adoption,
    engine::adopt::{self, Adopter, Listeners},
    host::{cgroup::Scope, clock::monotonic_ns},
    reaper::{
        diag::{Detail, MAX_BATCH, Socket, SocketId, state},
        pool::{Condition, Exchange, Next, Purpose},
        protocol::{Holder, Reach, Reply, Request},
    },
    report::metrics::{Repair, Untracked},
};

/// Sessions that were put into the map and are not confirmed yet. Each confirmation waits for some 10 ms.
const MAX_UNCONFIRMED: usize = 16_384;

/// Sessions that are noted at a time, between which what is due has its turn.
const AT_ONCE: usize = 4_096;

/// For how long a reaper may list without a word: first it may look at every descriptor of the host.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a sync is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Aim {
    /// Whether connections that are not tracked are adopted.
    pub(super) adopts: bool,
    /// Whether sessions of the map are brought up to date with their sockets: nobody has stamped them.
    pub(super) catches_up: bool,
    /// Whether what is adopted had to be tracked already.
    pub(super) repairs: bool,
    /// Whether processes and namespaces are looked for in every descriptor of the host.
    pub(super) is_thorough: bool,
    /// Whether what is past a limit is so by the policy, which has changed.
    pub(super) by_change: bool,
    /// Whether sessions of sockets that the attachment does not cover are let go.
    pub(super) releases_others: bool,
}

/// What a sync did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Synced {
    /// Connections that were adopted.
    pub(super) adopted: usize,
    /// Sessions that were brought up to date or had ended.
    pub(super) changed: usize,
}

/// A socket that listens, and a process that holds it.
type Listening = (Socket, Option<Holder>);

/// A sync that is under way.
struct Sync<'a> {
    context: &'a Rc<Context>,
    aim: Aim,
    /// The number of this one; another one has begun where it is not the last.
    number: u64,
    scope: Scope,
    entries: Vec<MatchEntry>,
    limits_of_rules: Vec<Limits>,
    generation: u32,
    lag_ns: u64,
    /// By cgroup, those above it.
    ancestors: HashMap<u64, Ancestors>,
    /// By namespace, sessions that were scheduled when it began and whose sockets were not listed so far.
    unseen: HashMap<u64, HashSet<u64>>,
    /// The namespace whose sockets come now.
    netns_cookie: u64,
    listeners: Listeners,
    wanted: Vec<Socket>,
    /// Sessions that are in the map and not counted yet.
    unconfirmed: Vec<(u64, Session)>,
    visited: HashSet<u64>,
    is_whole: bool,
    synced: Synced,
}

/// Whether the comparison that is due now goes to every descriptor of the host: only where something is known
/// to be wrong.
pub(super) fn routine(state: &State) -> Aim {
    let need = state.backlog.need(state.has_room());
    Aim {
        adopts: true,
        repairs: true,
        is_thorough: need != Need::Routine,
        ..Aim::default()
    }
}

/// Makes map, schedule and sockets agree. One that is under way breaks off.
///
/// # Errors
///
/// Where the session map cannot be read or written. What cannot be listed is counted and logged instead.
pub(super) async fn sync(context: &Rc<Context>, aim: Aim) -> Result<Synced> {
    let number = context.syncs.get() + 1;
    context.syncs.set(number);
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
    for some in scheduled.chunks(AT_ONCE) {
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
            visited: HashSet::new(),
            is_whole: true,
            synced: Synced::default(),
        }
    };
    let listed = sync.list().await;
    // What is in the map and not counted must be, whatever has gone wrong.
    let confirmed = sync.confirm().await;
    let used = match listed.and_then(|used| confirmed.map(|()| used)) {
        Ok(used) => used,
        Err(error) => return Err(error),
    };
    let synced = sync.synced;
    if sync.is_last() {
        let mut state = context.state();
        state.backlog.end(monotonic_ns(), used);
        state.note_backlog();
        for netns_cookie in &sync.visited {
            state.give_up_if_unused(*netns_cookie);
        }
    }
    context.wake.notify_one();
    Ok(synced)
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

    /// Takes in what a reaper lists; how long it has used a processor. Where it ends in the midst of that, another
    /// one begins anew: who is told that the sync has ended takes all for adopted.
    async fn list(&mut self) -> Result<Duration> {
        let reach = match (self.context.all_namespaces, self.aim.is_thorough) {
            (false, _) => Reach::Own,
            (true, false) => Reach::Usual,
            (true, true) => Reach::Every,
        };
        let is_gone = self.context.cgroup.is_gone();
        if is_gone {
            // What may be under its name now is another one.
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
            // It is listed again.
            self.wanted.clear();
        }
        self.unlisted("their list broke off");
        Ok(Duration::ZERO)
    }

    /// The same of one reaper; none where it has ended.
    async fn take_list(
        &mut self,
        mut exchange: Exchange,
        is_gone: bool,
    ) -> Result<Option<Duration>> {
        let mut listening: Vec<Listening> = Vec::new();
        let mut silent_looks = 0;
        while self.is_last() {
            let reply = match exchange.next(LOOK).await {
                Next::Reply(reply, handle) => {
                    silent_looks = 0;
                    if let (Reply::Namespace { cookie, path }, handle) = (&reply, handle) {
                        let mut state = self.context.state();
                        state.handles.keep(*cookie, path.clone(), handle);
                    }
                    reply
                }
                Next::Ended => return Ok(None),
                Next::Silent => {
                    silent_looks += 1;
                    let is_stuck = exchange.condition() == Condition::Stuck;
                    let is_blocked = is_stuck && ask::is_diag_blocked(self.context).await;
                    if LOOK * silent_looks < PATIENCE && !is_blocked {
                        continue;
                    }
                    wait_out(self.context, exchange);
                    self.unlisted("the kernel does not answer");
                    return Ok(Some(Duration::ZERO));
                }
            };
            match reply {
                Reply::Scope { ids } if !is_gone => self.widen_scope(ids),
                // Then there is only to see which sessions have ended.
                Reply::NoScope(error) => tracing::warn!("connections are not adopted: {error}"),
                Reply::Namespace { cookie, .. } => {
                    self.netns_cookie = cookie;
                    self.visited.insert(cookie);
                    self.listeners = Listeners::default();
                    listening.clear();
                }
                Reply::Listeners(sockets) => listening.extend(sockets),
                Reply::Sessions(sockets) => {
                    self.take_listeners(&mut listening).await?;
                    self.take_sessions(sockets).await?;
                }
                Reply::WholeNamespace => {
                    self.take_listeners(&mut listening).await?;
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
        }
        Ok(Some(Duration::ZERO))
    }

    fn widen_scope(&mut self, ids: Vec<u64>) {
        if let Scope::Only(all) = &mut self.scope {
            all.extend(ids);
        }
    }

    /// Counts a namespace, or sockets of one, that cannot be asked about.
    fn unlisted(&mut self, error: &str) {
        self.is_whole = false;
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

    /// The sockets that listen in the namespace, which tell whose and of which direction its sessions are.
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

    /// Notes the owners of sockets that listen, for those that they will accept.
    async fn note_owners(&mut self, listening: &[Listening]) -> Result<()> {
        let alone = Listeners::default();
        let mut held = Vec::new();
        for (socket, holder) in listening {
            let Some(holder) = holder.filter(|_| self.scope.contains(socket.cgroup_id)) else {
                continue;
            };
            let owner = adopt::owner(socket, &alone);
            if owner.is_known() {
                held.push(((holder, socket.target.cookie), owner));
            }
        }
        for some in held.chunks(MAX_BATCH) {
            let request = Request::Duplicate {
                sockets: some.iter().map(|(held, _)| *held).collect(),
            };
            let replies = ask::ask(self.context, &request, None).await;
            let replies = replies.unwrap_or_else(|error| {
                tracing::warn!("owners of sockets that listen are not noted: {error}");
                Vec::new()
            });
            let mut state = self.context.state();
            for ((_, owner), (reply, fd)) in some.iter().zip(replies) {
                // What it accepts is asked about one by one where this fails.
                let noted = fd.map(|fd| state.datapath.note_owner(&fd, owner));
                tracing::debug!("owner of a listener: {noted:?} {reply:?}");
            }
        }
        Ok(())
    }

    /// Takes in some sessions of the namespace.
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

    /// Sessions of the map whose sockets were listed.
    async fn take_known(&mut self, sockets: &[Socket]) -> Result<()> {
        if self.aim.releases_others {
            let elsewhere = |socket: &&Socket| !self.scope.contains(socket.cgroup_id);
            let others: Vec<u64> = sockets
                .iter()
                .filter(elsewhere)
                .map(|socket| socket.target.cookie)
                .collect();
            let mut state = self.context.state();
            for cookie in others {
                if let Some(session) = state.datapath.session(cookie)? {
                    state.release(cookie, &session)?;
                }
            }
        }
        if !self.aim.catches_up {
            return Ok(());
        }
        for some in sockets.chunks(MAX_BATCH) {
            let targets: Vec<SocketId> = some.iter().map(|socket| socket.target).collect();
            let answers = self.query(&targets, Detail::Activity).await;
            let mut state = self.context.state();
            for (target, answer) in targets.iter().zip(answers) {
                let Some(session) = state.datapath.session(target.cookie)? else {
                    continue;
                };
                if let CaughtUp::Written(_) = state.catch_up(target.cookie, &session, answer)? {
                    state.records.metrics.repaired(Repair::Behind);
                    self.synced.changed += 1;
                }
            }
        }
        Ok(())
    }

    /// Asks about sockets of the namespace. What cannot be asked about counts as in use.
    async fn query(&mut self, targets: &[SocketId], detail: Detail) -> Vec<Answer> {
        let asked = ask::query(self.context, self.netns_cookie, targets, detail).await;
        asked.unwrap_or_else(|error| {
            self.unlisted(&error);
            vec![Answer::Locked; targets.len()]
        })
    }

    /// Puts the connections that were wanted into the session map, as they are now.
    async fn adopt_wanted(&mut self) -> Result<()> {
        let wanted = std::mem::take(&mut self.wanted);
        for some in wanted.chunks(MAX_BATCH) {
            let targets: Vec<SocketId> = some.iter().map(|socket| socket.target).collect();
            let answers = self.query(&targets, Detail::Activity).await;
            let mut sessions = Vec::with_capacity(some.len());
            for (socket, answer) in some.iter().zip(answers) {
                sessions.extend(self.session_of(socket, answer));
            }
            self.insert(sessions)?;
        }
        if self.unconfirmed.len() >= MAX_UNCONFIRMED {
            self.confirm().await?;
        }
        Ok(())
    }

    /// The session of a socket; none where it has closed.
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
        // One that opened a moment ago: its event has come. Or a reaper has one that is reset for want of a place.
        let is_known = |state: &State, cookie: u64| {
            let phase = state.tracker.phase_of_cookie(cookie);
            state.tracker.contains(cookie) || phase.is_some_and(Phase::is_in_other_hands)
        };
        sessions.retain(|(cookie, _)| !is_known(&state, *cookie));
        let answers = state.datapath.adopt_all(&sessions)?;
        let (mut refused, mut refused_by_rules) = (0, 0);
        let mut untracked = Vec::new();
        for ((cookie, session), answer) in sessions.into_iter().zip(answers) {
            match answer {
                Adoption::Inserted => {
                    let adopting = Phase::Adopting {
                        may_have_ended: false,
                    };
                    state.tracker.set_phase(cookie, &session, adopting);
                    self.unconfirmed.push((cookie, session));
                }
                // Its event will come.
                Adoption::Known => {}
                Adoption::Full | Adoption::RuleFull => {
                    let (count, cause) = match answer {
                        Adoption::RuleFull => (&mut refused_by_rules, Untracked::RuleFull),
                        _ => (&mut refused, Untracked::MapFull),
                    };
                    let is_growing = answer == Adoption::Full && state.datapath.can_grow();
                    if state.resets_untracked(session.rule) && !is_growing {
                        untracked.push((cookie, session));
                        continue;
                    }
                    *count += 1;
                    if !self.aim.repairs {
                        state.records.metrics.untracked(cause);
                    }
                }
            }
        }
        state.backlog.to_reset += untracked.len();
        terminate::reset_untracked(self.context, &mut state, untracked)?;
        state.backlog.left_out_by_rules += refused_by_rules;
        let is_first = state.backlog.left_out == 0 && !self.aim.repairs;
        if refused > 0 && is_first && !state.datapath.can_grow() {
            tracing::error!(
                "connections are not tracked, the session map is full: raise daemon.max_sessions"
            );
        }
        state.backlog.left_out += refused;
        Ok(())
    }

    /// Asks once more about the sessions that were put into the map: a packet that came before its session was
    /// there was stamped by nobody. Then they are scheduled.
    async fn confirm(&mut self) -> Result<()> {
        let unconfirmed = std::mem::take(&mut self.unconfirmed);
        if unconfirmed.is_empty() {
            return Ok(());
        }
        // Such a packet may not be counted by its socket yet.
        ask::wait_for_programs(self.context).await;
        let mut by_namespace: HashMap<u64, Vec<(u64, Session)>> = HashMap::new();
        for (cookie, session) in unconfirmed {
            let of_namespace = by_namespace.entry(session.netns_cookie).or_default();
            of_namespace.push((cookie, session));
        }
        let current = self.netns_cookie;
        for (netns_cookie, sessions) in by_namespace {
            self.netns_cookie = netns_cookie;
            for some in sessions.chunks(MAX_BATCH) {
                let target = |(cookie, session): &(u64, Session)| SocketId::of(*cookie, session);
                let targets: Vec<SocketId> = some.iter().map(target).collect();
                let answers = self.query(&targets, Detail::Activity).await;
                for ((cookie, session), answer) in some.iter().zip(answers) {
                    self.confirm_one(*cookie, *session, answer)?;
                }
            }
        }
        self.netns_cookie = current;
        self.context.wake.notify_one();
        Ok(())
    }

    fn confirm_one(&mut self, cookie: u64, mut session: Session, answer: Answer) -> Result<()> {
        let mut state = self.context.state();
        let phase = state.tracker.phase(cookie, &session);
        let may_have_ended = matches!(
            phase,
            Some(Phase::Adopting {
                may_have_ended: true
            })
        );
        state.tracker.clear_phase(cookie);
        let open = match answer {
            Answer::Known(socket, at_ns) => socket.filter(|s| !s.is_mini).map(|s| (s, at_ns)),
            Answer::Locked => None,
        };
        // Its FIN may have come before it was in the map, and nobody was told.
        let is_closing = open.is_some_and(|(socket, _)| state::is_closing(socket.state));
        let is_there = match (answer, open) {
            (Answer::Known(..), None) => {
                // The socket may have been connected again, under the same cookie: the kernel tracks it.
                state.datapath.remove(cookie, session.established_ns)?;
                false
            }
            (_, Some((socket, at_ns))) => {
                let limits = self.limits_of_rules.get(usize::from(session.rule));
                let told = adopt::caught_up(&session, &socket, limits, at_ns, self.lag_ns);
                // What was stamped since the first look stays.
                told == session
                    || state.datapath.update(cookie, &told)?
                        && state.count_as_active(cookie, &mut session)?
            }
            (Answer::Locked, None) => state.count_as_active(cookie, &mut session)?,
        };
        if !is_there {
            return Ok(());
        }
        self.synced.adopted += 1;
        if self.aim.repairs {
            state.records.metrics.repaired(Repair::Missed);
        }
        state.records.metrics.adopted();
        let limits = state.rule_set.rules[usize::from(session.rule)].limits;
        let is_asked_for = state.kills.of(cookie, &session).is_some();
        let due_ns = if session.generation == state.rule_set.generation && !is_asked_for {
            ending::ahead_of(limits.first_deadline_ns(session.established_ns), &limits)
        } else {
            // The policy has changed meanwhile, or it is to be reset.
            0
        };
        state.tracker.add(cookie, group_of(&session), due_ns);
        if may_have_ended || is_closing {
            state.tracker.hasten(cookie, monotonic_ns() + RECHECK_NS);
        }
        let changed_ns = monotonic_ns();
        if self.aim.by_change
            && let Expiry::Expired { deadline_ns, .. } = expiry(&session, &limits, changed_ns)
        {
            let late = Phase::LateByPolicy {
                changed_ns,
                reached_ns: deadline_ns,
            };
            state.tracker.set_phase(cookie, &session, late);
        }
        Ok(())
    }

    /// Looks for the sockets of the sessions that the whole list of their namespace does not have: a list may
    /// leave out one while others come and go.
    async fn find_unseen(&mut self) -> Result<()> {
        self.context.read_events()?;
        let unseen = self.unseen.remove(&self.netns_cookie).unwrap_or_default();
        let unseen: Vec<u64> = unseen.into_iter().collect();
        for some in unseen.chunks(MAX_BATCH) {
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
            let answers = self.query(&targets, Detail::Names).await;
            for ((cookie, session), answer) in sessions.iter().zip(answers) {
                let Answer::Known(socket, _) = answer else {
                    continue;
                };
                if socket.is_none_or(|socket| socket.is_mini) {
                    let mut state = self.context.state();
                    // The kernel's report may have come first.
                    if state.still_there(*cookie, session)?.is_some() {
                        state.drop_stale(*cookie, session)?;
                        self.synced.changed += 1;
                    }
                }
            }
        }
        Ok(())
    }
}
