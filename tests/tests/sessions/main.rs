//! What a session is and when it ends: the clocks and what moves them, connections that come into being, close, are handed
//! on or are told apart in every way there is, and how each is reset.

mod activity;
mod adoption;
mod counters;
mod disconnect;
mod families;
mod gate;
mod half_closed;
mod handshakes;
mod idle;
mod lifetime;
mod mptcp;
mod not_activity;
mod outbound;
mod ports;
mod restored;
mod transfers;
mod tuple_reuse;
