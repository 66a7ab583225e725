//! Sessions that the daemon is about to reset, kept in the kernel: what was reset when it is killed, and not
//! recorded, is recorded by the next daemon.

use crate::Session;

/// Entries that there are: as many sessions may be reset and not recorded yet. The records of more are lost
/// where the daemon is killed just then.
pub const MAX_JOURNAL: u32 = 4_096;

/// Bytes of the name of a rule, at most.
pub const MAX_RULE_NAME: usize = 64;

/// A session that the daemon resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct JournalEntry {
    /// The session as it was when it was decided about.
    pub session: Session,
    /// The socket's cookie.
    pub cookie: u64,
    /// When it had to end.
    pub deadline_ns: u64,
    /// When it reached its limit.
    pub reached_ns: u64,
    /// The limit; 0 where a change of the policy ended it.
    pub limit_ns: u64,
    /// Since when the idle clock of its rule ran.
    pub idle_since_ns: u64,
    /// When the kernel had answered; 0 where the daemon has not taken in an answer.
    pub answered_ns: u64,
    /// 1 where the entry is in use, else 0. Written last.
    pub is_used: u32,
    /// [`Reason`](crate::Reason) as a number.
    pub reason: u16,
    /// Whether the answer was that the session had gone by itself: 1, else 0.
    pub was_gone: u16,
    /// Name of its rule, filled with zeroes.
    pub rule: [u8; MAX_RULE_NAME],
}

const _: () = assert!(
    size_of::<JournalEntry>() == size_of::<Session>() + 120 && align_of::<JournalEntry>() == 8
);

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for JournalEntry {}
