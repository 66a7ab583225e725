//! Inspects processes of users without being held up by them.
//!
//! While a process executes another program (`execve(2)`), the kernel holds its `exec_update_lock`. The links below its
//! `/proc` directory, `pidfd_getfd(2)` and `kcmp(2)` wait for that lock. With a file of a FUSE file system of their own,
//! any user can make an `execve` last as long as they like.
//!
//! So other threads inspect. If one sleeps for long, others inspect the rest, and in the end it is left behind. It ends
//! with the reaper, since a fatal signal interrupts that wait.

use std::{
    fs,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle, ThreadId},
    time::{Duration, Instant},
};

use nix::unistd::gettid;

/// After this time in one sleep a thread is not relied on: others inspect the rest.
const DOUBTED_AFTER: Duration = Duration::from_millis(50);

/// A thread counts as hanging after this time in one sleep. A process that waits for a processor while it executes a
/// program lets a thread sleep for some 0.1 s on a busy host.
const HANGS_AFTER: Duration = Duration::from_secs(1);

/// The interval between checks of the threads.
const CHECKED_EVERY: Duration = Duration::from_millis(10);

/// The maximum number of threads that inspect, besides those that hang.
const MAX_THREADS: usize = 64;

static HAS_LEFT_THREADS: AtomicBool = AtomicBool::new(false);

/// Whether a thread of this process was left behind. The process should then end after its request.
pub(super) fn has_left_threads() -> bool {
    HAS_LEFT_THREADS.load(SeqCst)
}

/// Calls `inspect` for each item, on up to `threads` other threads, and `take` on this thread for each result. Returns the
/// items at which threads hang. While `is_wanted`, it waits until it is certain that they do.
///
/// For each thread that sleeps for long, two others are started, so that many items that hang one after the other take
/// little time. If no thread can be started, this thread inspects.
pub(super) fn inspect_each<I, O>(
    items: Vec<I>,
    threads: usize,
    inspect: impl Fn(&I) -> Option<O> + Send + Sync + 'static,
    mut take: impl FnMut(O),
    is_wanted: impl Fn() -> bool,
) -> Vec<I>
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
    let start = |inspectors: &mut Vec<Inspector>, count: usize| {
        let at_work = inspectors.iter().filter(|inspector| !inspector.is_doubted);
        let room = MAX_THREADS.saturating_sub(at_work.count());
        let started = (0..count.min(room)).map_while(|_| Inspector::start(&work, &reports).ok());
        inspectors.extend(started);
    };
    start(&mut inspectors, threads);
    let mut checked = Instant::now();
    while inspectors
        .iter()
        .any(|inspector| !inspector.is_doubted || is_wanted() && inspector.slept() < HANGS_AFTER)
    {
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
        if checked.elapsed() >= CHECKED_EVERY {
            checked = Instant::now();
            let newly_doubted = inspectors.iter_mut().filter_map(Inspector::check);
            let count = newly_doubted.count();
            start(&mut inspectors, 2 * count);
        }
    }
    let hung = inspectors
        .iter()
        .map(|inspector| work.items[inspector.leave()].clone());
    let hung = hung.collect();
    while let Some((_, item)) = work.next() {
        (work.inspect)(item).into_iter().for_each(&mut take);
    }
    hung
}

/// The items that threads share.
struct Work<I, F> {
    items: Vec<I>,
    next: AtomicUsize,
    inspect: F,
}

impl<I, F> Work<I, F> {
    fn next(&self) -> Option<(usize, &I)> {
        let index = self.next.fetch_add(1, SeqCst);
        Some((index, self.items.get(index)?))
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

/// What a thread tells about itself.
#[derive(Default)]
struct Place {
    tid: AtomicI32,
    /// The index of its item.
    index: AtomicUsize,
    /// Whether it inspects the item; otherwise it waits until its result is taken.
    is_inspecting: AtomicBool,
    is_left: AtomicBool,
}

/// A thread that inspects.
struct Inspector {
    place: Arc<Place>,
    thread: JoinHandle<()>,
    /// The sleep in which it was found, and since when.
    sleep: Option<(u64, Instant)>,
    /// Whether it has slept for long.
    is_doubted: bool,
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
        let place = Arc::new(Place::default());
        let own = Arc::clone(&place);
        let run = move || {
            own.tid.store(gettid().as_raw(), SeqCst);
            while let Some((index, item)) = work.next() {
                own.index.store(index, SeqCst);
                own.is_inspecting.store(true, SeqCst);
                let result = (work.inspect)(item);
                own.is_inspecting.store(false, SeqCst);
                if own.is_left.load(SeqCst) {
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
            place,
            thread,
            sleep: None,
            is_doubted: false,
        })
    }

    /// Checks whether it sleeps. Returns a value if it is doubted from now on.
    fn check(&mut self) -> Option<()> {
        let place = &self.place;
        let is_inspecting = place.is_inspecting.load(SeqCst);
        let now = is_inspecting
            .then(|| sleep_of(place.tid.load(SeqCst)))
            .flatten();
        if self.sleep.map(|(sleep, _)| sleep) != now {
            self.sleep = now.map(|sleep| (sleep, Instant::now()));
        }
        let is_doubted = self.slept() >= DOUBTED_AFTER;
        let was_doubted = std::mem::replace(&mut self.is_doubted, is_doubted);
        (self.is_doubted && !was_doubted).then_some(())
    }

    /// How long it is known to sleep.
    fn slept(&self) -> Duration {
        self.sleep
            .map_or(Duration::ZERO, |(_, since)| since.elapsed())
    }

    /// Leaves the thread behind; returns the index of its item.
    fn leave(&self) -> usize {
        HAS_LEFT_THREADS.store(true, SeqCst);
        self.place.is_left.store(true, SeqCst);
        self.place.index.load(SeqCst)
    }
}

/// If a thread of this process sleeps, the number of the sleep: each one has another number (proc(5),
/// `/proc/pid/status`).
fn sleep_of(tid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let runs = value("State:")?.trim_start().starts_with('R');
    let sleeps = value("voluntary_ctxt_switches:")?;
    (!runs).then(|| sleeps.trim().parse().ok())?
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
            let hung = inspect_each((0..1_000).collect(), threads, half, take, || true);
            assert!(hung.is_empty());
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
            let hung = inspect_each((0..20).collect(), 1, inspect, take, || is_wanted);
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
