//! What the daemon reads of the session map while the kernel changes it.

use std::{
    collections::HashSet,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use session_enforcer::{
    bpf::{Kernel, Options},
    cgroup::Cgroup,
};
use session_enforcer_common::{MatchEntry, Policy};
use session_enforcer_tests::{Lab, Pair, reset_on_close};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Connections that stay, and how long others come and go beside them.
const CONNECTIONS: usize = 50;
const TIME: Duration = Duration::from_secs(2);

#[test]
fn a_session_is_listed_once_however_the_others_come_and_go() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let options = Options {
        max_sessions: 1024,
        only_netns: None,
        verbose: false,
    };
    let mut kernel = Kernel::load(options, None)?;
    kernel.put_policy(1, &[MatchEntry::any(0)], &[Policy::default()])?;
    kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
    let open = || Pair::open(&lab.outside, &listener);
    let _pairs: Vec<Pair> = (0..CONNECTIONS).map(|_| open()).collect::<Result<_>>()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                reset_on_close(&open()?.client)?;
            }
            Ok(())
        });
        let start = Instant::now();
        let mut twice = 0;
        while start.elapsed() < TIME && !churn.is_finished() {
            let cookies = kernel.cookies()?;
            let different: HashSet<&u64> = cookies.iter().collect();
            twice += cookies.len() - different.len();
        }
        done.store(true, Ordering::Relaxed);
        churn.join().expect("churn")?;
        assert_eq!(twice, 0);
        Ok(())
    })
}
