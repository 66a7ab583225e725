//! STUB
use crate::{audit::Outcome, config::Mode};
use session_enforcer_common::*;
use std::time::Duration;
#[allow(missing_docs)]
pub struct KernelSnapshot {
    pub rules: Vec<RuleCounters>,
    pub errors: [u64; ErrorKind::COUNT as usize],
}
#[allow(missing_docs)]
pub enum Repair {
    Unscheduled,
}
#[allow(missing_docs)]
pub struct Metrics;
#[allow(missing_docs)]
#[allow(clippy::all)]
impl Metrics {
    pub fn new(_: &[String], _: u32, _: &str, _: &str) -> anyhow::Result<Self> {
        Ok(Self)
    }
    pub fn termination(
        &self,
        _: usize,
        _: Reason,
        _: Mode,
        _: Outcome,
        _: Duration,
        _: Duration,
        _: Duration,
    ) {
    }
    pub fn adopted(&self, _: usize) {}
    pub fn closed_by_daemon(&self, _: usize) {}
    pub fn untracked_namespace(&self) {}
    pub fn untracked_map_full(&self) {}
    pub fn repaired(&self, _: Repair) {}
    pub fn render(&self, s: &KernelSnapshot) -> anyhow::Result<String> {
        Ok(format!("{:?} {:?}", s.rules, s.errors))
    }
}
