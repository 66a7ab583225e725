//! The daemon's reports: audit records, metrics, health, readiness.
//!
//! The engine passes events to this module and requests nothing from it. Nothing here waits for a reader: the
//! audit and the log have their own threads, which count and drop data that nobody reads.

pub mod audit;
mod connections;
pub mod control;
pub mod health;
pub mod http;
mod landing_page;
pub mod metrics;
pub mod service_manager;
pub mod to_engine;
