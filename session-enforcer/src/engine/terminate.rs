//! Termination of late sessions: a reaper resets the session and the result is recorded. If the rule only observes, the
//! session is only recorded.
//!
//! If a reset hangs, the sockets that its reaper has not claimed go to another reaper at once. The session at which it
//! hangs is recorded as failed when the reaper counts as stuck, and recorded again when the reset returns. See
//! `docs/design/reapers.md`.

use std::{collections::BTreeMap, os::fd::OwnedFd, rc::Rc};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_common::{Expiry, Reason, Session, expiry, flags};

use super::{
    adopt,
    ask::{self, ATTEMPTS, Answer, POLL_INTERVAL, note_problem},
    batch::{Batch, ResetMethod},
    context::Context,
    handles::SearchNeed,
    holder_search::search_holder_of,
    in_progress::{Counted, HangPermit, SearchUnderWay, Slot, Turn, full_part},
    outcome::UNANSWERED,
    phase::{Expired, Phase},
    slow_owners::SlowKey,
    state::State,
    unreported::query_unreported,
};
use crate::{
    config::Mode,
    host::clock::monotonic_ns,
    reaper::{
        diag::{Destroyed, Detail, LEFT_OUT, MAX_BATCH, Queued, SocketId, SocketOwner},
        pool::{Condition, Exchange, Next, Purpose, STALL},
        protocol::{Disconnected, Problem, Reply, Search},
    },
};

/// Number of batches in progress at a time, besides hanging ones. The second one makes sessions that are due at once
/// end about 6 % sooner on two processors.
const MAX_BATCHES: usize = 2;

/// Maximum number of regular batches, for when a pass finds sessions of many namespaces. If all of them hang, so many
/// reapers are left behind before the limits on hanging resets apply.
const MAX_REGULAR: usize = 8;

/// How long a socket may delay the ACK of what it has taken (`TCP_DELACK_MAX` of include/net/tcp.h).
const LONGEST_ACK_DELAY_NS: u64 = 200_000_000;

/// A batch of ordinary resets takes some milliseconds. One that takes twice this long, and uses the processor for half
/// of it, must not keep others waiting.
const SLOW_NS: u64 = 5_000_000;

/// Number of sessions that go on at a time after they have waited for room. If the first one hangs, the others wait again.
const MAX_RELEASED: usize = 32;

/// Retry interval while a search for other namespaces is in progress.
const SEARCH_POLL_NS: u64 = 20_000_000;

/// Number of queries of candidates that wait for a grace period at a time: one could have to wait for the period of
/// another one and for its own.
const MAX_CONFIRM_ROUNDS: usize = 2;

/// The key of a batch: namespace, method, and why its sessions are kept separate.
type Lot = (u64, ResetMethod, Apart);

/// Why sessions are kept separate from others, so that these do not wait for them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Apart {
    No,
    /// The resets of their sockets' owner are slow.
    Slow(SlowKey),
    /// A reset of their cgroup hangs.
    Suspect(u64),
}

/// Terminates due sessions, up to the limit of one pass.
///
/// # Errors
///
/// Fails if the session table cannot be read.
pub(super) fn reset_due(context: &Rc<Context>) -> Result<()> {
    let mut looked_at = 0;
    let mut state = context.state();
    while looked_at < super::state::MAX_PASS && may_end_more(context, &state) && state.is_due() {
        let (late, count) = state.take_due(MAX_BATCH)?;
        looked_at += count;
        confirm_or_reset(context, &mut state, late)?;
    }
    Ok(())
}

/// Has sessions judged again that have waited for room, or for their owner's turn.
pub(super) fn retry_waiting(context: &Context) {
    let mut state = context.state();
    // Sessions that are due come first. They include those that were released last.
    if state.is_due() {
        return;
    }
    let State {
        without_room,
        hanging,
        slow,
        tracker,
        ..
    } = &mut *state;
    let mut released = without_room.release(MAX_RELEASED, |scope| hanging.has_room(scope));
    released.extend(slow.release(MAX_RELEASED));
    for cookie in released {
        tracker.rearm(cookie, 0);
    }
}

/// Queries the sockets of the late sessions with a candidate. If a confirmation could let a session live, the query waits
/// first until packets that have passed the hook have reached their sockets. All that have come meanwhile share one wait
/// and one query, so that many such sessions of one user delay nobody.
pub(super) fn confirm_candidates(context: &Rc<Context>) {
    let only_counts = std::mem::take(&mut context.state().only_counts);
    confirm_all(context, only_counts, false);
    if context.confirm_rounds.get() == MAX_CONFIRM_ROUNDS {
        return;
    }
    let candidates = std::mem::take(&mut context.state().candidates);
    if !candidates.is_empty() {
        let round = Counted::begin(context, |context| &context.confirm_rounds);
        context.spawn(confirm_round(round, candidates));
    }
}

/// Whether another batch may be started. The limit keeps the check of a session close to its reset. With a synced
/// audit, the records of the previous batch must be on disk.
pub(super) fn may_end_more(context: &Context, state: &State) -> bool {
    let (under_way, audit) = (context.resets_under_way.get(), &state.records.audit);
    if audit.is_synced() {
        return under_way == 0 && audit.is_written();
    }
    under_way < MAX_BATCHES
}

/// Starts the resets of late sessions, except of those with a candidate, whose sockets must first be queried.
fn confirm_or_reset(context: &Rc<Context>, state: &mut State, late: Vec<Expired>) -> Result<()> {
    let mut confirmed = Vec::new();
    for expired in state.shut(late)? {
        let is_tried = state
            .tracker
            .tried(expired.cookie, &expired.session)
            .is_some();
        // After an earlier attempt the candidate was already checked, and its gate has been shut since. An
        // administrator's request does not depend on activity.
        let may_live = expired.reason != Reason::Admin && !is_tried;
        if expired.session.has_candidate() && may_live {
            let (cookie, session) = (expired.cookie, &expired.session);
            state.tracker.set_phase(cookie, session, Phase::Candidate);
            state.add_candidate(expired);
        } else {
            confirmed.push(expired);
        }
    }
    start_resets(context, state, confirmed)
}

/// Resets the sessions that their rules have no room for.
///
/// # Errors
///
/// As [`reset_untracked`].
pub(super) fn reset_waiting_untracked(context: &Rc<Context>) -> Result<()> {
    let mut state = context.state();
    let sessions = std::mem::take(&mut state.untracked);
    if sessions.is_empty() {
        return Ok(());
    }
    reset_untracked(context, &mut state, sessions)
}

/// Resets sessions for which the session table has no slot.
///
/// # Errors
///
/// Fails if the session table cannot be read.
pub(super) fn reset_untracked(
    context: &Rc<Context>,
    state: &mut State,
    sessions: Vec<(u64, Session)>,
) -> Result<()> {
    // The next sync shows whether they are gone.
    state.backlog.to_reset += sessions.len();
    let now_ns = monotonic_ns();
    let untracked = |(cookie, session): (u64, Session)| Expired {
        cookie,
        idle_since_ns: session.last_activity_ns(),
        session: Session {
            // There is no record whose end could be missed.
            flags: session.flags & !flags::END_UNREPORTED,
            ..session
        },
        reason: Reason::Untracked,
        deadline_ns: now_ns,
        reached_ns: now_ns,
        decided_ns: now_ns,
        limit_ns: 0,
    };
    start_resets(
        context,
        state,
        sessions.into_iter().map(untracked).collect(),
    )?;
    state.records.audit.flush();
    Ok(())
}

/// Waits until packets that have passed the hook have reached their sockets, and then queries these.
async fn confirm_round(round: Counted, candidates: Vec<Expired>) -> Result<()> {
    ask::wait_for_programs(&round.context).await;
    confirm_all(&round.context, candidates, true);
    Ok(())
}

/// Starts queries of the sockets of late sessions. Each cgroup has its own queries, so that a locked socket does not
/// delay other cgroups.
fn confirm_all(context: &Rc<Context>, candidates: Vec<Expired>, may_live: bool) {
    let mut lots: BTreeMap<(u64, u64), Vec<Expired>> = BTreeMap::new();
    for expired in candidates {
        let session = &expired.session;
        let lot = (session.netns_cookie, session.owner.cgroup_id);
        lots.entry(lot).or_default().push(expired);
    }
    for ((netns_cookie, _), lot) in lots {
        context.spawn(confirm_lot(Rc::clone(context), netns_cookie, may_live, lot));
    }
}

/// Queries the sockets of late sessions of one cgroup, one batch after the other.
///
/// A socket that its process keeps locked does not answer. Its reaper is left behind and counts as a hanging reset;
/// another reaper queries the remaining sockets at once, within the limits on those.
async fn confirm_lot(
    context: Rc<Context>,
    netns_cookie: u64,
    may_live: bool,
    mut waiting: Vec<Expired>,
) -> Result<()> {
    let mut lost_reapers = 0;
    while !waiting.is_empty() {
        let Some(permit) = begin_query(&context, &waiting) else {
            return Ok(());
        };
        let batch = waiting.drain(..waiting.len().min(MAX_BATCH));
        let mut lot: Vec<Expired> = batch.collect();
        let began_ns = monotonic_ns();
        let target = |expired: &Expired| SocketId::of(expired.cookie, &expired.session);
        let targets: Vec<SocketId> = lot.iter().map(target).collect();
        let asked =
            ask::query_until_silent(&context, netns_cookie, &targets, Detail::Activity).await;
        let (answers, silent) = asked.unwrap_or_else(|error| {
            tracing::warn!(
                "{} sockets could not be queried before their sessions end, so the records decide: {error}",
                lot.len()
            );
            if may_live {
                let mut state = context.state();
                lot.retain(|expired| !state.waits_for_ack(expired));
            }
            (vec![Some(Answer::Locked); lot.len()], None)
        });
        let silent_at = silent.as_ref().map(|silent| silent.index);
        let is_lost = silent_at.is_none() && answers.contains(&None);
        lost_reapers += u32::from(is_lost);
        let has_given_up = lost_reapers > ATTEMPTS;
        let mut state = context.state();
        let (late, rest) =
            state.confirm_answers(&lot, answers, (silent_at, has_given_up), began_ns)?;
        start_resets(&context, &mut state, late)?;
        state.records.audit.flush();
        drop(state);
        if let Some(silent) = silent {
            let expired = lot[silent.index];
            let confirmed = confirm_silent(
                Rc::clone(&context),
                expired,
                silent,
                began_ns,
                permit.silent(),
            );
            context.spawn(confirmed);
        }
        context.wake.notify_one();
        if rest.is_empty() {
            lost_reapers = 0;
        }
        waiting.splice(0..0, rest);
    }
    Ok(())
}

/// Counts a query as possibly hanging. If no more may hang, the sessions wait for room.
fn begin_query(context: &Rc<Context>, lot: &[Expired]) -> Option<HangPermit> {
    let first = lot.first()?;
    let mut state = context.state();
    if let Some(full) = full_part(&state, first.session.owner.cgroup_id) {
        state.query_has_no_room(lot, &full);
        return None;
    }
    Some(HangPermit::begin(
        context,
        &mut state,
        first.session.owner.cgroup_id,
    ))
}

/// Confirms a session at whose socket a reaper is silent, as soon as that answers or counts as stuck.
async fn confirm_silent(
    context: Rc<Context>,
    expired: Expired,
    silent: ask::Silent,
    began_ns: u64,
    permit: HangPermit,
) -> Result<()> {
    let (answer, stuck) = silent.wait(&context).await;
    {
        let mut state = context.state();
        let late = state.confirm(&expired, answer, began_ns)?;
        start_resets(&context, &mut state, late.into_iter().collect())?;
        state.records.audit.flush();
    }
    context.wake.notify_one();
    if let Some(exchange) = stuck {
        ask::end_of(exchange).await;
    }
    drop(permit);
    Ok(())
}

/// Gives late sessions, whose gates are shut, to reapers.
pub(super) fn start_resets(
    context: &Rc<Context>,
    state: &mut State,
    late: Vec<Expired>,
) -> Result<()> {
    let mut lots: BTreeMap<Lot, Vec<Expired>> = BTreeMap::new();
    let now_ns = monotonic_ns();
    for expired in late {
        let cgroup_id = expired.session.owner.cgroup_id;
        if let Some(full) = full_part(state, cgroup_id) {
            state.has_no_room(&expired, full, now_ns);
            continue;
        }
        let method = state.method_for(&expired, now_ns);
        let apart = match state.slow.owner_of(expired.cookie, now_ns) {
            Some(key) => Apart::Slow(key),
            None if state.hanging.is_suspect(cgroup_id) => Apart::Suspect(cgroup_id),
            None => Apart::No,
        };
        let lot = (expired.session.netns_cookie, method, apart);
        lots.entry(lot).or_default().push(expired);
    }
    for ((netns_cookie, method, apart), lot) in lots {
        let existed_ns = lot.iter().map(|expired| expired.session.established_ns);
        let existed_ns = existed_ns.min().unwrap_or(0);
        let search_need = match method {
            ResetMethod::ByCookie => SearchNeed::None,
            _ => state.handles.search(netns_cookie, existed_ns, now_ns),
        };
        if search_need == SearchNeed::Wait {
            for expired in &lot {
                state.tracker.rearm(expired.cookie, now_ns + SEARCH_POLL_NS);
            }
            continue;
        }
        let Some(slot) = take_slot(context, state, apart, &lot, now_ns) else {
            continue;
        };
        for expired in &lot {
            state.tracker.begin_reset(expired);
            state.note_reset(expired);
        }
        let search = match search_need {
            SearchNeed::Start(search) => Some(search),
            _ => None,
        };
        let batch = Batch {
            netns_cookie,
            method,
            search: search.map(|search| SearchUnderWay::begin(context, state, search)),
            sessions: lot,
            is_turn: matches!(slot, Slot::SlowTurn(_)),
        };
        context.spawn(reset(Rc::clone(context), batch, Some(slot)));
    }
    Ok(())
}

/// Takes what a batch occupies. If there is none, has the sessions wait and returns `None`.
fn take_slot(
    context: &Rc<Context>,
    state: &mut State,
    apart: Apart,
    lot: &[Expired],
    now_ns: u64,
) -> Option<Slot> {
    if let Apart::Slow(key) = apart {
        let turn = Turn::begin(context, state, key);
        if turn.is_none() {
            for expired in lot {
                state.waits_for_turn(expired, key);
            }
        }
        return turn.map(Slot::SlowTurn);
    }
    if let Apart::Suspect(cgroup_id) = apart {
        // Batches of this pass may have taken the room meanwhile.
        if let Some(full) = full_part(state, cgroup_id) {
            for expired in lot {
                state.has_no_room(expired, Rc::clone(&full), now_ns);
            }
            return None;
        }
        // Counts as possibly hanging from now on.
        let permit = HangPermit::begin(context, state, cgroup_id);
        return Some(Slot::Separate(permit));
    }
    if context.resets_under_way.get() >= MAX_REGULAR {
        for expired in lot {
            state.tracker.rearm(expired.cookie, 0);
        }
        return None;
    }
    let batch = Counted::begin(context, |context| &context.resets_under_way);
    Some(Slot::Regular { _batch: batch })
}

/// Resets a batch. Sessions that the reaper has not claimed when it hangs or ends go to other reapers.
async fn reset(context: Rc<Context>, batch: Batch, slot: Option<Slot>) -> Result<()> {
    let began_ns = monotonic_ns();
    let (request, handle, may_search) = context.state().request(&batch);
    let asked = context
        .pool
        .ask(Purpose::Resets, &request, handle.as_deref())
        .await;
    let exchange = match asked {
        Ok(exchange) => exchange,
        Err(error) => {
            tracing::error!("sessions are not reset: {error:#}");
            for expired in &batch.sessions {
                conclude(&context, expired, None, began_ns)?;
            }
            return Ok(());
        }
    };
    let attempt = Attempt {
        exchange,
        netns_cookie: batch.netns_cookie,
        method: batch.method,
        may_search,
        sessions: batch.sessions,
        concluded: 0,
        began_ns,
        is_slow: batch.is_turn,
        took_ns: BTreeMap::new(),
    };
    let rest = attempt.run(&context, slot).await?;
    restart_unclaimed(&context, rest)
}

/// Gives sessions that a reaper has not claimed to others.
fn restart_unclaimed(context: &Rc<Context>, rest: Vec<Expired>) -> Result<()> {
    let mut state = context.state();
    let untouched = |expired: &Expired| state.answered(expired);
    let rest = rest.into_iter().filter(untouched).collect();
    confirm_or_reset(context, &mut state, rest)
}

/// A reaper's work on a batch.
struct Attempt {
    exchange: Exchange,
    netns_cookie: u64,
    method: ResetMethod,
    /// Whether the reaper may search for the namespace before it claims the first socket.
    may_search: bool,
    sessions: Vec<Expired>,
    /// Number of sessions with an outcome; they are the first in the list.
    concluded: usize,
    began_ns: u64,
    /// Whether the batch takes long, or is one of an owner whose batches did.
    is_slow: bool,
    /// The processor time of the resets of each owner.
    took_ns: BTreeMap<SocketOwner, u64>,
}

/// A reaper's answer about a session.
enum ReaperAnswer {
    /// The kernel's error code, and the unsent or unread data of the socket if known.
    Destroyed(i32, Option<Queued>),
    Outcome(Disconnected),
    /// The resets of the socket's owner are slow.
    LeftOut(SocketOwner),
}

impl Attempt {
    /// Runs until the reaper is done, or until it hangs or ends and the unclaimed sessions are taken back. Returns the
    /// unclaimed sessions.
    async fn run(mut self, context: &Rc<Context>, slot: Option<Slot>) -> Result<Vec<Expired>> {
        // Held while this is one of the regular batches.
        let mut slot = slot;
        let mut claimed_before = 0;
        let mut wait = STALL;
        let mut ran_before = None;
        loop {
            match self.exchange.next(wait).await {
                Next::Reply(reply, handle) => {
                    if self.take_in(context, reply, handle)? {
                        if let Some(Slot::SlowTurn(turn)) = &slot {
                            let took_ns: u64 = self.took_ns.values().sum();
                            let count = self.sessions.len() as u64;
                            if took_ns < count * SLOW_NS / MAX_RELEASED as u64 {
                                context.state().slow.forget(turn.key);
                            }
                        }
                        return Ok(Vec::new());
                    }
                }
                Next::Ended => return self.ended(context),
                Next::Silent => {
                    let claimed = self.exchange.claimed();
                    let searches = claimed == 0 && self.may_search;
                    let is_regular = matches!(slot, Some(Slot::Regular { .. }));
                    let is_slow = is_regular && claimed > 0 && self.is_slow(&mut ran_before);
                    self.is_slow |= is_slow;
                    let waits = !searches && self.waits_for_a_processor();
                    if !is_slow && (claimed != claimed_before || waits) {
                        claimed_before = claimed;
                    } else if claimed == 0 {
                        // The reaper is searching for the namespace, or hangs before the first socket. Only sessions in
                        // that namespace wait for it.
                        drop(slot.take());
                        wait = POLL_INTERVAL;
                        self.exchange.leave_behind();
                        self.exchange.condition();
                    } else {
                        let claimed = self.exchange.stop();
                        let rest = self.sessions.split_off(claimed);
                        self.conclude_answered(context)?;
                        self.exchange.leave_behind();
                        let Some(hung) = self.sessions.last().copied() else {
                            return Ok(rest);
                        };
                        let permit = match slot.take() {
                            Some(Slot::Separate(permit)) => permit,
                            _ => HangPermit::begin(
                                context,
                                &mut context.state(),
                                hung.session.owner.cgroup_id,
                            ),
                        };
                        context.spawn(self.wait_out(Rc::clone(context), hung, permit.silent()));
                        return Ok(rest);
                    }
                }
            }
        }
    }

    /// Whether the kernel takes long for the resets, so that others must not wait for them: the batch has lasted for
    /// some time, and the reaper has then used the processor for as long. `ran_before` has what it had used until then.
    fn is_slow(&self, ran_before: &mut Option<u64>) -> bool {
        if self.method != ResetMethod::Destroy || monotonic_ns() < self.began_ns + SLOW_NS {
            return false;
        }
        let ran_ns = self.exchange.ran_ns();
        ran_ns.saturating_sub(*ran_before.get_or_insert(ran_ns)) > SLOW_NS
    }

    /// Whether the reaper waits for a processor and not for a socket: another reaper would wait as long. Only for
    /// `SOCK_DESTROY`, because the other methods may run long before they reach a socket.
    fn waits_for_a_processor(&self) -> bool {
        self.method == ResetMethod::Destroy && self.exchange.can_run()
    }

    /// Handles a reply; returns whether it was the last.
    fn take_in(
        &mut self,
        context: &Rc<Context>,
        reply: Reply,
        handle: Option<OwnedFd>,
    ) -> Result<bool> {
        match reply {
            Reply::Met { cookie, path } => {
                context.state().handles.note(cookie, path);
                Ok(false)
            }
            Reply::Found { path } => {
                let mut state = context.state();
                state.handles.keep(self.netns_cookie, path, handle);
                // Its last session may have ended during the search.
                state.give_up_if_unused(self.netns_cookie);
                Ok(false)
            }
            Reply::Disconnected { outcome, at_ns } => {
                self.conclude_next(context, Some(ReaperAnswer::Outcome(outcome)), at_ns)?;
                Ok(false)
            }
            Reply::Done { at_ns, error, .. } => {
                self.conclude_answered(context)?;
                if let Some(problem) = error {
                    note_problem(context, self.netns_cookie, &problem, self.began_ns);
                    return self.broken_off(context, &problem, at_ns).map(|()| true);
                }
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Handles the kernel's answers in the shared page.
    fn conclude_answered(&mut self, context: &Rc<Context>) -> Result<()> {
        let now_ns = monotonic_ns();
        while let Some(destroyed) = self
            .exchange
            .answered(self.concluded)
            .filter(|_| self.concluded < self.sessions.len())
        {
            let Destroyed {
                code,
                queued,
                owner,
                took_ns,
            } = destroyed;
            *self.took_ns.entry(owner).or_default() += took_ns;
            let answer = match code {
                LEFT_OUT => ReaperAnswer::LeftOut(owner),
                _ => ReaperAnswer::Destroyed(code, queued),
            };
            self.conclude_next(context, Some(answer), now_ns)?;
        }
        // Once for each batch: the answers of one that was taken back come in two parts.
        if std::mem::take(&mut self.is_slow) {
            self.note_slow(context);
        }
        context.state().records.audit.flush();
        context.wake.notify_one();
        query_unreported(context);
        Ok(())
    }

    /// Notes the owners whose resets took long.
    fn note_slow(&self, context: &Rc<Context>) {
        let mut state = context.state();
        for (owner, _) in self
            .took_ns
            .iter()
            .filter(|(_, took_ns)| **took_ns > SLOW_NS)
        {
            let key = SlowKey {
                netns_cookie: self.netns_cookie,
                owner: *owner,
            };
            if state.slow.note(key, monotonic_ns()) {
                let netns = state.handles.name(self.netns_cookie);
                let cgroup = state
                    .owner_resolver
                    .path(owner.cgroup_id)
                    .unwrap_or("unknown");
                tracing::warn!(
                    "{netns}: the kernel takes long to reset connections of user {} in cgroup {cgroup}; they are \
                     reset one batch at a time",
                    owner.uid
                );
            }
        }
    }

    fn conclude_next(
        &mut self,
        context: &Rc<Context>,
        said: Option<ReaperAnswer>,
        at_ns: u64,
    ) -> Result<()> {
        let Some(expired) = self.sessions.get(self.concluded) else {
            return Ok(());
        };
        self.concluded += 1;
        conclude(context, expired, said, at_ns)
    }

    /// Handles the sessions that are left when the kernel or the namespace could not be asked any further.
    fn broken_off(&mut self, context: &Rc<Context>, problem: &Problem, at_ns: u64) -> Result<()> {
        let rest = &self.sessions[self.concluded..];
        match problem {
            // The next attempt searches the whole host for it.
            Problem::Namespace {
                searched: Search::Processes,
                ..
            } => {
                let mut state = context.state();
                for expired in rest {
                    state.answered(expired);
                    if state.tracker.contains(expired.cookie) {
                        state.tracker.rearm(expired.cookie, 0);
                    } else {
                        // It has ended, or has no slot in the table; in the latter case the next sync finds it again.
                        state.forget(expired.cookie);
                    }
                }
            }
            // Its sockets can still be found through their processes.
            Problem::Namespace {
                searched: Search::Everywhere,
                ..
            } => {
                let batch = Batch {
                    netns_cookie: self.netns_cookie,
                    method: ResetMethod::ByCookie,
                    search: None,
                    sessions: rest.to_vec(),
                    is_turn: false,
                };
                for expired in rest {
                    let mut state = context.state();
                    state.answered(expired);
                    state.tracker.begin_reset(expired);
                }
                context.spawn(reset(Rc::clone(context), batch, None));
            }
            Problem::Namespace { error, .. } => {
                let mut state = context.state();
                for expired in rest {
                    state.answered(expired);
                    state.not_reset(expired, at_ns, error)?;
                }
            }
            Problem::Diag(error) | Problem::Cgroups(error) => {
                tracing::warn!(
                    "the kernel's answers broke off, so the sessions are checked again: {error}"
                );
                for expired in rest {
                    conclude(context, expired, None, at_ns)?;
                }
            }
        }
        context.state().records.audit.flush();
        Ok(())
    }

    /// Handles a reaper that has ended early. Sessions that it had claimed without an answer may have been reset or
    /// not. Returns the unclaimed sessions.
    fn ended(&mut self, context: &Rc<Context>) -> Result<Vec<Expired>> {
        let claimed = self.exchange.stop().min(self.sessions.len());
        let rest = self.sessions.split_off(claimed);
        self.conclude_answered(context)?;
        let now_ns = monotonic_ns();
        while self.concluded < self.sessions.len() {
            self.conclude_next(context, None, now_ns)?;
        }
        Ok(rest)
    }

    /// Waits for the end of a reset that hangs or is slow.
    async fn wait_out(
        mut self,
        context: Rc<Context>,
        hung: Expired,
        permit: HangPermit,
    ) -> Result<()> {
        let mut permit = Some(permit);
        let mut is_recorded = false;
        let mut has_asked_again = false;
        loop {
            match self.exchange.next(POLL_INTERVAL).await {
                Next::Reply(reply, handle) => {
                    if self.take_in(&context, reply, handle)? {
                        return Ok(());
                    }
                }
                Next::Ended => {
                    let rest = self.ended(&context)?;
                    return restart_unclaimed(&context, rest);
                }
                Next::Silent => {
                    let is_stuck = self.exchange.condition() == Condition::Stuck;
                    if is_stuck && !has_asked_again && self.method == ResetMethod::Destroy {
                        has_asked_again = true;
                        if ask::is_diag_blocked(&context).await {
                            // Another socket may be the locked one, so the session is also reset by its cookie. The
                            // result of that attempt is recorded.
                            is_recorded = true;
                            drop(permit.take());
                            let batch = Batch {
                                netns_cookie: self.netns_cookie,
                                method: ResetMethod::ByCookie,
                                search: None,
                                sessions: vec![hung],
                                is_turn: false,
                            };
                            context.state().tracker.begin_reset(&hung);
                            context.spawn(reset(Rc::clone(&context), batch, None));
                            continue;
                        }
                    }
                    if is_stuck && !is_recorded && self.concluded + 1 == self.sessions.len() {
                        is_recorded = true;
                        context.state().quarantine(&hung);
                    }
                }
            }
        }
    }
}

/// Handles the result for a session that a reaper was asked to reset.
fn conclude(
    context: &Rc<Context>,
    expired: &Expired,
    said: Option<ReaperAnswer>,
    at_ns: u64,
) -> Result<()> {
    let mut state = context.state();
    if !state.answered(expired) {
        // Another attempt has reset and recorded it meanwhile.
        return Ok(());
    }
    match said {
        Some(ReaperAnswer::Destroyed(0, queued)) => state.was_reset(expired, at_ns, queued),
        Some(ReaperAnswer::Outcome(Disconnected::Reset)) => state.was_reset(expired, at_ns, None),
        // The other reaper may have reset it.
        Some(
            ReaperAnswer::Destroyed(libc::ENOENT, _) | ReaperAnswer::Outcome(Disconnected::Gone),
        ) if state.is_asked_of_another(expired) => Ok(()),
        Some(
            ReaperAnswer::Destroyed(libc::ENOENT, _) | ReaperAnswer::Outcome(Disconnected::Gone),
        ) => state.not_found(expired),
        Some(ReaperAnswer::Destroyed(libc::EOPNOTSUPP, _)) => {
            // The kernel lacks `SOCK_DESTROY`; it is not used from now on.
            state.has_no_destroy = true;
            confirm_or_reset(context, &mut state, vec![*expired])
        }
        Some(ReaperAnswer::Destroyed(code, _)) => {
            let text = format!("SOCK_DESTROY: {}", Errno::from_raw(code).desc());
            state.fail(expired, at_ns, &text);
            Ok(())
        }
        Some(ReaperAnswer::LeftOut(owner)) => {
            // Its socket is open, so nothing has to be recorded after a crash. Very many that wait would take all slots.
            drop(state.tracker.take_journal_slot(expired));
            let netns_cookie = expired.session.netns_cookie;
            state.waits_for_turn(
                expired,
                SlowKey {
                    netns_cookie,
                    owner,
                },
            );
            Ok(())
        }
        Some(ReaperAnswer::Outcome(Disconnected::Failed(error))) => {
            state.not_reset(expired, at_ns, &error)
        }
        Some(ReaperAnswer::Outcome(Disconnected::NeedsHolder(key))) => {
            search_holder_of(context, &mut state, expired, key);
            Ok(())
        }
        Some(ReaperAnswer::Outcome(Disconnected::Unknown)) | None => {
            state.unanswered(expired, at_ns, UNANSWERED);
            Ok(())
        }
    }
}

/// Decisions about late sessions.
impl State {
    /// Whether a connection of this rule is reset if the session table has no slot for it.
    pub(super) fn resets_untracked(&self, rule: u16) -> bool {
        let rule = self.rule_set.rule(rule);
        self.backlog.resets && rule.is_some_and(|rule| rule.mode == Mode::Enforce)
    }

    /// Has a session wait for its owner's turn.
    fn waits_for_turn(&mut self, expired: &Expired, key: SlowKey) {
        let (cookie, deadline_ns) = (expired.cookie, expired.deadline_ns);
        if self.tracker.contains(cookie) {
            self.slow.waiting.add(key, cookie, deadline_ns, 0);
            self.tracker.rearm(cookie, u64::MAX);
        } else {
            // It has ended, or has no slot in the table; in the latter case the next sync finds it again.
            self.forget(cookie);
        }
    }

    /// Shuts the gates of sessions and returns those that are still late by the records read afterwards. A packet that
    /// was in the hook may have been stamped after the first read. Sessions that are no longer late are judged again.
    fn shut(&mut self, mut late: Vec<Expired>) -> Result<Vec<Expired>> {
        let named: Vec<(u64, u64)> = late
            .iter()
            .map(|expired| (expired.cookie, expired.session.established_ns))
            .collect();
        let mut records = self.datapath.shut(&named)?.into_iter();
        late.retain_mut(|expired| {
            let limits = &self.rule_set.rules[usize::from(expired.session.rule)].limits;
            let is_decided_anew = self.in_force_since_ns >= expired.decided_ns;
            let still_late = records.next().flatten().filter(|session| {
                expired.reason == Reason::Admin
                    || !is_decided_anew
                        && matches!(
                            expiry(session, limits, expired.decided_ns),
                            Expiry::Expired { deadline_ns, .. } if deadline_ns == expired.reached_ns
                        )
            });
            match still_late {
                Some(session) => {
                    let Session { rule, owner, .. } = expired.session;
                    expired.session = Session {
                        rule,
                        owner,
                        ..session
                    };
                    expired.idle_since_ns = limits.idle_since(&session);
                }
                None if self.tracker.contains(expired.cookie) => {
                    self.tracker.rearm(expired.cookie, 0);
                }
                // It has ended, or never had a slot; in the latter case the next sync finds it again.
                None => self.forget(expired.cookie),
            }
            still_late.is_some()
        });
        Ok(late)
    }

    /// Has the socket of a late session with a candidate queried.
    pub(super) fn add_candidate(&mut self, expired: Expired) {
        let candidates = match self.would_live(&expired, &expired.session.with_candidate()) {
            true => &mut self.candidates,
            false => &mut self.only_counts,
        };
        candidates.push(expired);
    }

    /// Whether a late session would be within its limits with this record.
    fn would_live(&self, expired: &Expired, session: &Session) -> bool {
        let limits = &self.rule_set.rules[usize::from(expired.session.rule)].limits;
        matches!(
            expiry(session, limits, expired.decided_ns),
            Expiry::Alive { .. }
        )
    }

    /// If a socket could not be queried, delays the reset until the ACK of the candidate must have arrived. Returns
    /// whether it did.
    fn waits_for_ack(&mut self, expired: &Expired) -> bool {
        let (cookie, session) = (expired.cookie, &expired.session);
        let acked_ns =
            session.received_candidate_ns.max(session.sent_candidate_ns) + LONGEST_ACK_DELAY_NS;
        if monotonic_ns() >= acked_ns {
            return false;
        }
        if let Some(Phase::Candidate) = self.tracker.phase(cookie, session) {
            self.tracker.clear_phase(cookie);
        }
        // The socket may have another session by now.
        self.tracker.hasten(cookie, acked_ns);
        true
    }

    /// Handles the answers about the sockets of late sessions. Returns the sessions that must be reset, and those that
    /// must be queried again. The session at whose socket the reaper is silent is in neither list. After too many lost
    /// reapers a socket without an answer counts as locked.
    fn confirm_answers(
        &mut self,
        lot: &[Expired],
        answers: Vec<Option<Answer>>,
        (silent_at, has_given_up): (Option<usize>, bool),
        began_ns: u64,
    ) -> Result<(Vec<Expired>, Vec<Expired>)> {
        let (mut late, mut rest) = (Vec::new(), Vec::new());
        for (index, (expired, answer)) in lot.iter().zip(answers).enumerate() {
            let answer = match answer {
                Some(answer) => answer,
                None if silent_at == Some(index) => continue,
                None if silent_at.is_none() && has_given_up => Answer::Locked,
                None => {
                    rest.push(*expired);
                    continue;
                }
            };
            late.extend(self.confirm(expired, answer, began_ns)?);
        }
        Ok((late, rest))
    }

    /// Handles the state of a late session's socket. Returns the session if it must be reset. A locked socket gives no
    /// answer, and its candidate does not delay the reset.
    fn confirm(
        &mut self,
        expired: &Expired,
        answer: Answer,
        began_ns: u64,
    ) -> Result<Option<Expired>> {
        let cookie = expired.cookie;
        let phase = self.tracker.phase(cookie, &expired.session);
        let is_enforced = matches!(phase, Some(Phase::Candidate));
        if is_enforced {
            self.tracker.clear_phase(cookie);
        }
        let Some(now) = self.still_there(cookie, &expired.session)? else {
            return Ok(None);
        };
        if self.in_force_since_ns >= expired.decided_ns {
            // Another policy decides about it.
            self.tracker.rearm(cookie, 0);
            return Ok(None);
        }
        let socket = match answer {
            Answer::Known(socket, _) => socket.filter(|socket| !socket.is_mini),
            Answer::Locked => None,
        };
        let limits = self.rule_set.rules[usize::from(expired.session.rule)].limits;
        let confirmed = match &socket {
            Some(socket) => adopt::confirmed(&now, socket, Some(&limits)),
            None => now,
        };
        let lives = self.would_live(expired, &confirmed);
        if lives {
            self.datapath.update(cookie, &confirmed)?;
        }
        // A packet after the query is not covered by the answer.
        if lives || now.received_candidate_ns.max(now.sent_candidate_ns) >= began_ns {
            self.tracker.rearm(cookie, 0);
            return Ok(None);
        }
        let Session { rule, owner, .. } = expired.session;
        let late = Expired {
            idle_since_ns: limits.idle_since(&confirmed),
            session: Session {
                rule,
                owner,
                ..confirmed
            },
            ..*expired
        };
        if is_enforced {
            return Ok(Some(late));
        }
        self.note_observed(&late)?;
        Ok(None)
    }
}
