//! What is done about an expired session: destroy and record, or, where the rule only observes,
//! record.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_common::{Policy, Reason, Session, Verdict, verdict};

use super::{
    destroyer::{self, Answered, Destroyer, WORTH_IT},
    enforcer::{Enforcer, LOOK_NS, Look, RETRY_NS},
};
use crate::{
    audit::{Outcome, Termination},
    clock::monotonic_ns,
    config::Mode,
    disconnect::{self, Answer, Extent},
    metrics::{Ended, Untracked},
    processes::Descriptors,
    sock_diag::{MAX_BATCH, Target},
};

/// When a session whose fate is unknown is looked at again, the first time. Each time takes twice as
/// long.
const DOUBT_NS: u64 = 10_000_000;

/// Why a session is not reset, where it is not.
const UNANSWERED: &str = "SOCK_DESTROY: the kernel cannot be asked, the log says why";
const NOT_FOUND: &str = "SOCK_DESTROY: the kernel does not find the socket of an open session";

/// After so many requests without an answer the session could not be reset.
const MAX_DOUBTS: u32 = 5;

/// When an observed session with nothing more to record is looked at, in case that its end was not
/// reported.
const SLOW_LOOK_NS: u64 = 60_000_000_000;

/// A session that is past its limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expired {
    pub(super) cookie: u64,
    /// As the kernel has it, but with the rule that the policy in force says.
    pub(super) session: Session,
    pub(super) reason: Reason,
    /// When it had to end: when it reached its limit, or when a change of the policy made it late.
    pub(super) deadline_ns: u64,
    /// When it reached its limit.
    pub(super) reached_ns: u64,
    /// When it was decided to be late. Its record was read after this.
    pub(super) decided_ns: u64,
    /// Requests to destroy it, one after the other, that were not answered.
    pub(super) doubts: u32,
}

impl Enforcer {
    /// Acts on expired sessions, those of one network namespace together. Where there is a destroyer,
    /// the answers about the last of them are still to come.
    pub(super) fn terminate_all(
        &mut self,
        expired: Vec<Expired>,
        mut destroyer: Option<&mut Destroyer>,
    ) -> Result<()> {
        let mut by_namespace: BTreeMap<u64, Vec<Expired>> = BTreeMap::new();
        let is_observed =
            |e: &Expired| self.book.rules[usize::from(e.session.rule)].mode == Mode::Observe;
        let (observed, enforced): (Vec<Expired>, Vec<Expired>) =
            expired.into_iter().partition(is_observed);
        for expired in &observed {
            self.observe(expired);
        }
        for expired in self.shut(enforced)? {
            by_namespace
                .entry(expired.session.netns_cookie)
                .or_default()
                .push(expired);
        }
        for (netns_cookie, expired) in by_namespace {
            for batch in expired.chunks(MAX_BATCH) {
                self.end_batch(netns_cookie, batch, destroyer.as_deref_mut())?;
            }
        }
        Ok(())
    }

    /// Shuts the gate of sessions, and returns those that are late by the record that is read after that:
    /// the stamp of a packet that was in the hook may have come too late for the record by which they were
    /// judged. The others are judged again.
    fn shut(&mut self, mut expired: Vec<Expired>) -> Result<Vec<Expired>> {
        let named: Vec<(u64, u64)> = expired
            .iter()
            .map(|expired| (expired.cookie, expired.session.established_ns))
            .collect();
        let mut records = self.kernel.shut(&named)?.into_iter();
        expired.retain_mut(|expired| {
            let policy = &self.book.rules[usize::from(expired.session.rule)].policy;
            let late = records.next().flatten().filter(|session| {
                matches!(
                    verdict(session, policy, expired.decided_ns),
                    Verdict::Expired { deadline_ns, .. } if deadline_ns == expired.reached_ns
                )
            });
            match late {
                Some(session) => {
                    let rule = expired.session.rule;
                    expired.session = Session { rule, ..session };
                }
                None => self.schedule.rearm(expired.cookie, 0),
            }
            late.is_some()
        });
        Ok(expired)
    }

    /// Records a session that would be terminated, once for each deadline that it reaches. What has
    /// passed since it was read is not in the record, which is therefore of the moment of the decision.
    /// One that is too old may have been active until it was read: then of that of its last activity.
    fn observe(&mut self, expired: &Expired) {
        let cookie = expired.cookie;
        if self.observed.insert(cookie, expired.reached_ns) != Some(expired.reached_ns) {
            let at_ns = expired.decided_ns.max(expired.session.last_activity_ns());
            self.record(expired, at_ns, Outcome::Observed, None);
        }
        // That a change of the policy made it late is told. It lives on, and may be late again for
        // another limit.
        self.late_by_policy.remove(&cookie);
        let policy = self.book.rules[usize::from(expired.session.rule)].policy;
        let next_ns = next_observation(expired, &policy);
        self.schedule.rearm(cookie, next_ns);
    }

    /// Ends the sessions of a batch, each in the way that serves it.
    fn end_batch(
        &mut self,
        netns_cookie: u64,
        batch: &[Expired],
        destroyer: Option<&mut Destroyer>,
    ) -> Result<()> {
        let (subflows, plain): (Vec<Expired>, Vec<Expired>) =
            batch.iter().partition(|e| e.session.is_mptcp_subflow());
        if !plain.is_empty() {
            self.destroy(netns_cookie, plain, destroyer)?;
        }
        if subflows.is_empty() {
            return Ok(());
        }
        self.disconnect(netns_cookie, &subflows)
    }

    /// Has the kernel destroy a batch. Where the destroyer does, its answers about an earlier one are taken
    /// in meanwhile.
    fn destroy(
        &mut self,
        netns_cookie: u64,
        mut batch: Vec<Expired>,
        destroyer: Option<&mut Destroyer>,
    ) -> Result<()> {
        // The engine's own, first of all: it stays open until the last session of the namespace has
        // gone, and nothing else may lead there by then.
        let existed_ns = batch.iter().map(|expired| expired.session.established_ns);
        let existed_ns = existed_ns.min().unwrap_or(u64::MAX);
        if let Err(error) = self.namespaces.get_existing(netns_cookie, existed_ns) {
            return self.namespace_unreachable(&batch, &error.to_string());
        }
        if let Some(destroyer) = destroyer.filter(|_| batch.len() >= WORTH_IT) {
            let before = destroyer.make_room()?;
            let begun = destroyer.begin(&self.namespaces, netns_cookie, batch);
            before.map_or(Ok(()), |before| self.settle_all(before))?;
            match begun {
                Ok(()) => return Ok(()),
                Err(unbegun) => batch = unbegun,
            }
        }
        let diag = match self.namespaces.get_existing(netns_cookie, existed_ns) {
            Ok(diag) => diag,
            // It was closed since, after an exchange that broke off.
            Err(error) => return self.namespace_unreachable(&batch, &error.to_string()),
        };
        let answered = destroyer::destroy(diag, netns_cookie, batch);
        if answered.result.is_err() {
            self.namespaces.reopen(netns_cookie);
        }
        self.settle_all(answered)
    }

    /// Takes in the kernel's answers about a batch.
    pub(super) fn settle_all(&mut self, answered: Answered) -> Result<()> {
        let Answered {
            netns_cookie,
            batch,
            codes,
            result,
            answered_ns,
        } = answered;
        let mut unsupported = Vec::new();
        for (expired, code) in batch.iter().zip(codes) {
            match code {
                Some(libc::EOPNOTSUPP) => unsupported.push(*expired),
                code => self.settle(expired, code, answered_ns)?,
            }
        }
        if let Err(error) = result {
            tracing::warn!(
                "the kernel's answers broke off, the sessions are looked at again: {error}"
            );
        }
        if unsupported.is_empty() {
            return Ok(());
        }
        // The kernel cannot destroy sockets.
        self.disconnect(netns_cookie, &unsupported)
    }

    /// Resets sessions through the processes that hold them.
    fn disconnect(&mut self, netns_cookie: u64, batch: &[Expired]) -> Result<()> {
        // A look at every process, so once for all of them.
        let processes = Descriptors::of_all_processes();
        let (mut failed, mut reason) = (0, String::new());
        for expired in batch {
            let target = Target::of(expired.cookie, &expired.session);
            let extent = self.extent(expired);
            let existed_ns = expired.session.established_ns;
            let diag = match self.namespaces.get_existing(netns_cookie, existed_ns) {
                Ok(diag) => diag,
                Err(error) => {
                    let error = error.to_string();
                    self.namespace_unreachable(std::slice::from_ref(expired), &error)?;
                    continue;
                }
            };
            let result = if expired.session.is_mptcp_subflow() {
                disconnect::reset_mptcp(diag, &target, &processes, extent)
            } else {
                disconnect::reset_tcp(diag, &target, &processes)
            };
            let answered_ns = monotonic_ns();
            match result {
                Ok(answer) => self.settle(expired, code_of(answer), answered_ns)?,
                Err(error) => {
                    failed += 1;
                    reason = error.to_string();
                    self.fail(expired, answered_ns, &reason);
                }
            }
        }
        if failed > 0 {
            tracing::error!(
                "{failed} of {} expired sessions are not reset, they stay behind the gate and are \
                 tried again: {reason}",
                batch.len()
            );
        }
        Ok(())
    }

    /// A subflow can be idle in a busy connection, which has others. But a connection is at least as
    /// old as any of its subflows.
    fn extent(&self, expired: &Expired) -> Extent {
        let policy = &self.book.rules[usize::from(expired.session.rule)].policy;
        match verdict(&expired.session, &only_lifetime(policy), monotonic_ns()) {
            Verdict::Expired { .. } => Extent::Connection,
            Verdict::Alive { .. } => Extent::Subflow,
        }
    }

    /// Takes in the kernel's answer about one session.
    fn settle(&mut self, expired: &Expired, code: Option<i32>, answered_ns: u64) -> Result<()> {
        let cookie = expired.cookie;
        match code {
            Some(0) => {
                self.in_doubt.remove(&cookie);
                self.record(expired, answered_ns, Outcome::Reset, None);
                self.end(expired, answered_ns)
            }
            Some(libc::ENOENT) => self.not_found(expired, answered_ns),
            Some(code) => {
                let error = Errno::from_raw(code);
                let text = format!("SOCK_DESTROY: {}", error.desc());
                self.fail(expired, answered_ns, &text);
                Ok(())
            }
            None => {
                self.doubt(expired, answered_ns, UNANSWERED);
                Ok(())
            }
        }
    }

    /// The kernel did not answer, its answer was lost, or it was asked about another socket. After some
    /// attempts the session could not be reset, and this is the error.
    fn doubt(&mut self, expired: &Expired, now_ns: u64, error: &str) {
        let cookie = expired.cookie;
        let before = self.in_doubt.get(&cookie).map_or(0, |before| before.doubts);
        if before == MAX_DOUBTS {
            self.fail(expired, now_ns, error);
            return;
        }
        let doubts = before + 1;
        self.in_doubt.insert(cookie, Expired { doubts, ..*expired });
        self.schedule.rearm(cookie, now_ns + (DOUBT_NS << before));
    }

    /// The kernel knows no such socket.
    fn not_found(&mut self, expired: &Expired, answered_ns: u64) -> Result<()> {
        let cookie = expired.cookie;
        if expired.session.end_is_unreported() {
            // It may have ended long ago: nothing was terminated now.
            return self.drop_stale(cookie, &expired.session);
        }
        if self.kernel.session(cookie)?.is_none() {
            // It closed by itself between the decision and the request.
            self.in_doubt.insert(cookie, *expired);
            self.forget(cookie);
            return Ok(());
        }
        // Another sock_ops program may have overwritten the flag by which the kernel reports the end.
        if matches!(self.look(cookie, &expired.session), Some(Look::Gone)) {
            if self.follow(cookie, &expired.session)? {
                self.doubt(expired, answered_ns, NOT_FOUND);
                return Ok(());
            }
            self.in_doubt.remove(&cookie);
            return self.drop_stale(cookie, &expired.session);
        }
        self.fail(expired, answered_ns, NOT_FOUND);
        Ok(())
    }

    /// Notes the interface of a session whose process has bound the socket to another since it was
    /// established (`SO_BINDTODEVICE` does not ask for its state), so that the kernel finds it again. Whether
    /// the socket is there; where that cannot be told, it is.
    fn follow(&mut self, cookie: u64, session: &Session) -> Result<bool> {
        let target = Target::of(cookie, session);
        let namespaces = &mut self.namespaces;
        let diag = match namespaces.get_existing(session.netns_cookie, session.established_ns) {
            Ok(diag) => diag,
            Err(error) => {
                tracing::warn!("searching for session {cookie}: {error}");
                return Ok(true);
            }
        };
        let found = match diag.search(&target) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!("searching for session {cookie}: {error}");
                self.namespaces.reopen(session.netns_cookie);
                return Ok(true);
            }
        };
        let Some(found) = found else {
            return Ok(false);
        };
        let Some(now) = self.still_there(cookie, session)? else {
            return Ok(false);
        };
        let ifindex = found.target.ifindex;
        Ok(self.kernel.amend(cookie, &Session { ifindex, ..now })?)
    }

    /// A session could not be reset. It stands behind the gate until it is tried again.
    fn fail(&mut self, expired: &Expired, at_ns: u64, error: &str) {
        self.in_doubt.remove(&expired.cookie);
        self.record(expired, at_ns, Outcome::Failed, Some(error));
        self.refused.insert(expired.cookie, *expired);
        self.schedule.rearm(expired.cookie, at_ns + RETRY_NS);
    }

    /// A session was reset. The kernel has taken it out of the map by now and the event of its end is
    /// still to be read, except where it does not report the end.
    fn end(&mut self, expired: &Expired, answered_ns: u64) -> Result<()> {
        let Expired {
            cookie, session, ..
        } = expired;
        if !session.end_is_unreported() {
            self.refused.remove(cookie);
            self.late_by_policy.remove(cookie);
            // Should the event not come, this look lets go of it.
            self.reset.insert(*cookie, session.established_ns);
            self.schedule.rearm(*cookie, answered_ns + LOOK_NS);
            return Ok(());
        }
        // The socket may have been connected again, under the same cookie.
        let is_same = |now: Session| now.established_ns == session.established_ns;
        if self.kernel.session(*cookie)?.is_some_and(is_same) {
            return self.release(*cookie, session);
        }
        self.forget(*cookie);
        Ok(())
    }

    /// Records a session that was gone when it was to be destroyed.
    pub(super) fn record_gone(&mut self, expired: &Expired) {
        self.record(expired, monotonic_ns(), Outcome::Gone, None);
    }

    fn namespace_unreachable(&mut self, batch: &[Expired], error: &str) -> Result<()> {
        let now_ns = monotonic_ns();
        for expired in batch {
            // The sockets of a namespace that vanished close with it.
            if self.kernel.session(expired.cookie)?.is_none() {
                self.forget(expired.cookie);
                continue;
            }
            self.metrics.untracked(Untracked::Namespace);
            self.fail(expired, now_ns, error);
        }
        Ok(())
    }

    /// Writes the audit record and counts: the one place where either is done.
    fn record(&mut self, expired: &Expired, at_ns: u64, outcome: Outcome, error: Option<&str>) {
        let session = &expired.session;
        let rule = &self.book.rules[usize::from(session.rule)];
        let since = |then_ns: u64| Duration::from_nanos(at_ns.saturating_sub(then_ns));
        self.audit.termination(&Termination {
            cookie: expired.cookie,
            session,
            rule: &rule.name,
            reason: expired.reason,
            mode: rule.mode,
            outcome,
            limit: rule.limit(expired.reason, session),
            deadline_ns: expired.deadline_ns,
            answered_ns: at_ns,
            cgroup: self.directory.path(session.owner.cgroup_id),
            user: self.directory.user_name(session.owner.uid),
            error,
        });
        self.metrics.ended(&Ended {
            rule: usize::from(session.rule),
            reason: expired.reason,
            mode: rule.mode,
            outcome,
            lateness: since(expired.deadline_ns),
            age: since(session.established_ns),
            idle: since(session.last_activity_ns()),
        });
    }
}

/// When an observed session that was recorded is looked at again: what passes after the decision makes
/// a new deadline no sooner than this; the lifetime ends when it ends.
fn next_observation(expired: &Expired, policy: &Policy) -> u64 {
    let now_ns = expired.decided_ns;
    let next_activity_ns = policy.next_activity_deadline_ns(now_ns);
    match verdict(&expired.session, &only_lifetime(policy), now_ns) {
        // A session does not become younger: there is nothing more to record, only its end to see.
        Verdict::Expired { deadline_ns, .. } if deadline_ns == expired.reached_ns => {
            now_ns + SLOW_LOOK_NS
        }
        // It was late before, by another limit. With the next payload it is late by its age.
        Verdict::Expired { .. } => next_activity_ns.min(now_ns + SLOW_LOOK_NS),
        Verdict::Alive { look_again_ns } => look_again_ns.min(next_activity_ns),
    }
}

/// What a policy says about lifetimes.
fn only_lifetime(policy: &Policy) -> Policy {
    Policy {
        idle_timeout_ns: 0,
        response_timeout_ns: 0,
        ..*policy
    }
}

/// The code by which `SOCK_DESTROY` says the same.
fn code_of(answer: Answer) -> Option<i32> {
    match answer {
        Answer::Reset => Some(0),
        Answer::Gone => Some(libc::ENOENT),
        Answer::Unknown => None,
    }
}
