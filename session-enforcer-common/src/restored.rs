//! Connections that move to another socket (`TCP_REPAIR`, which CRIU uses). The first socket closes without a FIN, and
//! the connection keeps its age.

use crate::{Address, Direction, Session, expiry::later};

/// Maximum number of remembered connections. Beyond it, those that closed first are forgotten.
pub const MAX_REMEMBERED: u32 = 16_384;

/// A connection, independent of its socket and network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Ends {
    /// This host's address.
    pub local: Address,
    /// The peer's address.
    pub remote: Address,
    /// This host's port, in host byte order.
    pub local_port: u16,
    /// The peer's port, in host byte order.
    pub remote_port: u16,
}

/// The clocks and the direction of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Clocks {
    /// See [`Session::established_ns`].
    pub established_ns: u64,
    /// See [`Session::last_received_ns`].
    pub last_received_ns: u64,
    /// See [`Session::last_sent_ns`].
    pub last_sent_ns: u64,
    /// See [`Session::answered_ns`].
    pub answered_ns: u64,
    /// See [`Session::half_closed_ns`].
    pub half_closed_ns: u64,
    /// See [`Session::direction`].
    pub direction: u64,
}

impl Clocks {
    /// The clocks of a session. Unconfirmed candidates count as activity here, because no later packet can confirm
    /// them.
    #[inline(always)]
    pub const fn of(session: &Session) -> Self {
        Self {
            established_ns: session.established_ns,
            last_received_ns: later(session.last_received_ns, session.received_candidate_ns),
            last_sent_ns: later(session.last_sent_ns, session.sent_candidate_ns),
            answered_ns: session.answered_ns,
            half_closed_ns: session.half_closed_ns,
            direction: session.direction as u64,
        }
    }

    /// Copies the clocks into a session.
    #[inline(always)]
    pub const fn give_to(&self, session: &mut Session) {
        session.established_ns = self.established_ns;
        session.last_received_ns = self.last_received_ns;
        session.last_sent_ns = self.last_sent_ns;
        session.answered_ns = self.answered_ns;
        session.half_closed_ns = self.half_closed_ns;
        session.direction = if self.direction == Direction::Outbound as u64 {
            Direction::DIALLED_BEFORE
        } else {
            self.direction as u8
        };
    }
}

const _: () = {
    assert!(size_of::<Ends>() == 36 && align_of::<Ends>() == 4);
    assert!(size_of::<Clocks>() == 48);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests_support::session;

    #[test]
    fn a_connection_goes_on_with_its_clocks_and_with_what_was_waited_for() {
        let before = Session {
            half_closed_ns: 25,
            direction: 2,
            ..session(10, 20, 30)
        };
        let inherited = |before: &Session| {
            let mut after = session(90, 90, 90);
            Clocks::of(before).give_to(&mut after);
            after
        };
        let after = inherited(&before);
        assert_eq!(after.established_ns, 10);
        assert_eq!((after.last_received_ns, after.last_sent_ns), (20, 30));
        assert_eq!((after.answered_ns, after.half_closed_ns), (10, 25));
        assert_eq!(after.direction, Direction::DIALLED_BEFORE);
        // However often it moves, and an accepted one stays accepted.
        assert_eq!(inherited(&after).direction, Direction::DIALLED_BEFORE);
        assert_eq!(inherited(&session(10, 20, 30)).direction, 1);
        // Unconfirmed candidates count.
        let (received_candidate_ns, sent_candidate_ns) = (40, 50);
        let waiting = Session {
            received_candidate_ns,
            sent_candidate_ns,
            ..before
        };
        let after = inherited(&waiting);
        assert_eq!((after.last_received_ns, after.last_sent_ns), (40, 50));
        // Older candidates do not set the clocks back.
        let stale = Session {
            received_candidate_ns: 5,
            sent_candidate_ns: 6,
            ..before
        };
        assert_eq!(inherited(&stale), inherited(&before));
    }
}
