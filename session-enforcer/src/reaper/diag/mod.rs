//! The kernel's socket table over netlink: list, look at, and destroy TCP sockets. The only user
//! of netlink in the project.

mod netlink;
pub mod wire;

pub use netlink::{BIT, Destroyed, DiagSocket, MAX_BATCH, SockDiagError};
pub use wire::{Detail, Family, Info, Queued, Socket, SocketId, state};
