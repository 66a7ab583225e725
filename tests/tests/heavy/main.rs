//! Tests that load the machine, open thousands of sockets or disturb other daemons, and tests that
//! such load would disturb. The tests of one module run in parallel, and other modules wait. Each
//! test begins with `let _turn = turn(module_path!());`.

use std::{
    process::Child,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use session_enforcer::datapath::{Datapath, Options};
use session_enforcer_tests::{Lab, Listener, Pair, reset_on_close};

mod agreement;
mod cgroup_patterns;
mod control;
mod crashes;
mod crowd;
mod gate_and_expiry;
mod growth;
mod hanging_process;
mod many;
mod owners;
mod reapers;
mod reconcile;
mod reload;
mod session_map;
mod stalls;

/// The module that runs, and the number of its running tests.
static NOW: Mutex<(&str, usize)> = Mutex::new(("", 0));
/// Signals that no test runs.
static OVER: Condvar = Condvar::new();

/// While a test holds this, tests of other modules wait.
struct Turn;

/// Waits until no test of another module runs. Tests are started in the order of their names,
/// module by module.
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

/// A process that is killed when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens and closes so many connections that their events overflow the ring buffer of a stopped daemon.
fn overflow_events(lab: &Lab, listener: &Listener) -> anyhow::Result<()> {
    for _ in 0..14_000 {
        let pair = Pair::open(&lab.outside, listener)?;
        reset_on_close(&pair.client)?;
    }
    Ok(())
}

/// Loads the programs without a daemon; they note the owners of sockets.
fn load(max_sessions: u32) -> anyhow::Result<Datapath> {
    let options = Options {
        max_sessions,
        only_netns: None,
        notes_owners: true,
        verbose: false,
    };
    Ok(Datapath::load(options, None)?)
}
