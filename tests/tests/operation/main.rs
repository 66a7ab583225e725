//! Operation: commands, errors, audit and journal, metrics, `top`, and Kubernetes manifests.

mod audit;
mod commands;
mod http;
mod journald;
mod kubernetes;
mod prometheus;
mod refusals;
mod top;
