//! The kernel's socket table over netlink: list, look at, and destroy TCP sockets. The only user
//! of netlink in the project.

mod connection;
pub mod wire;

pub use connection::{BIT, Destroyed, DiagSocket, MAX_BATCH, SockDiagError};
pub use wire::{Detail, Family, Info, Queued, Socket, Target, state};
