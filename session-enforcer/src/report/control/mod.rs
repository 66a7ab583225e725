//! The control socket: HTTP/1.1 and JSON on a Unix socket, for the commands and for other programs.
//!
//! The HTTP thread of the metrics serves it. The kernel identifies each client (`SO_PEERCRED`). This module
//! reads sessions directly from the kernel's table in batches, without the engine. It asks the engine only
//! for data and actions that the engine alone has. Requests are limited in size and time; a client that stops
//! reading holds only its buffers and delays nobody.

mod filter;
mod kill_request;
mod listing;
mod messages;
mod peer;
mod routes;
mod serve;
mod session_row;
mod socket;
mod write_timeout;

pub use filter::{FILTER_KEYS, Filter, MAX_SORTED, Selection, SortKey};
pub use kill_request::KillSelection;
pub use messages::{
    ConfigInForce, Degradation, KillLine, KillOutcome, KillRequest, KillResult, Killed, OwnerNames,
    PolicyChange, Refusal, ReloadRequest, ReloadResult, Request, RuleStatus, Rules, Status,
    TerminationCount,
};
pub use peer::Admission;
pub use serve::{Server, serve};
pub use session_row::{Carried, End, Owner, Row, RuleInForce};
pub use socket::{ControlError, bind, check};
