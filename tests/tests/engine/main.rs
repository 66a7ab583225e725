//! The daemon's life: starts, stops, crashes, stalls and faults of what it stands on, a table that is full, what it leaves
//! to the next one, and what it mends.

mod crashes;
mod faults;
mod map_full;
mod pins;
mod place_taken;
mod reconcile;
mod restart;
mod shutdown;
mod stalls;
mod takeover;
mod unrecorded;
mod untrusted;
