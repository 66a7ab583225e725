//! The engine: start, stop, take-over, pins, faults, a full session table, and records that a
//! killed daemon left.

mod exclusive_program;
mod faults;
mod map_full;
mod pins;
mod restart;
mod shutdown;
mod takeover;
mod unrecorded;
mod untrusted;
