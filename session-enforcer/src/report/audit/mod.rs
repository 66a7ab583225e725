//! The audit: one record for each termination and for each session that a rule in observe mode would have
//! terminated. A record is a line of JSON with ECS field names, or one [journal entry](journald).
//!
//! The engine builds the records; a [separate thread](writer) writes them. So a log pipe that nobody reads,
//! or a slow disk, cannot delay the enforcement.

mod journald;
mod record;
mod sink;
mod subscription;
mod writer;

use std::{collections::HashSet, fmt, path::PathBuf, sync::Arc, time::Duration};

use session_enforcer_common::{Reason, Session};
use tokio::sync::Notify;

use crate::{
    config::{AuditTarget, Mode},
    host::{
        boot,
        clock::{WallClock, monotonic_ns},
    },
    reaper::diag::Queued,
};
pub(super) use record::passed_ns;
use subscription::Subscribers;
pub use subscription::Subscription;
use writer::Writer;
pub use writer::{AuditError, check};

/// The maximum batch for the writer. It starts to write while further records are built, and if its queue is
/// full, only one batch is lost at a time.
const MAX_PENDING_BYTES: usize = 256 << 10;

/// The result for an expired session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The kernel reset the session.
    Reset,
    /// The session had ended before the reset.
    Gone,
    /// The kernel refused, or could not be asked.
    Failed,
    /// The rule is in observe mode: no reset was tried.
    Observed,
}

impl Outcome {
    /// The name in metrics and in the audit.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Gone => "gone",
            Self::Failed => "failed",
            Self::Observed => "none",
        }
    }
}

/// The result for an expired session, with its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End<'a> {
    /// The kernel reset the session and reported the bytes in its socket's queues.
    Reset(Option<Queued>),
    /// See [`Outcome::Gone`].
    Gone,
    /// The reset failed for this reason.
    Failed(&'a str),
    /// See [`Outcome::Observed`].
    Observed,
}

impl End<'_> {
    /// The result without its details.
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Reset(_) => Outcome::Reset,
            Self::Gone => Outcome::Gone,
            Self::Failed(_) => Outcome::Failed,
            Self::Observed => Outcome::Observed,
        }
    }
}

/// The reason's name in metrics and in the audit.
pub const fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::IdleTimeout => "idle_timeout",
        Reason::MaxLifetime => "max_lifetime",
        Reason::ResponseTimeout => "response_timeout",
        Reason::HalfClosedTimeout => "half_closed_timeout",
        Reason::Policy => "policy",
        Reason::Untracked => "untracked",
        Reason::Admin => "admin",
    }
}

/// The mode's name in metrics and in the audit.
pub const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "enforce",
        Mode::Observe => "observe",
    }
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// The PID.
    pub pid: u32,
    /// The process name, zero-padded.
    pub name: [u8; 16],
}

/// The client that sent a request over the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The UID.
    pub uid: u32,
    /// The PID, or 0 if the process is not in the daemon's PID namespace.
    pub pid: u32,
    /// The name of the program, as the kernel stores it. Empty if the process has ended.
    pub command: String,
}

/// The client with its user name, for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedBy<'a> {
    /// The client.
    pub requester: &'a Requester,
    /// The user name, if the UID has one.
    pub user: Option<&'a str>,
}

/// The termination of a session, or what would have been its termination in enforce mode.
#[derive(Clone, Copy, Debug)]
pub struct Termination<'a> {
    /// The socket's cookie.
    pub cookie: u64,
    /// The session at the time of the decision.
    pub session: &'a Session,
    /// The name of its rule.
    pub rule: &'a str,
    /// The limit that the session reached.
    pub reason: Reason,
    /// The rule's mode.
    pub mode: Mode,
    /// The result.
    pub end: End<'a>,
    /// The length of the limit. `None` if a change of the policy ended the session.
    pub limit: Option<Duration>,
    /// The deadline, in nanoseconds of `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
    /// The start of the rule's idle time, in nanoseconds of `CLOCK_BOOTTIME`.
    pub idle_since_ns: u64,
    /// The time of the kernel's answer, in nanoseconds of `CLOCK_BOOTTIME`.
    pub answered_ns: u64,
    /// The process that holds the connection, if one was found.
    pub process: Option<Process>,
    /// The path of the owner's cgroup, if it is known.
    pub cgroup: Option<&'a str>,
    /// The name of the owner's user, if the UID has one.
    pub user: Option<&'a str>,
    /// The client that requested the termination, if one did.
    pub requested_by: Option<RequestedBy<'a>>,
}

impl Termination<'_> {
    /// Appends the record as one line of JSON.
    pub fn write_json(&self, record_id: &RecordId<'_>, clock: &WallClock, out: &mut Vec<u8>) {
        record::termination(self, record_id, clock, out);
    }
}

/// Identifies a record: no two records have the same id.
#[derive(Clone, Copy, Debug)]
pub struct RecordId<'a> {
    /// The kernel's boot ID.
    pub boot: &'a str,
    /// The start time of this daemon, in nanoseconds of `CLOCK_BOOTTIME`.
    pub run_ns: u64,
    /// The number of the record in this run of the daemon, counted from 1.
    pub sequence: u64,
}

/// The engine's side of the audit.
#[derive(Debug)]
pub struct Audit {
    writer: Writer,
    pending: Pending,
    /// The path, if the target is a file.
    path: Option<PathBuf>,
    /// Whether the next batch of resets must wait until the records are on the disk.
    is_synced: bool,
    boot: String,
    run_ns: u64,
    sequence: u64,
    subscribers: Subscribers,
}

/// This value is dropped when its record is written or lost.
pub type Receipt = Box<dyn fmt::Debug + Send>;

/// Records that are not handed to the writer yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    records: u64,
    receipts: Vec<Receipt>,
}

impl Audit {
    /// Opens the audit. With `is_synced`, each write must reach the disk.
    ///
    /// # Errors
    ///
    /// Fails if the target cannot be opened for appending.
    pub fn open(target: &AuditTarget, is_synced: bool) -> Result<Self, AuditError> {
        let path = match target {
            AuditTarget::Stdout | AuditTarget::Journald => None,
            AuditTarget::File(path) => Some(path.clone()),
        };
        Ok(Self {
            path,
            ..Self::of(Writer::open(target, is_synced)?, is_synced)
        })
    }

    fn of(writer: Writer, is_synced: bool) -> Self {
        Self {
            writer,
            pending: Pending::default(),
            path: None,
            is_synced,
            boot: boot::id(),
            run_ns: monotonic_ns(),
            sequence: 0,
            subscribers: Subscribers::default(),
        }
    }

    /// Records the end of a session. The receipt is dropped when the record is written or lost.
    pub fn termination(&mut self, termination: &Termination<'_>, receipt: Option<Receipt>) {
        self.pending.receipts.extend(receipt);
        self.add(|record_id, clock, out| termination.write_json(record_id, clock, out));
    }

    /// The ID of the record of a session's end.
    pub fn id_of_end(&self, cookie: u64, established_ns: u64) -> String {
        record::termination_id(&self.boot, cookie, established_ns, 0)
    }

    /// The number of records of this run.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The IDs of the last records in the file, whichever daemon wrote them. They include at least all
    /// records whose resets can still be in the reset journal. Empty if the audit is not a readable file.
    pub fn recorded(&self) -> HashSet<String> {
        let tail = self.path.as_deref().map(writer::tail);
        let lines = tail.and_then(Result::ok).unwrap_or_default();
        // Ignore an incomplete last line.
        let lines = lines.split_inclusive(|byte| *byte == b'\n');
        let whole = lines.filter(|line| line.ends_with(b"\n"));
        whole.filter_map(record::id).collect()
    }

    /// Records that the enforcement has started.
    pub fn started(&mut self) {
        self.add(|record_id, clock, out| {
            record::lifecycle("enforcer-started", "start", record_id, clock, out);
        });
    }

    /// Records that a policy is in force from now on and, if a client requested the reload, which one.
    pub fn policy_loaded(
        &mut self,
        mode: Mode,
        rules: &[String],
        requested_by: Option<RequestedBy<'_>>,
    ) {
        self.add(|record_id, clock, out| {
            record::policy(mode, rules, requested_by, record_id, clock, out);
        });
    }

    /// Records that the enforcement has stopped.
    pub fn stopped(&mut self) {
        self.add(|record_id, clock, out| {
            record::lifecycle("enforcer-stopped", "end", record_id, clock, out);
        });
    }

    /// Whether the records must be on the disk before the next batch of resets is requested.
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Whether all records are written.
    pub fn is_written(&self) -> bool {
        self.pending.records == 0 && self.writer.is_idle()
    }

    /// Notified after each write, if the audit is synced.
    pub fn written(&self) -> Arc<Notify> {
        self.writer.written()
    }

    /// Builds a record with `write` and adds it to the pending ones.
    fn add(&mut self, write: impl FnOnce(&RecordId<'_>, &WallClock, &mut Vec<u8>)) {
        self.sequence += 1;
        let record_id = RecordId {
            boot: &self.boot,
            run_ns: self.run_ns,
            sequence: self.sequence,
        };
        write(&record_id, &WallClock::now(), &mut self.pending.bytes);
        self.pending.records += 1;
        if self.pending.bytes.len() >= MAX_PENDING_BYTES {
            self.flush();
        }
    }

    /// Hands the pending records to the writer.
    pub fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if pending.records > 0 {
            self.subscribers.publish(&pending.bytes);
            self.writer.write(pending);
        }
    }

    /// Subscribes to the records from now on. `None` if there are too many readers.
    pub fn subscribe(&mut self) -> Option<Subscription> {
        // Records that are pending now precede the subscription.
        self.flush();
        self.subscribers.add()
    }

    /// The start time of this run, in nanoseconds of `CLOCK_BOOTTIME`.
    pub fn began_ns(&self) -> u64 {
        self.run_ns
    }

    /// Opens the file again after a log rotation has renamed it.
    pub fn reopen(&mut self) {
        self.flush();
        self.writer.reopen();
    }

    /// Waits until all records are written, 5 s at most.
    pub fn close(&mut self) {
        self.flush();
        self.subscribers.close();
        self.writer.close();
    }

    /// Whether the writer could not write the last records.
    pub fn is_failing(&self) -> bool {
        self.writer.is_failing()
    }

    /// The number of records that could not be written.
    pub fn lost(&self) -> u64 {
        self.writer.lost()
    }
}

#[cfg(test)]
pub(super) mod tests;
