//! The audit: one JSON object a line with ECS field names, or one [entry of the journal](journald), for every
//! termination and for every one that a rule only observes.
//!
//! Records are made here and written by a [thread](writer) of their own: a log pipe that nobody
//! reads or a slow disk must not hold up the enforcement.

mod journald;
mod record;
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

/// How much is handed to the writer at once: it begins to write while the rest is made, and what does
/// not fit into its queue is lost a little at a time.
const MAX_PENDING_BYTES: usize = 256 << 10;

/// What became of an expired session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The kernel reset it.
    Reset,
    /// It had ended by itself when the kernel looked for it.
    Gone,
    /// The kernel refused, or could not be asked.
    Failed,
    /// The rule only observes: nothing was done.
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

/// The same, with what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End<'a> {
    /// The kernel reset it, and told what waited in its socket.
    Reset(Option<Queued>),
    /// See [`Outcome::Gone`].
    Gone,
    /// This went wrong.
    Failed(&'a str),
    /// See [`Outcome::Observed`].
    Observed,
}

impl End<'_> {
    /// What became of the session.
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
    /// Its number.
    pub pid: u32,
    /// Its name, filled with zeroes.
    pub name: [u8; 16],
}

/// Who asked for something over the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The user.
    pub uid: u32,
    /// The process; 0 where this one's namespace does not have it.
    pub pid: u32,
    /// The name of its program, as the kernel has it; empty where the process has gone.
    pub command: String,
}

/// The same with the user's name, for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedBy<'a> {
    /// Who.
    pub requester: &'a Requester,
    /// The user's name, where it has one.
    pub user: Option<&'a str>,
}

/// The end of a session, or what would have been its end.
#[derive(Clone, Copy, Debug)]
pub struct Termination<'a> {
    /// The socket's cookie.
    pub cookie: u64,
    /// The session as it was when it was decided about.
    pub session: &'a Session,
    /// Name of its rule.
    pub rule: &'a str,
    /// Which limit it reached.
    pub reason: Reason,
    /// Whether the rule enforces or observes.
    pub mode: Mode,
    /// What became of it.
    pub end: End<'a>,
    /// The limit; none where a change of the policy ended it.
    pub limit: Option<Duration>,
    /// When it reached it, in nanoseconds of `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
    /// Since when the idle clock of its rule runs, in nanoseconds of `CLOCK_BOOTTIME`.
    pub idle_since_ns: u64,
    /// When the kernel had answered, in nanoseconds of `CLOCK_BOOTTIME`.
    pub answered_ns: u64,
    /// The process that holds the connection, where one was found.
    pub process: Option<Process>,
    /// Path of the owner's cgroup, where it is known.
    pub cgroup: Option<&'a str>,
    /// Name of the owner's user, where it has one.
    pub user: Option<&'a str>,
    /// Who asked for it, where somebody did.
    pub requested_by: Option<RequestedBy<'a>>,
}

impl Termination<'_> {
    /// Appends the record, one line of JSON.
    pub fn write_json(&self, place: &Place<'_>, clock: &WallClock, out: &mut Vec<u8>) {
        record::termination(self, place, clock, out);
    }
}

/// Where a record stands: with it no two records are the same.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The kernel's name of this boot.
    pub boot: &'a str,
    /// When this daemon was started, in nanoseconds of `CLOCK_BOOTTIME`.
    pub run_ns: u64,
    /// The number of the record in this run of the daemon, from 1 on.
    pub sequence: u64,
}

/// The audit's writer.
#[derive(Debug)]
pub struct Audit {
    writer: Writer,
    pending: Pending,
    /// The file, where it is one.
    path: Option<PathBuf>,
    /// Whether records are to be on the disk before more is done.
    is_synced: bool,
    boot: String,
    run_ns: u64,
    sequence: u64,
    subscribers: Subscribers,
}

/// What is dropped when a record is written.
pub type Receipt = Box<dyn fmt::Debug + Send>;

/// Records that the writer does not have yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    records: u64,
    receipts: Vec<Receipt>,
}

impl Audit {
    /// Opens the audit. `is_synced` asks for each record on the disk.
    ///
    /// # Errors
    ///
    /// Where the file cannot be opened for appending.
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

    /// Records the end of a session. The receipt is dropped when the record is written, or lost.
    pub fn termination(&mut self, termination: &Termination<'_>, receipt: Option<Receipt>) {
        self.pending.receipts.extend(receipt);
        self.add(|place, clock, out| termination.write_json(place, clock, out));
    }

    /// The name of the record of a session's end.
    pub fn id_of_end(&self, cookie: u64, established_ns: u64) -> String {
        record::termination_id(&self.boot, cookie, established_ns, 0)
    }

    /// How many records there are of this run.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The names of the last records in the file, of whichever daemon: of as many at least as can have been
    /// written and be in the journal of resets still. None where the audit is no file that can be read.
    pub fn recorded(&self) -> HashSet<String> {
        let tail = self.path.as_deref().map(writer::tail);
        let lines = tail.and_then(Result::ok).unwrap_or_default();
        // A record that was cut is none.
        let lines = lines.split_inclusive(|byte| *byte == b'\n');
        let whole = lines.filter(|line| line.ends_with(b"\n"));
        whole.filter_map(record::id).collect()
    }

    /// Records that the enforcement begins.
    pub fn started(&mut self) {
        self.add(|place, clock, out| {
            record::lifecycle("enforcer-started", "start", place, clock, out);
        });
    }

    /// Records that a policy is in force from now on, and who asked for it where somebody did.
    pub fn policy_loaded(
        &mut self,
        mode: Mode,
        rules: &[String],
        requested_by: Option<RequestedBy<'_>>,
    ) {
        self.add(|place, clock, out| record::policy(mode, rules, requested_by, place, clock, out));
    }

    /// Records that the enforcement ends.
    pub fn stopped(&mut self) {
        self.add(|place, clock, out| {
            record::lifecycle("enforcer-stopped", "end", place, clock, out);
        });
    }

    /// Whether records are to be on the disk before the next batch of resets is asked for.
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Whether everything that was recorded is written.
    pub fn is_written(&self) -> bool {
        self.pending.records == 0 && self.writer.is_idle()
    }

    /// Told each time that records were written, where they are synced.
    pub fn written(&self) -> Arc<Notify> {
        self.writer.written()
    }

    /// Adds the line that `write` appends.
    fn add(&mut self, write: impl FnOnce(&Place<'_>, &WallClock, &mut Vec<u8>)) {
        self.sequence += 1;
        let place = Place {
            boot: &self.boot,
            run_ns: self.run_ns,
            sequence: self.sequence,
        };
        write(&place, &WallClock::now(), &mut self.pending.bytes);
        self.pending.records += 1;
        if self.pending.bytes.len() >= MAX_PENDING_BYTES {
            self.flush();
        }
    }

    /// Hands what was recorded to the writer.
    pub fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if pending.records > 0 {
            self.subscribers.publish(&pending.bytes);
            self.writer.write(pending);
        }
    }

    /// The records from now on; none where there are too many readers.
    pub fn subscribe(&mut self) -> Option<Subscription> {
        // What was made before is before.
        self.flush();
        self.subscribers.add()
    }

    /// When this run of the daemon began, in nanoseconds of `CLOCK_BOOTTIME`.
    pub fn began_ns(&self) -> u64 {
        self.run_ns
    }

    /// Opens the file again, after it was renamed.
    pub fn reopen(&mut self) {
        self.flush();
        self.writer.reopen();
    }

    /// Waits until everything is written, a few seconds at most.
    pub fn close(&mut self) {
        self.flush();
        self.subscribers.close();
        self.writer.close();
    }

    /// Whether the last records were lost.
    pub fn is_failing(&self) -> bool {
        self.writer.is_failing()
    }

    /// Records that could not be written.
    pub fn lost(&self) -> u64 {
        self.writer.lost()
    }
}

#[cfg(test)]
pub(super) mod tests;
