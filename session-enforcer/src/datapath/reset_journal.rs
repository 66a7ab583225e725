//! The journal of resets in progress ([`JournalEntry`]). It lies in a map, so the kernel keeps it if the daemon is
//! killed.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use nix::sys::mman::ProtFlags;
use session_enforcer_common::{JournalEntry, MAX_JOURNAL};

use super::session_table::Mapping;

/// Name of the map in the object and of its pin.
pub(super) const JOURNAL: &str = "JOURNAL";

/// The journal. One thread adds entries; any thread may free a slot.
#[derive(Debug)]
pub struct Journal {
    entries: Mapping<JournalEntry>,
    /// Where the search for a free slot starts.
    next: AtomicU32,
    is_closed: AtomicBool,
}

// SAFETY: an entry is written by the thread that has just taken its slot, before other threads know the slot. Other
// threads only access `is_used`, atomically.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    pub(super) fn new(map: BorrowedFd<'_>) -> io::Result<Arc<Self>> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Arc::new(Self {
            entries: Mapping::new(map, MAX_JOURNAL as usize, access)?,
            next: AtomicU32::new(0),
            is_closed: AtomicBool::new(false),
        }))
    }

    /// The entries of an earlier daemon. Each entry stays in use until its slot is dropped.
    pub fn left(self: &Arc<Self>) -> Vec<(Arc<JournalSlot>, JournalEntry)> {
        let used =
            (0..MAX_JOURNAL).filter(|number| self.is_used(*number).load(Ordering::Acquire) != 0);
        used.map(|number| {
            // SAFETY: within the mapping; nothing else writes.
            let entry = unsafe { self.entries.at(number as usize).read() };
            (self.slot(number), entry)
        })
        .collect()
    }

    /// Adds a session that is about to be reset. Returns `None` if the journal is full.
    pub fn put(self: &Arc<Self>, entry: &JournalEntry) -> Option<Arc<JournalSlot>> {
        let first = self.next.load(Ordering::Relaxed);
        let mut numbers = (0..MAX_JOURNAL).map(|offset| (first + offset) % MAX_JOURNAL);
        let number = numbers.find(|number| self.is_used(*number).load(Ordering::Acquire) == 0)?;
        self.next.store(number + 1, Ordering::Relaxed);
        let unused = JournalEntry {
            is_used: 0,
            ..*entry
        };
        // SAFETY: within the mapping, at a free slot.
        unsafe { self.entries.at(number as usize).write(unused) };
        self.is_used(number).store(1, Ordering::Release);
        Some(self.slot(number))
    }

    /// Keeps the remaining entries for the next daemon: dropped slots no longer free them.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    fn slot(self: &Arc<Self>, number: u32) -> Arc<JournalSlot> {
        Arc::new(JournalSlot {
            journal: Arc::clone(self),
            number,
        })
    }

    fn is_used(&self, number: u32) -> &AtomicU32 {
        let entry = self.entries.at(number as usize);
        // SAFETY: a word of the mapping, which lives as long as `self`; all accesses are atomic.
        unsafe { AtomicU32::from_ptr(&raw mut (*entry).is_used) }
    }
}

/// The slot of an entry. Dropping it frees the entry.
#[derive(Debug)]
pub struct JournalSlot {
    journal: Arc<Journal>,
    number: u32,
}

impl JournalSlot {
    /// Records the kernel's answer: the session was reset, or it was already gone.
    pub fn answer(&self, was_gone: bool, answered_ns: u64) {
        let entry = self.journal.entries.at(self.number as usize);
        // SAFETY: within the mapping; this value owns the slot.
        unsafe {
            (&raw mut (*entry).was_gone).write_volatile(u16::from(was_gone));
            (&raw mut (*entry).answered_ns).write_volatile(answered_ns);
        }
    }
}

#[cfg(test)]
impl JournalSlot {
    /// A slot of a journal in a file instead of a map.
    pub(crate) fn in_file() -> Arc<Self> {
        use std::os::fd::AsFd as _;

        let file = tempfile::tempfile().unwrap();
        let bytes = size_of::<JournalEntry>() * MAX_JOURNAL as usize;
        file.set_len(bytes as u64).unwrap();
        Journal::new(file.as_fd()).unwrap().slot(0)
    }
}

impl Drop for JournalSlot {
    fn drop(&mut self) {
        if !self.journal.is_closed.load(Ordering::Relaxed) && !std::thread::panicking() {
            self.journal
                .is_used(self.number)
                .store(0, Ordering::Release);
        }
    }
}
