//! What outlives a socket that was closed without a word to its peer: another one can take its connection over
//! (`TCP_REPAIR`, which CRIU uses), and with it the connection's age.

use crate::{Address, Session};

/// Connections that are remembered. Of more than these the ones that closed first are forgotten.
pub const MAX_REMEMBERED: u32 = 16_384;

/// A connection, whatever socket it has and in whatever namespace that is.
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

/// The clocks of a connection, and who dialled.
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
    /// Those of a session.
    #[inline(always)]
    pub const fn of(session: &Session) -> Self {
        Self {
            established_ns: session.established_ns,
            last_received_ns: session.last_received_ns,
            last_sent_ns: session.last_sent_ns,
            answered_ns: session.answered_ns,
            half_closed_ns: session.half_closed_ns,
            direction: session.direction as u64,
        }
    }

    /// Has a session go on with them.
    #[inline(always)]
    pub const fn give_to(&self, session: &mut Session) {
        session.established_ns = self.established_ns;
        session.last_received_ns = self.last_received_ns;
        session.last_sent_ns = self.last_sent_ns;
        session.answered_ns = self.answered_ns;
        session.half_closed_ns = self.half_closed_ns;
        session.direction = self.direction as u8;
    }
}

const _: () = {
    assert!(size_of::<Ends>() == 36 && align_of::<Ends>() == 4);
    assert!(size_of::<Clocks>() == 48);
};
