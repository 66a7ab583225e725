//! What the daemon says of itself and of its sessions: audit records, metrics, health, readiness.
//!
//! The engine hands over what has happened, and asks for nothing. Nothing here waits for whoever reads: the
//! audit and the log have threads of their own, and lose and count what nobody takes.

pub mod audit;
pub mod control;
pub mod health;
pub mod http;
mod landing_page;
pub mod metrics;
pub mod service_manager;
