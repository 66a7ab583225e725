//! Sessions that may have ended without a report: a reaper queries or searches their sockets.

use std::rc::Rc;

use anyhow::Result;
use session_enforcer_common::Session;

use super::{
    ask::{self, Answer},
    context::Context,
    holder_searches::Holding,
    state::{Cause, MaybeEnded, RETRY_NS, State},
    tracker::by_namespace,
};
use crate::{
    host::clock::monotonic_ns,
    reaper::diag::{Socket, SocketId, state},
};

/// Recheck interval of a session whose socket is closing.
pub(super) const CLOSING_NS: u64 = 1_000_000_000;

/// The recorded error of a session whose socket is open and was not found by the kernel.
pub(super) const NOT_FOUND: &str =
    "SOCK_DESTROY: the kernel does not find the socket of an open session";

/// Queries the sockets of sessions that may have ended without a report.
pub(super) fn query_unreported(context: &Rc<Context>) {
    let sessions = std::mem::take(&mut context.state().maybe_ended);
    for (netns_cookie, sessions) in by_namespace(sessions, |maybe_ended| &maybe_ended.session) {
        context.spawn(query_maybe_ended(
            Rc::clone(context),
            netns_cookie,
            sessions,
        ));
    }
}

/// Queries the sockets. Another `sock_ops` program may have cleared the callback flag, so that the end was not reported.
pub(super) async fn query_maybe_ended(
    context: Rc<Context>,
    netns_cookie: u64,
    sessions: Vec<MaybeEnded>,
) -> Result<()> {
    let is_due = |maybe_ended: &MaybeEnded| matches!(maybe_ended.cause, Cause::NotFound(_));
    let (due, others): (Vec<_>, Vec<_>) = sessions.into_iter().partition(is_due);
    let targets = targets_of(&others);
    let answers = ask::query(&context, netns_cookie, &targets).await;
    conclude(&context, others, answers)?;
    // Who misses one of these frees it of its limit.
    let targets = targets_of(&due);
    let answers = ask::query_each(&context, netns_cookie, &targets).await;
    conclude(&context, due, answers)
}

fn targets_of(sessions: &[MaybeEnded]) -> Vec<SocketId> {
    let target = |s: &MaybeEnded| SocketId::of(s.cookie, &s.session);
    sessions.iter().map(target).collect()
}

fn conclude(
    context: &Context,
    sessions: Vec<MaybeEnded>,
    answers: Result<Vec<Answer>, String>,
) -> Result<()> {
    let answers = answers.unwrap_or_else(|error| {
        tracing::warn!(
            "the sockets of {} sessions could not be queried; the daemon tries again: {error}",
            sessions.len()
        );
        vec![Answer::Locked; sessions.len()]
    });
    for (maybe_ended, answer) in sessions.into_iter().zip(answers) {
        let mut state = context.state();
        match answer {
            Answer::Known(Some(socket), _) if !socket.is_mini => {
                state.is_there(&maybe_ended, &socket)?;
            }
            Answer::Known(..) => state.has_ended(&maybe_ended)?,
            Answer::Locked => state.may_be_there(&maybe_ended)?,
        }
    }
    context.state().records.audit.flush();
    Ok(())
}

impl State {
    /// Handles a session whose socket does not exist any more.
    fn has_ended(&mut self, maybe_ended: &MaybeEnded) -> Result<()> {
        let (cookie, session) = (maybe_ended.cookie, &maybe_ended.session);
        match self.still_there(cookie, session)? {
            // It may have ended long ago, so this is no termination, unless an earlier reset has no answer. The end of an
            // adopted session is never reported, so nothing is repaired.
            Some(_) if session.end_is_unreported() => self.release(cookie, session),
            Some(_) => self.drop_stale(cookie, session),
            None => Ok(()),
        }
    }

    /// Handles a session whose socket exists, with the interface in its record or with another one.
    fn is_there(&mut self, maybe_ended: &MaybeEnded, found: &Socket) -> Result<()> {
        let (cookie, session) = (maybe_ended.cookie, &maybe_ended.session);
        let Some(now) = self.still_there(cookie, session)? else {
            return Ok(());
        };
        let ifindex = found.target.ifindex;
        if ifindex != now.ifindex {
            self.datapath.update(cookie, &Session { ifindex, ..now })?;
        }
        let now_ns = monotonic_ns();
        match &maybe_ended.cause {
            Cause::Unreported if state::is_closing(found.state) => {
                self.tracker.hasten(cookie, now_ns + CLOSING_NS);
            }
            Cause::Unreported => {}
            Cause::Observed(expired) => self.observe(expired),
            Cause::NotFound(expired) => {
                // The query before its deadline did not find it either.
                let holding = || Holding::of(session, found);
                self.holdings.entry(cookie).or_insert_with(holding);
                self.unanswered(expired, now_ns, NOT_FOUND);
            }
        }
        Ok(())
    }

    /// Handles a session whose socket could not be queried.
    fn may_be_there(&mut self, maybe_ended: &MaybeEnded) -> Result<()> {
        let now_ns = monotonic_ns();
        match &maybe_ended.cause {
            Cause::NotFound(expired) => {
                if let Some(tried) = self.tracker.tried(expired.cookie, &expired.session) {
                    tried.is_shadowed_by_socket = true;
                }
                self.unanswered(expired, now_ns, NOT_FOUND);
            }
            cause => {
                self.tracker.hasten(maybe_ended.cookie, now_ns + RETRY_NS);
                let is_there = self.still_there(maybe_ended.cookie, &maybe_ended.session)?;
                if let (Cause::Observed(expired), Some(_)) = (cause, is_there) {
                    self.observe(expired);
                }
            }
        }
        Ok(())
    }
}
