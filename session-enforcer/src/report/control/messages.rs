//! The requests and answers of the control socket, both between the HTTP thread and the engine and as JSON.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use session_enforcer_common::{Ancestors, Session};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::session_row::{End, RuleInForce};
use crate::report::audit::{Outcome, Requester, Subscription};

/// A request of the HTTP thread to the engine.
#[derive(Debug)]
pub enum Request {
    /// Returns the status of the daemon.
    Status(oneshot::Sender<Status>),
    /// Returns the rules in force.
    Rules(oneshot::Sender<Box<dyn Rules>>),
    /// Returns names of cgroups and users.
    Owners {
        /// The cgroup IDs.
        cgroups: Vec<u64>,
        /// The UIDs.
        users: Vec<u32>,
        /// The channel for the answer.
        reply: oneshot::Sender<OwnerNames>,
    },
    /// Resets sessions now.
    Kill(KillRequest),
    /// Reads the configuration again.
    Reload(ReloadRequest),
    /// Subscribes to the audit records. `None` if there are too many subscribers.
    Events(oneshot::Sender<Option<Subscription>>),
}

/// A snapshot of the rules in force.
pub trait Rules: Send + Sync + std::fmt::Debug {
    /// The rule of a session, or `None` if no rule matches it any longer. `ancestors` returns the ancestors
    /// of a cgroup.
    fn rule_of(
        &self,
        session: &Session,
        ancestors: &dyn Fn(u64) -> Option<Ancestors>,
    ) -> Option<RuleInForce<'_>>;

    /// Whether a rule has this name.
    fn has(&self, name: &str) -> bool;

    /// Whether a rule names users or cgroups. Otherwise the owners of most sessions are not known.
    fn name_owners(&self) -> bool;
}

/// The names that the engine knows of owners.
#[derive(Clone, Debug, Default)]
pub struct OwnerNames {
    /// For each cgroup ID, its path and its ancestors, if they are known.
    pub cgroups: Vec<(u64, Option<String>, Option<Ancestors>)>,
    /// For each UID, the user name, if it is known.
    pub users: Vec<(u32, Option<String>)>,
}

/// A request to reset sessions now.
#[derive(Debug)]
pub struct KillRequest {
    /// The cookie and the time of establishment of each session.
    pub sessions: Vec<(u64, u64)>,
    /// The client.
    pub by: Arc<Requester>,
    /// The channel for one result per session.
    pub results: UnboundedSender<Killed>,
}

/// The result of a requested reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// The session's cookie.
    pub id: u64,
    /// The result.
    pub result: KillResult,
}

/// The results that the engine reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KillResult {
    /// The kernel reset the session.
    Reset,
    /// The session had ended before the reset.
    Gone,
    /// The reset failed for this reason. The gate drops the session's packets, and the reset is tried again.
    Failed(String),
}

/// One line of the answer to a kill request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillLine {
    /// The session's ID.
    pub id: u64,
    /// The session's rule, if the session existed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// This host's endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<End>,
    /// The peer's endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<End>,
    /// The result.
    pub result: KillOutcome,
    /// The reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The result of a requested reset, for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KillOutcome {
    /// The kernel reset the session.
    Reset,
    /// The session had ended before the reset.
    Gone,
    /// The reset failed and is tried again.
    Failed,
    /// No session has this ID, or the filters exclude it.
    NotFound,
    /// The reset is not answered yet. The daemon continues with it.
    Pending,
    /// Dry run: the session would be reset.
    WouldReset,
}

impl KillOutcome {
    /// The name in the answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reset => Outcome::Reset.name(),
            Self::Gone => Outcome::Gone.name(),
            Self::Failed => Outcome::Failed.name(),
            Self::NotFound => "not_found",
            Self::Pending => "pending",
            Self::WouldReset => "would_reset",
        }
    }

    /// Whether the result needs no further action.
    pub const fn is_done(self) -> bool {
        matches!(self, Self::Reset | Self::Gone | Self::WouldReset)
    }
}

/// A request to read the configuration again.
#[derive(Debug)]
pub struct ReloadRequest {
    /// The client.
    pub by: Requester,
    /// The channel for the result.
    pub reply: oneshot::Sender<ReloadResult>,
}

/// The result of a reload.
pub type ReloadResult = Result<PolicyChange, Refusal>;

/// The effect of a new configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyChange {
    /// The number of rules.
    pub rules: usize,
    /// The number of sessions that stay tracked.
    pub kept: usize,
    /// The number of sessions that no rule matches any longer.
    pub released: usize,
    /// The number of sessions that exceed a limit of the new policy and are reset.
    pub expired: usize,
    /// The number of connections that only the new rules match.
    pub adopted: usize,
}

/// The reason why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The error, its location and a remedy.
    pub error: String,
}

/// The status of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of the daemon.
    pub version: String,
    /// The release of the kernel.
    pub kernel: String,
    /// The daemon's PID.
    pub pid: u32,
    /// The start time of the daemon.
    pub started: String,
    /// Whether the daemon enforces and records everything that it should.
    pub ready: bool,
    /// The reasons why it is not ready.
    pub degraded: Vec<Degradation>,
    /// `enforce` or `observe`.
    pub mode: String,
    /// The cgroup that the programs are attached to.
    pub cgroup: String,
    /// Whether the programs are attached.
    pub attached: bool,
    /// The configuration in force.
    pub config: ConfigInForce,
    /// The number of tracked sessions.
    pub sessions: u64,
    /// The capacity of the session table.
    pub max_sessions: u64,
    /// Sessions that were established while tracked or adopted later.
    pub opened_total: u64,
    /// Sessions that have ended or that no rule matches any longer.
    pub closed_total: u64,
    /// Sessions whose reset hangs.
    pub quarantined: u64,
    /// Audit records of this run.
    pub audit_records: u64,
    /// Audit records that could not be written.
    pub audit_records_lost: u64,
    /// The rules in the order of their indexes. Rules that are no longer in force are listed with their
    /// counters.
    pub rules: Vec<RuleStatus>,
}

/// A reason why the daemon does not enforce or record everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degradation {
    /// The cause's name in the metrics.
    pub cause: String,
    /// A description with a remedy.
    pub what: String,
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigInForce {
    /// The file. `None` if the configuration came from the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The SHA-256 of the file's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The time when it came into force.
    pub since: String,
    /// Whether the last configuration that was read is in force.
    pub last_reload_successful: bool,
    /// Why it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reload_error: Option<String>,
}

/// A rule with its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// The rule's name.
    pub name: String,
    /// `enforce`, `observe` or `exempt`.
    pub mode: String,
    /// Whether the configuration in force has the rule.
    pub in_force: bool,
    /// The number of tracked sessions.
    pub sessions: u64,
    /// The terminations by reason and result.
    pub terminations: Vec<TerminationCount>,
}

/// The number of terminations with one reason and result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminationCount {
    /// The reason.
    pub reason: String,
    /// The result.
    pub result: String,
    /// The count.
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_a_status() {
        let page = include_str!("../../../docs/control.md");
        let shown = page.split("### A status\n\n```json\n").nth(1).unwrap();
        let shown: serde_json::Value =
            serde_json::from_str(shown.split("```").next().unwrap()).unwrap();
        let status: Status = serde_json::from_value(shown.clone()).unwrap();
        assert_eq!(serde_json::to_value(status).unwrap(), shown);
    }

    #[test]
    fn the_page_has_each_result_of_a_kill() {
        let page = include_str!("../../../docs/control.md");
        for outcome in [
            "reset",
            "gone",
            "failed",
            "not_found",
            "pending",
            "would_reset",
        ] {
            let outcome: KillOutcome = serde_json::from_value(outcome.into()).unwrap();
            assert!(
                page.contains(&format!("`{}`", outcome.name())),
                "{outcome:?}"
            );
        }
    }
}
