//! Finds the processes that hold connections: for the audit records of sessions that will end soon, and for resets
//! through a descriptor. The holder at the end may be another process than the creator of the socket. For the audit a
//! reaper searches before the deadline, because the process closes the socket when it is reset. No reset waits for that
//! search; a holder that is not found in time is omitted.
//!
//! Any user can have millions of descriptors. So each search has a budget of processor time and is followed by a rest.
//! The processes of a session's cgroup are searched first, each cgroup by itself, and then those of the host, in parts.
//! See `docs/design/reapers.md`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_common::{Owner, Session};
use tokio::time::Instant;

use super::{
    ask::{self, Answer},
    context::Context,
    holder_searches::{HOST, Holding, Name, ScanRange, Sought},
    judge::Judgement,
    owner_search,
    phase::Expired,
    state::State,
    terminate::start_resets,
    tracker::by_namespace,
};
use crate::{
    host::clock::monotonic_ns,
    reaper::{
        diag::{Detail, MAX_BATCH, Socket, SocketId},
        disconnect::DisconnectError,
        protocol::{Holder, Reply, Request, SearchScope, SocketKey},
    },
    report::audit::Process,
};

/// Maximum processor time of a search for the holders of a cgroup's sessions.
const BUDGET: Duration = Duration::from_millis(100);

/// The same for a search of the whole host, or a part of it.
const BUDGET_OF_ALL: Duration = Duration::from_secs(1);

/// Minimum pause between two searches.
const PAUSE: Duration = Duration::from_millis(20);

/// Searches for the holder of a session that can be reset only through it.
pub(super) fn search_holder_of(
    context: &Context,
    state: &mut State,
    expired: &Expired,
    key: SocketKey,
) {
    // The reset counts as unanswered until the search ends.
    state.tracker.begin_reset(expired);
    let sought = Sought {
        key,
        to_reset: Some(*expired),
        has_begun: false,
    };
    let name = (expired.cookie, expired.session.established_ns);
    let cgroup_id = expired.session.owner.cgroup_id;
    add(context, state, cgroup_id, name, sought);
}

/// Adds a session to the searches of its cgroup or, if that is not known, of the host.
fn add(context: &Context, state: &State, cgroup_id: u64, name: Name, sought: Sought) {
    let is_known = state.owner_resolver.path(cgroup_id).is_some();
    let scope = if is_known { cgroup_id } else { HOST };
    let mut searches = context.holder_searches.borrow_mut();
    searches.add(scope, name, sought);
}

/// Starts the tasks that search for the holders of waiting sessions, unless they run.
pub(super) fn find(context: &Rc<Context>) {
    let is_ending = !context.state().ending.is_empty();
    for of_host in [false, true] {
        let mut searches = context.holder_searches.borrow_mut();
        let is_due = searches.has(of_host) || is_ending && !of_host;
        let is_running = &mut searches.is_running[usize::from(of_host)];
        if is_due && !std::mem::replace(is_running, true) {
            context.spawn(find_waiting(Rc::clone(context), of_host));
        }
    }
}

async fn find_waiting(context: Rc<Context>, of_host: bool) -> Result<()> {
    loop {
        if !of_host {
            note_ending(&context).await?;
        }
        if let Some((scope, slice)) = next_scope(&context, of_host) {
            search(&context, scope, slice).await?;
            find(&context);
        }
        tokio::time::sleep(PAUSE).await;
        let is_ending = !of_host && !context.state().ending.is_empty();
        let mut searches = context.holder_searches.borrow_mut();
        if !is_ending && !searches.has(of_host) {
            searches.is_running[usize::from(of_host)] = false;
            return Ok(());
        }
    }
}

fn next_scope(context: &Context, of_host: bool) -> Option<(u64, u64)> {
    let state = context.state();
    let slice_of = |cgroup_id| {
        let ancestors = state
            .ancestors_of(cgroup_id)
            .map(|ancestors| ancestors.0[1]);
        ancestors.filter(|slice| *slice != 0).unwrap_or(cgroup_id)
    };
    let mut searches = context.holder_searches.borrow_mut();
    let scope = searches.next(of_host, Instant::now(), slice_of)?;
    Some((scope, slice_of(scope)))
}

/// Queries the owners of the sessions that will end soon, and adds those sessions to the searches.
async fn note_ending(context: &Rc<Context>) -> Result<()> {
    let ending = context.state().take_ending()?;
    for (netns_cookie, sessions) in ending {
        for some in sessions.chunks(MAX_BATCH) {
            let target = |(cookie, session): &(u64, Session)| SocketId::of(*cookie, session);
            let targets: Vec<SocketId> = some.iter().map(target).collect();
            let answers =
                ask::query_until_silent(context, netns_cookie, &targets, Detail::Names).await;
            // An error is ignored here: it is reported when the sessions are reset.
            let (answers, silent) = answers.unwrap_or_default();
            if let Some(silent) = silent {
                context.spawn(ask::outlast(Rc::clone(context), silent));
            }
            let sockets = answers.into_iter().map(|answer| match answer {
                Some(Answer::Known(socket, _)) => socket.filter(|socket| !socket.is_mini),
                _ => None,
            });
            let found: Vec<_> = some.iter().zip(sockets).collect();
            let cgroups = found.iter().filter_map(|(_, socket)| (*socket)?.cgroup_id);
            owner_search::note_cgroups(context, cgroups.collect::<HashSet<_>>()).await?;
            let mut state = context.state();
            for ((cookie, session), socket) in found {
                let Some(socket) = socket.filter(|_| state.tracker.contains(*cookie)) else {
                    continue;
                };
                state
                    .holdings
                    .insert(*cookie, Holding::of(session, &socket));
                if socket.inode != 0 {
                    let sought = Sought {
                        key: SocketKey::Inode(socket.inode),
                        to_reset: None,
                        has_begun: false,
                    };
                    let name = (*cookie, session.established_ns);
                    let cgroup_id = socket.cgroup_id.unwrap_or(HOST);
                    add(context, &state, cgroup_id, name, sought);
                }
            }
        }
    }
    Ok(())
}

/// Searches a cgroup's processes, or a part of the host's, for the holders of the sessions that wait for it.
async fn search(context: &Rc<Context>, scope: u64, slice: u64) -> Result<()> {
    let mut sought = context.holder_searches.borrow_mut().take(scope);
    let is_there = |cookie: u64| context.state().tracker.contains(cookie);
    sought.retain(|((cookie, _), sought)| sought.to_reset.is_some() || is_there(*cookie));
    if sought.is_empty() {
        return Ok(());
    }
    let from = context.holder_searches.borrow().from;
    let (found, next, used) = scan(context, scope, from, &sought).await;
    let not_held = {
        let mut searches = context.holder_searches.borrow_mut();
        searches.rest(scope, slice, used, Instant::now());
        searches.note_missing(scope, &sought, &found, ScanRange { from, next })
    };
    let mut state = context.state();
    for (name, sought) in sought {
        if let Some(holder) = found.get(&sought.key) {
            state.note_holder(name, &sought, holder);
            if let Some(expired) = sought.to_reset {
                reset_through_holder(context, &mut state, expired)?;
            }
        }
    }
    for expired in not_held {
        if state.answered(&expired) {
            let error = DisconnectError::NotHeld.to_string();
            state.not_reset(&expired, monotonic_ns(), &error)?;
        }
    }
    state.records.audit.flush();
    context.wake.notify_one();
    Ok(())
}

/// Has a reaper scan the processes of a cgroup, or those of the host from a PID on. Returns the holders that it has
/// found, the PID at which the next scan of the host goes on, and its processor time.
async fn scan(
    context: &Rc<Context>,
    scope: u64,
    from: u32,
    sought: &[(Name, Sought)],
) -> (HashMap<SocketKey, Holder>, Option<u32>, Duration) {
    let (processes, budget) = match scope {
        HOST => (SearchScope::Host { from }, BUDGET_OF_ALL),
        _ => (SearchScope::Cgroup(scope), BUDGET),
    };
    let request = Request::Holders {
        sought: sought.iter().map(|(_, sought)| sought.key).collect(),
        scope: processes,
        budget,
    };
    let began = Instant::now();
    let replies = ask::ask(context, &request, None).await.unwrap_or_default();
    let answer = replies.into_iter().find_map(|(reply, _)| match reply {
        Reply::Holders {
            found,
            next,
            used_ns,
        } => Some((
            found.into_iter().collect(),
            next,
            Duration::from_nanos(used_ns),
        )),
        _ => None,
    });
    // A search without an answer counts by its duration. The next search of the host starts at the same process.
    answer.unwrap_or_else(|| (HashMap::new(), Some(from), began.elapsed()))
}

/// Resets a session whose holder was found.
fn reset_through_holder(context: &Rc<Context>, state: &mut State, expired: Expired) -> Result<()> {
    if !state.answered(&expired) {
        return Ok(());
    }
    // Judge it again, since the search took time. Skip this while another reset hangs or if the session has no slot.
    let is_free = !state.is_asked_of_another(&expired);
    if is_free && state.tracker.contains(expired.cookie) {
        state.tracker.rearm(expired.cookie, 0);
        return Ok(());
    }
    start_resets(context, state, vec![expired])
}

impl Holding {
    pub(super) fn of(session: &Session, socket: &Socket) -> Self {
        Self {
            established_ns: session.established_ns,
            owner: Owner {
                cgroup_id: socket.cgroup_id.unwrap_or(0),
                uid: socket.uid,
                ..Owner::UNKNOWN
            },
            process: None,
            holder: None,
        }
    }
}

impl State {
    /// Takes the waiting sessions that still exist, by namespace.
    fn take_ending(&mut self) -> Result<BTreeMap<u64, Vec<(u64, Session)>>> {
        let cookies = std::mem::take(&mut self.ending);
        let records = self.datapath.sessions(&cookies)?;
        let sessions = cookies.into_iter().zip(records);
        let sessions = sessions.filter_map(|(cookie, session)| Some((cookie, session?)));
        Ok(by_namespace(sessions, |(_, session)| session))
    }

    /// Schedules the next check of a session that lives: first for the search for its holder, then for its deadline.
    /// Returns whether the search is due now.
    pub(super) fn recheck_ahead(
        &mut self,
        cookie: u64,
        (due_ns, ahead_ns): (u64, u64),
        now_ns: u64,
    ) -> bool {
        let is_soon = ahead_ns <= now_ns;
        self.tracker
            .rearm(cookie, if is_soon { due_ns } else { ahead_ns });
        if is_soon {
            self.ending.push(cookie);
        } else if !self.holdings.is_empty() {
            self.holdings.remove(&cookie);
        }
        is_soon
    }

    /// Adds the owner that the search has found to a late session, if the programs have not recorded one.
    pub(super) fn with_holder(&self, judged: Judgement) -> Judgement {
        let Judgement::Late(mut expired) = judged else {
            return judged;
        };
        let holding = self.holding(expired.cookie, &expired.session);
        if let Some(holding) = holding.filter(|_| !expired.session.owner.is_known()) {
            expired.session.owner = holding.owner;
        }
        Judgement::Late(expired)
    }

    /// Notes a holder that was found.
    fn note_holder(&mut self, (cookie, established_ns): Name, sought: &Sought, holder: &Holder) {
        let known = self.holdings.get(&cookie);
        let known = known.filter(|holding| holding.established_ns == established_ns);
        let owner = sought.to_reset.map(|expired| expired.session.owner);
        // A session that is active again needs no holder.
        let Some(owner) = known.map(|holding| holding.owner).or(owner) else {
            return;
        };
        let holding = Holding {
            established_ns,
            owner,
            process: Some(Process {
                pid: holder.pid,
                name: holder.comm,
            }),
            // The descriptor may be reused, so only the waiting reset uses it.
            holder: sought.to_reset.map(|_| *holder),
        };
        self.holdings.insert(cookie, holding);
    }

    /// Takes the holder that was found for the reset of a session. If that reset fails, it is searched for again.
    pub(super) fn take_holder(&mut self, expired: &Expired) -> Option<Holder> {
        let holding = self.holdings.get_mut(&expired.cookie)?;
        let is_its = holding.established_ns == expired.session.established_ns;
        holding.holder.take().filter(|_| is_its)
    }

    /// The last known holder of a session.
    pub(super) fn holding(&self, cookie: u64, session: &Session) -> Option<&Holding> {
        let holding = self.holdings.get(&cookie);
        holding.filter(|holding| holding.established_ns == session.established_ns)
    }
}
