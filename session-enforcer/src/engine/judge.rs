//! Is a session late, why, and since when? Pure: the record, the rule in force, what was decided before,
//! and the time are arguments.

use session_enforcer_common::{Policy, Reason, Session, Verdict, verdict};

use super::tracker::Phase;

/// A session that is past its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// What is decided about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is within its limits, and is to be looked at again at this time.
    Alive {
        /// The earliest time at which anything that passes can have made it late.
        recheck_ns: u64,
    },
    /// It is late.
    Late(Expired),
}

/// Decides about a session of the rule with this number and these limits, whose record was read not before
/// `now_ns`. `changed_now` is told whether a change of the policy, which takes place now, made it late.
pub(super) fn judge(
    cookie: u64,
    session: &Session,
    (rule, limits): (u16, &Policy),
    phase: Option<&Phase>,
    now_ns: u64,
    changed_now: impl FnOnce() -> bool,
) -> Judgement {
    match verdict(session, limits, now_ns) {
        Verdict::Alive { look_again_ns } => Judgement::Alive {
            recheck_ns: look_again_ns,
        },
        Verdict::Expired {
            reason,
            deadline_ns: reached_ns,
        } => {
            let (reason, deadline_ns) = known_cause(phase, reached_ns)
                .or_else(|| changed_now().then_some((Reason::Policy, now_ns)))
                .unwrap_or((reason, reached_ns));
            Judgement::Late(Expired {
                cookie,
                session: Session { rule, ..*session },
                reason,
                deadline_ns,
                reached_ns,
                decided_ns: now_ns,
            })
        }
    }
}

/// Why and since when a session is late, where that was found before for the same limit: at an attempt
/// that was refused or has no answer, or when the policy changed.
fn known_cause(phase: Option<&Phase>, reached_ns: u64) -> Option<(Reason, u64)> {
    let phase = phase?;
    if let Phase::LateByPolicy {
        changed_ns,
        reached_ns: late_since_ns,
    } = phase
    {
        return (*late_since_ns == reached_ns).then_some((Reason::Policy, *changed_ns));
    }
    let tried = phase.expired()?;
    (tried.reached_ns == reached_ns).then_some((tried.reason, tried.deadline_ns))
}

/// When an observed session that was recorded is looked at again: what passes after the decision makes
/// a new deadline no sooner than this; the lifetime ends when it ends.
pub(super) fn next_observation(expired: &Expired, policy: &Policy) -> u64 {
    let now_ns = expired.decided_ns;
    let next_activity_ns = policy.next_activity_deadline_ns(now_ns);
    match verdict(&expired.session, &only_lifetime(policy), now_ns) {
        // A session does not become younger: there is nothing more to record, only its end to see.
        Verdict::Expired { deadline_ns, .. } if deadline_ns == expired.reached_ns => {
            now_ns + SLOW_RECHECK_NS
        }
        // It was late before, by another limit. With the next payload it is late by its age.
        Verdict::Expired { .. } => next_activity_ns.min(now_ns + SLOW_RECHECK_NS),
        Verdict::Alive { look_again_ns } => look_again_ns.min(next_activity_ns),
    }
}

/// When an observed session with nothing more to record is looked at, in case that its end was not
/// reported.
const SLOW_RECHECK_NS: u64 = 60_000_000_000;

/// What a policy says about lifetimes.
pub(super) fn only_lifetime(policy: &Policy) -> Policy {
    Policy {
        idle_timeout_ns: 0,
        response_timeout_ns: 0,
        ..*policy
    }
}
