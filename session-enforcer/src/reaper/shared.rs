//! The memory page that the engine shares with one reaper. It shows the progress of a request even while the
//! reaper hangs in the kernel and cannot send.
//!
//! A reaper *claims* the sockets of a request one by one before it touches them. The engine can take back the
//! unclaimed ones at any time. Claim and stop are one atomic word, so each socket belongs either to the
//! reaper or to the engine.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    mman::{MapFlags, ProtFlags, mmap, munmap},
};

use super::{
    diag::{Destroyed, Queued, SocketOwner},
    protocol::MAX_SOCKETS,
};

/// This bit of `claims` is set when the engine has taken back the rest.
const STOPPED: u32 = 1 << 31;

/// The code of a slot without an answer. The kernel's codes are not negative.
const UNANSWERED: i32 = -1;

/// Marks queue lengths that the kernel did not report.
const UNKNOWN: u32 = u32::MAX;

#[repr(C)]
struct Page {
    claims: AtomicU32,
    answers: [Slot; MAX_SOCKETS],
}

/// A [`Destroyed`]. The reaper writes `code` last, and the engine reads it first.
#[repr(C)]
struct Slot {
    code: AtomicI32,
    send: AtomicU32,
    receive: AtomicU32,
    uid: AtomicU32,
    cgroup_id: AtomicU64,
    took_ns: AtomicU64,
}

const BYTES: NonZeroUsize = NonZeroUsize::new(size_of::<Page>()).unwrap();

/// The mapped page, in the engine or in the reaper.
#[derive(Debug)]
pub struct SharedPage {
    at: NonNull<Page>,
}

// SAFETY: the page consists of atomics and stays mapped as long as this value lives.
unsafe impl Send for SharedPage {}

impl SharedPage {
    /// Creates the page, and the file that the other process maps.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory or no free descriptor.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let file = memfd_create(c"session-enforcer-reaper", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, BYTES.get() as i64)?;
        Ok((Self::map(&file)?, file))
    }

    /// Maps the page of a file that the other process has created.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be mapped.
    pub fn map(file: &impl AsFd) -> io::Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: this is a new mapping at an address that the kernel chooses, and the file is as long as the
        // page.
        let at = unsafe { mmap(None, BYTES, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at: at.cast() })
    }

    fn page(&self) -> &Page {
        // SAFETY: the page stays mapped as long as this value lives, is page-aligned, and all-zero bytes are
        // a valid `Page`.
        unsafe { self.at.as_ref() }
    }

    /// Engine: resets the page for the next request. The reaper must be idle.
    pub fn begin(&self) {
        for answer in &self.page().answers {
            answer.code.store(UNANSWERED, Ordering::Relaxed);
        }
        self.page().claims.store(0, Ordering::Release);
    }

    /// Reaper: claims the socket with this index, which must be the next one. Returns false if the engine has
    /// taken back the rest.
    pub fn claim(&self, index: usize) -> bool {
        let (now, next) = (index as u32, index as u32 + 1);
        let claimed =
            self.page()
                .claims
                .compare_exchange(now, next, Ordering::AcqRel, Ordering::Acquire);
        claimed.is_ok()
    }

    /// Engine: returns the number of claimed sockets.
    pub fn claimed(&self) -> usize {
        (self.page().claims.load(Ordering::Acquire) & !STOPPED) as usize
    }

    /// Engine: takes back the unclaimed sockets. Returns the number of claimed ones.
    pub fn stop(&self) -> usize {
        (self.page().claims.fetch_or(STOPPED, Ordering::AcqRel) & !STOPPED) as usize
    }

    /// Reaper: stores the kernel's answer for a socket.
    pub fn answer(&self, index: usize, destroyed: Destroyed) {
        let queued = destroyed.queued.map(|queued| (queued.send, queued.receive));
        let (send, receive) = queued.unwrap_or((UNKNOWN, UNKNOWN));
        if let Some(answer) = self.page().answers.get(index) {
            answer.send.store(send, Ordering::Relaxed);
            answer.receive.store(receive, Ordering::Relaxed);
            let SocketOwner { cgroup_id, uid } = destroyed.owner;
            answer.uid.store(uid, Ordering::Relaxed);
            answer.cgroup_id.store(cgroup_id, Ordering::Relaxed);
            answer.took_ns.store(destroyed.took_ns, Ordering::Relaxed);
            answer.code.store(destroyed.code, Ordering::Release);
        }
    }

    /// Engine: returns the kernel's answer for a socket, if it has arrived.
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
            owner: SocketOwner {
                cgroup_id: answer.cgroup_id.load(Ordering::Relaxed),
                uid: answer.uid.load(Ordering::Relaxed),
            },
            took_ns: answer.took_ns.load(Ordering::Relaxed),
        })
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: this unmaps the mapping that `map` made, with its length. `munmap` of an existing mapping
        // cannot fail.
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
            ..Destroyed::default()
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
            owner: SocketOwner {
                cgroup_id: 1 << 40,
                uid: 5,
            },
            took_ns: 1 << 41,
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
    fn either_claim_or_stop_wins_a_race() {
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
