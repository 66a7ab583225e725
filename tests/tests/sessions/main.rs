//! Sessions: what counts as activity, the limits, the gate, how connections are established,
//! closed, adopted and restored, and how each kind is reset.

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
