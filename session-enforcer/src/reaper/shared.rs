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

use super::{
    diag::{Destroyed, Queued},
    protocol::MAX_SOCKETS,
};

/// Set in the claims where the engine has taken back the rest.
const STOPPED: u32 = 1 << 31;

/// An answer that has not come: no error number of the kernel.
const UNANSWERED: i32 = -1;

/// Of a queue, that the kernel did not tell it.
const UNKNOWN: u32 = u32::MAX;

#[repr(C)]
struct Page {
    claims: AtomicU32,
    answers: [Slot; MAX_SOCKETS],
}

/// A [`Destroyed`]. Its code is written last and read first.
#[repr(C)]
struct Slot {
    code: AtomicI32,
    send: AtomicU32,
    receive: AtomicU32,
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
            answer.code.store(UNANSWERED, Ordering::Relaxed);
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

    /// Reaper: notes the kernel's answer about a socket.
    pub fn answer(&self, index: usize, destroyed: Destroyed) {
        let queued = destroyed.queued.map(|queued| (queued.send, queued.receive));
        let (send, receive) = queued.unwrap_or((UNKNOWN, UNKNOWN));
        if let Some(answer) = self.page().answers.get(index) {
            answer.send.store(send, Ordering::Relaxed);
            answer.receive.store(receive, Ordering::Relaxed);
            answer.code.store(destroyed.code, Ordering::Release);
        }
    }

    /// Engine: the kernel's answer about a socket, where it has come.
    pub fn answered(&self, index: usize) -> Option<Destroyed> {
        let answer = self.page().answers.get(index)?;
        let code = answer.code.load(Ordering::Acquire);
        let queued = Queued {
            send: answer.send.load(Ordering::Relaxed),
            receive: answer.receive.load(Ordering::Relaxed),
        };
        (code >= 0).then_some(Destroyed {
            code,
            queued: (queued.send != UNKNOWN).then_some(queued),
        })
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
        let refused = Destroyed {
            code: 2,
            queued: None,
        };
        reaper.answer(0, refused);
        assert_eq!(engine.claimed(), 2);
        assert_eq!(
            (engine.answered(0), engine.answered(1)),
            (Some(refused), None)
        );
        assert_eq!(engine.stop(), 2);
        assert!(!reaper.claim(2));
        assert_eq!((engine.claimed(), engine.stop()), (2, 2));
        let (send, receive) = (7, 9);
        let reset = Destroyed {
            code: 0,
            queued: Some(Queued { send, receive }),
        };
        reaper.answer(1, reset);
        assert_eq!(engine.answered(1), Some(reset));
        engine.begin();
        assert_eq!((engine.claimed(), engine.answered(0)), (0, None));
        assert!(!reaper.claim(1) && reaper.claim(0));
        assert_eq!(engine.answered(MAX_SOCKETS), None);
        reaper.answer(MAX_SOCKETS, reset);
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
