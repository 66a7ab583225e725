//! What the host is asked for besides sockets: cgroups, users, clocks, privileges, whom files belong to.
//!
//! Nothing here knows of sessions or rules.

pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod grace_period;
pub mod privilege;
pub mod sockets;
pub mod threads;
pub mod timer;
pub mod trust;
pub mod users;
pub mod watch;
