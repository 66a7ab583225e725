//! Runs work on other threads while the caller waits.

use std::{panic::resume_unwind, thread};

use super::privilege;

/// Runs `work` on the calling thread and on up to `others` more at the same time, and returns their results.
/// If no thread can be started, the calling thread runs it alone.
pub fn run_parallel<T: Send>(name: &str, others: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let spawn = |_| {
            let builder = thread::Builder::new().name(name.to_owned());
            builder.spawn_scoped(scope, &work).ok()
        };
        let others: Vec<_> = (0..others).filter_map(spawn).collect();
        let mut made = vec![work()];
        for other in others {
            made.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        made
    })
}

/// Runs `work`, and the threads that it starts, with the priority of an ordinary process. The calling thread keeps its
/// own, which it could not raise again. If no thread can be started, the calling thread runs it with its own priority.
pub fn run_aside<T: Send>(work: impl Fn() -> T + Sync) -> T {
    let aside = || {
        privilege::give_way();
        work()
    };
    thread::scope(
        |scope| match thread::Builder::new().spawn_scoped(scope, aside) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(_no_thread) => work(),
        },
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn each_thread_does_a_part_and_nothing_is_done_twice() {
        let next = AtomicUsize::new(0);
        let take_some = || {
            let mut taken = Vec::new();
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    number if number < 1_000 => taken.push(number),
                    _ => return taken,
                }
            }
        };
        let made = run_parallel("test", 3, take_some);
        assert_eq!(made.len(), 4);
        let mut all = made.concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1_000));
    }

    #[test]
    fn a_panic_of_another_thread_is_not_lost() {
        let first = AtomicUsize::new(0);
        let panicked = std::panic::catch_unwind(|| {
            run_parallel("test", 1, || {
                assert_ne!(first.fetch_add(1, Ordering::Relaxed), 1);
            })
        });
        assert!(panicked.is_err());
    }
}
