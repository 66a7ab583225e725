//! The page that an engine shares with one reaper: how far a request has come, also while the reaper
//! hangs in the kernel and can say nothing.
//!
//! A reaper *claims* the sockets of a request one by one before it touches them. The engine can take
//! back at any time what is not claimed yet: claim and stop are one atomic word, so each socket
//! is either the reaper's or the engine's.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicI32, AtomicU32, Ordering},
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    mman::{MapFlags, ProtFlags, mmap, munmap},
};

use super::protocol::MAX_SOCKETS;

/// Set in the claims where the engine has taken back the rest.
const STOPPED: u32 = 1 << 31;

/// An answer that has not come: no error number of the kernel.
const UNANSWERED: i32 = -1;

#[repr(C)]
struct Page {
    claims: AtomicU32,
    answers: [AtomicI32; MAX_SOCKETS],
}

const BYTES: NonZeroUsize = NonZeroUsize::new(size_of::<Page>()).unwrap();

/// The page, in the engine or in the reaper.
#[derive(Debug)]
pub struct SharedPage {
    at: NonNull<Page>,
}

// SAFETY: the page holds atomic numbers only, and stays mapped as long as this value.
unsafe impl Send for SharedPage {}

impl SharedPage {
    /// A new page and the file for the other process.
    ///
    /// # Errors
    ///
    /// Where there is no memory or no descriptor left.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let file = memfd_create(c"session-enforcer-reaper", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, BYTES.get() as i64)?;
        Ok((Self::map(&file)?, file))
    }

    /// The page of a file that the other process has made.
    ///
    /// # Errors
    ///
    /// Where it cannot be mapped.
    pub fn map(file: &impl AsFd) -> io::Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at no given place, of a file that is as long as the page.
        let at = unsafe { mmap(None, BYTES, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at: at.cast() })
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as this value, aligned as a page, and zeroes are a value.
        unsafe { self.at.as_ref() }
    }

    /// Engine: prepares the page for the next request. The reaper is idle.
    pub fn begin(&self) {
        for answer in &self.page().answers {
            answer.store(UNANSWERED, Ordering::Relaxed);
        }
        self.page().claims.store(0, Ordering::Release);
    }

    /// Reaper: claims the next socket, whose index this is; false where the engine has taken back the
    /// rest.
    pub fn claim(&self, index: usize) -> bool {
        let (now, next) = (index as u32, index as u32 + 1);
        let claimed =
            self.page()
                .claims
                .compare_exchange(now, next, Ordering::AcqRel, Ordering::Acquire);
        claimed.is_ok()
    }

    /// Engine: how many sockets are claimed.
    pub fn claimed(&self) -> usize {
        (self.page().claims.load(Ordering::Acquire) & !STOPPED) as usize
    }

    /// Engine: takes back what is not claimed; how many are.
    pub fn stop(&self) -> usize {
        (self.page().claims.fetch_or(STOPPED, Ordering::AcqRel) & !STOPPED) as usize
    }

    /// Reaper: notes the kernel's answer about a socket, 0 or an error number.
    pub fn answer(&self, index: usize, code: i32) {
        if let Some(answer) = self.page().answers.get(index) {
            answer.store(code, Ordering::Release);
        }
    }

    /// Engine: the kernel's answer about a socket, where it has come.
    pub fn answered(&self, index: usize) -> Option<i32> {
        let code = self.page().answers.get(index)?.load(Ordering::Acquire);
        (code >= 0).then_some(code)
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, of that length. It cannot fail for one that is there.
        let _ = unsafe { munmap(self.at.cast(), BYTES.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_the_reaper_s_or_the_engine_s() {
        let (engine, file) = SharedPage::create().unwrap();
        let reaper = SharedPage::map(&file).unwrap();
        engine.begin();
        assert!(reaper.claim(0) && reaper.claim(1));
        reaper.answer(0, 2);
        assert_eq!(engine.claimed(), 2);
        assert_eq!((engine.answered(0), engine.answered(1)), (Some(2), None));
        assert_eq!(engine.stop(), 2);
        assert!(!reaper.claim(2));
        assert_eq!((engine.claimed(), engine.stop()), (2, 2));
        reaper.answer(1, 0);
        assert_eq!(engine.answered(1), Some(0));
        engine.begin();
        assert_eq!((engine.claimed(), engine.answered(0)), (0, None));
        assert!(!reaper.claim(1) && reaper.claim(0));
        assert_eq!(engine.answered(MAX_SOCKETS), None);
        reaper.answer(MAX_SOCKETS, 0);
    }

    #[test]
    fn of_a_race_between_claim_and_stop_one_wins() {
        for _ in 0..1_000 {
            let (engine, file) = SharedPage::create().unwrap();
            let reaper = SharedPage::map(&file).unwrap();
            engine.begin();
            let claiming =
                std::thread::spawn(move || (0..4).take_while(|i| reaper.claim(*i)).count());
            let stopped_at = engine.stop();
            assert_eq!(claiming.join().unwrap(), stopped_at);
        }
    }
}
