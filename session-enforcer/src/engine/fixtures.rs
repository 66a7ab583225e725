//! Fixtures for unit tests.

use session_enforcer_common::{Address, Direction, Owner, Session};

/// An inbound session that was established at 0 and has carried no payload.
pub(crate) fn session() -> Session {
    Session {
        last_received_ns: 0,
        last_sent_ns: 0,
        answered_ns: 1,
        bytes_received: 0,
        bytes_sent: 0,
        open_until_ns: 0,
        generation: 1,
        rule: 0,
        direction: Direction::Inbound as u8,
        flags: 0,
        established_ns: 0,
        netns_cookie: 3,
        local: Address([0; 4]),
        remote: Address([0; 4]),
        local_port: 1,
        remote_port: 2,
        ifindex: 0,
        owner: Owner::UNKNOWN,
        data_segments_sent: 0,
        sent_before_answer: 0,
        sent_candidate_completes_answer: 0,
        half_closed_ns: Session::NOT_HALF_CLOSED,
        received_candidate_ns: 0,
        sent_candidate_ns: 0,
        sent_candidate_end: 0,
    }
}
