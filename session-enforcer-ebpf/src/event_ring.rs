//! Events for the daemon, in a ring buffer.

use session_enforcer_common::{ErrorKind, Event, EventKind, Session};

use crate::{count, maps::EVENTS};

/// Reports an event to the daemon. Returns whether the ring buffer accepted it.
#[inline(always)]
pub(crate) fn notify(kind: EventKind, cookie: u64, session: &Session) -> bool {
    send(event(kind, cookie, session))
}

/// The event about a session.
#[inline(always)]
pub(crate) fn event(kind: EventKind, cookie: u64, session: &Session) -> Event {
    Event {
        cookie,
        netns_cookie: session.netns_cookie,
        established_ns: session.established_ns,
        cgroup_id: session.owner.cgroup_id,
        kind: kind as u32,
        rule: session.rule,
        generation: session.generation as u16,
    }
}

/// With flags 0 the ring buffer wakes the daemon only if it had consumed all earlier events.
#[inline(always)]
pub(crate) fn send(event: Event) -> bool {
    let told = EVENTS.output(event, 0).is_ok();
    if !told {
        count::error(ErrorKind::EventLost);
    }
    told
}
