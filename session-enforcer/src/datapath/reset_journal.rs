//! The journal of resets ([`JournalEntry`]), in memory that the kernel keeps where the daemon is killed.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use aya::maps::MapData;
use nix::sys::mman::ProtFlags;
use session_enforcer_common::{JournalEntry, MAX_JOURNAL};

use super::session_table::Mapping;

/// The map, as it is named in the object and as a pin.
pub(super) const JOURNAL: &str = "JOURNAL";

/// The entries. One thread puts them in; any may free its slot.
#[derive(Debug)]
pub struct Journal {
    entries: Mapping<JournalEntry>,
    /// Where a free slot is looked for first.
    next: AtomicU32,
    is_closed: AtomicBool,
}

// SAFETY: an entry is written by the thread that has just taken its place, before anybody else knows the slot;
// of others only `is_used` is touched, atomically.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    pub(super) fn new(map: &MapData) -> io::Result<Arc<Self>> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Arc::new(Self {
            entries: Mapping::new(map.fd().as_fd(), MAX_JOURNAL as usize, access)?,
            next: AtomicU32::new(0),
            is_closed: AtomicBool::new(false),
        }))
    }

    /// What an earlier daemon left. Each entry stays until its slot is dropped.
    pub fn left(self: &Arc<Self>) -> Vec<(Arc<JournalSlot>, JournalEntry)> {
        let used =
            (0..MAX_JOURNAL).filter(|number| self.is_used(*number).load(Ordering::Acquire) != 0);
        used.map(|number| {
            // SAFETY: within the mapping; nobody else writes.
            let entry = unsafe { self.entries.at(number as usize).read() };
            (self.slot(number), entry)
        })
        .collect()
    }

    /// Notes a session that is to be reset. None where there is no room.
    pub fn put(self: &Arc<Self>, entry: &JournalEntry) -> Option<Arc<JournalSlot>> {
        let first = self.next.load(Ordering::Relaxed);
        let mut numbers = (0..MAX_JOURNAL).map(|offset| (first + offset) % MAX_JOURNAL);
        let number = numbers.find(|number| self.is_used(*number).load(Ordering::Acquire) == 0)?;
        self.next.store(number + 1, Ordering::Relaxed);
        let unused = JournalEntry {
            is_used: 0,
            ..*entry
        };
        // SAFETY: within the mapping, at a slot that is free.
        unsafe { self.entries.at(number as usize).write(unused) };
        self.is_used(number).store(1, Ordering::Release);
        Some(self.slot(number))
    }

    /// Leaves what is in it to the next daemon.
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
        // SAFETY: a word of the mapping, which lives as long as this; all touch it atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*entry).is_used) }
    }
}

/// The slot of an entry. It is free when this is dropped.
#[derive(Debug)]
pub struct JournalSlot {
    journal: Arc<Journal>,
    number: u32,
}

impl JournalSlot {
    /// Notes what the kernel has answered: that the session was reset, or that it had gone by itself.
    pub fn answer(&self, was_gone: bool, answered_ns: u64) {
        let entry = self.journal.entries.at(self.number as usize);
        // SAFETY: within the mapping; the slot is this one's.
        unsafe {
            (&raw mut (*entry).was_gone).write_volatile(u16::from(was_gone));
            (&raw mut (*entry).answered_ns).write_volatile(answered_ns);
        }
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
