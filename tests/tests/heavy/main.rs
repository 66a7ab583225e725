//! What keeps the machine busy, opens thousands of sockets or holds up other daemons, and what must not wait for a daemon that
//! looks at so many sockets: the tests of one module run together, and those of the others wait. Each test begins with `let _turn = turn(module_path!());`.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

mod agreement;
mod cgroup_patterns;
mod control;
mod crashes;
mod crowd;
mod growth;
mod many;
mod owners;
mod reapers;
mod reconcile;
mod reload;
mod session_map;
mod stalls;
mod verdict;

/// Whose turn it is, and how many of its tests run.
static NOW: Mutex<(&str, usize)> = Mutex::new(("", 0));
/// That nobody has a turn.
static OVER: Condvar = Condvar::new();

/// While there is one, tests of other modules wait.
struct Turn;

/// Waits until no test of another module runs. The tests are started in the order of their names, module after module.
fn turn(module: &'static str) -> Turn {
    let is_anothers = |now: &mut (&str, usize)| now.1 > 0 && now.0 != module;
    let now = OVER.wait_while(lock(), is_anothers);
    let mut now = now.unwrap_or_else(PoisonError::into_inner);
    *now = (module, now.1 + 1);
    Turn
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut now = lock();
        now.1 -= 1;
        if now.1 == 0 {
            OVER.notify_all();
        }
    }
}

fn lock() -> MutexGuard<'static, (&'static str, usize)> {
    NOW.lock().unwrap_or_else(PoisonError::into_inner)
}
