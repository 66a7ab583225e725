//! Journal of the resets in progress, kept in a BPF map. If the daemon is killed before it has recorded a reset, the
//! next daemon records it.

use crate::Session;

/// Number of journal entries. If more resets are in progress at once, a kill of the daemon loses the records of those
/// without an entry.
pub const MAX_JOURNAL: u32 = 4_096;

/// Maximum length of a rule name, in bytes.
pub const MAX_RULE_NAME: usize = 64;

/// A session that the daemon is resetting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct JournalEntry {
    /// The session as it was at the decision.
    pub session: Session,
    /// The socket cookie.
    pub cookie: u64,
    /// The deadline of the session.
    pub deadline_ns: u64,
    /// When the session reached its limit.
    pub reached_ns: u64,
    /// The limit; 0 if a policy change ended the session.
    pub limit_ns: u64,
    /// When the idle clock of the rule started.
    pub idle_since_ns: u64,
    /// When the kernel answered; 0 if the daemon has not received an answer.
    pub answered_ns: u64,
    /// 1 if the entry is in use, else 0. Written last.
    pub is_used: u32,
    /// A [`Reason`](crate::Reason) as a number.
    pub reason: u16,
    /// 1 if the kernel answered that the socket no longer existed, else 0.
    pub was_gone: u16,
    /// Name of the rule, padded with zeros.
    pub rule: [u8; MAX_RULE_NAME],
}

const _: () = assert!(
    size_of::<JournalEntry>() == size_of::<Session>() + 120 && align_of::<JournalEntry>() == 8
);

// SAFETY: integers only, no padding (the size is asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for JournalEntry {}
