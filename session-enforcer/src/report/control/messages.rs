//! What is asked over the control socket, and what is answered: between the HTTP thread and the engine, and as JSON.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use session_enforcer_common::{Ancestors, Limits, Session};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::row::End;
use crate::{
    config::Mode,
    report::audit::{Requester, Subscription},
};

/// What the HTTP thread asks the engine.
#[derive(Debug)]
pub enum Request {
    /// How the daemon is.
    Status(oneshot::Sender<Status>),
    /// The rules in force.
    Rules(oneshot::Sender<Box<dyn Rules>>),
    /// Names of cgroups and users.
    Owners {
        /// Identities of cgroups.
        cgroups: Vec<u64>,
        /// Users.
        users: Vec<u32>,
        /// Where the answer goes.
        reply: oneshot::Sender<OwnerNames>,
    },
    /// Reset sessions now.
    Kill(KillRequest),
    /// Read the configuration again.
    Reload(ReloadRequest),
    /// The audit's records from now on; none where too many have asked.
    Events(oneshot::Sender<Option<Subscription>>),
}

/// The rules in force at one moment.
pub trait Rules: Send + Sync + std::fmt::Debug {
    /// The rule of a session; none where no rule matches it any more. `ancestors` tells the cgroups above one.
    fn rule_of(
        &self,
        session: &Session,
        ancestors: &dyn Fn(u64) -> Option<Ancestors>,
    ) -> Option<RuleInForce<'_>>;

    /// Whether there is a rule of this name.
    fn has(&self, name: &str) -> bool;
}

/// A rule as it is in force.
#[derive(Clone, Copy, Debug)]
pub struct RuleInForce<'a> {
    /// Its number.
    pub place: u16,
    /// Its name.
    pub name: &'a str,
    /// Whether it enforces.
    pub mode: Mode,
    /// Its limits.
    pub limits: &'a Limits,
}

/// What the engine knows of owners.
#[derive(Clone, Debug, Default)]
pub struct OwnerNames {
    /// By the identity of a cgroup, its path and the cgroups above it, as far as they are known.
    pub cgroups: Vec<(u64, Option<String>, Option<Ancestors>)>,
    /// Users by their numbers.
    pub users: Vec<(u32, Option<String>)>,
}

/// Sessions that are to be reset now.
#[derive(Debug)]
pub struct KillRequest {
    /// Each by its cookie and its time of establishment.
    pub sessions: Vec<(u64, u64)>,
    /// Who asks.
    pub by: Arc<Requester>,
    /// One result for each.
    pub results: UnboundedSender<Killed>,
}

/// What became of a session that was to be reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// Its cookie.
    pub id: u64,
    /// What became of it.
    pub result: KillResult,
}

/// The same, as far as the engine tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KillResult {
    /// The kernel has reset it.
    Reset,
    /// It had ended by itself.
    Gone,
    /// It could not be reset, for this reason. It stands behind the gate, and is tried again.
    Failed(String),
}

/// A line of the answer to a kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillLine {
    /// The session.
    pub id: u64,
    /// Its rule, where the session was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// This host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<End>,
    /// The peer's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<End>,
    /// What became of it.
    pub result: Outcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What became of a session that was to be reset, for people and programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The kernel has reset it.
    Reset,
    /// It had ended by itself.
    Gone,
    /// It could not be reset, and is tried again.
    Failed,
    /// There is no session of this number, or it is none of those that the filters choose.
    NotFound,
    /// There is no answer yet. The daemon goes on.
    Pending,
    /// It would be reset.
    WouldReset,
}

impl Outcome {
    /// The name in the answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Gone => "gone",
            Self::Failed => "failed",
            Self::NotFound => "not_found",
            Self::Pending => "pending",
            Self::WouldReset => "would_reset",
        }
    }

    /// Whether what was asked for is done.
    pub const fn is_done(self) -> bool {
        matches!(self, Self::Reset | Self::Gone | Self::WouldReset)
    }
}

/// The configuration is to be read again.
#[derive(Debug)]
pub struct ReloadRequest {
    /// Who asks.
    pub by: Requester,
    /// What became of it.
    pub reply: oneshot::Sender<ReloadResult>,
}

/// What became of a reload.
pub type ReloadResult = Result<PolicyChange, Refusal>;

/// A configuration came into force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyChange {
    /// Its rules.
    pub rules: usize,
    /// Sessions that are tracked on.
    pub kept: usize,
    /// Sessions that no rule matches any more.
    pub released: usize,
    /// Sessions that were past a limit, and are reset.
    pub expired: usize,
    /// Connections that a rule matches now and none did before.
    pub adopted: usize,
}

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What is wrong, where, and what to do.
    pub error: String,
}

/// How the daemon is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Of the daemon.
    pub version: String,
    /// Of the kernel.
    pub kernel: String,
    /// The daemon's process.
    pub pid: u32,
    /// When it was started.
    pub started: String,
    /// Whether everything that should be enforced and recorded is.
    pub ready: bool,
    /// Why it is not.
    pub troubles: Vec<StatusTrouble>,
    /// `enforce` or `observe`.
    pub mode: String,
    /// What the programs are attached to.
    pub cgroup: String,
    /// Whether they are.
    pub attached: bool,
    /// Where the configuration came from.
    pub config: ConfigInForce,
    /// Sessions that are tracked.
    pub sessions: u64,
    /// How many can be.
    pub max_sessions: u64,
    /// Sessions that were established while tracked, or that the daemon has found later.
    pub opened_total: u64,
    /// Sessions that have ended, or that no rule matches any more.
    pub closed_total: u64,
    /// Sessions whose reset hangs.
    pub quarantined: u64,
    /// Records of this run.
    pub audit_records: u64,
    /// Records that could not be written.
    pub audit_records_lost: u64,
    /// In the order of their numbers; those that are no more come with their counters.
    pub rules: Vec<RuleStatus>,
}

/// Something that keeps the daemon from enforcing or recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusTrouble {
    /// Its name in the metrics.
    pub cause: String,
    /// What it is, and what to do.
    pub what: String,
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigInForce {
    /// The file; none where it came from the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The SHA-256 of its text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Since when it is in force.
    pub since: String,
    /// Whether what was read last is what is in force.
    pub last_reload_successful: bool,
}

/// A rule with its counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// Its name.
    pub name: String,
    /// `enforce` or `observe`, or `exempt`.
    pub mode: String,
    /// Whether the configuration in force has it.
    pub in_force: bool,
    /// Sessions that are tracked.
    pub sessions: u64,
    /// Those that ended, by reason and result.
    pub terminations: Vec<TerminationCount>,
}

/// How many sessions ended so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminationCount {
    /// Why.
    pub reason: String,
    /// What became of them.
    pub result: String,
    /// How many.
    pub count: u64,
}

/// An address and a port.
pub(super) const fn end(ip: IpAddr, port: u16) -> End {
    End { ip, port }
}
