//! Finds the processes that hold connections that will end soon, for their audit records. The holder at the end may be
//! another process than the creator of the socket. A reaper searches before the deadline, because the process closes
//! the socket when it is reset. No reset waits for the search; a holder that is not found in time is omitted.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use anyhow::Result;
use session_enforcer_common::{Limits, Owner, Session};
use tokio::time::Instant;

use super::{
    ask, context::Context, judge::Judgement, owner_search, state::State, tracker::by_namespace,
};
use crate::{
    reaper::{
        diag::{MAX_BATCH, SocketId},
        protocol::{Reply, Request, SocketOwner},
    },
    report::audit::Process,
};

/// Maximum time before its deadline at which the holder of a session is searched for.
const MAX_AHEAD_NS: u64 = 2_000_000_000;

/// The pause after a search is this multiple of its processor time, because any user can have many descriptors.
const REST: u32 = 9;

/// Minimum pause after a search.
const PAUSE: Duration = Duration::from_millis(20);

/// The multiple for a search of the whole host's descriptors.
const REST_OF_ALL: u32 = 19;

/// The holder of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holding {
    established_ns: u64,
    pub(super) owner: Owner,
    pub(super) process: Option<Process>,
}

/// When the holder of a session must be searched for, if the session can be due at `due_ns`: half of the shortest limit
/// earlier. By then a new connection has usually reached the process that will hold it.
pub(super) fn ahead_of(due_ns: u64, limits: &Limits) -> u64 {
    let limits = [
        limits.idle_timeout_ns,
        limits.max_lifetime_ns,
        limits.response_timeout_ns,
        limits.half_closed_timeout_ns,
    ];
    let shortest_ns = limits.into_iter().filter(|limit| *limit != 0).min();
    due_ns.saturating_sub((shortest_ns.unwrap_or(0) / 2).min(MAX_AHEAD_NS))
}

/// Starts the task that searches for the holders of waiting sessions, unless it is running.
pub(super) fn find(context: &Rc<Context>) {
    let is_due = !context.state().ending.is_empty();
    if is_due && !context.is_finding_holders.replace(true) {
        context.spawn(find_waiting(Rc::clone(context)));
    }
}

async fn find_waiting(context: Rc<Context>) -> Result<()> {
    loop {
        let ending = context.state().take_ending()?;
        if ending.is_empty() {
            context.is_finding_holders.set(false);
            return Ok(());
        }
        let everywhere = Instant::now() >= context.all_rest_until.get();
        let mut used = Duration::ZERO;
        for (netns_cookie, sessions) in ending {
            for some in sessions.chunks(MAX_BATCH) {
                used += find_holders(&context, netns_cookie, some, everywhere).await?;
            }
        }
        if everywhere {
            let until = Instant::now() + used * REST_OF_ALL;
            context.all_rest_until.set(until);
        }
        tokio::time::sleep((used * REST).max(PAUSE)).await;
    }
}

/// Searches for the holders of sessions; returns the processor time of the reaper.
async fn find_holders(
    context: &Rc<Context>,
    netns_cookie: u64,
    sessions: &[(u64, Session)],
    everywhere: bool,
) -> Result<Duration> {
    if context.state().hanging.is_diag_blocked {
        return Ok(Duration::ZERO);
    }
    let target = |(cookie, session): &(u64, Session)| SocketId::of(*cookie, session);
    let (netns, handle) = context.state().handles.netns(netns_cookie);
    let request = Request::Owners {
        netns,
        targets: sessions.iter().map(target).collect(),
        everywhere,
    };
    // An error is ignored here: it is reported when the sessions are reset.
    let replies = ask::ask(context, &request, handle.as_deref()).await;
    let mut replies = replies.unwrap_or_default().into_iter();
    let found = replies.find_map(|(reply, _)| match reply {
        Reply::Owners { owners, used_ns } => Some((owners, used_ns)),
        _ => None,
    });
    let (found, used_ns) = found.unwrap_or_default();
    let cgroups = found.iter().flatten().filter_map(|owner| owner.cgroup_id);
    owner_search::note_cgroups(context, cgroups.collect()).await?;
    let mut state = context.state();
    for ((cookie, session), owner) in sessions.iter().zip(found) {
        let Some(owner) = owner.filter(|_| state.tracker.contains(*cookie)) else {
            continue;
        };
        state.holdings.insert(*cookie, Holding::of(session, &owner));
        if owner.holder.is_none() && !everywhere {
            // The session waits for a search of the whole host, or for its end.
            state.ending.push(*cookie);
        }
    }
    Ok(Duration::from_nanos(used_ns))
}

impl Holding {
    fn of(session: &Session, owner: &SocketOwner) -> Self {
        Self {
            established_ns: session.established_ns,
            owner: Owner {
                cgroup_id: owner.cgroup_id.unwrap_or(0),
                uid: owner.uid,
                ..Owner::UNKNOWN
            },
            process: owner.holder.map(|holder| Process {
                pid: holder.pid,
                name: holder.comm,
            }),
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

    /// The last known holder of a session.
    pub(super) fn holding(&self, cookie: u64, session: &Session) -> Option<&Holding> {
        let holding = self.holdings.get(&cookie);
        holding.filter(|holding| holding.established_ns == session.established_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_session_is_looked_at_half_of_its_shortest_limit_ahead() {
        let mut limits = Limits {
            idle_timeout_ns: 60 * S,
            ..Limits::default()
        };
        assert_eq!(ahead_of(100 * S, &limits), 98 * S);
        limits.half_closed_timeout_ns = S;
        assert_eq!(ahead_of(100 * S, &limits), 100 * S - S / 2);
    }
}
