//! Requests to reapers other than resets. If a reaper hangs at a socket, it is left behind, and another reaper is asked
//! about the remaining sockets.

use std::{os::fd::OwnedFd, rc::Rc, time::Duration};

use anyhow::Result;

use super::{
    context::Context,
    in_progress::{HangPermit, full_part},
};
use crate::{
    host::clock::monotonic_ns,
    reaper::{
        diag::{Detail, MAX_BATCH, Socket, SocketId},
        pool::{Condition, Exchange, Next, Purpose, STALL},
        protocol::{Problem, Reply, Request},
    },
};

/// Longest poll interval of a silent reaper.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Maximum number of attempts if reapers end early.
pub(super) const ATTEMPTS: u32 = 3;

/// How long a request that names no socket may stay without an answer: a search of a large host takes seconds.
const PATIENCE: Duration = Duration::from_secs(15);

/// The error while `sock_diag` is blocked.
const BLOCKED: &str = "the kernel's socket tables do not answer";

/// The state of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The socket, or `None` if it is gone, at this time.
    Known(Option<Socket>, u64),
    /// Its process keeps it locked, so it is in use.
    Locked,
}

/// Queries sockets of one namespace for what takes no lock; returns the answers in their order.
///
/// A socket is asked for by its addresses, ports and interface, which is cheap. One that is not found is searched for in
/// the whole socket table: its process may have bound it to another interface since (`SO_BINDTODEVICE` depends on no
/// state and needs no privilege). The socket in the answer then has another interface than the target.
///
/// # Errors
///
/// Fails if the namespace or the kernel cannot be queried.
pub(super) async fn query(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
) -> Result<Vec<Answer>, String> {
    query_or_search(context, netns_cookie, targets, None).await
}

/// As [`query`], but a socket that is not found among others is searched for alone. A dump of many sockets can miss one
/// while others close; a dump of one pair of ports does not. Users can bind all of their sockets at once, so a search for
/// each alone would take seconds.
///
/// # Errors
///
/// As [`query`].
pub(super) async fn query_each(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
) -> Result<Vec<Answer>, String> {
    let mut answers = query(context, netns_cookie, targets).await?;
    search_missing(context, netns_cookie, targets, None, 1, &mut answers).await?;
    Ok(answers)
}

/// As [`query`], with the activity of the sockets, for which the kernel takes their locks. `cgroups` has the cgroup of
/// each socket. A query that hangs counts as a hanging reset, and the sockets for which there is no room then are not
/// asked: they count as locked.
///
/// # Errors
///
/// As [`query`].
pub(super) async fn query_activity(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
    cgroups: &[u64],
) -> Result<Vec<Answer>, String> {
    query_or_search(context, netns_cookie, targets, Some(cgroups)).await
}

async fn query_or_search(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
    cgroups: Option<&[u64]>,
) -> Result<Vec<Answer>, String> {
    let mut answers = query_by_name(context, netns_cookie, targets, cgroups).await?;
    search_missing(
        context,
        netns_cookie,
        targets,
        cgroups,
        MAX_BATCH,
        &mut answers,
    )
    .await?;
    Ok(answers)
}

/// Searches for sockets that were not found by name, so many at a time, and queries those that are found.
async fn search_missing(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
    cgroups: Option<&[u64]>,
    searched_at_once: usize,
    answers: &mut [Answer],
) -> Result<(), String> {
    let missing =
        (0..targets.len()).filter(|index| matches!(answers[*index], Answer::Known(None, _)));
    let missing: Vec<usize> = missing.collect();
    for missing in missing.chunks(searched_at_once) {
        let of_missing = missing.iter().map(|index| targets[*index]).collect();
        let found = search(context, netns_cookie, of_missing)
            .await
            .unwrap_or_else(|error| {
                tracing::warn!(
                    "{} sockets could not be searched for and count as locked: {error}",
                    missing.len()
                );
                missing.iter().map(|index| Some(targets[*index])).collect()
            });
        let found = missing.iter().zip(found);
        let (indices, found): (Vec<usize>, Vec<SocketId>) = found
            .filter_map(|(index, target)| Some((*index, target?)))
            .unzip();
        let cgroups: Option<Vec<u64>> =
            cgroups.map(|cgroups| indices.iter().map(|index| cgroups[*index]).collect());
        let again = query_by_name(context, netns_cookie, &found, cgroups.as_deref()).await?;
        for (index, answer) in indices.into_iter().zip(again) {
            // It was there, and is being bound again and again, or was not searched for.
            let is_lost = matches!(answer, Answer::Known(None, _));
            answers[index] = if is_lost { Answer::Locked } else { answer };
        }
    }
    Ok(())
}

/// Searches for sockets in the whole socket table of a namespace; returns their present names, in the order of the
/// targets.
async fn search(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: Vec<SocketId>,
) -> Result<Vec<Option<SocketId>>, String> {
    let (netns, handle) = context.state().handles.netns(netns_cookie);
    let request = Request::Search { netns, targets };
    let replies = ask(context, &request, handle.as_deref()).await?;
    let sockets = replies.into_iter().flat_map(|(reply, _)| match reply {
        Reply::Sockets { sockets, .. } => sockets,
        _ => Vec::new(),
    });
    Ok(sockets.map(|socket| Some(socket?.target)).collect())
}

/// Queries sockets by their addresses, ports and interface; with their activity if their cgroups are given.
async fn query_by_name(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
    cgroups: Option<&[u64]>,
) -> Result<Vec<Answer>, String> {
    if context.state().hanging.is_diag_blocked {
        return Err(BLOCKED.to_owned());
    }
    let detail = cgroups.map_or(Detail::Names, |_| Detail::Activity);
    // Whether another query may hang at a socket of this cgroup.
    let has_room =
        |index: usize| cgroups.is_none_or(|of| full_part(&context.state(), of[index]).is_none());
    let mut answers: Vec<Option<Answer>> = vec![None; targets.len()];
    let mut left: Vec<usize> = (0..targets.len()).collect();
    let mut without_room = Vec::new();
    let mut behind: Vec<(PartialQuery, Option<HangPermit>)> = Vec::new();
    let mut attempts = 0;
    loop {
        while !left.is_empty() {
            let some = left.drain(..left.len().min(MAX_BATCH));
            let (some, others): (Vec<usize>, Vec<usize>) = some.partition(|index| has_room(*index));
            without_room.extend(others);
            if some.is_empty() {
                continue;
            }
            let of_some = some.iter().map(|index| targets[*index]).collect();
            let mut part = PartialQuery::ask(context, netns_cookie, of_some, detail).await?;
            part.indices = some;
            match part.receive(&mut answers, context, true).await? {
                PartEnd::Done => {}
                PartEnd::Silent => {
                    let claimed = part.exchange.stop();
                    left.splice(0..0, part.indices.drain(claimed.min(part.indices.len())..));
                    if part.answered < part.indices.len() {
                        part.exchange.leave_behind();
                        // It hangs at the socket that was claimed last.
                        let at = cgroups.zip(part.indices.last());
                        let permit = at.map(|(of, index)| {
                            HangPermit::begin(context, &mut context.state(), of[*index])
                        });
                        behind.push((part, permit));
                    }
                }
                PartEnd::Ended => {
                    note_lost(&mut attempts)?;
                    left.splice(0..0, part.indices.drain(part.answered..));
                }
            }
        }
        let Some((mut part, permit)) = behind.pop() else {
            let all = answers
                .into_iter()
                .map(|answer| answer.unwrap_or(Answer::Locked));
            return Ok(all.collect());
        };
        left.append(&mut without_room);
        match part.receive(&mut answers, context, false).await? {
            PartEnd::Done => {}
            PartEnd::Ended => {
                note_lost(&mut attempts)?;
                left.extend(part.indices.drain(part.answered..));
            }
            PartEnd::Silent if is_diag_blocked(context).await => {
                wait_out(context, part.exchange, permit);
                return Err(BLOCKED.to_owned());
            }
            PartEnd::Silent => {
                // The socket that was claimed last is locked. The others without an answer are queried again.
                let locked = part.indices.pop();
                left.extend(part.indices.drain(part.answered..));
                if let Some(locked) = locked {
                    answers[locked] = Some(Answer::Locked);
                }
                wait_out(context, part.exchange, permit);
            }
        }
    }
}

/// Counts an attempt whose reaper has ended early.
fn note_lost(attempts: &mut u32) -> Result<(), String> {
    *attempts += 1;
    if *attempts > ATTEMPTS {
        return Err("reapers end without an answer".to_owned());
    }
    Ok(())
}

/// Queries sockets of one namespace once with one reaper. If the reaper is silent at a socket, it is left behind, and
/// what it has left to answer is returned; sockets without an answer are `None`.
///
/// # Errors
///
/// Fails if the namespace or the kernel cannot be queried.
pub(super) async fn query_until_silent(
    context: &Rc<Context>,
    netns_cookie: u64,
    targets: &[SocketId],
    detail: Detail,
) -> Result<(Vec<Option<Answer>>, Option<Silent>), String> {
    if context.state().hanging.is_diag_blocked {
        return Err(BLOCKED.to_owned());
    }
    let mut answers = vec![None; targets.len()];
    let mut part = PartialQuery::ask(context, netns_cookie, targets.to_vec(), detail).await?;
    part.indices = (0..targets.len()).collect();
    let silent = match part.receive(&mut answers, context, true).await? {
        PartEnd::Silent => {
            let claimed = part.exchange.stop().min(targets.len());
            part.exchange.leave_behind();
            let index = claimed.checked_sub(1);
            index.map(|index| Silent { part, index })
        }
        PartEnd::Done | PartEnd::Ended => None,
    };
    Ok((answers, silent))
}

/// A reaper that is silent at a socket of its query.
pub(super) struct Silent {
    part: PartialQuery,
    /// The index of that socket among the targets.
    pub(super) index: usize,
}

impl Silent {
    /// Waits until the reaper answers or counts as stuck. A stuck one is returned with the answer.
    pub(super) async fn wait(mut self, context: &Rc<Context>) -> (Answer, Option<Exchange>) {
        let mut answers = vec![None; self.part.indices.len()];
        let ended = self.part.receive(&mut answers, context, false).await;
        let answer = answers.get(self.index).copied().flatten();
        let stuck = matches!(ended, Ok(PartEnd::Silent)).then_some(self.part.exchange);
        (answer.unwrap_or(Answer::Locked), stuck)
    }
}

/// Waits for a silent reaper whose answer does not matter, so that it counts among the reapers until it answers.
pub(super) async fn outlast(context: Rc<Context>, silent: Silent) -> Result<()> {
    if let (_, Some(exchange)) = silent.wait(&context).await {
        is_diag_blocked(&context).await;
        end_of(exchange).await;
    }
    Ok(())
}

/// A part of a query, handled by one reaper.
struct PartialQuery {
    exchange: Exchange,
    netns_cookie: u64,
    began_ns: u64,
    /// Indices of the sockets that the reaper was asked about and still has.
    indices: Vec<usize>,
    /// Number of sockets that it has answered.
    answered: usize,
}

/// Why the handling of a part has stopped.
enum PartEnd {
    Done,
    /// The reaper is silent or, if it was given more time, stuck.
    Silent,
    Ended,
}

impl PartialQuery {
    async fn ask(
        context: &Rc<Context>,
        netns_cookie: u64,
        targets: Vec<SocketId>,
        detail: Detail,
    ) -> Result<Self, String> {
        let began_ns = monotonic_ns();
        let (netns, handle) = context.state().handles.netns(netns_cookie);
        let request = Request::Query {
            netns,
            targets,
            detail,
        };
        let asked = context
            .pool
            .ask(Purpose::Others, &request, handle.as_deref());
        Ok(Self {
            exchange: asked.await.map_err(|error| format!("{error:#}"))?,
            netns_cookie,
            began_ns,
            indices: Vec::new(),
            answered: 0,
        })
    }

    /// Handles replies until the reaper is done, has ended, or is silent at a socket.
    async fn receive(
        &mut self,
        answers: &mut [Option<Answer>],
        context: &Rc<Context>,
        is_first: bool,
    ) -> Result<PartEnd, String> {
        let mut silent = Duration::ZERO;
        let mut wait = if is_first { STALL } else { POLL_INTERVAL };
        let mut claimed_before = 0;
        loop {
            match self.exchange.next(wait).await {
                Next::Reply(Reply::Sockets { sockets, at_ns }, _) => {
                    for (index, socket) in self.indices[self.answered..].iter().zip(&sockets) {
                        answers[*index] = Some(Answer::Known(*socket, at_ns));
                    }
                    self.answered = (self.answered + sockets.len()).min(self.indices.len());
                }
                Next::Reply(Reply::Met { cookie, path }, _) => {
                    context.state().handles.note(cookie, path);
                }
                Next::Reply(Reply::Found { path }, handle) => {
                    let mut state = context.state();
                    state.handles.keep(self.netns_cookie, path, handle);
                    state.give_up_if_unused(self.netns_cookie);
                }
                Next::Reply(Reply::Done { error: None, .. }, _) => return Ok(PartEnd::Done),
                Next::Reply(
                    Reply::Done {
                        error: Some(problem),
                        ..
                    },
                    _,
                ) => {
                    note_problem(context, self.netns_cookie, &problem, self.began_ns);
                    return Err(problem.to_string());
                }
                Next::Reply(..) => return Err("a reaper answers something else".to_owned()),
                Next::Ended => return Ok(PartEnd::Ended),
                Next::Silent => {
                    let condition = self.exchange.condition();
                    silent += wait;
                    wait = POLL_INTERVAL.min(wait * 2);
                    let claimed = self.exchange.claimed();
                    let is_at_socket = claimed > self.answered;
                    let moves = std::mem::replace(&mut claimed_before, claimed) != claimed;
                    if condition == Condition::Stuck && is_at_socket {
                        return Ok(PartEnd::Silent);
                    }
                    if !is_at_socket && silent > PATIENCE {
                        return Err("the namespace is not found in time".to_owned());
                    }
                    // Another reaper would wait for a processor as long.
                    let is_busy = moves || self.exchange.can_run();
                    if is_first && is_at_socket && !is_busy {
                        return Ok(PartEnd::Silent);
                    }
                }
            }
        }
    }
}

/// Notes that a reaper did not find a namespace.
pub(super) fn note_problem(
    context: &Rc<Context>,
    netns_cookie: u64,
    problem: &Problem,
    began_ns: u64,
) {
    if let Problem::Namespace { searched, .. } = problem {
        let handles = &mut context.state().handles;
        handles.note_missed(netns_cookie, *searched, began_ns);
    }
}

/// Waits in the background for the end of an exchange that is not needed any more. Meanwhile the reaper counts as
/// stuck; afterwards it is used again.
pub(super) fn wait_out(context: &Rc<Context>, mut exchange: Exchange, permit: Option<HangPermit>) {
    exchange.leave_behind();
    context.spawn(async move {
        end_of(exchange).await;
        drop(permit);
        Ok(())
    });
}

/// Returns when a reaper is done or has ended, however long it hangs.
pub(super) async fn end_of(mut exchange: Exchange) {
    loop {
        match exchange.next(POLL_INTERVAL).await {
            Next::Reply(Reply::Done { .. }, _) | Next::Ended => return,
            Next::Reply(..) => {}
            Next::Silent => {
                exchange.condition();
            }
        }
    }
}

/// Sends a request; returns all replies in their order, with their descriptors. If a reaper ends early, its replies are
/// discarded and another reaper is asked.
///
/// # Errors
///
/// Fails if there is no complete answer in time.
pub(super) async fn ask(
    context: &Rc<Context>,
    request: &Request,
    handle: Option<&OwnedFd>,
) -> Result<Vec<(Reply, Option<OwnedFd>)>, String> {
    let mut replies = Vec::new();
    each(context, request, handle, |index, reply, fd| {
        replies.truncate(index);
        replies.push((reply, fd));
    })
    .await?;
    Ok(replies)
}

/// Sends a request, and passes each reply to `take` as soon as it comes, with its index and its descriptor. If a reaper
/// ends early, another reaper is asked, whose replies begin at index 0 again.
///
/// # Errors
///
/// Fails if there is no complete answer in time.
pub(super) async fn each(
    context: &Rc<Context>,
    request: &Request,
    handle: Option<&OwnedFd>,
    mut take: impl FnMut(usize, Reply, Option<OwnedFd>),
) -> Result<(), String> {
    for _ in 0..ATTEMPTS {
        let asked = context.pool.ask(Purpose::Others, request, handle).await;
        let mut exchange = asked.map_err(|error| format!("{error:#}"))?;
        let mut index = 0;
        let mut silent_polls = 0;
        loop {
            match exchange.next(POLL_INTERVAL).await {
                Next::Reply(Reply::Done { error: None, .. }, _) => return Ok(()),
                Next::Reply(
                    Reply::Done {
                        error: Some(problem),
                        ..
                    },
                    _,
                ) => {
                    return Err(problem.to_string());
                }
                Next::Reply(reply, fd) => {
                    silent_polls = 0;
                    take(index, reply, fd);
                    index += 1;
                }
                Next::Ended => break,
                Next::Silent => {
                    exchange.condition();
                    silent_polls += 1;
                    if POLL_INTERVAL * silent_polls > PATIENCE {
                        exchange.kill();
                        wait_out(context, exchange, None);
                        return Err("there is no answer".to_owned());
                    }
                }
            }
        }
    }
    Err("reapers end without an answer".to_owned())
}

/// Whether `sock_diag` as a whole is blocked, so that even a query that takes no socket lock hangs. That query is
/// awaited in the background; its answer ends the state.
pub(super) async fn is_diag_blocked(context: &Rc<Context>) -> bool {
    if context.state().hanging.is_diag_blocked {
        return true;
    }
    let own = context.state().handles.own();
    let (netns, _) = context.state().handles.netns(own);
    let request = Request::Query {
        netns,
        targets: vec![NOBODY],
        detail: Detail::Names,
    };
    let asked = context.pool.ask(Purpose::Resets, &request, None).await;
    let Ok(mut exchange) = asked else {
        return false;
    };
    loop {
        match exchange.next(POLL_INTERVAL).await {
            Next::Reply(Reply::Done { .. }, _) | Next::Ended => return false,
            Next::Reply(..) => {}
            Next::Silent => {
                if exchange.condition() == Condition::Stuck {
                    break;
                }
            }
        }
    }
    exchange.leave_behind();
    let mut state = context.state();
    state.hanging.is_diag_blocked = true;
    state.note_backlog();
    drop(state);
    let background = Rc::clone(context);
    context.spawn(async move {
        end_of(exchange).await;
        let mut state = background.state();
        state.hanging.is_diag_blocked = false;
        // Requests a sync, which adopts what could not be adopted meanwhile.
        state.backlog.events = true;
        state.note_backlog();
        Ok(())
    });
    true
}

/// A socket that cannot exist: no socket has port 0.
const NOBODY: SocketId = SocketId {
    local: session_enforcer_common::Address([0, 0, 0, 0]),
    remote: session_enforcer_common::Address([0, 0, 0, 0]),
    local_port: 0,
    remote_port: 0,
    ifindex: 0,
    cookie: 1,
};

/// Waits for an RCU grace period. Afterwards no program runs that has looked up an old record or none, and sockets have
/// counted the packets of those programs.
pub(super) async fn wait_for_programs(context: &Rc<Context>) {
    let waited = ask(context, &Request::GracePeriod, None).await;
    if let Err(error) = waited {
        tracing::warn!("waiting for the kernel's programs: {error}");
    }
}
