//! What an operator has before them: commands, refusals, audit and journal, metrics, `top`, and the manifests of
//! Kubernetes.

mod audit;
mod commands;
mod http;
mod journald;
mod kubernetes;
mod prometheus;
mod refusals;
mod top;
