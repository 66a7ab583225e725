//! Reapers: processes that make every call that may block. They list, query and reset sockets, search `/proc`
//! and network namespaces, and ask the name service.
//!
//! [`pool`] is the engine's side. It starts reapers, sends each one request at a time ([`protocol`]), and
//! detects reapers that hang ([`shared`]). [`worker`] is the reaper's side: the same program, started again.
//! This module takes no decisions. A reaper holds no BPF object, no port and none of the daemon's locks. Only
//! the engine calls [`pool`]. The other modules are used by [`worker`] and by the commands that probe the
//! host.

pub mod channel;
pub mod diag;
pub mod disconnect;
pub mod inspect;
pub mod namespaces;
pub mod pool;
pub mod processes;
pub mod protocol;
pub mod shared;
pub mod trial;
pub mod worker;
