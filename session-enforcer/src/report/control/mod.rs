//! The control socket: HTTP/1.1 and JSON on a Unix socket, for commands and for programs.
//!
//! The thread of the metrics serves it. Who connects is told by the kernel (`SO_PEERCRED`). Sessions are read from the
//! kernel's table here, some at a time, and not by the engine; what only the engine knows or may do it is asked for.
//! A client has bounds on its bytes and its time, and one that stops reading costs its buffers and nobody's wait.

mod filter;
mod listing;
mod messages;
mod order;
mod patient;
mod peer;
mod routes;
mod row;
mod serve;
mod socket;

pub use filter::{FILTER_KEYS, Filter, Selection, SortKey};
pub use messages::{
    ConfigInForce, KillLine, KillRequest, KillResult, Killed, Outcome, OwnerNames, PolicyChange,
    Refusal, ReloadRequest, ReloadResult, Request, RuleInForce, RuleStatus, Rules, Status,
    StatusTrouble, TerminationCount,
};
pub use order::Order;
pub use peer::Admission;
pub use row::{Carried, End, Owner, Row};
pub use serve::{Server, serve};
pub use socket::{ControlError, bind, check};
