//! Services of the host besides sockets: cgroups, users, clocks, privileges, file ownership.
//!
//! This module knows no sessions and no rules.

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
