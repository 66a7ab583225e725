//! The commands of the program, one file each.
//!
//! A command takes the arguments that [`cli`](crate::cli) has parsed, prints its output, and returns the
//! basis of the exit status. Only `main` calls commands. This module takes no decision about a session.

pub mod check;
mod columns;
mod daemon_client;
pub mod detach;
pub mod doctor;
pub mod explain;
pub mod follow;
pub mod kill;
pub mod last_good;
pub mod list;
mod probe;
pub mod reload_now;
pub mod run;
pub mod status;
pub mod top;
