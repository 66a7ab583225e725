//! Inspects processes of users without being held up by them.
//!
//! While a process executes another program (`execve(2)`), the kernel holds its `exec_update_lock`. The links below its
//! `/proc` directory, `pidfd_getfd(2)` and `kcmp(2)` wait for that lock. With a file of a FUSE file system of their own,
//! any user can make an `execve` last as long as they like, again and again.
//!
//! So other threads inspect. The more they sleep, the more of them there are, and one that sleeps for long at one item is
//! left behind. It ends with the reaper, since a fatal signal interrupts that wait.

use std::{
    fs, mem,
    panic::resume_unwind,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicI32, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
        mpsc,
    },
    thread::{self, JoinHandle, ThreadId},
    time::{Duration, Instant},
};

use nix::unistd::gettid;

/// After so much sleep in all, a thread is not relied on: two others are started. Waiting for a processor is no sleep.
const DOUBTED_AFTER: Duration = Duration::from_millis(50);

/// After so much sleep at one item, a thread counts as hanging. A process that executes a program may wait for a
/// processor.
const HANGS_AFTER: Duration = Duration::from_secs(1);

/// The interval between checks of the threads.
const CHECKED_EVERY: Duration = Duration::from_millis(10);

/// The maximum number of threads that inspect and are not doubted.
const MAX_RELIABLE: usize = 64;

/// The maximum number of threads. The tasks of the daemon may be limited (`TasksMax=`, `podPidsLimit`).
const MAX_THREADS: usize = 256;

static HAS_LEFT_THREADS: AtomicBool = AtomicBool::new(false);

/// Whether a thread of this process was left behind. The process should then end after its request.
pub(super) fn has_left_threads() -> bool {
    HAS_LEFT_THREADS.load(SeqCst)
}

/// The items that were not inspected.
#[derive(Debug)]
pub struct Missed<I> {
    /// Threads hang at these.
    pub hung: Vec<I>,
    /// There were not enough threads for these, the last ones in the list.
    pub rest: Vec<I>,
}

/// Calls `inspect` for each item, on up to `threads` other threads, and `take` on this thread for each result. Returns the
/// items that were not inspected. While `is_wanted`, it waits until it is certain that a thread hangs.
pub(super) fn inspect_each<I, O>(
    items: Vec<I>,
    threads: usize,
    inspect: impl Fn(&I) -> Option<O> + Send + Sync + 'static,
    mut take: impl FnMut(O),
    is_wanted: impl Fn() -> bool,
) -> Missed<I>
where
    I: Clone + Send + Sync + 'static,
    O: Send + 'static,
{
    let work = Arc::new(Work {
        items,
        next: AtomicUsize::new(0),
        inspect,
    });
    // Threads wait until their results are taken, so that few descriptors are open at a time.
    let (reports, received) = mpsc::sync_channel(1);
    let mut inspectors: Vec<Inspector> = Vec::new();
    let mut hung = Vec::new();
    let start = |inspectors: &mut Vec<Inspector>, count: usize| {
        let reliable = inspectors
            .iter()
            .filter(|inspector| !inspector.is_doubted());
        let room = MAX_RELIABLE.saturating_sub(reliable.count());
        let room = room.min(MAX_THREADS.saturating_sub(inspectors.len()));
        let started = (0..count.min(room)).map_while(|_| Inspector::start(&work, &reports).ok());
        inspectors.extend(started);
    };
    start(&mut inspectors, threads);
    let mut checked = Instant::now();
    while !inspectors.is_empty() {
        match received.recv_timeout(CHECKED_EVERY) {
            Ok(Report::Result(result)) => take(result),
            Ok(Report::End(thread)) => {
                let is_it = |inspector: &mut Inspector| inspector.thread.thread().id() == thread;
                let mut ended = inspectors.extract_if(.., is_it);
                if let Some(Err(panic)) = ended.next().map(|inspector| inspector.thread.join()) {
                    resume_unwind(panic);
                }
            }
            Err(_) => {}
        }
        if checked.elapsed() < CHECKED_EVERY {
            continue;
        }
        checked = Instant::now();
        let doubted = inspectors.iter_mut().filter_map(Inspector::check);
        let count = doubted.count();
        start(&mut inspectors, 2 * count);
        let bound = if is_wanted() {
            HANGS_AFTER
        } else {
            DOUBTED_AFTER
        };
        if inspectors
            .iter()
            .all(|inspector| inspector.slept_here >= bound)
        {
            inspectors.retain_mut(|inspector| match inspector.status.leave() {
                Some(index) => {
                    hung.push(work.items[index].clone());
                    false
                }
                None => true,
            });
        }
    }
    let rest = std::iter::from_fn(|| work.next());
    Missed {
        hung,
        rest: rest.map(|index| work.items[index].clone()).collect(),
    }
}

/// The items that threads share.
struct Work<I, F> {
    items: Vec<I>,
    next: AtomicUsize,
    inspect: F,
}

impl<I, F> Work<I, F> {
    /// The index of the next item.
    fn next(&self) -> Option<usize> {
        let index = self.next.fetch_add(1, Relaxed);
        (index < self.items.len()).then_some(index)
    }
}

/// What a thread reports.
enum Report<O> {
    Result(O),
    /// This thread ends.
    End(ThreadId),
}

/// Reports the end of its thread when it is dropped, also by a panic.
struct AtEnd<O>(mpsc::SyncSender<Report<O>>);

impl<O> Drop for AtEnd<O> {
    fn drop(&mut self) {
        let _ = self.0.send(Report::End(thread::current().id()));
    }
}

/// The status of a thread.
#[derive(Default)]
struct Status {
    tid: AtomicI32,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    /// The index of the item that the thread inspects.
    item: Option<usize>,
    is_left: bool,
}

impl Status {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with the next item, unless the thread was left behind.
    fn begin(&self, next: impl FnOnce() -> Option<usize>) -> Option<usize> {
        let mut now = self.now();
        now.item = if now.is_left { None } else { next() };
        now.item
    }

    /// Ends with the item. Returns false if the thread was left behind at it.
    fn end(&self) -> bool {
        let mut now = self.now();
        now.item = None;
        !now.is_left
    }

    /// Leaves the thread behind at its item and returns that. Returns `None` if the thread has none: it is reporting.
    fn leave(&self) -> Option<usize> {
        let mut now = self.now();
        now.is_left = now.item.is_some();
        HAS_LEFT_THREADS.fetch_or(now.is_left, SeqCst);
        now.item
    }
}

/// A thread that inspects.
struct Inspector {
    status: Arc<Status>,
    thread: JoinHandle<()>,
    /// The last check: its time, the item, and the sleep in which it was found.
    last: (Instant, Option<usize>, Option<u64>),
    /// How long it has slept at its item, and at all items.
    slept_here: Duration,
    slept: Duration,
}

impl Inspector {
    fn start<I, O, F>(
        work: &Arc<Work<I, F>>,
        reports: &mpsc::SyncSender<Report<O>>,
    ) -> std::io::Result<Self>
    where
        I: Send + Sync + 'static,
        O: Send + 'static,
        F: Fn(&I) -> Option<O> + Send + Sync + 'static,
    {
        let (work, reports) = (Arc::clone(work), AtEnd(reports.clone()));
        let status = Arc::new(Status::default());
        let own = Arc::clone(&status);
        let run = move || {
            own.tid.store(gettid().as_raw(), SeqCst);
            while let Some(index) = own.begin(|| work.next()) {
                let result = (work.inspect)(&work.items[index]);
                if !own.end() {
                    return;
                }
                let report = result.map(Report::Result);
                if report.is_some_and(|report| reports.0.send(report).is_err()) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("inspect".to_owned())
            .spawn(run)?;
        Ok(Self {
            status,
            thread,
            last: (Instant::now(), None, None),
            slept_here: Duration::ZERO,
            slept: Duration::ZERO,
        })
    }

    fn is_doubted(&self) -> bool {
        self.slept >= DOUBTED_AFTER
    }

    /// Adds the time since the last check if it has slept since then. Returns a value if it is doubted from now on.
    fn check(&mut self) -> Option<()> {
        let was_doubted = self.is_doubted();
        let item = self.status.now().item;
        // Without an item it waits until its result is taken.
        let sleep = item.and_then(|_| sleep_of(self.status.tid.load(SeqCst)));
        let (at, item_before, sleep_before) =
            mem::replace(&mut self.last, (Instant::now(), item, sleep));
        if item != item_before {
            self.slept_here = Duration::ZERO;
        } else if sleep.is_some() && sleep == sleep_before {
            let time = self.last.0 - at;
            self.slept_here += time;
            self.slept += time;
        }
        (self.is_doubted() && !was_doubted).then_some(())
    }
}

/// If a thread of this process sleeps, the number of the sleep: each one has another number (proc(5),
/// `/proc/pid/status`).
fn sleep_of(tid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let is_runnable = value("State:")?.trim_start().starts_with('R');
    let number = value("voluntary_ctxt_switches:")?.trim().parse().ok()?;
    (!is_runnable).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_item_is_inspected_once_and_each_result_taken() {
        for threads in [1, 3] {
            let mut taken = BTreeSet::new();
            let half = |number: &u32| number.is_multiple_of(2).then_some(*number / 2);
            let take = |half| assert!(taken.insert(half));
            let missed = inspect_each((0..1_000).collect(), threads, half, take, || true);
            assert!(missed.hung.is_empty() && missed.rest.is_empty());
            assert!(taken.into_iter().eq(0..500));
        }
    }

    #[test]
    fn a_panic_of_an_inspecting_thread_is_not_lost() {
        let not_two = |number: &u32| {
            assert_ne!(*number, 2);
            None::<()>
        };
        let panicked =
            std::panic::catch_unwind(|| inspect_each(vec![1, 2, 3], 1, not_two, |()| {}, || true));
        assert!(panicked.is_err());
    }

    #[test]
    fn items_at_which_threads_hang_are_passed_over_and_slow_ones_are_not() {
        const HANG: [u32; 5] = [3, 4, 5, 6, 9];
        let inspect = |number: &u32| {
            match number {
                7 => sleep_for(2 * DOUBTED_AFTER),
                number if HANG.contains(number) => sleep_for(3 * HANGS_AFTER),
                _ => {}
            }
            Some(*number)
        };
        for is_wanted in [true, false] {
            let mut taken = BTreeSet::new();
            let take = |number| assert!(taken.insert(number));
            let hung = inspect_each((0..20).collect(), 1, inspect, take, || is_wanted).hung;
            let mut hung = BTreeSet::from_iter(hung);
            // Nobody waits for a slow one whose result is not wanted.
            assert!(!is_wanted || !hung.contains(&7));
            hung.remove(&7);
            taken.remove(&7);
            assert_eq!(hung, BTreeSet::from(HANG));
            assert!(
                taken
                    .into_iter()
                    .eq((0..20).filter(|number| *number != 7 && !HANG.contains(number)))
            );
            assert!(has_left_threads());
        }
    }

    #[test]
    fn many_short_sleeps_do_not_add_up() {
        let began = Instant::now();
        let inspect = |number: &u32| {
            sleep_for(DOUBTED_AFTER * 4 / 5);
            Some(*number)
        };
        let mut taken = BTreeSet::new();
        let take = |number| assert!(taken.insert(number));
        let missed = inspect_each((0..200).collect(), 1, inspect, take, || false);
        assert!(missed.hung.is_empty() && missed.rest.is_empty());
        assert_eq!(taken.len(), 200);
        // One after the other they take 8 s.
        let time = began.elapsed();
        assert!(time < Duration::from_secs(4), "{time:?}");
    }

    #[test]
    fn items_for_which_there_are_no_threads_are_the_last_ones() {
        let inspect = |number: &usize| {
            sleep_for(3 * HANGS_AFTER);
            Some(*number)
        };
        let take = |number| panic!("{number} is done");
        let missed = inspect_each((0..400).collect(), 1, inspect, take, || true);
        assert_eq!(missed.hung.len(), MAX_THREADS);
        assert!(missed.rest.into_iter().eq(MAX_THREADS..400));
    }

    /// `CLONE_VFORK` suspends the calling thread until the child has ended, as `exec_update_lock` does.
    fn sleep_for(time: Duration) {
        extern "C" fn sleep(time: *mut libc::c_void) -> libc::c_int {
            // SAFETY: reads the value that the caller has passed.
            unsafe { libc::nanosleep(time.cast(), std::ptr::null_mut()) }
        }
        let mut time = libc::timespec {
            tv_sec: time.as_secs() as libc::time_t,
            tv_nsec: time.subsec_nanos().into(),
        };
        let mut stack = vec![0_u128; 4096];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK;
        // SAFETY: the child has a stack of its own, makes one system call and ends, and this thread waits for it.
        unsafe {
            let top = stack.as_mut_ptr_range().end.cast();
            assert!(libc::clone(sleep, top, flags, (&raw mut time).cast()) > 0);
        }
    }
}
