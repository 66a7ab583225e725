//! The exchanges with the kernel that destroy sessions. Where many are due, a thread has them while the
//! engine decides about the next and records the last: the kernel's part is half of the work.

use std::{
    collections::HashMap,
    io,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use anyhow::{Context as _, Result};

use super::terminate::Expired;
use crate::{
    clock::monotonic_ns,
    netns::Namespaces,
    sock_diag::{DiagSocket, MAX_BATCH, SockDiagError, Target},
};

/// What the kernel answered about expired sessions of one network namespace.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) netns_cookie: u64,
    pub(super) batch: Vec<Expired>,
    /// By session: 0, an error number, or no answer.
    pub(super) codes: Vec<Option<i32>>,
    /// Set where the exchange broke off.
    pub(super) result: Result<(), SockDiagError>,
    /// The time after the last answer.
    pub(super) answered_ns: u64,
}

/// Has the kernel destroy sessions, at most [`MAX_BATCH`] of one network namespace.
pub(super) fn destroy(diag: &mut DiagSocket, netns_cookie: u64, batch: Vec<Expired>) -> Answered {
    debug_assert!(batch.len() <= MAX_BATCH, "the rest would have no answer");
    let target = |e: &Expired| Target::of(e.cookie, &e.session);
    let targets: Vec<Target> = batch.iter().map(target).collect();
    let (codes, result) = diag.destroy(&targets);
    Answered {
        netns_cookie,
        batch,
        codes,
        result,
        answered_ns: monotonic_ns(),
    }
}

/// Sessions to destroy, and the socket table for it, which comes back with the answer.
struct Job {
    diag: DiagSocket,
    netns_cookie: u64,
    batch: Vec<Expired>,
}

/// Sessions of one network namespace for which the thread is asked: each exchange there takes two more
/// wake-ups, and the first of a namespace a second socket table. A choice, and not measured.
pub(super) const WORTH_IT: usize = MAX_BATCH / 4;

/// A thread that does the exchanges, one at a time. It ends with this.
pub(super) struct Destroyer {
    jobs: SyncSender<Job>,
    done: Receiver<(DiagSocket, Answered)>,
    /// Whether the thread is at work, or its answer waits to be taken.
    is_busy: bool,
    /// Socket tables of its own: the engine looks at sockets meanwhile. That of the namespace which
    /// the thread is at is with the thread.
    tables: HashMap<u64, DiagSocket>,
}

impl Destroyer {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Where there can be none.
    pub(super) fn start() -> io::Result<Self> {
        // Room for the one that may be under way: nobody waits to hand over.
        let (jobs, queue) = sync_channel::<Job>(1);
        let (answers, done) = sync_channel(1);
        let work = move || {
            for mut job in queue {
                let answered = destroy(&mut job.diag, job.netns_cookie, job.batch);
                if answers.send((job.diag, answered)).is_err() {
                    return;
                }
            }
        };
        let builder = thread::Builder::new().name("destroy".to_owned());
        builder.spawn(work)?;
        Ok(Self {
            jobs,
            done,
            is_busy: false,
            tables: HashMap::new(),
        })
    }

    /// Gives a batch to the thread, which has nothing else to do: its last answer was [waited](Self::wait)
    /// for. The batch comes back where there is no second socket table of its namespace.
    pub(super) fn begin(
        &mut self,
        namespaces: &Namespaces,
        netns_cookie: u64,
        batch: Vec<Expired>,
    ) -> Result<(), Vec<Expired>> {
        let table = self.tables.remove(&netns_cookie);
        let Some(diag) = table.or_else(|| namespaces.another(netns_cookie)) else {
            return Err(batch);
        };
        let job = Job {
            diag,
            netns_cookie,
            batch,
        };
        // A thread that is no more is met when its answer is waited for.
        let _ = self.jobs.send(job);
        self.is_busy = true;
        Ok(())
    }

    /// Waits for the answer to the batch that the thread has, if it has one.
    ///
    /// # Errors
    ///
    /// Where the thread has ended without it.
    pub(super) fn wait(&mut self) -> Result<Option<Answered>> {
        if !std::mem::take(&mut self.is_busy) {
            return Ok(None);
        }
        let (diag, answered) = self
            .done
            .recv()
            .context("the thread that destroys sessions has ended")?;
        // After an exchange that broke off, the next one has a socket without a past.
        if answered.result.is_ok() {
            self.tables.insert(answered.netns_cookie, diag);
        }
        Ok(Some(answered))
    }
}
