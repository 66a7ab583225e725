//! Resolves session owners that the kernel programs have not recorded, because the socket is older than the programs. A
//! reaper queries the socket and the listeners on its port.

use std::{
    collections::{BTreeSet, HashSet},
    rc::Rc,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_common::{Direction, Expiry, Owner, Session, expiry};

use super::{
    ask::{self, Answer},
    context::Context,
    state::{MAX_PASS, RETRY_NS, State},
    tracker::{by_namespace, group_of},
};
use crate::{
    engine::{
        adopt::{self, Listeners},
        owner_resolver::FoundCgroups,
    },
    host::clock::monotonic_ns,
    reaper::{
        diag::{MAX_BATCH, Socket, SocketId},
        protocol::{Cgroup, MAX_PATHS, Reply, Request},
    },
    report::metrics::Untracked,
};

/// Up to this number of ports the listeners are queried port by port; above it all listeners of the namespace are
/// listed once.
const MAX_PORTS: usize = 4;

/// The pause after a search is this multiple of its time, because any user can create sockets whose owner must be
/// resolved.
const REST: u32 = 2;

/// A session with its cookie.
pub(super) type Tracked = (u64, Session);

/// Starts the task that resolves the owners of waiting sessions, unless it is running.
pub(super) fn find(context: &Rc<Context>) {
    let is_due = !context.state().without_owner.is_empty();
    if is_due && !context.is_finding_owners.replace(true) {
        context.spawn(find_waiting(Rc::clone(context)));
    }
}

async fn find_waiting(context: Rc<Context>) -> Result<()> {
    loop {
        let some = {
            let mut state = context.state();
            let count = state.without_owner.len().min(MAX_PASS);
            state.without_owner.drain(..count).collect::<Vec<_>>()
        };
        if some.is_empty() {
            context.is_finding_owners.set(false);
            return Ok(());
        }
        let began = std::time::Instant::now();
        for (cookie, _) in resolve(&context, some).await? {
            context.state().tracker.rearm(cookie, 0);
        }
        context.wake.notify_one();
        tokio::time::sleep(began.elapsed().min(Duration::from_secs(1)) * REST).await;
    }
}

/// Resolves the owners of sessions, and then their rules. The returned sessions are scheduled without a due time and
/// can be judged.
///
/// # Errors
///
/// Fails if the session table cannot be read or written.
pub(super) async fn resolve(context: &Rc<Context>, sessions: Vec<Tracked>) -> Result<Vec<Tracked>> {
    let mut resolved = Vec::new();
    for (netns_cookie, sessions) in by_namespace(sessions, |(_, session)| session) {
        resolved.extend(resolve_in(context, netns_cookie, sessions).await?);
    }
    Ok(resolved)
}

async fn resolve_in(
    context: &Rc<Context>,
    netns_cookie: u64,
    sessions: Vec<Tracked>,
) -> Result<Vec<Tracked>> {
    let found = sockets_and_listeners(context, netns_cookie, &sessions).await;
    let (answers, listeners) = match found {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(
                "the owners of {} sessions could not be found; the daemon tries again: {error}",
                sessions.len()
            );
            context.state().postpone_all(&sessions)?;
            return Ok(Vec::new());
        }
    };
    let sockets = answers.iter().filter_map(|answer| match answer {
        Answer::Known(Some(socket), _) => socket.cgroup_id,
        _ => None,
    });
    note_cgroups(context, sockets.collect()).await?;
    let mut resolved = Vec::new();
    let mut state = context.state();
    for ((cookie, session), answer) in sessions.iter().zip(answers) {
        match owner_of(session, answer, &listeners) {
            None => state.release(*cookie, session)?,
            Some(owner) if owner.is_known() => {
                resolved.extend(state.set_owner(*cookie, session, owner)?);
            }
            Some(_) => state.go_on_without_owner(*cookie, session)?,
        }
    }
    Ok(resolved)
}

/// Queries the sockets of sessions, and the listeners of their ports.
async fn sockets_and_listeners(
    context: &Rc<Context>,
    netns_cookie: u64,
    sessions: &[Tracked],
) -> Result<(Vec<Answer>, Listeners), String> {
    let sockets = sockets_of(context, netns_cookie, sessions).await?;
    let open = sockets.iter().filter_map(|answer| match answer {
        Answer::Known(Some(socket), _) => Some(socket),
        _ => None,
    });
    let ports: BTreeSet<u16> = open.map(|socket| socket.target.local_port).collect();
    let listeners = listeners(context, netns_cookie, ports).await?;
    Ok((sockets, listeners))
}

/// The owner of a session, by the answer about its socket; `None` if the socket is gone. The owner that the programs
/// recorded is preferred, because it is the process that created the socket.
fn owner_of(session: &Session, answer: Answer, listeners: &Listeners) -> Option<Owner> {
    let owner = match answer {
        Answer::Known(socket, _) => {
            let socket = socket.filter(|socket| !socket.is_mini)?;
            let direction = Direction::from_number(session.direction);
            let direction = direction.unwrap_or(Direction::Inbound);
            adopt::owner(&socket, direction, listeners)
        }
        Answer::Locked => Owner::UNKNOWN,
    };
    Some(match session.owner.is_known() {
        true => session.owner,
        false => owner,
    })
}

async fn sockets_of(
    context: &Rc<Context>,
    netns_cookie: u64,
    sessions: &[Tracked],
) -> Result<Vec<Answer>, String> {
    let target = |(cookie, session): &Tracked| SocketId::of(*cookie, session);
    let targets: Vec<SocketId> = sessions.iter().map(target).collect();
    ask::query(context, netns_cookie, &targets).await
}

/// Queries the listeners on these ports of a namespace.
async fn listeners(
    context: &Rc<Context>,
    netns_cookie: u64,
    ports: BTreeSet<u16>,
) -> Result<Listeners, String> {
    let ports = if ports.len() > MAX_PORTS {
        BTreeSet::from([0])
    } else {
        ports
    };
    let mut listening: Vec<Socket> = Vec::new();
    for port in ports {
        let (netns, handle) = context.state().handles.netns(netns_cookie);
        let request = Request::Listeners { netns, port };
        for (reply, _) in ask::ask(context, &request, handle.as_deref()).await? {
            if let Reply::Sockets { sockets, .. } = reply {
                listening.extend(sockets.into_iter().flatten());
            }
        }
    }
    Ok(Listeners::among(&listening))
}

/// Queries the paths of cgroups (for the audit) and their ancestors (for the kernel programs).
///
/// # Errors
///
/// Fails if the kernel's map cannot be written.
pub(super) async fn note_cgroups(context: &Rc<Context>, ids: HashSet<u64>) -> Result<()> {
    let unknown = context.state().owner_resolver.unknown_among(ids);
    for some in unknown.chunks(MAX_BATCH) {
        let request = Request::Cgroups { ids: some.to_vec() };
        let replies = ask::ask(context, &request, None).await;
        let replies = replies.unwrap_or_else(|error| {
            tracing::warn!("cgroups are not found: {error}");
            Vec::new()
        });
        let mut state = context.state();
        for (reply, _) in replies {
            if let Reply::Cgroup(cgroup) = reply {
                state.note_cgroup(cgroup)?;
            }
        }
    }
    Ok(())
}

/// Looks up cgroups by path or pattern. Returns `None`, with a message in the log, if there is no answer.
pub(super) async fn look_up(context: &Rc<Context>, names: &[String]) -> Option<FoundCgroups> {
    let mut found = FoundCgroups::default();
    for some in names.chunks(MAX_PATHS) {
        let request = Request::NamedCgroups {
            names: some.to_vec(),
        };
        let replies = ask::ask(context, &request, None).await;
        let replies = replies
            .inspect_err(|error| tracing::warn!("cgroups of the rules are not looked up: {error}"));
        for (reply, _) in replies.ok()? {
            match reply {
                Reply::Matching { name, cgroups } => {
                    found.matching.entry(name).or_default().extend(cgroups);
                }
                Reply::WatchDirectories(directories) => found.watch_directories.extend(directories),
                _ => {}
            }
        }
    }
    Some(found)
}

/// Starts a task that looks up the cgroups of newly opened sessions.
pub(super) fn find_cgroups(context: &Rc<Context>) {
    let Some(ids) = context.state().owner_resolver.take_unknown() else {
        return;
    };
    let task = Rc::clone(context);
    context.spawn(async move {
        let noted = note_cgroups(&task, ids).await;
        task.state().owner_resolver.has_asked();
        noted
    });
}

impl State {
    /// Notes the path and the ancestors of a cgroup.
    fn note_cgroup(&mut self, cgroup: Cgroup) -> Result<()> {
        let id = cgroup.id;
        self.owner_resolver.note(cgroup);
        if self.datapath.ancestors(id)?.is_none()
            && let Some(ancestors) = self.owner_resolver.ancestors(id)
        {
            self.datapath.note_ancestors(id, &ancestors)?;
        }
        Ok(())
    }

    /// Postpones the search for the owners of sessions. If a rule already limits a session, its normal recheck applies;
    /// otherwise retry in 10 s.
    fn postpone_all(&mut self, sessions: &[Tracked]) -> Result<()> {
        for (cookie, session) in sessions {
            if self.rule_set.needs_owner_of(session) {
                self.go_on_without_owner(*cookie, session)?;
            }
        }
        Ok(())
    }

    /// Handles a session whose owner cannot be resolved: the search is repeated later. Until then the session has the
    /// limits of the first rule that could match it, and when it is past them, that rule decides.
    fn go_on_without_owner(&mut self, cookie: u64, session: &Session) -> Result<()> {
        let now_ns = monotonic_ns();
        let open = Session {
            generation: 0,
            ..*session
        };
        let rule = self
            .rule_of(&open)
            .and_then(|rule| self.rule_set.rule(rule));
        match rule.map(|rule| expiry(session, &rule.limits, now_ns)) {
            Some(Expiry::Alive { recheck_ns }) => {
                let due_ns = recheck_ns.min(now_ns + RETRY_NS);
                self.tracker.rearm(cookie, due_ns);
            }
            Some(Expiry::Expired { .. }) | None => {
                if self.set_owner(cookie, session, session.owner)?.is_some() {
                    self.tracker.rearm(cookie, 0);
                }
            }
        }
        Ok(())
    }

    /// Writes the owner of a session, and the rule that results, into the session table. The returned session is
    /// scheduled without a due time. Returns `None` if the session must not be judged now; it is then already handled.
    fn set_owner(
        &mut self,
        cookie: u64,
        session: &Session,
        owner: Owner,
    ) -> Result<Option<Tracked>> {
        // The record may have changed meanwhile.
        let Some(session) = self.still_there(cookie, session)? else {
            self.forget_unless_another(cookie, session)?;
            return Ok(None);
        };
        let mut resolved = Session {
            owner,
            // The gate has not checked it under the new rule.
            open_until_ns: 0,
            generation: 0,
            ..session
        };
        let Some(rule) = self.rule_of(&resolved) else {
            self.release(cookie, &session)?;
            return Ok(None);
        };
        (resolved.rule, resolved.generation) = (rule, self.rule_set.generation);
        if session.generation == 0 && self.is_full(rule, cookie) {
            self.release(cookie, &session)?;
            self.leave_out(cookie, &resolved);
            return Ok(None);
        }
        if !self.datapath.update(cookie, &resolved)? {
            self.forget_unless_another(cookie, &session)?;
            return Ok(None);
        }
        // From here on its end is counted as closed, so its opening is counted too.
        if session.generation == 0 {
            self.records.metrics.opened(usize::from(rule));
        }
        self.tracker.add(cookie, group_of(&resolved), u64::MAX);
        Ok(Some((cookie, resolved)))
    }

    /// Whether the rule has its maximum of sessions without this one. The programs count a session under its rule only
    /// when that is decided.
    fn is_full(&self, rule: u16, cookie: u64) -> bool {
        let sessions = self.tracker.sessions_of().get(usize::from(rule));
        let group = self.tracker.group(cookie);
        let own = u64::from(group.is_some_and(|group| group.rule == rule));
        let others = sessions.copied().unwrap_or(0).saturating_sub(own);
        let rule = self.rule_set.rule(rule);
        let most = rule.map_or(0, |rule| u64::from(rule.limits.max_sessions));
        most != 0 && others >= most
    }

    /// Handles a session that its rule has no room for.
    fn leave_out(&mut self, cookie: u64, session: &Session) {
        if self.resets_untracked(session.rule) {
            self.untracked.push((cookie, *session));
        } else {
            self.records.metrics.untracked(Untracked::RuleFull);
            self.backlog.left_out_by_rule(session.rule);
        }
    }

    /// Compares the record of a session with its socket, and updates the record if they differ. Returns whether it did.
    pub(super) fn catch_up(
        &mut self,
        cookie: u64,
        session: &Session,
        answer: Answer,
    ) -> Result<bool> {
        let (socket, at_ns) = match answer {
            Answer::Known(socket, at_ns) => (socket.filter(|socket| !socket.is_mini), at_ns),
            Answer::Locked => {
                // A locked socket is in use.
                if self.count_as_active(cookie, session)?.is_none() {
                    self.forget_unless_another(cookie, session)?;
                }
                return Ok(false);
            }
        };
        let Some(socket) = socket else {
            self.release(cookie, session)?;
            return Ok(false);
        };
        // Read after the socket was queried: activity in between is only in the record.
        let Some(now) = self.still_there(cookie, session)? else {
            self.forget_unless_another(cookie, session)?;
            return Ok(false);
        };
        let limits = self.rule_set.rule(now.rule).map(|rule| rule.limits);
        let caught_up = adopt::caught_up(&now, &socket, limits.as_ref(), at_ns, self.lag_ns);
        if caught_up == now {
            return Ok(false);
        }
        let is_updated = self.datapath.update(cookie, &caught_up)?;
        if !is_updated {
            self.forget_unless_another(cookie, session)?;
        }
        Ok(is_updated)
    }

    /// Counts a session as active at this moment. That is later than any packet that was not stamped, so the session
    /// does not end early. Returns the session if it still exists.
    pub(super) fn count_as_active(
        &mut self,
        cookie: u64,
        session: &Session,
    ) -> Result<Option<Session>> {
        // Taken before the record is read; later stamps are higher and are kept.
        let now_ns = monotonic_ns();
        let Some(found) = self.still_there(cookie, session)? else {
            return Ok(None);
        };
        let active = Session {
            last_received_ns: found.last_received_ns.max(now_ns),
            last_sent_ns: found.last_sent_ns.max(now_ns),
            ..found
        };
        let is_updated = self.datapath.update(cookie, &active)?;
        Ok(is_updated.then_some(active))
    }
}
