//! All that can wait for somebody else, in processes of its own: lists of sockets, queries about one, resets,
//! searches of `/proc` and of namespaces, the name service.
//!
//! [`pool`] is the engine's side. It starts reapers, asks each for one thing at a time ([`protocol`]),
//! and sees where one hangs ([`shared`]). [`worker`] is the other side, the same program started
//! again. Nothing here decides anything, and a reaper holds no BPF object, no port and no lock of the
//! daemon's. Only the engine calls [`pool`]; only [`worker`] uses the rest, besides the commands that try what the host allows.

pub mod channel;
pub mod diag;
pub mod disconnect;
pub mod namespaces;
pub mod pool;
pub mod processes;
pub mod protocol;
pub mod shared;
pub mod trial;
pub mod worker;
