//! What the program can be asked to do: a file a command.
//!
//! Each takes the arguments that [`cli`](crate::cli) has read, says what it has to say, and returns what the
//! exit status is made of. Only `main` calls them. Nothing here decides about a session.

pub mod check;
pub mod detach;
pub mod doctor;
pub mod explain;
pub mod last_good;
mod probe;
pub mod run;
