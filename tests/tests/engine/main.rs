//! The daemon's life: starts, stops and faults of what it stands on, a table that is full, and what it leaves to the next
//! one.

mod faults;
mod map_full;
mod pins;
mod place_taken;
mod restart;
mod shutdown;
mod takeover;
mod unrecorded;
mod untrusted;
