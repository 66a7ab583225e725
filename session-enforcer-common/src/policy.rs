//! The limits of a rule, and the decision whether a session has outlived them.

use crate::Session;

/// The limits that one rule sets. A limit of 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// Longest time without new payload, in nanoseconds.
    pub idle_timeout_ns: u64,
    /// Longest time since establishment, in nanoseconds.
    pub max_lifetime_ns: u64,
    /// How far a time stamp may lag behind the event, in nanoseconds: one tick of the coarse
    /// clock. Each deadline is later by this much, so that no session ends early.
    pub tick_ns: u64,
}

const _: () = assert!(size_of::<Policy>() == 24);

/// Why a session is terminated. The names are those of the metrics and the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No new payload for the rule's `idle_timeout`.
    IdleTimeout,
    /// Open for the rule's `max_lifetime`.
    MaxLifetime,
}

/// The answer of [`verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The session lives. Without activity it does not expire before `deadline_ns`.
    Alive {
        /// The earliest possible deadline; `u64::MAX` where there is no limit.
        deadline_ns: u64,
    },
    /// The session is past its limit.
    Expired {
        /// The limit that it reached first.
        reason: Reason,
        /// When it reached it.
        deadline_ns: u64,
    },
}

/// Whether the session is past its limits at `now_ns`: binary, without grace.
#[inline]
pub fn verdict(session: &Session, policy: &Policy, now_ns: u64) -> Verdict {
    let idle = deadline(
        session.last_activity_ns(),
        policy.idle_timeout_ns,
        policy.tick_ns,
    );
    let lifetime = deadline(
        session.established_ns,
        policy.max_lifetime_ns,
        policy.tick_ns,
    );
    let (deadline_ns, reason) = if lifetime < idle {
        (lifetime, Reason::MaxLifetime)
    } else {
        (idle, Reason::IdleTimeout)
    };
    if now_ns < deadline_ns || deadline_ns == u64::MAX {
        Verdict::Alive { deadline_ns }
    } else {
        Verdict::Expired {
            reason,
            deadline_ns,
        }
    }
}

#[inline]
fn deadline(since_ns: u64, limit_ns: u64, tick_ns: u64) -> u64 {
    if limit_ns == 0 {
        return u64::MAX;
    }
    since_ns.saturating_add(limit_ns).saturating_add(tick_ns)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::tests_support::session;

    const SECOND: u64 = 1_000_000_000;

    fn policy(idle: u64, lifetime: u64) -> Policy {
        Policy {
            idle_timeout_ns: idle * SECOND,
            max_lifetime_ns: lifetime * SECOND,
            tick_ns: 4_000_000,
        }
    }

    #[test]
    fn the_deadline_itself_is_expired_and_the_nanosecond_before_is_not() {
        let s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        let p = policy(5, 0);
        let at = 17 * SECOND + 4_000_000;
        assert_eq!(verdict(&s, &p, at - 1), Verdict::Alive { deadline_ns: at });
        assert_eq!(
            verdict(&s, &p, at),
            Verdict::Expired {
                reason: Reason::IdleTimeout,
                deadline_ns: at
            }
        );
    }

    #[test]
    fn the_earlier_limit_names_the_reason() {
        let s = session(10 * SECOND, 12 * SECOND, 10 * SECOND);
        let Verdict::Expired { reason, .. } = verdict(&s, &policy(5, 6), 30 * SECOND) else {
            panic!("must be expired")
        };
        assert_eq!(reason, Reason::MaxLifetime);
        let Verdict::Expired { reason, .. } = verdict(&s, &policy(5, 8), 30 * SECOND) else {
            panic!("must be expired")
        };
        assert_eq!(reason, Reason::IdleTimeout);
    }

    #[test]
    fn no_limit_never_expires() {
        let s = session(0, 0, 0);
        let alive = Verdict::Alive {
            deadline_ns: u64::MAX,
        };
        assert_eq!(verdict(&s, &policy(0, 0), u64::MAX), alive);
    }

    proptest! {
        #[test]
        fn never_before_every_limit_has_passed_and_always_after_one_has(
            established in 0..u64::MAX / 4,
            received in 0..u64::MAX / 4,
            sent in 0..u64::MAX / 4,
            idle in 0..1u64 << 50,
            lifetime in 0..1u64 << 50,
            tick in 0..10_000_000u64,
            now: u64,
        ) {
            let s = session(established, received, sent);
            let p = Policy { idle_timeout_ns: idle, max_lifetime_ns: lifetime, tick_ns: tick };
            let idle_over = idle > 0 && now >= received.max(sent) + idle + tick;
            let lifetime_over = lifetime > 0 && now >= established + lifetime + tick;
            let expired = matches!(verdict(&s, &p, now), Verdict::Expired { .. });
            prop_assert_eq!(expired, idle_over || lifetime_over);
        }

        #[test]
        fn a_living_session_expires_exactly_at_the_deadline_it_was_given(
            established in 0..1u64 << 60,
            received in 0..1u64 << 60,
            idle in 1..1u64 << 50,
            lifetime in 0..1u64 << 50,
            now in 0..1u64 << 60,
        ) {
            let s = session(established, received, established);
            let p = Policy { idle_timeout_ns: idle, max_lifetime_ns: lifetime, tick_ns: 0 };
            if let Verdict::Alive { deadline_ns } = verdict(&s, &p, now) {
                prop_assert!(deadline_ns > now);
                let before = verdict(&s, &p, deadline_ns - 1);
                let expired = matches!(verdict(&s, &p, deadline_ns), Verdict::Expired { .. });
                prop_assert_eq!(before, Verdict::Alive { deadline_ns });
                prop_assert!(expired);
            }
        }
    }
}
