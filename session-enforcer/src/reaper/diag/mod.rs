//! The kernel's socket table over netlink: lists, queries and destroys TCP sockets. No other module uses
//! netlink.

mod netlink;
pub mod wire;

pub use netlink::{CHUNK, Destroyed, DiagSocket, LEFT_OUT, MAX_BATCH, SockDiagError, SocketOwner};
pub use wire::{Detail, Family, Info, Queued, Socket, SocketId, state};
