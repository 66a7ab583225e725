//! The daemon's parts; see ARCHITECTURE.md for the map.

pub mod cli;
pub mod commands;
pub mod config;
pub mod datapath;
pub mod engine;
pub mod exit;
pub mod host;
pub mod reaper;
pub mod report;
