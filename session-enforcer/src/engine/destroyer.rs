//! The exchanges with the kernel that destroy sessions. Where many are due, threads have them while the
//! engine decides about the next and records the last: the kernel's part is more than half of the work.

use std::{
    collections::{HashMap, VecDeque},
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

/// Sessions of one network namespace for which a thread is asked: each exchange there takes two more
/// wake-ups, and the first of a namespace a second socket table. A choice, and not measured.
pub(super) const WORTH_IT: usize = MAX_BATCH / 4;

/// Exchanges that are under way at a time. With the second, sessions that are due at once are gone some 6 %
/// sooner on two processors, which are both busy nearly all the time then.
const AT_A_TIME: usize = 2;

/// A thread that does exchanges, one at a time. It ends with this.
struct Exchanger {
    jobs: SyncSender<Job>,
    done: Receiver<(DiagSocket, Answered)>,
}

impl Exchanger {
    fn start() -> io::Result<Self> {
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
        Ok(Self { jobs, done })
    }
}

/// Threads that do the exchanges. They end with this.
pub(super) struct Destroyer {
    idle: Vec<Exchanger>,
    /// At work, or with an answer that waits to be taken; the one that was asked first comes first.
    busy: VecDeque<Exchanger>,
    /// Socket tables of their own: the engine looks at sockets meanwhile. Those that are in use are with
    /// the threads.
    tables: HashMap<u64, Vec<DiagSocket>>,
}

impl Destroyer {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// Where there can be none.
    pub(super) fn start() -> io::Result<Self> {
        let mut idle = vec![Exchanger::start()?];
        // One alone does it too.
        idle.extend((1..AT_A_TIME).map_while(|_| Exchanger::start().ok()));
        Ok(Self {
            idle,
            busy: VecDeque::new(),
            tables: HashMap::new(),
        })
    }

    /// Where every thread has something to do, waits for the answer to the batch that was given first.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub(super) fn make_room(&mut self) -> Result<Option<Answered>> {
        if self.idle.is_empty() {
            self.wait()
        } else {
            Ok(None)
        }
    }

    /// Gives a batch to a thread that has nothing else to do: there was [room made](Self::make_room). The
    /// batch comes back where there is none, or no further socket table of its namespace.
    pub(super) fn begin(
        &mut self,
        namespaces: &Namespaces,
        netns_cookie: u64,
        batch: Vec<Expired>,
    ) -> Result<(), Vec<Expired>> {
        let table = self.tables.get_mut(&netns_cookie).and_then(Vec::pop);
        let Some(diag) = table.or_else(|| namespaces.another(netns_cookie)) else {
            return Err(batch);
        };
        let Some(exchanger) = self.idle.pop() else {
            return Err(batch);
        };
        let job = Job {
            diag,
            netns_cookie,
            batch,
        };
        // A thread that is no more is met when its answer is waited for.
        let _ = exchanger.jobs.send(job);
        self.busy.push_back(exchanger);
        Ok(())
    }

    /// Waits for the answer to the batch that was given first, if a thread has one.
    ///
    /// # Errors
    ///
    /// Where the thread has ended without it.
    pub(super) fn wait(&mut self) -> Result<Option<Answered>> {
        let Some(exchanger) = self.busy.pop_front() else {
            return Ok(None);
        };
        let (diag, answered) = exchanger
            .done
            .recv()
            .context("a thread that destroys sessions has ended")?;
        self.idle.push(exchanger);
        // After an exchange that broke off, the next one has a socket without a past.
        if answered.result.is_ok() {
            self.tables
                .entry(answered.netns_cookie)
                .or_default()
                .push(diag);
        }
        Ok(Some(answered))
    }
}
