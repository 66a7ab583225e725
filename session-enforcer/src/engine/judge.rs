//! The decision whether a session is late, why, and since when. Pure: its arguments are the record, the active rule,
//! the session's phase and the time.

use session_enforcer_common::{Expiry, Limits, Reason, Session, expiry};

use super::phase::{Expired, Phase};

/// The decision about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "one lives on the stack for a moment"
)]
pub(super) enum Judgement {
    /// It is within its limits.
    Alive {
        /// The earliest time at which it can be late, whatever passes; it is rechecked then.
        recheck_ns: u64,
    },
    /// It is past a limit.
    Late(Expired),
}

/// Judges a session under the rule with this id and these limits. Its record must have been read at `now_ns` or later.
/// `by_change` gets the time at which the session reached its limit; it returns the time of a policy change in progress
/// if that change made the session late.
pub(super) fn judge(
    cookie: u64,
    session: &Session,
    (rule, limits): (u16, &Limits),
    phase: Option<&Phase>,
    now_ns: u64,
    by_change: impl FnOnce(u64) -> Option<u64>,
) -> Judgement {
    match expiry(session, limits, now_ns) {
        Expiry::Alive { recheck_ns } => Judgement::Alive { recheck_ns },
        Expiry::Expired {
            reason,
            deadline_ns: reached_ns,
        } => {
            let (reason, deadline_ns) = known_cause(phase, reached_ns)
                .or_else(|| Some((Reason::Policy, by_change(reached_ns)?)))
                .unwrap_or((reason, reached_ns));
            Judgement::Late(Expired {
                cookie,
                session: Session { rule, ..*session },
                reason,
                deadline_ns,
                reached_ns,
                decided_ns: now_ns,
                limit_ns: limit_ns(reason, limits, session),
                idle_since_ns: limits.idle_since(session),
            })
        }
    }
}

/// The length of the limit that belongs to the reason; 0 for reasons without a limit.
fn limit_ns(reason: Reason, limits: &Limits, session: &Session) -> u64 {
    match reason {
        Reason::IdleTimeout => limits.idle_timeout_ns,
        Reason::MaxLifetime => limits.lifetime_ns(session),
        Reason::ResponseTimeout => limits.response_timeout_ns,
        Reason::HalfClosedTimeout => limits.half_closed_timeout_ns,
        Reason::Policy | Reason::Untracked | Reason::Admin => 0,
    }
}

/// Reason and deadline from an earlier decision about the same limit: from a reset that failed or has no answer, or
/// from a policy change.
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

/// When an observed session that was recorded is rechecked. Activity after the decision sets a new deadline no earlier
/// than this. The end of the lifetime is fixed.
pub(super) fn next_observation(expired: &Expired, limits: &Limits) -> u64 {
    let now_ns = expired.decided_ns;
    let next_activity_ns = limits.next_activity_deadline_ns(now_ns);
    match expiry(&expired.session, &only_lifetime(limits), now_ns) {
        // The lifetime is over and recorded. The recheck only detects the session's end.
        Expiry::Expired { deadline_ns, .. } if deadline_ns == expired.reached_ns => {
            now_ns + SLOW_RECHECK_NS
        }
        // Another limit was reached first. After the next payload the session is late by its lifetime.
        Expiry::Expired { .. } => next_activity_ns.min(now_ns + SLOW_RECHECK_NS),
        Expiry::Alive { recheck_ns } => recheck_ns.min(next_activity_ns),
    }
}

/// Recheck interval of an observed session with nothing more to record, for the case that its end was not reported.
const SLOW_RECHECK_NS: u64 = 60_000_000_000;

/// The limits without all but the lifetime.
pub(super) fn only_lifetime(limits: &Limits) -> Limits {
    Limits {
        idle_timeout_ns: 0,
        response_timeout_ns: 0,
        half_closed_timeout_ns: 0,
        ..*limits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::{fixtures::session, tracker::Tracker};

    const S: u64 = 1_000_000_000;

    fn idle(limit_s: u64) -> Limits {
        Limits {
            idle_timeout_ns: limit_s * S,
            ..Limits::default()
        }
    }

    fn late(judgement: Judgement) -> Expired {
        match judgement {
            Judgement::Late(expired) => expired,
            Judgement::Alive { .. } => panic!("it is within its limits"),
        }
    }

    /// The phase after a first reset attempt.
    fn tried(expired: Expired) -> Phase {
        let mut tracker = Tracker::default();
        tracker.begin_reset(&expired);
        tracker
            .phase(expired.cookie, &expired.session)
            .unwrap()
            .clone()
    }

    #[test]
    fn a_session_is_late_from_its_limit_on_and_belongs_to_the_rule_in_force() {
        let limits = (7, &idle(10));
        let judged = |now_ns| judge(1, &session(), limits, None, now_ns, |_| None);
        assert_eq!(judged(10 * S - 1), Judgement::Alive { recheck_ns: 10 * S });
        let expired = late(judged(10 * S));
        assert_eq!(
            (expired.reason, expired.deadline_ns),
            (Reason::IdleTimeout, 10 * S)
        );
        assert_eq!((expired.reached_ns, expired.decided_ns), (10 * S, 10 * S));
        assert_eq!((expired.cookie, expired.session.rule), (1, 7));
        assert_eq!((expired.limit_ns, expired.idle_since_ns), (10 * S, 0));
    }

    #[test]
    fn a_session_late_by_the_policy_keeps_that_reason_at_each_attempt() {
        let limits = (0, &idle(10));
        let first = late(judge(1, &session(), limits, None, 16 * S, |reached_ns| {
            assert_eq!(reached_ns, 10 * S);
            Some(15 * S)
        }));
        assert_eq!((first.reason, first.deadline_ns), (Reason::Policy, 15 * S));
        assert_eq!((first.reached_ns, first.limit_ns), (10 * S, 0));
        let made_late = Phase::LateByPolicy {
            changed_ns: 15 * S,
            reached_ns: 10 * S,
        };
        for phase in [made_late, tried(first)] {
            let again = late(judge(1, &session(), limits, Some(&phase), 20 * S, |_| None));
            assert_eq!((again.reason, again.deadline_ns), (Reason::Policy, 15 * S));
            // Another limit, whose deadline is not that of the policy change.
            let other = late(judge(
                1,
                &session(),
                (0, &idle(12)),
                Some(&phase),
                20 * S,
                |_| None,
            ));
            assert_eq!(
                (other.reason, other.deadline_ns),
                (Reason::IdleTimeout, 12 * S)
            );
        }
    }

    #[test]
    fn an_observed_session_gives_no_cause_to_the_next_decision() {
        let observed = Phase::Observed {
            reached_ns: 10 * S,
            decided_ns: 10 * S,
        };
        let judged = judge(
            1,
            &session(),
            (0, &idle(10)),
            Some(&observed),
            11 * S,
            |_| Some(11 * S),
        );
        assert_eq!(late(judged).reason, Reason::Policy);
    }

    #[test]
    fn an_observed_session_is_looked_at_again_when_something_new_can_be_late() {
        let both = Limits {
            max_lifetime_ns: 100 * S,
            ..idle(10)
        };
        let at = |now_ns| late(judge(1, &session(), (0, &both), None, now_ns, |_| None));
        // New activity may be late 10 s from now; the lifetime ends at 100 s.
        assert_eq!(next_observation(&at(11 * S), &both), 21 * S);
        assert_eq!(next_observation(&at(95 * S), &both), 100 * S);
        // The lifetime is over, so only the end of the session can follow.
        let old = Limits {
            idle_timeout_ns: 0,
            ..both
        };
        let too_old = late(judge(1, &session(), (0, &old), None, 101 * S, |_| None));
        assert_eq!(next_observation(&too_old, &old), 101 * S + SLOW_RECHECK_NS);
        // Also if it can become idle again, since it stays late.
        let lately = Session {
            last_sent_ns: 95 * S,
            ..session()
        };
        let too_old = late(judge(1, &lately, (0, &both), None, 101 * S, |_| None));
        assert_eq!(too_old.reached_ns, 100 * S);
        assert_eq!(next_observation(&too_old, &both), 101 * S + SLOW_RECHECK_NS);
        // The idle limit was reached before the lifetime: after the next payload the session is late by its lifetime.
        // The recheck is early enough to detect the session's end.
        assert_eq!(next_observation(&at(101 * S), &both), 111 * S);
        let patient = Limits {
            max_lifetime_ns: 100 * S,
            ..idle(70)
        };
        let idle_first = late(judge(1, &session(), (0, &patient), None, 101 * S, |_| None));
        assert_eq!(idle_first.reached_ns, 70 * S);
        let next_ns = next_observation(&idle_first, &patient);
        assert_eq!(next_ns, 101 * S + SLOW_RECHECK_NS);
    }

    #[test]
    fn lifetime_only_drops_the_other_limits() {
        let lifetime = Limits {
            max_lifetime_ns: 3,
            ..Limits::default()
        };
        let all = Limits {
            idle_timeout_ns: 1,
            response_timeout_ns: 2,
            half_closed_timeout_ns: 4,
            ..lifetime
        };
        assert_eq!(only_lifetime(&all), lifetime);
    }

    proptest! {
        /// Whatever was decided before: a session is alive exactly if [`expiry`] says so, and a deadline
        /// is never in the future.
        #[test]
        fn an_earlier_decision_changes_only_the_cause(
            idle_s in 0_u64..20,
            lifetime_s in 1_u64..20,
            last_s in 0_u64..20,
            now_ns in 0_u64..40_000_000_000,
            changed_ns in 0_u64..40_000_000_000,
            reached_s in 0_u64..20,
            has_changed: bool,
        ) {
            let limits = Limits { max_lifetime_ns: lifetime_s * S, ..idle(idle_s) };
            let session = Session { last_sent_ns: last_s * S, ..session() };
            let changed_ns = changed_ns.min(now_ns);
            let phase = Phase::LateByPolicy { changed_ns, reached_ns: reached_s * S };
            for phase in [None, Some(&phase)] {
                let judged = judge(1, &session, (0, &limits), phase, now_ns, |_| has_changed.then_some(changed_ns));
                match (expiry(&session, &limits, now_ns), judged) {
                    (Expiry::Alive { recheck_ns }, Judgement::Alive { recheck_ns: judged_ns }) => {
                        prop_assert_eq!(recheck_ns, judged_ns);
                    }
                    (Expiry::Expired { deadline_ns, .. }, Judgement::Late(expired)) => {
                        prop_assert_eq!(deadline_ns, expired.reached_ns);
                        prop_assert!(expired.deadline_ns <= now_ns);
                        let counted_from_ns = expired.deadline_ns - expired.limit_ns;
                        match expired.reason {
                            Reason::IdleTimeout => prop_assert_eq!(counted_from_ns, expired.idle_since_ns),
                            Reason::MaxLifetime => prop_assert_eq!(counted_from_ns, session.established_ns),
                            _ => prop_assert_eq!(expired.limit_ns, 0),
                        }
                        let is_by_policy = expired.reason == Reason::Policy;
                        prop_assert!(is_by_policy || expired.deadline_ns == deadline_ns);
                    }
                    (expiry, judged) => prop_assert!(false, "{expiry:?} {judged:?}"),
                }
            }
        }
    }
}
