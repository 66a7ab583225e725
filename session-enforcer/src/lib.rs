//! The daemon's parts; see ARCHITECTURE.md for the map.

pub mod adopt;
pub mod audit;
pub mod bpf;
pub mod cgroup;
pub mod check;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod detach;
pub mod doctor;
pub mod engine;
pub mod exit;
pub mod explain;
pub mod health;
pub mod host;
pub mod http;
pub mod metrics;
pub mod owners;
pub mod probe;
pub mod reaper;
pub mod schedule;
pub mod threads;
pub mod timer;
pub mod users;
pub mod watch;
