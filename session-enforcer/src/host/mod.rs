//! What the host is asked for besides sockets.

pub mod privilege;
pub mod trust;
