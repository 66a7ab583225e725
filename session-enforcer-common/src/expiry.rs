//! The limits of a rule, and the decision whether a session is past them.

use crate::Session;

/// Which payload resets the idle clock, as seen from this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Activity {
    /// Payload in either direction.
    #[default]
    Any = 0,
    /// Payload that this host receives.
    Received = 1,
    /// Payload that this host sends.
    Sent = 2,
}

/// The limits of a rule. A limit of 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Limits {
    /// Longest time without activity, in nanoseconds.
    pub idle_timeout_ns: u64,
    /// Longest time since establishment, in nanoseconds.
    pub max_lifetime_ns: u64,
    /// Maximum reduction of a session's lifetime, in nanoseconds; less than the lifetime.
    pub lifetime_jitter_ns: u64,
    /// Longest time that this host may owe an answer, in nanoseconds. If set, the idle clock stands still while an
    /// answer is owed.
    pub response_timeout_ns: u64,
    /// Longest time without activity after the first FIN of either side, in nanoseconds. It then replaces
    /// `idle_timeout_ns`.
    pub half_closed_timeout_ns: u64,
    /// Minimum number of payload bytes of an answer.
    pub min_answer: u32,
    /// Maximum number of the rule's sessions in the session table; 0 means no maximum.
    pub max_sessions: u32,
    /// Generation of the match table that belongs to these limits. A session of another generation must be matched
    /// again.
    pub generation: u32,
    /// Minimum number of new payload bytes in a packet that counts as activity, request or answer. No clock considers
    /// less.
    pub min_payload: u16,
    /// [`Activity`] as a number. An invalid number counts as [`Activity::Any`], with which a session lives longest.
    pub activity: u8,
    /// 1 if the rule enforces, so that the gate drops payload past the deadline. Any other value disables the gate.
    pub gate: u8,
    /// Key of the hash for the jitter shares of sessions.
    pub jitter_key: u64,
}

const _: () = {
    assert!(size_of::<Limits>() == 64 && align_of::<Limits>() == 8);
    assert!(core::mem::offset_of!(Limits, generation) == 48);
    assert!(core::mem::offset_of!(Limits, gate) == 55);
};

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Limits {}

/// Why a session is terminated. The names are those in metrics and audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No activity for the rule's `idle_timeout`.
    IdleTimeout,
    /// The session has reached the rule's `max_lifetime`.
    MaxLifetime,
    /// This host has not answered for the rule's `response_timeout`.
    ResponseTimeout,
    /// No activity for the rule's `half_closed_timeout` after a FIN.
    HalfClosedTimeout,
    /// The session was already past the limits of a policy when it came into force. [`expiry`] never returns it; the
    /// daemon uses it when it loads a policy.
    Policy,
    /// The session table has no slot for the session (`daemon.on_full = "reset"`). [`expiry`] never returns it.
    Untracked,
    /// Requested over the control socket. [`expiry`] never returns it.
    Admin,
}

impl Reason {
    /// Every reason, in the order of declaration.
    pub const ALL: [Self; 7] = [
        Self::IdleTimeout,
        Self::MaxLifetime,
        Self::ResponseTimeout,
        Self::HalfClosedTimeout,
        Self::Policy,
        Self::Untracked,
        Self::Admin,
    ];
}

/// The result of [`expiry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// The session is within its limits.
    Alive {
        /// The session does not expire before this time, whatever passes; `u64::MAX` if it has no limit.
        recheck_ns: u64,
    },
    /// The session is past a limit.
    Expired {
        /// The limit that it reached first.
        reason: Reason,
        /// When it reached that limit.
        deadline_ns: u64,
    },
}

impl Limits {
    /// The maximum lifetime of this session: the rule's maximum minus the session's jitter. 0 means no limit.
    #[inline]
    pub const fn lifetime_ns(&self, session: &Session) -> u64 {
        if self.lifetime_jitter_ns == 0 {
            return self.max_lifetime_ns;
        }
        // The share is in 65,536ths; the product fits into 64 bits.
        let share = (self.lifetime_jitter_ns >> 16) * session.jitter_share(self.jitter_key) as u64;
        self.max_lifetime_ns.saturating_sub(share)
    }

    /// The earliest deadline that a session established at `established_ns` can have, whatever passes.
    pub const fn first_deadline_ns(&self, established_ns: u64) -> u64 {
        let lifetime = self.max_lifetime_ns.saturating_sub(self.lifetime_jitter_ns);
        earlier(
            self.deadline(established_ns, lifetime),
            self.next_activity_deadline_ns(established_ns),
        )
    }

    /// The earliest deadline that a packet from now on can set.
    pub const fn next_activity_deadline_ns(&self, now_ns: u64) -> u64 {
        let response = self.deadline(now_ns, self.response_timeout_ns);
        earlier(
            self.deadline(now_ns, self.idle_timeout_ns),
            earlier(response, self.deadline(now_ns, self.half_closed_timeout_ns)),
        )
    }

    #[inline]
    const fn deadline(&self, since_ns: u64, limit_ns: u64) -> u64 {
        if limit_ns == 0 {
            return u64::MAX;
        }
        since_ns.saturating_add(limit_ns)
    }

    /// Until when the gate can stay open without a new check; 0 if the session is past its limits at `now_ns`. Later
    /// payload is stamped [`Session::next_stamp_ns`] or later, so the `recheck_ns` of [`expiry`] is a valid bound.
    #[inline]
    pub fn open_until_ns(&self, session: &Session, now_ns: u64) -> u64 {
        if self.gate != 1 {
            return u64::MAX;
        }
        match expiry(session, self, now_ns) {
            Expiry::Alive { recheck_ns } => recheck_ns,
            Expiry::Expired { .. } => 0,
        }
    }

    /// Whether the gate drops payload of the session at `now_ns`, a time of the precise clock.
    #[inline]
    pub fn refuses(&self, session: &Session, now_ns: u64) -> bool {
        self.gate == 1 && expired(session, self, now_ns)
    }

    /// Whether the idle clock stands still because this host owes an answer.
    #[inline]
    pub const fn waits_for_answer(&self, session: &Session) -> bool {
        self.response_timeout_ns != 0 && session.owes_answer()
    }

    /// The last payload that resets the idle clock.
    #[inline]
    const fn last_activity(&self, session: &Session) -> u64 {
        if self.activity == Activity::Received as u8 {
            session.last_received_ns
        } else if self.activity == Activity::Sent as u8 {
            session.last_sent_ns
        } else {
            session.last_activity_ns()
        }
    }

    /// When the idle clock started, if it is running.
    #[inline]
    pub const fn idle_since(&self, session: &Session) -> u64 {
        let activity = self.last_activity(session);
        // The clock stood still until the answer and restarted with it.
        if self.response_timeout_ns != 0 && session.answered_ns > activity {
            return session.answered_ns;
        }
        activity
    }

    /// The idle deadline, and the limit that sets it.
    #[inline(always)]
    const fn idle_deadline(&self, session: &Session) -> (u64, Reason) {
        let since_ns = self.idle_since(session);
        let idle_ns = self.deadline(since_ns, self.idle_timeout_ns);
        // A FIN after the idle deadline does not extend the session.
        if self.half_closed_timeout_ns == 0 || session.half_closed_ns >= idle_ns {
            return (idle_ns, Reason::IdleTimeout);
        }
        let since_ns = later(since_ns, session.half_closed_ns);
        let half_closed_ns = self.deadline(since_ns, self.half_closed_timeout_ns);
        (half_closed_ns, Reason::HalfClosedTimeout)
    }
}

pub(crate) const fn later(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

const fn earlier(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}

#[inline]
fn expired(session: &Session, limits: &Limits, now_ns: u64) -> bool {
    matches!(expiry(session, limits, now_ns), Expiry::Expired { .. })
}

/// Decides whether the session is past its limits at `now_ns`. There is no grace period.
// Always inlined: an out-of-line function returns the result through the caller's stack, and the verifier refuses it
// ("cannot return stack pointer to the caller").
#[inline(always)]
pub fn expiry(session: &Session, limits: &Limits, now_ns: u64) -> Expiry {
    let (clock, clock_reason) = if limits.waits_for_answer(session) {
        // What this host sends is no answer if it is less than `min_answer`, but it can be activity.
        let since_ns = later(session.last_received_ns, limits.last_activity(session));
        let response_ns = limits.deadline(since_ns, limits.response_timeout_ns);
        (response_ns, Reason::ResponseTimeout)
    } else {
        limits.idle_deadline(session)
    };
    let lifetime = limits.deadline(session.established_ns, limits.lifetime_ns(session));
    let (deadline_ns, reason) = if lifetime < clock {
        (lifetime, Reason::MaxLifetime)
    } else {
        (clock, clock_reason)
    };
    if deadline_ns != u64::MAX && now_ns >= deadline_ns {
        return Expiry::Expired {
            reason,
            deadline_ns,
        };
    }
    // With a response or half-closed timeout the running clock can change: an answer starts the idle clock, a request
    // the response clock, a FIN the half-closed clock. Each may end before the current one.
    let recheck_ns = if limits.response_timeout_ns | limits.half_closed_timeout_ns == 0 {
        deadline_ns
    } else {
        let stamp_ns = session.next_stamp_ns(now_ns);
        earlier(deadline_ns, limits.next_activity_deadline_ns(stamp_ns))
    };
    Expiry::Alive { recheck_ns }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::tests_support::session;

    const SECOND: u64 = 1_000_000_000;

    fn limits(idle: u64, lifetime: u64) -> Limits {
        Limits {
            idle_timeout_ns: idle * SECOND,
            max_lifetime_ns: lifetime * SECOND,
            ..Limits::default()
        }
    }

    #[test]
    fn the_deadline_itself_is_expired_and_the_nanosecond_before_is_not() {
        let s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        let p = limits(5, 0);
        let at = 17 * SECOND;
        assert_eq!(expiry(&s, &p, at - 1), Expiry::Alive { recheck_ns: at });
        assert_eq!(
            expiry(&s, &p, at),
            Expiry::Expired {
                reason: Reason::IdleTimeout,
                deadline_ns: at
            }
        );
    }

    /// A new reason does not compile here until it has a successor, and then must be in the list.
    #[test]
    fn the_list_has_every_reason() {
        let next = |reason| match reason {
            Reason::IdleTimeout => Some(Reason::MaxLifetime),
            Reason::MaxLifetime => Some(Reason::ResponseTimeout),
            Reason::ResponseTimeout => Some(Reason::HalfClosedTimeout),
            Reason::HalfClosedTimeout => Some(Reason::Policy),
            Reason::Policy => Some(Reason::Untracked),
            Reason::Untracked => Some(Reason::Admin),
            Reason::Admin => None,
        };
        let all = core::iter::successors(Some(Reason::IdleTimeout), |reason| next(*reason));
        assert!(all.eq(Reason::ALL));
    }

    #[test]
    fn the_earlier_limit_names_the_reason() {
        let s = session(10 * SECOND, 12 * SECOND, 10 * SECOND);
        let Expiry::Expired { reason, .. } = expiry(&s, &limits(5, 6), 30 * SECOND) else {
            panic!("must be expired")
        };
        assert_eq!(reason, Reason::MaxLifetime);
        let Expiry::Expired { reason, .. } = expiry(&s, &limits(5, 8), 30 * SECOND) else {
            panic!("must be expired")
        };
        assert_eq!(reason, Reason::IdleTimeout);
    }

    #[test]
    fn equal_deadlines_are_not_attributed_to_the_lifetime() {
        let mut s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        let p = Limits {
            response_timeout_ns: 8 * SECOND,
            ..limits(8, 10)
        };
        assert_eq!(expires(&s, &p, 20), Some(Reason::IdleTimeout));
        s.answered_ns = 0;
        assert_eq!(expires(&s, &p, 20), Some(Reason::ResponseTimeout));
    }

    /// A session with these times in seconds; `at` is the time of the first FIN.
    fn half_closed(established: u64, received: u64, sent: u64, at: u64) -> Session {
        Session {
            half_closed_ns: at * SECOND,
            ..session(established * SECOND, received * SECOND, sent * SECOND)
        }
    }

    #[test]
    fn from_the_first_fin_on_its_limit_takes_the_place_of_the_idle_one() {
        let p = |idle, half_closed| Limits {
            half_closed_timeout_ns: half_closed * SECOND,
            ..limits(idle, 0)
        };
        let reached = |s: &Session, p: &Limits, at| expires(s, p, at);
        let (idle, by_fin) = (Some(Reason::IdleTimeout), Some(Reason::HalfClosedTimeout));
        // The timeout starts at the FIN or at later payload; shorter or longer than the idle timeout, or without one.
        let s = half_closed(10, 12, 11, 20);
        assert_eq!(reached(&s, &p(15, 3), 23), by_fin);
        assert_eq!(reached(&s, &p(15, 90), 110), by_fin);
        assert_eq!(reached(&s, &p(0, 3), 23), by_fin);
        let busy = half_closed(10, 22, 12, 20);
        assert_eq!(reached(&busy, &p(15, 3), 25), by_fin);
        // Without the timeout a FIN has no effect, and without a FIN the timeout has none.
        assert_eq!(reached(&s, &p(15, 0), 27), idle);
        let open = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        assert_eq!(reached(&open, &p(15, 3), 27), idle);
        let alive = expiry(&open, &p(0, 3), 1 << 60);
        assert!(matches!(alive, Expiry::Alive { .. }));
        // A FIN at the idle deadline does not extend the session.
        let late = half_closed(10, 12, 11, 27);
        assert_eq!(reached(&late, &p(15, 3), 27), idle);
    }

    #[test]
    fn a_half_closed_session_that_owes_the_answer_has_the_limit_of_that() {
        let mut s = half_closed(10, 12, 11, 12);
        s.answered_ns = 0;
        let p = Limits {
            half_closed_timeout_ns: 3 * SECOND,
            ..with_response(15, 60, Activity::Any)
        };
        assert_eq!(expires(&s, &p, 72), Some(Reason::ResponseTimeout));
        s.stamp_sent(50 * SECOND, true);
        assert_eq!(expires(&s, &p, 53), Some(Reason::HalfClosedTimeout));
    }

    #[test]
    fn a_session_is_looked_at_before_a_fin_can_have_made_it_late() {
        let s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        let p = Limits {
            half_closed_timeout_ns: 3 * SECOND,
            ..limits(15, 0)
        };
        let recheck_ns = 16 * SECOND;
        assert_eq!(expiry(&s, &p, 13 * SECOND), Expiry::Alive { recheck_ns });
        // Also if the response timeout is equal.
        let p = Limits {
            response_timeout_ns: 3 * SECOND,
            ..p
        };
        assert_eq!(expiry(&s, &p, 13 * SECOND), Expiry::Alive { recheck_ns });
    }

    #[test]
    fn the_first_deadline_is_that_of_the_shortest_limit() {
        let first = |idle, response, half_closed, lifetime, jitter| {
            let p = Limits {
                half_closed_timeout_ns: half_closed * SECOND,
                lifetime_jitter_ns: jitter * SECOND,
                response_timeout_ns: response * SECOND,
                ..limits(idle, lifetime)
            };
            p.first_deadline_ns(10 * SECOND)
        };
        assert_eq!(first(0, 0, 0, 0, 0), u64::MAX);
        for (limits, at) in [
            ((5, 0, 0, 0, 0), 15),
            ((0, 6, 0, 0, 0), 16),
            ((0, 0, 7, 0, 0), 17),
            ((0, 0, 0, 7, 0), 17),
            ((5, 6, 9, 7, 0), 15),
            ((8, 6, 9, 7, 0), 16),
            ((8, 9, 9, 7, 0), 17),
            ((8, 9, 6, 7, 0), 16),
            ((8, 9, 9, 7, 3), 14),
            ((5, 9, 9, 90, 30), 15),
        ] {
            let (idle, response, half_closed, lifetime, jitter) = limits;
            let found = first(idle, response, half_closed, lifetime, jitter);
            assert_eq!(found, at * SECOND, "{limits:?}");
        }
    }

    #[test]
    fn no_limit_never_expires() {
        let s = session(0, 0, 0);
        let alive = Expiry::Alive {
            recheck_ns: u64::MAX,
        };
        assert_eq!(expiry(&s, &limits(0, 0), u64::MAX), alive);
    }

    proptest! {
        #[test]
        fn never_before_every_limit_has_passed_and_always_after_one_has(
            established in 0..u64::MAX / 4,
            received in 0..u64::MAX / 4,
            sent in 0..u64::MAX / 4,
            idle in 0..1u64 << 50,
            lifetime in 0..1u64 << 50,
            now: u64,
        ) {
            let s = session(established, received, sent);
            let p = Limits {
                idle_timeout_ns: idle,
                max_lifetime_ns: lifetime,
                ..Limits::default()
            };
            let idle_over = idle > 0 && now >= received.max(sent) + idle;
            let lifetime_over = lifetime > 0 && now >= established + lifetime;
            let expired = matches!(expiry(&s, &p, now), Expiry::Expired { .. });
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
            let p = Limits {
                idle_timeout_ns: idle,
                max_lifetime_ns: lifetime,
                ..Limits::default()
            };
            if let Expiry::Alive { recheck_ns } = expiry(&s, &p, now) {
                prop_assert!(recheck_ns > now);
                let before = expiry(&s, &p, recheck_ns - 1);
                let expired = matches!(expiry(&s, &p, recheck_ns), Expiry::Expired { .. });
                prop_assert_eq!(before, Expiry::Alive { recheck_ns });
                prop_assert!(expired);
            }
        }
    }

    fn with_response(idle: u64, response: u64, activity: Activity) -> Limits {
        Limits {
            response_timeout_ns: response * SECOND,
            activity: activity as u8,
            ..limits(idle, 0)
        }
    }

    fn expires(session: &Session, limits: &Limits, at: u64) -> Option<Reason> {
        let deadline = at * SECOND;
        assert!(matches!(
            expiry(session, limits, deadline - 1),
            Expiry::Alive { .. }
        ));
        match expiry(session, limits, deadline) {
            Expiry::Expired {
                reason,
                deadline_ns,
            } if deadline_ns == deadline => Some(reason),
            _ => None,
        }
    }

    #[test]
    fn only_the_chosen_direction_resets_the_idle_clock() {
        let s = session(10 * SECOND, 12 * SECOND, 14 * SECOND);
        for (activity, at) in [
            (Activity::Received, 17),
            (Activity::Sent, 19),
            (Activity::Any, 19),
        ] {
            let p = with_response(5, 0, activity);
            assert_eq!(expires(&s, &p, at), Some(Reason::IdleTimeout));
        }
    }

    #[test]
    fn while_the_answer_is_owed_the_idle_clock_stands_still_and_the_other_runs() {
        let mut s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        s.answered_ns = 0;
        let p = with_response(5, 60, Activity::Any);
        assert_eq!(expires(&s, &p, 72), Some(Reason::ResponseTimeout));
        // Without a response timeout an owed answer has no effect.
        let p = with_response(5, 0, Activity::Any);
        assert_eq!(expires(&s, &p, 17), Some(Reason::IdleTimeout));
    }

    #[test]
    fn less_than_an_answer_restarts_the_response_clock_where_sending_is_activity() {
        let mut s = session(10 * SECOND, 12 * SECOND, 20 * SECOND);
        s.answered_ns = 0;
        for (activity, deadline) in [
            (Activity::Any, 30),
            (Activity::Sent, 30),
            (Activity::Received, 22),
        ] {
            let p = with_response(5, 10, activity);
            assert_eq!(expires(&s, &p, deadline - 1), None);
            assert_eq!(expires(&s, &p, deadline), Some(Reason::ResponseTimeout));
        }
    }

    #[test]
    fn the_answer_starts_the_idle_clock_also_where_sending_is_no_activity() {
        let mut s = session(10 * SECOND, 12 * SECOND, 35 * SECOND);
        s.answered_ns = 32 * SECOND;
        let p = with_response(5, 60, Activity::Received);
        assert_eq!(expires(&s, &p, 37), Some(Reason::IdleTimeout));
    }

    #[test]
    fn a_session_that_owes_an_answer_is_checked_before_the_answer_can_be_too_old() {
        let mut s = session(10 * SECOND, 12 * SECOND, 11 * SECOND);
        s.answered_ns = 0;
        let p = with_response(5, 60, Activity::Any);
        let Expiry::Alive { recheck_ns } = expiry(&s, &p, 13 * SECOND) else {
            panic!("must be alive")
        };
        assert_eq!(recheck_ns, 18 * SECOND);
    }

    #[test]
    fn the_jitter_shortens_a_life_by_at_most_itself_and_always_the_same() {
        let p = Limits {
            lifetime_jitter_ns: 20 * SECOND,
            ..limits(0, 100)
        };
        let of_port = |remote_port| {
            let s = Session {
                remote_port,
                ..session(0, 0, 0)
            };
            let share = u64::from(s.jitter_share(p.jitter_key));
            let lifetime = p.lifetime_ns(&s);
            assert_eq!(lifetime, 100 * SECOND - ((20 * SECOND) >> 16) * share);
            lifetime
        };
        let lifetimes: Vec<u64> = (0..=u16::MAX).map(of_port).collect();
        let (shortest, longest) = (lifetimes.iter().min(), lifetimes.iter().max());
        assert!((80 * SECOND..81 * SECOND).contains(shortest.unwrap()));
        assert!((99 * SECOND..=100 * SECOND).contains(longest.unwrap()));
    }

    /// Lets a request (0), an answer (1) or a FIN pass.
    fn pass(session: &mut Session, what: u8, at_ns: u64) {
        match what {
            0 => session.stamp_received(at_ns),
            1 => session.stamp_sent(at_ns, true),
            _ => session.half_closed_ns = session.half_closed_ns.min(at_ns),
        }
    }

    /// A session that was established at 0, and received and sent within the first 1,000 ns.
    fn any_session() -> impl Strategy<Value = Session> {
        let times = (0..1_000u64, 0..1_000u64, any::<bool>());
        times.prop_map(|(received, sent, owes)| {
            let mut session = session(0, received, sent);
            if owes && received > sent {
                session.answered_ns = 0;
            }
            session
        })
    }

    /// Limits below 500 ns, with a lifetime below 5,000 ns; 0 is no limit.
    fn any_limits() -> impl Strategy<Value = Limits> {
        let limits = (0..500u64, 0..500u64, 0..500u64, 0..500u64, 0..3u8);
        limits.prop_map(|(idle, response, lifetime, half_closed, activity)| Limits {
            idle_timeout_ns: idle,
            response_timeout_ns: response,
            half_closed_timeout_ns: half_closed,
            max_lifetime_ns: lifetime * 10,
            activity,
            ..Limits::default()
        })
    }

    proptest! {
        /// The gate agrees with [`expiry`], with or without a remembered `open_until_ns`.
        #[test]
        fn the_gate_refuses_exactly_what_has_expired(
            times in (0..1_000u64, 0..1_000u64, 0..1_000u64, 0..1_000u64),
            owes: bool,
            half_closed in 0..2_000u64,
            remote_port: u16,
            limits in (0..500u64, 0..500u64, 0..500u64, 0..500u64),
            jitter in 0..90u64,
            activity in 0..4u8,
            gate in 0..3u8,
            now in 0..2_000u64,
        ) {
            let s = Session {
                answered_ns: if owes { 0 } else { times.3 + 1 },
                half_closed_ns: half_closed,
                remote_port,
                ..session(times.0, times.1, times.2)
            };
            let p = Limits {
                // Long lifetimes, since the jitter has steps of 1/65,536.
                max_lifetime_ns: limits.2 << 16,
                lifetime_jitter_ns: (limits.2 << 16) / 100 * jitter,
                idle_timeout_ns: limits.0,
                response_timeout_ns: limits.1,
                half_closed_timeout_ns: limits.3,
                activity,
                gate,
                ..Limits::default()
            };
            for now in [now, now << 16] {
                let is_past = matches!(expiry(&s, &p, now), Expiry::Expired { .. });
                prop_assert_eq!(p.refuses(&s, now), gate == 1 && is_past);
                let by_two_steps = p.open_until_ns(&s, now) <= now && p.refuses(&s, now);
                prop_assert_eq!(by_two_steps, p.refuses(&s, now));
            }
        }

        /// Otherwise each packet would read the clock twice.
        #[test]
        fn the_gate_is_not_asked_twice_before_the_deadline(
            received in 0..1_000u64,
            idle in 1..500u64,
            response in 1..500u64,
            now in 0..2_000u64,
        ) {
            let s = session(0, received, 0);
            for response_timeout_ns in [0, response] {
                let p = Limits {
                    idle_timeout_ns: idle,
                    response_timeout_ns,
                        gate: 1,
                    ..Limits::default()
                };
                let asks = p.open_until_ns(&s, now) <= now;
                prop_assert_eq!(asks, now >= received + idle);
            }
        }

        /// The programs remember `open_until_ns` and do not check the gate before that time.
        #[test]
        fn the_gate_stays_open_until_the_time_that_was_computed(
            mut s in any_session(),
            limits in any_limits(),
            now in 1_000..2_000u64,
            passes in prop::collection::vec((0..3u8, 0..300u64), 0..6),
            rest in 0..300u64,
        ) {
            let p = Limits { gate: 1, ..limits };
            let until = p.open_until_ns(&s, now);
            let mut at = now;
            for (what, later) in passes {
                at += later;
                pass(&mut s, what, at);
            }
            at += rest;
            if at < until {
                prop_assert!(!p.refuses(&s, at));
            }
        }
    }

    proptest! {
        /// The schedule relies on this: whatever passes after a check, no deadline is earlier than
        /// the time of the next check.
        #[test]
        fn no_event_after_a_check_sets_a_deadline_before_the_next_check(
            mut s in any_session(),
            p in any_limits(),
            now in 1_000..2_000u64,
            later in 0..2_000u64,
            then in 0..3u8,
        ) {
            if let Expiry::Alive { recheck_ns } = expiry(&s, &p, now) {
                pass(&mut s, then, now + later);
                if let Expiry::Expired { deadline_ns, .. } = expiry(&s, &p, u64::MAX - 1) {
                    prop_assert!(deadline_ns >= recheck_ns, "{deadline_ns} {recheck_ns}");
                }
            }
        }

        /// A candidate is stamped later, with the time at which it passed.
        #[test]
        fn no_confirmed_candidate_sets_a_deadline_before_the_next_check(
            mut s in any_session(),
            p in any_limits(),
            now in 1_000..2_000u64,
            waits in (0..1_000u64, 0..1_000u64),
            is_taken in (any::<bool>(), any::<bool>()),
        ) {
            (s.received_candidate_ns, s.sent_candidate_ns) = (now - waits.0, now - waits.1);
            if let Expiry::Alive { recheck_ns } = expiry(&s, &p, now) {
                s.received_candidate_ns *= u64::from(is_taken.0);
                s.sent_candidate_ns *= u64::from(is_taken.1);
                if let Expiry::Expired { deadline_ns, .. } = expiry(&s.with_candidate(), &p, u64::MAX - 1) {
                    prop_assert!(deadline_ns >= recheck_ns, "{deadline_ns} {recheck_ns}");
                }
            }
        }
    }
}
