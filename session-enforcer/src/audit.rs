//! STUB
use std::time::Duration;
use session_enforcer_common::*;
use crate::config::{AuditTarget, Mode};
#[derive(Clone, Copy, Debug)] #[allow(missing_docs)]
pub enum Outcome { Reset, Gone, Failed, Expired }
#[allow(missing_docs)]
pub struct Termination<'a> { pub cookie: u64, pub session: &'a Session, pub rule: &'a str, pub reason: Reason, pub mode: Mode, pub outcome: Outcome, pub limit: Duration, pub deadline_ns: u64, pub answered_ns: u64, pub error: Option<&'a str> }
#[allow(missing_docs)]
pub struct Audit;
#[allow(missing_docs)]
impl Audit { pub fn open(_: &AuditTarget) -> std::io::Result<Self> { Ok(Self) }
pub fn termination(&mut self, t: &Termination<'_>) { println!("{} {:?} {:?} {:?} late {} us err {:?} {:?}", t.rule, t.reason, t.outcome, t.mode, (t.answered_ns - t.deadline_ns)/1000, t.error, t.session); }
pub fn flush(&mut self) {} pub fn reopen(&mut self) {} pub fn started(&mut self, _: &[String]) {} pub fn stopped(&mut self) {} }
