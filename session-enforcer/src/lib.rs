//! The daemon's parts; see ARCHITECTURE.md for the map.
pub mod bpf;
pub mod cgroup;
pub mod netns;
pub mod schedule;
pub mod sock_diag;
