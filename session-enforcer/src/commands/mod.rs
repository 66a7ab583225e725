//! What the program can be asked to do: a file a command.
//!
//! Each takes the arguments that [`cli`](crate::cli) has read, says what it has to say, and returns what the
//! exit status is made of. Only `main` calls them. Nothing here decides about a session.

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
